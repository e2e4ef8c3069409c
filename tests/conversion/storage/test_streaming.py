"""Indexing, planning and writing safetensors as byte ranges, and the folder that appears whole or not at all."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.storage import write as streaming
from conversion.storage.output_folder import new_folder
from conversion.storage.tensors import PlannedTensor, index_tensors
from conversion.storage.write import parse_size, write_shards


@pytest.fixture
def tensors():
    return {
        "b.weight": torch.randn(5, 3),
        "a.weight": torch.randn(4, 2).bfloat16(),
        "steps": torch.arange(3),
        "scale": torch.tensor(2.5),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    path = tmp_path / "part"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def write(plan, path, **options):
    path.mkdir()
    return write_shards(plan, path, progress=False, **options)


def plan_of(folder):
    return [PlannedTensor(name, source) for name, source in index_tensors(folder).items()]


def test_index_gives_the_bytes_of_every_tensor(folder, tensors):
    index = index_tensors(folder)
    assert list(index) == sorted(tensors)
    for name, tensor in tensors.items():
        assert index[name].shape == tuple(tensor.shape)
        assert index[name].load().dtype == tensor.dtype
        assert torch.equal(index[name].load(), tensor)


def test_rows_and_reshaped_name_parts_of_a_tensor_without_reading_it(folder, tensors):
    source = index_tensors(folder)["b.weight"]
    assert torch.equal(source.rows(1, 4).load(), tensors["b.weight"][1:4])
    assert torch.equal(source.rows(1, 3).reshaped(3, 2).load(), tensors["b.weight"][1:3].reshape(3, 2))
    with pytest.raises(ValueError, match=r"b.weight: rows 4 to 6 of a tensor of shape \(5, 3\) do not exist"):
        source.rows(4, 6)
    with pytest.raises(ValueError, match=r"shape \(5, 3\) cannot become \(4, 4\)"):
        source.reshaped(4, 4)


def test_a_copy_is_bit_identical_and_its_records_hold_the_hashes(folder, tensors, tmp_path):
    records = write(plan_of(folder), tmp_path / "copy")
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == tensors.keys()
    for record in records:
        tensor = tensors[record["name"]]
        assert torch.equal(copied[record["name"]], tensor) and copied[record["name"]].dtype == tensor.dtype
        stored = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert record["sha256"] == hashlib.sha256(stored).hexdigest()
        assert record["shape"] == list(tensor.shape) and record["source"] == record["name"]


def test_a_copy_of_what_the_library_wrote_has_the_library_s_bytes_after_its_header(folder, tmp_path):
    write(plan_of(folder), tmp_path / "copy")
    sizes = []
    data = []
    for path in (folder / "model.safetensors", tmp_path / "copy" / "model.safetensors"):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        sizes.append(size)
        data.append(content[8 + size :])
    assert data[0] == data[1]
    assert sizes[1] % 8 == 0


def test_tensors_larger_than_a_buffer_are_copied_and_converted_in_pieces(folder, tensors, tmp_path, monkeypatch):
    for name, value in {"CHUNK_BYTES": 16, "NUM_BUFFERS": 2, "SYNC_BYTES": 16}.items():
        monkeypatch.setattr(streaming, name, value)  # b.weight is 60 bytes: four pieces
    plan = [PlannedTensor("same", index_tensors(folder)["b.weight"])]
    plan += [PlannedTensor("half", index_tensors(folder)["b.weight"], dtype="BF16")]
    records = write(plan, tmp_path / "copy")
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert torch.equal(copied["same"], tensors["b.weight"])
    assert torch.equal(copied["half"], tensors["b.weight"].bfloat16())
    for record in records:  # a buffer that is filled again too early would spoil the hash and nothing else
        stored = copied[record["name"]].view(torch.uint8).numpy().tobytes()
        assert record["sha256"] == hashlib.sha256(stored).hexdigest()


def test_a_disk_that_fails_behind_the_writing_is_not_passed_over(folder, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(streaming, "SYNC_BYTES", 16)
    monkeypatch.setattr(streaming.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(plan_of(folder), tmp_path / "copy")


def test_shards_keep_the_limit_and_the_index_names_them(tmp_path):
    weights = {f"layer.{number}": torch.full((10,), float(number)) for number in range(5)}  # 40 bytes each
    write(
        [PlannedTensor(name, tensor=tensor) for name, tensor in weights.items()], tmp_path / "out", max_shard_size=90
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    read = {name: source.load() for name, source in index_tensors(tmp_path / "out").items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


def test_the_same_plan_gives_the_same_bytes(folder, tmp_path):
    for name in ("one", "two"):
        write(plan_of(folder), tmp_path / name, max_shard_size=50)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 4
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_new_rows_follow_the_source_s_own_in_the_source_s_dtype(folder, tensors, tmp_path):
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    plan = [PlannedTensor("grown", index_tensors(folder)["a.weight"].rows(0, 3), rows)]
    records = write(plan, tmp_path / "out")
    grown = load_file(tmp_path / "out" / "model.safetensors")["grown"]
    assert torch.equal(grown, torch.cat([tensors["a.weight"][:3], rows.bfloat16()]))
    assert records[0]["shape"] == [5, 2]


def test_a_value_that_the_new_dtype_cannot_hold_stops_with_its_name(tmp_path):
    plan = [PlannedTensor("big", tensor=torch.tensor([1.0, 1e6]), dtype="F16")]
    with pytest.raises(ValueError, match="big: has values that F16 cannot hold"):
        write(plan, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "x: neither a source nor a tensor is planned"),
        ({"tensor": torch.zeros(2, dtype=torch.complex64)}, "x: dtype torch.complex64 is not one of F64"),
        ({"tensor": torch.zeros(2), "dtype": "F99"}, "x: dtype F99 is not one of F64"),
    ],
)
def test_an_impossible_plan_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlannedTensor("x", **arguments)


def test_new_rows_of_another_width_are_refused(folder):
    with pytest.raises(ValueError, match=r"x: new rows of shape \(1, 9\) do not continue \(5, 3\)"):
        PlannedTensor("x", index_tensors(folder)["b.weight"], torch.zeros(1, 9))


def test_a_name_planned_twice_or_an_empty_plan_is_refused(tmp_path):
    twice = [PlannedTensor("x", tensor=torch.zeros(1))] * 2
    with pytest.raises(ValueError, match="x is planned twice"):
        write(twice, tmp_path / "out")
    with pytest.raises(ValueError, match="no tensors are planned"):
        write([], tmp_path / "empty")


@pytest.mark.parametrize(("size", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (7, 7), ("64", 64)])
def test_sizes_are_decimal(size, num_bytes):
    assert parse_size(size) == num_bytes


@pytest.mark.parametrize("size", ["five", "0", "-1GB", "infGB", "nanKB"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="expected"):
        parse_size(size)


def test_a_truncated_file_is_refused_with_its_name(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model.safetensors: \d+ bytes, expected \d+; the file is cut off"):
        index_tensors(folder)


def test_a_file_that_shrinks_during_the_run_is_named(folder, tmp_path):
    plan = plan_of(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: ended inside a.weight. Did it change during the run"):
        write(plan, tmp_path / "copy")


def shard_folder(tmp_path, weight_map):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors: not found"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}, "c is listed in one.*found in no"),
        ({"a": "one.safetensors", "x": "two.safetensors"}, "b is listed in no shard, found in two.safetensors"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, weight_map, message):
    with pytest.raises(ValueError, match=message):
        index_tensors(shard_folder(tmp_path, weight_map))


def test_a_name_in_two_shards_is_refused(tmp_path):
    folder = shard_folder(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"two.safetensors: a is also in one.safetensors"):
        index_tensors(folder)


def test_a_shape_that_does_not_fill_its_bytes_is_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"x is F32 \(3,\) in 8 bytes; that cannot be"):
        index_tensors(tmp_path)


def test_a_new_folder_appears_only_at_the_end(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    leftover = tmp_path / ".out.partial"
    (leftover / "unet").mkdir(parents=True)
    (leftover / "old.safetensors").write_bytes(b"half")
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "out"]


def test_a_second_process_does_not_write_the_same_folder(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="out: another process is writing it just now"):
            with new_folder(tmp_path / "out"):
                pass
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_checkpoint(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    with pytest.raises(ValueError, match=r"out: exists already\. Choose another folder, or pass --overwrite"):
        with new_folder(output):
            pass
    with new_folder(output, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (output / "config.json").rename(output / "thesis.tex")
    with pytest.raises(ValueError, match="out: holds something else than a checkpoint and is not replaced"):
        with new_folder(output, overwrite=True):
            pass
    with pytest.raises(ValueError, match=r"thesis.tex: this is a file. Give a folder to write"):
        with new_folder(output / "thesis.tex"):
            pass


def test_the_earlier_folder_comes_back_if_the_run_that_replaced_it_was_killed_between_two_renames(tmp_path):
    earlier = tmp_path / ".out.earlier"
    earlier.mkdir()
    (earlier / "config.json").write_text("old")
    with pytest.raises(ValueError, match="out: exists already"):
        with new_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "config.json").read_text() == "old"
