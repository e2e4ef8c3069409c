"""Claims about `finetune.data.streams`: order, readers, resuming, and bad records of streams."""

from collections import Counter
from itertools import islice

import datasets
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from finetune.data.load import load_data
from finetune.data.schema import DataError
from tests.finetune.data.data_files import picture, prompt, truncated_jpeg, write_shards, write_tar


def take(stream, count):
    return [prompt(row) for row in islice(iter(stream), count)]


def load(path, **keys):
    seed = keys.pop("seed", 0)
    return load_data({"path": str(path), **keys}, seed)


def identity(rows):
    return rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of four rows."""
    return write_shards(tmp_path_factory.mktemp("shards"), 3, 4)


def test_each_pass_has_every_row_once_in_an_order_of_its_own(shards):
    rows = take(load(shards), 36)
    passes = [rows[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(each) == sorted(passes[0]) and len(set(each)) == 12 for each in passes)
    assert passes[0] != passes[1] != passes[2]


def test_the_order_follows_from_the_seed(shards):
    assert take(load(shards, seed=3), 30) == take(load(shards, seed=3), 30)
    assert take(load(shards, seed=3), 30) != take(load(shards, seed=4), 30)


def test_a_buffer_of_one_keeps_the_order_inside_shards(shards):
    rows = take(load(shards, shuffle_buffer=1), 12)
    for start in (0, 4, 8):
        assert [row[-1] for row in rows[start : start + 4]] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("stop", [0, 1, 5, 12, 17])
def test_a_stream_goes_on_at_the_same_row(shards, stop):
    whole = take(load(shards, shuffle_buffer=3), 40)
    stream = load(shards, shuffle_buffer=3)
    take(stream, stop)
    resumed = load(shards, shuffle_buffer=3)
    resumed.load_state_dict(stream.state_dict())
    assert take(resumed, 40 - stop) == whole[stop:]
    assert take(resumed, 5) == whole[stop : stop + 5]  # a second iteration begins at the loaded state again


def test_records_of_two_rows_are_resumed_between_their_rows(shards):
    stream, resumed = load(shards, side="both"), load(shards, side="both")
    ids = [row["id"] for row in islice(iter(stream), 10)]
    stop = next(i for i in range(10) if ids[i].endswith("understanding"))
    list(islice(iter(stream), stop + 1))
    resumed.load_state_dict(stream.state_dict())
    assert [row["id"] for row in islice(iter(resumed), 9 - stop)] == ids[stop + 1 :]


@pytest.mark.parametrize("num_readers", [2, 3, 5])
def test_readers_share_the_work_and_none_runs_dry(shards, num_readers):
    stream = load(shards)
    rows = [take(stream.shard(num_readers, index), 12 * 4) for index in range(num_readers)]
    counts = Counter(row for part in rows for row in part)
    assert len(counts) == 12
    # each reader takes whole visits; over many of them every row comes equally often
    assert max(counts.values()) - min(counts.values()) <= num_readers


def test_ranks_and_workers_split_like_one_row_of_readers(shards):
    stream = load(shards)
    visits = [take(stream.shard(6, index), 4) for index in range(6)]
    assert take(stream.shard(2, 1).shard(3, 2), 4) == visits[1 + 2 * 2]
    assert Counter(row for part in visits for row in part) == Counter(take(stream, 24))
    with pytest.raises(ValueError, match="shard 3 of 3: expected 0 to 2"):
        stream.shard(3, 3)


def test_dataloader_workers_read_different_shards(shards):
    loader = DataLoader(load(shards), batch_size=4, num_workers=3, collate_fn=identity)
    rows = [prompt(row) for batch in islice(loader, 3) for row in batch]
    assert len(set(rows)) == 12


def test_accelerate_gives_each_rank_its_part_of_each_batch(shards):
    def rank(index):
        loader = DataLoader(load(shards), batch_size=3, collate_fn=identity)
        prepared = prepare_data_loader(loader, num_processes=2, process_index=index, dispatch_batches=False)
        return [prompt(row) for batch in islice(prepared, 2) for row in batch]

    assert sorted(rank(0) + rank(1)) == sorted(take(load(shards), 12))


# ---- bad records


def test_bad_records_are_left_out_and_counted_once(tmp_path, caplog):
    files = {"0.png": truncated_jpeg(), "0.txt": "broken", "1.png": picture(), "1.txt": "good"}
    stream = load(write_tar(tmp_path / "a.tar", files))
    assert take(stream, 5) == ["good"] * 5
    assert list(stream.bad_records) == [f"{tmp_path}/a.tar, 0"]
    assert len(caplog.records) == 1 and "Left out; 1 bad of" in caplog.text


def test_too_many_bad_records_stop_a_stream(tmp_path):
    files = {f"{n}.txt": "no picture" for n in range(30)} | {"x.png": picture(), "x.txt": "good"}
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=r"2 of \d+ records are bad, more than max_bad_records \(1\)"):
        take(load(path, max_bad_records=1), 3)
    with pytest.raises(DataError, match=r"21 of \d+ records are bad, more than max_bad_records \(0.02\)"):  # of 1,000
        take(load(path), 3)
    assert take(load(path, max_bad_records=30), 3) == ["good"] * 3


def test_a_stream_without_a_usable_record_ends_instead_of_searching_for_ever(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.txt": "no picture"})
    write_tar(tmp_path / "b.tar", {})
    for reader in (load(tmp_path), load(tmp_path).shard(4, 1)):
        with pytest.raises(
            DataError, match=r"none of its records can be used. The first: .*a.tar, 0: found fields caption"
        ):
            take(reader, 1)
    with pytest.raises(DataError, match="The shards are empty"):
        take(load(tmp_path / "b.tar"), 1)


# ---- tables


def test_parquet_streams_file_by_file(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for part in range(2):
        rows = {"image": [{"bytes": picture(), "path": None}] * 3, "caption": [f"{part}-{row}" for row in range(3)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"part-{part}.parquet")
    stream = load(str(tmp_path / "part-*.parquet"), streaming=True)
    assert len(stream.shards) == 2
    assert sorted(take(stream, 6)) == [f"{part}-{row}" for part in range(2) for row in range(3)]
    assert [place.split(", ", 1)[1] for place, _ in stream.iter_checked()][:2] == ["part 0, row 0", "part 0, row 1"]
    resumed = load(str(tmp_path / "part-*.parquet"), streaming=True)
    take(stream, 4)
    resumed.load_state_dict(stream.state_dict())
    assert take(resumed, 8) == take(stream, 12)[4:]
