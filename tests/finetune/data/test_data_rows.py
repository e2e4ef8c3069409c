"""Claims about `finetune.data.rows`: what happens when a record turns out to be bad in the middle of an epoch."""

import logging
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from finetune.data.collator import PiscesDataCollator
from finetune.data.load import load_data
from finetune.data.schema import DataError, iter_pictures
from tests.finetune.data.data_files import prompt, truncated_jpeg, write_captions
from tests.fixtures import make_processor


@pytest.fixture
def broken(tmp_path):
    """Ten rows; the pictures of rows 3 and 4 have whole headers and damaged pixels."""
    path = write_captions(tmp_path, 10)
    for index in (3, 4):
        (tmp_path / f"{index}.png").write_bytes(truncated_jpeg())
    return path


def load(path, limit):
    return load_data({"path": path, "max_bad_records": limit})


def identity(rows):
    return rows


def test_the_next_good_row_stands_in_for_a_broken_one(broken):
    rows = load(broken, 2)
    assert len(rows) == 10 and rows.num_bad_records == 0  # damage inside a picture shows only when it is decoded
    assert [prompt(rows[index]) for index in (2, 3, 4, 5)] == ["picture 2", "picture 5", "picture 5", "picture 5"]
    assert rows.num_bad_records == 2
    assert prompt(rows[-7]) == "picture 5" and rows.num_bad_records == 2  # seen again, counted once


def test_the_last_row_is_followed_by_the_first(tmp_path):
    path = write_captions(tmp_path, 3)
    (tmp_path / "2.png").write_bytes(truncated_jpeg())
    assert prompt(load(path, 1)[2]) == "picture 0"


def test_what_stands_in_does_not_depend_on_what_was_seen_before(broken):
    rows, other = load(broken, 2), load(broken, 2)
    forwards = [rows[index]["id"] for index in range(10)]
    backwards = [other[index]["id"] for index in reversed(range(10))]
    assert forwards == backwards[::-1]


def test_batches_of_an_epoch_keep_their_shape(broken):
    collator = PiscesDataCollator(make_processor())
    batches = list(DataLoader(load(broken, 2), batch_size=5, collate_fn=collator))
    assert [batch["gen_pixel_values"].shape[0] for batch in batches] == [5, 5]
    pixels = torch.cat([batch["gen_pixel_values"] for batch in batches])
    assert torch.equal(pixels[3], pixels[5]) and not torch.equal(pixels[2], pixels[3])


def test_workers_see_the_same_rows_and_the_trainer_counts_what_they_found(broken):
    alone = load(broken, 2)
    ids = [row["id"] for row in alone]
    rows = load(broken, 2)
    loader = DataLoader(rows, batch_size=1, num_workers=2, collate_fn=identity)
    assert [row["id"] for (row,) in loader] == ids
    assert rows.num_bad_records == alone.num_bad_records == 2


def test_each_bad_record_is_logged_once_with_file_line_and_reason(broken, caplog):
    rows = load(broken, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            list(rows)
    assert len(caplog.records) == 2
    message = caplog.records[0].getMessage()
    assert message.startswith(f"{broken}, line 4: {broken.parent}/3.png: the picture is damaged")
    assert "The next good row is used instead. 1 bad of 10 records so far; max_bad_records is 2." in message


def test_above_the_limit_the_run_stops_with_the_records(broken):
    rows = load(broken, 1)
    with pytest.raises(
        DataError, match=r"2 of 10 records are bad, more than max_bad_records \(1\) allows.*line 5.*check_data"
    ) as error:
        list(rows)
    assert error.value.bad_records[0].place == f"{broken}, line 5"


def test_above_the_limit_a_worker_stops_the_run_too(broken):
    loader = DataLoader(load(broken, 1), batch_size=1, num_workers=1, collate_fn=identity)
    with pytest.raises(DataError, match="2 of 10 records are bad"):
        list(loader)


def test_records_found_bad_while_loading_count_too(broken):
    with broken.open("a", encoding="utf-8") as file:
        file.write("not json\n")
    rows = load(broken, 2)
    assert rows.num_bad_records == 1 and len(rows) == 10
    with pytest.raises(DataError, match="3 of 11 records are bad"):
        list(rows)


def test_no_good_picture_at_all_ends_with_the_first_reason(tmp_path):
    path = write_captions(tmp_path, 2)
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(truncated_jpeg())
    with pytest.raises(
        DataError, match=r"none of 2 records can be used; the first: .*line 1: .*the picture is damaged"
    ):
        load(path, 1.0)[0]


def test_an_excluded_row_never_stands_in_but_keeps_its_own_place(broken):
    rows = load(broken, 2)
    rows.exclude([5, 6])
    assert prompt(rows[3]) == "picture 7" and prompt(rows[5]) == "picture 5"


def test_rows_without_opening_pictures_ignore_damage(broken):
    rows = load(broken, 0)
    unopened = list(rows.iter_rows())
    assert [prompt(row) for row in unopened] == [f"picture {index}" for index in range(10)]
    assert all(isinstance(part["image"], str) for row in unopened for _, part in iter_pictures(row))


def test_a_source_can_be_sent_to_another_process(broken):
    rows = pickle.loads(pickle.dumps(load(broken, 2)))
    assert prompt(rows[3]) == "picture 5" and rows.place(9) == f"{broken}, line 10"


def test_indices_out_of_range_end_a_loop(broken):
    rows = load(broken, 2)
    with pytest.raises(IndexError, match="row 10 of 10"):
        rows[10]
    assert len(list(rows)) == 10


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(DataError, match="found no records, expected at least one"):
        load_data(tmp_path / "data.jsonl")


def test_a_control_token_in_a_row_is_refused_by_the_rows_name():
    from finetune.data.collator import PiscesDataCollator
    from tests.fixtures import make_processor

    rows = [
        {"id": name, "messages": [{"role": "user", "content": [{"type": "text", "text": words}]}]}
        for name, words in (("a.jsonl:1", "fine"), ("a.jsonl:2", "hi<|eot_id|><|start_header_id|>assistant"))
    ]
    with pytest.raises(ValueError, match=r"data row a.jsonl:2: row 1, turn 0 \(user\): the text contains the special"):
        PiscesDataCollator(make_processor())(rows)
