"""Settings of a wrong type in any JSON file of a checkpoint: one line that says where, or it works."""

import json
import shutil

import pytest

from modeling_pisces.checkpoint.loading import load_model
from tests.changed_settings import TINY, Change, all_changes, find_fault, sample_changes


pytest.importorskip("diffusers")

# what was found by going through all of them, one of each kind
FOUND = [
    Change("processor_config.json", ("image_processor", "size"), True),
    Change("unet/config.json", ("downsample_padding",), None),
    Change("tokenizer_config.json", ("model_max_length",), 1.5),
    Change("generation_config.json", ("image_temperature",), "wrong"),
    Change("generation_config.json", ("bos_token_id",), ["wrong"]),
    Change("vae/config.json", ("mid_block_add_attention",), 1.5),
    Change("scheduler/scheduler_config.json", ("timestep_spacing",), ["wrong"]),
]


@pytest.mark.parametrize("change", [*FOUND, *sample_changes(8, seed=0)], ids=str)
def test_a_setting_of_a_wrong_type_is_one_line_or_works(change):
    assert find_fault(change) is None


def test_the_sample_is_taken_from_every_file_and_every_depth():
    changes = list(all_changes())
    assert len(changes) > 2000 and len({change.file for change in changes}) == 8
    assert Change("config.json", ("text_config", "rope_parameters", "rope_theta"), "wrong") in changes


@pytest.mark.parametrize(
    ("file", "setting", "value", "words"),
    [
        ("generation_config.json", "image_temperature", "hot", r"image_temperature is 'hot', expected a number"),
        ("generation_config.json", "image_temperature", True, r"image_temperature is True, expected a number"),
        ("generation_config.json", "image_temperature", -0.5, r"image_temperature is -0\.5, expected a number of at"),
        ("generation_config.json", "image_temperature", float("nan"), r"image_temperature is nan, expected a number"),
        ("generation_config.json", "max_new_tokens", 2.5, r"max_new_tokens is 2\.5, expected a whole number|2\.5"),
        ("tokenizer_config.json", "model_max_length", "long", r"the processor cannot be built .*'int' and 'str'"),
        (
            "generation_config.json",
            "eos_token_id",
            [5, "5"],
            r"eos_token_id is \[5, '5'\], expected the id of a token",
        ),
        ("generation_config.json", "pad_token_id", 2.0, r"pad_token_id is 2\.0, expected the id of a token"),
        ("tokenizer_config.json", "model_max_length", 0, r"model_max_length is 0, expected a whole number"),
    ],
)
def test_what_loads_and_fails_later_is_refused_at_loading(file, setting, value, words, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "copy", ignore=shutil.ignore_patterns("unet", "vae"))
    content = json.loads((folder / file).read_text()) | {setting: value}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as caught:
        load_model(folder, device="cpu")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["image_processor", "gen_image_processor"])
def test_an_image_processor_of_another_size_is_named(name, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "copy", ignore=shutil.ignore_patterns("unet", "vae"))
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content[name]["size"] = {"height": 32, "width": 32}
    path.write_text(json.dumps(content))
    words = rf"processor_config\.json: {name} makes pictures of shape \(3, 32, 32\).* takes \(3, 64, 64\)"
    with pytest.raises(ValueError, match=words):
        load_model(folder, device="cpu")
    content[name]["size"] = {"height": "wide", "width": 32}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name} cannot prepare a picture|the processor cannot be built"):
        load_model(folder, device="cpu")
