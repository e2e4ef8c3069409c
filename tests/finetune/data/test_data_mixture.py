"""Claims about `finetune.data.mixture`: shares, order and resuming of several sources."""

from collections import Counter
from itertools import islice

import pytest

from finetune.data.load import load_data
from finetune.data.mixture import MixedRows, mix_rows
from finetune.data.schema import DataError
from finetune.data.streams import StreamedRows
from tests.finetune.data.data_files import prompt, truncated_jpeg, write_captions, write_shards


@pytest.fixture
def two(tmp_path):
    """Sources of 30 and of 6 rows."""
    return [
        {"path": write_captions(tmp_path / name, size), "name": name} for name, size in (("big", 30), ("small", 6))
    ]


def weighted(specs, *weights):
    return [{**spec, "weight": weight} for spec, weight in zip(specs, weights, strict=True)]


def sources_of(mixture):
    return [mixture.locate(index)[0] for index in range(len(mixture))]


def test_without_weights_each_row_comes_once(two):
    mixture = load_data(two)
    assert isinstance(mixture, MixedRows) and len(mixture) == 36
    assert Counter(map(mixture.locate, range(36))) == Counter([(0, i) for i in range(30)] + [(1, i) for i in range(6)])


def test_weights_are_shares_and_an_epoch_has_every_row_at_least_once(two):
    mixture = load_data(weighted(two, 1, 1))
    assert len(mixture) == 60 and Counter(sources_of(mixture)) == {0: 30, 1: 30}
    counts = Counter(map(mixture.locate, range(60)))
    assert {counts[0, i] for i in range(30)} == {1} and {counts[1, i] for i in range(6)} == {5}
    assert mixture.shares() == {
        "big": {"num_records": 30, "rows_per_epoch": 30, "share": 0.5},
        "small": {"num_records": 6, "rows_per_epoch": 30, "share": 0.5},
    }


@pytest.mark.parametrize("weights", [(3, 1), (1, 7), (0.9, 0.1), (5, 1)])
def test_every_stretch_has_nearly_the_shares_of_the_whole(two, weights):
    mixture = load_data(weighted(two, *weights))
    chosen = sources_of(mixture)
    share = weights[1] / sum(weights)
    assert abs(chosen.count(1) / len(chosen) - share) < 0.02
    for start in range(0, len(chosen) - 20, 7):
        assert abs(sum(chosen[start : start + 20]) - 20 * share) <= 1.5


def test_a_row_depends_on_seed_and_index_alone(two):
    first, second, other = load_data(two, 1), load_data(two, 1), load_data(two, 2)
    assert [first.row(i)["id"] for i in (35, 0, 17)] == [second.row(i)["id"] for i in (35, 0, 17)]
    assert list(map(first.locate, range(36))) != list(map(other.locate, range(36)))
    assert prompt(first[5]) == prompt(first.row(5)) and first[-1]["id"] == first[35]["id"]
    with pytest.raises(IndexError):
        first[36]


def test_rounds_of_a_small_source_have_different_orders(two):
    mixture = load_data(weighted(two, 1, 1))
    order = [inner for source, inner in map(mixture.locate, range(60)) if source == 1]
    rounds = [tuple(order[start : start + 6]) for start in range(0, 30, 6)]
    assert all(sorted(each) == list(range(6)) for each in rounds) and len(set(rounds)) > 1


def test_a_broken_row_is_replaced_from_its_own_source(two):
    (two[1]["path"].parent / "2.png").write_bytes(truncated_jpeg())
    mixture = load_data(two)
    index = next(i for i in range(36) if mixture.locate(i) == (1, 2))
    assert prompt(mixture[index]) == "picture 3" and mixture.num_bad_records == 1
    mixture.exclude([next(i for i in range(36) if mixture.locate(i) == (1, 3))])
    assert prompt(mixture[index]) == "picture 4"


def test_sources_of_one_name_are_told_apart(two):
    path = two[0]["path"]
    assert list(load_data([path, path]).shares()) == [f"{path} (0)", f"{path} (1)"]


def test_weights_are_given_to_all_sources_or_to_none(two, tmp_path):
    with pytest.raises(DataError, match=r"weight is missing for small. Give every source a weight, or none"):
        load_data([{**two[0], "weight": 1}, two[1]])
    with pytest.raises(DataError, match="a stream among several sources has no known size"):
        load_data([two[0], write_shards(tmp_path / "shards", 1, 2)])
    with pytest.raises(DataError, match="1 weights for 2 sources"):
        mix_rows([load_data(two[0]), load_data(two[1])], [1.0])


# ---- with streams


@pytest.fixture
def streamed(two, tmp_path):
    shards = {"path": write_shards(tmp_path / "shards", 2, 5), "name": "shards", "shuffle_buffer": 2}
    return weighted([two[1], shards], 1, 3)


def take(stream, count):
    return [prompt(row) for row in islice(iter(stream), count)]


def test_a_stream_makes_the_mixture_a_stream_with_exact_shares(streamed):
    mixture = load_data(streamed)
    rows = take(mixture, 80)
    assert not isinstance(mixture, StreamedRows | MixedRows)
    assert sum(row.startswith("picture") for row in rows) == 20
    assert Counter(row for row in rows if row.startswith("picture")).most_common()[-1][1] == 3  # 20 of 6 rows
    assert mixture.shares() == {"small": {"share": 0.25}, "shards": {"share": 0.75}}


@pytest.mark.parametrize("stop", [1, 7, 30])
def test_a_mixed_stream_goes_on_at_the_same_row(streamed, stop):
    whole = take(load_data(streamed, 5), 60)
    stream = load_data(streamed, 5)
    take(stream, stop)
    resumed = load_data(streamed, 5)
    resumed.load_state_dict(stream.state_dict())
    assert take(resumed, 60 - stop) == whole[stop:]


def test_readers_of_a_mixed_stream_get_different_rows(streamed):
    parts = [take(load_data(streamed).shard(2, index), 20) for index in range(2)]
    assert parts[0] != parts[1]
    assert all(sum(row.startswith("picture") for row in part) == 5 for part in parts)


def test_damage_in_a_source_by_index_is_left_out_of_a_mixed_stream(streamed):
    (streamed[0]["path"].parent / "2.png").write_bytes(truncated_jpeg())
    assert "picture 2" not in take(load_data(streamed), 80)
