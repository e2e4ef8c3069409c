"""A checkpoint that reaches outside its folder, or never ends, is refused by name before anything of it is opened."""

import json
import os
import pickle
import signal

import pytest
from safetensors.torch import load_file, save_file

from conversion.storage.hub_files import index_variant
from conversion.storage.tensors import index_tensors
from modeling_pisces.checkpoint.files import check_checkpoint, read_json, weight_files
from modeling_pisces.checkpoint.loading import load_model
from modeling_pisces.hub.export import export_to_folder
from pisces_commands.console import main


@pytest.fixture(autouse=True)
def no_hanging():
    """A read that blocks becomes a failure of the test."""

    def stop(*_):
        raise TimeoutError("a check opened what never ends")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, name):
    """Move the weights to `name`, relative to the folder, and let an index point there."""
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file(weights, target, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DOORS = {
    "check": check_checkpoint,
    "load": lambda folder: load_model(folder, device="cpu"),
    "conversion": index_tensors,
    "one component": lambda folder: index_variant(folder, "model", None),
    "export": lambda folder: export_to_folder(folder, None, folder.parent / "export"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["../outside.safetensors", "/absolute", "deeper/model.safetensors"])
def test_an_index_that_points_elsewhere_is_refused_through_every_door(folder, name, door):
    name = str(folder.parent / "outside.safetensors") if name == "/absolute" else name
    shard(folder, name)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: weight_map names .*same folder"):
        DOORS[door](folder)
    assert not (folder.parent / "export").exists()


@pytest.mark.parametrize("name", [7, None, ["a"], "", ".", "..", "pytorch_model.bin", "a\\b.safetensors"])
def test_an_index_that_names_no_shard_is_refused(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"weight_map names .*, expected the name of a \.safetensors file"):
        weight_files(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, ["model.safetensors"], "model.safetensors", 3])
def test_an_index_without_a_table_is_refused(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map is .*, expected the shard of every tensor"):
        weight_files(folder)


def test_two_answers_to_where_the_weights_are_are_refused(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"there is model\.safetensors too, and libraries differ"):
        check_checkpoint(folder)


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_folder(path):
    path.mkdir()


def make_loop(path):
    path.symlink_to(path.name)


def make_dangling(path):
    path.symlink_to("nowhere.json")


STRANGE = [
    (make_pipe, "is a pipe, expected a file"),
    (make_device, "is a device, expected a file"),
    (make_folder, "is a folder, expected a file"),
    (make_loop, "cannot be read"),
    (make_dangling, "a link to a file that is not there"),
]


@pytest.mark.parametrize(("make", "words"), STRANGE)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "notes.json", "chat_template.jinja", "model.safetensors"]
)
def test_what_is_no_regular_file_is_refused_before_it_is_opened(folder, make, words, name, capsys):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        check_checkpoint(folder)
    assert main(["info", str(folder)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and name in err and words in err


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_pipe_in_the_decoder_is_refused(folder, name):
    (folder / name).parent.mkdir()
    make_pipe(folder / name)
    with pytest.raises(ValueError, match=f"{name}: is a pipe"):
        check_checkpoint(folder)


def test_links_to_regular_files_are_read_as_in_the_cache_of_the_hub(folder):
    """Laid out as huggingface_hub does; other links out of the folder are in `test_hostile_checkpoints.py`."""
    snapshot, blobs = (folder.parent / "models--a--b" / name for name in ("snapshots/1a2b", "blobs"))
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    for path in list(folder.iterdir()):
        path.rename(blobs / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-of-{path.name}")
    check_checkpoint(snapshot)
    load_model(snapshot, device="cpu")


def test_json_nested_without_end_is_named(folder):
    (folder / "notes.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"notes\.json: not valid JSON"):
        read_json(folder / "notes.json")


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel@main:fast"}, ["sdpa"]])
def test_a_kernel_of_the_hub_is_refused_wherever_the_config_names_it(folder, part, name, value):
    config = read_json(folder / "config.json")
    (config if part is None else config[part])[name] = value
    change_config(folder, **config)
    with pytest.raises(ValueError, match=r"config\.json: .*implementation is .*, expected a name like 'sdpa'"):
        load_model(folder, device="cpu")


def test_known_attention_is_loaded_and_unknown_is_one_line(folder):
    change_config(folder, attn_implementation="eager")
    load_model(folder, device="cpu")
    change_config(folder, attn_implementation="telepathy")
    with pytest.raises(ValueError, match=r"the model cannot be loaded .*telepathy") as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_another_name_for_the_weights_is_refused(folder):
    change_config(folder, transformers_weights="../outside.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: transformers_weights is '\.\./outside\.safetensors'"):
        check_checkpoint(folder)


def test_an_adapter_beside_the_model_cannot_replace_it(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: an adapter beside a whole model.*Merge it"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "hqq", "gptq", "awq", "magic", 7])
def test_quantization_by_an_absent_package_is_one_line(folder, method):
    change_config(folder, quantization_config={"quant_method": method, "load_in_4bit": True, "bits": 4})
    with pytest.raises(ValueError, match="the model cannot be loaded") as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


class Planted:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_and_planted_code_beside_the_weights_are_never_run(folder, tmp_path, capsys):
    trace = tmp_path / "trace"
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Planted(trace)))
    for name in ("configuration_pisces", "modeling_pisces", "processing_pisces"):
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')")
    change_config(
        folder, auto_map={"AutoConfig": "configuration_pisces.Planted", "AutoModel": "modeling_pisces.Planted"}
    )
    path = folder / "processor_config.json"
    path.write_text(json.dumps(read_json(path) | {"auto_map": {"AutoProcessor": "processing_pisces.Planted"}}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"auto_map": {"AutoTokenizer": ["processing_pisces.Planted", None]}}))
    model, _ = load_model(folder, device="cpu")
    assert type(model).__module__ == "modeling_pisces.modeling_pisces" and not trace.exists()
    (folder / "model.safetensors").unlink()  # and not in their absence
    with pytest.raises(ValueError, match=r"model\.safetensors: not found"):
        load_model(folder, device="cpu")
    assert not trace.exists()
