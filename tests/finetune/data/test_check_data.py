"""Claims about `python -m finetune.check_data`: what it prints, what it writes, and its exit codes."""

import json

import pytest
from PIL import Image

from finetune.check_data import main
from finetune.data.collator import PiscesDataCollator
from finetune.data.load import load_data
from tests.finetune.data.data_files import (
    picture,
    truncated_jpeg,
    write_captions,
    write_jsonl,
    write_pictures,
    write_shards,
)
from tests.fixtures import make_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def mixed(tmp_path):
    """One row of each side, with pictures of different sizes."""
    write_pictures(tmp_path, "a.png")
    (tmp_path / "wide.png").write_bytes(picture(size=(40, 10)))
    ask = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    say = {"role": "assistant", "content": "a box"}
    draw = {"role": "assistant", "content": [{"type": "image", "image": "wide.png"}]}
    rows = [
        {"id": "see", "messages": [{"role": "user", "content": ask}, say, {"role": "user", "content": "sure?"}, say]},
        {"id": "draw", "messages": [{"role": "user", "content": "a box"}, draw]},
        {"id": "edit", "messages": [{"role": "user", "content": ask}, draw]},
        {"id": "talk", "messages": [{"role": "user", "content": "hello"}, say]},
    ]
    return str(write_jsonl(tmp_path / "rows.jsonl", rows))


def run(capsys, *words):
    code = main(["--data", *map(str, words)])
    return code, *capsys.readouterr()


def test_counts_sides_turns_pictures_and_sizes(mixed, capsys):
    code, output, errors = run(capsys, mixed, "--json")
    (source,) = json.loads(output)["sources"]
    assert code == 0 and errors == ""
    assert source["sides"] == {"understanding": 1, "generation": 1, "both": 1, "text": 1}
    assert (source["num_pictures_shown"], source["num_pictures_drawn"], source["max_pictures_in_a_row"]) == (2, 2, 2)
    assert source["turns"]["p0"] == 2 and source["turns"]["p100"] == 4
    assert source["widths"]["p0"] == 8 and source["widths"]["p100"] == 40 and source["heights"]["p100"] == 10
    assert "tokens" not in source and source["num_rows"] == 4


def test_token_lengths_are_those_of_the_collator(mixed, checkpoint, capsys):
    _, output, _ = run(capsys, mixed, "--checkpoint", checkpoint, "--json", "--max_length", "60")
    (source,) = json.loads(output)["sources"]
    collator = PiscesDataCollator(make_processor())
    rows = load_data(mixed)
    lengths = {row["id"]: collator([row])["input_ids"].shape[1] for row in rows}
    assert {entry["id"]: entry["tokens"] for entry in source["too_long"]} == {
        k: n for k, n in lengths.items() if n > 60
    }
    assert 0 < len(source["too_long"]) < 4
    assert source["tokens"]["p0"] == min(lengths.values()) and source["tokens"]["p100"] == max(lengths.values())


def test_a_row_that_spells_a_control_token_is_one_bad_record(tmp_path, checkpoint, capsys):
    write_pictures(tmp_path, "a.png")
    good, evil = {"image": "a.png", "caption": "a box"}, {"image": "a.png", "caption": "a<|eot_id|>box"}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, evil, good])
    code, output, _ = run(capsys, path, "--checkpoint", checkpoint, "--json")
    (source,) = json.loads(output)["sources"]
    assert code == 1 and source["num_rows"] == 2
    (bad,) = source["bad_records"]
    assert "line 2" in str(bad) and "the text contains the special token <|eot_id|>" in str(bad)
    assert "sanitize" not in str(bad)


def test_the_text_report_names_rows_that_are_too_long(mixed, checkpoint, capsys):
    code, output, _ = run(capsys, mixed, "--checkpoint", checkpoint, "--max_length", "60")
    assert code == 0  # rows that are too long are left out of training, and are no damage
    assert "rows      4, and 0 bad records" in output
    assert "sides     understanding 1, generation 1, both 1, text 1" in output
    assert "of more than 60 tokens:\n    see: " in output


def test_all_rows_too_long_is_an_error(mixed, checkpoint, capsys):
    code, _, errors = run(capsys, mixed, "--checkpoint", checkpoint, "--max_length", "5")
    assert code == 1
    assert errors.count("\n") == 1
    assert f"{mixed}: all 4 rows have more than 5 tokens (the shortest " in errors and "Raise --max_length" in errors


def test_every_bad_record_is_listed_whatever_the_limit(tmp_path, capsys):
    path = write_captions(tmp_path, 6)
    (tmp_path / "1.png").write_bytes(truncated_jpeg())
    (tmp_path / "2.png").unlink()
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    code, output, errors = run(capsys, path)
    assert code == 1 and errors == "check_data: 3 bad records\n"
    assert "rows      4, and 3 bad records" in output
    assert f"    {path}, line 2: {tmp_path}/1.png: the picture is damaged" in output
    assert f"    {path}, line 3: picture 0: no file '2.png'" in output
    assert f"    {path}, line 7: not JSON" in output


def test_a_source_without_any_usable_record_is_reported_too(tmp_path, capsys):
    path = write_jsonl(tmp_path / "data.jsonl", [{"picture": "a", "words": "b"}] * 3)
    code, output, errors = run(capsys, path, "--json")
    (source,) = json.loads(output)["sources"]
    assert code == 1 and errors == "check_data: 3 bad records\n"
    assert source["num_rows"] == 0 and [record["place"][-6:] for record in source["bad_records"]] == [
        "line 1",
        "line 2",
        "line 3",
    ]


def test_streams_are_read_once_and_limits_hold(tmp_path, capsys):
    pattern = write_shards(tmp_path, 2, 3)
    _, output, _ = run(capsys, pattern, "--json")
    assert json.loads(output)["sources"][0]["num_rows"] == 6
    _, output, _ = run(capsys, pattern, "--json", "--limit", "4")
    assert json.loads(output)["sources"][0]["num_rows"] == 4


def test_the_sheet_shows_pictures_of_each_source_and_side(mixed, tmp_path, capsys):
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    run(capsys, mixed, "--sheet", small)
    run(capsys, mixed, write_captions(tmp_path / "more", 20), "--sheet", large)
    assert Image.open(small).height < Image.open(large).height
    colors = {color for _, color in Image.open(small).getcolors(maxcolors=2**24)}
    assert {(0, 90, 160), (255, 0, 0)} <= colors  # the picture that is shown, and the one that is drawn


def test_a_sheet_of_no_pictures_is_refused(tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}])
    code, _, errors = run(capsys, path, "--sheet", tmp_path / "sheet.png")
    assert code == 2 and "--sheet" in errors and "no pictures" in errors


def test_several_sources_show_their_shares(mixed, tmp_path, capsys):
    more = write_captions(tmp_path / "more", 8)
    specs = [f"{{path: {mixed}, weight: 1, name: mixed}}", f"{{path: {more}, weight: 3}}"]
    _, output, _ = run(capsys, *specs)
    assert f"mixture\n   25.0%  mixed, 4 rows per epoch\n   75.0%  {more}, 12 rows per epoch" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["{path: a, formt: x}"], "unknown key 'formt'; did you mean format?"),
        (["MIXED", "--max_length", "5"], "--max_length needs --checkpoint"),
        (["MIXED", "--limit", "0"], "--limit 0: expected at least 1"),
        (["MIXED", "--checkpoint", "nowhere"], "--checkpoint nowhere: no processor"),
    ],
)
def test_what_cannot_be_checked_ends_in_one_line(mixed, capsys, words, message):
    code, output, errors = run(capsys, *[word.replace("MIXED", mixed) for word in words])
    assert code == 2 and output == ""
    assert errors.startswith("check_data: error: ") and message in errors and errors.count("\n") == 1


def test_wrong_arguments_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--dta", "x"])
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith("check_data: error: ") and errors.count("\n") == 1
