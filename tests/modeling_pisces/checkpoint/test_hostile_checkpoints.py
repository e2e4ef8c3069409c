"""Faults that `tests/fuzz/checkpoint.py` found in how a changed checkpoint is taken, one of each kind."""

import json
import os

import pytest

from modeling_pisces.checkpoint.adapters import find_adapter
from modeling_pisces.checkpoint.files import check_checkpoint, read_json
from modeling_pisces.checkpoint.info import describe_checkpoint
from modeling_pisces.checkpoint.loading import load_model, load_pipeline
from modeling_pisces.hub.export import export_to_folder
from modeling_pisces.hub.publish import stage_adapter
from tests.checkpoint_folder import write_checkpoint
from tests.fuzz.planted import setting


pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """With a decoder."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def edit(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- files


def test_a_number_of_5000_digits_names_the_file(folder):
    (folder / "notes.json").write_text('{"a": ' + "7" * 5000 + "}")
    with pytest.raises(ValueError, match=r"notes\.json: not valid JSON"):
        check_checkpoint(folder)


def test_nan_in_any_json_file_is_named_with_its_setting(folder):
    edit(
        folder,
        "config.json",
        text_config=read_json(folder / "config.json")["text_config"] | {"rms_norm_eps": float("nan")},
    )
    with pytest.raises(ValueError, match=r"config\.json: rms_norm_eps is nan, expected a number"):
        check_checkpoint(folder)


def test_settings_nested_deeper_than_python_calls_are_walked(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"gen_pool_stride"', '"x": ' + '{"a":' * 900 + "1" + "}" * 900 + ', "gen_pool_stride"')
    )
    try:
        check_checkpoint(folder)
    except ValueError as error:  # what the library says of a setting that it does not know
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "entry", [["os", "system"], ["antigravity", "x"], ["diffusers", {"a": 1}], ["diffusers"], "unet", 3]
)
@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_a_part_of_the_decoder_is_a_class_of_diffusers(folder, part, entry):
    edit(folder, "model_index.json", **{part: entry})
    for door in (lambda: check_checkpoint(folder, with_decoder=True), lambda: describe_checkpoint(folder)):
        with pytest.raises(
            ValueError, match=rf"model_index\.json: {part} is .*expected \[\"diffusers\", NAME OF A CLASS\]"
        ):
            door()


@pytest.mark.parametrize("entry", [None, [], {}, -1, True, "text", {"id": {}, "content": "a"}, {"id": 4}])
def test_an_added_token_that_is_none_is_named(folder, entry):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][4] = entry
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json: added_tokens 4 is .*expected a token with id and content"):
        describe_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "chat_template.jinja", "known_words.txt", "scheduler/scheduler_config.json"]
)
def test_a_text_that_a_link_brings_from_outside_is_refused(folder, name):
    path = folder / name
    outside = folder.parent / "outside"
    outside.write_text(path.read_text() if path.exists() else "words")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name}: leads out of the folder, to {outside}"):
        check_checkpoint(folder)


def test_links_inside_the_folder_and_weights_elsewhere_are_fine(folder):
    (folder / "texts").mkdir()
    (folder / "chat_template.jinja").rename(folder / "texts" / "template")
    (folder / "chat_template.jinja").symlink_to("texts/template")
    (folder / "model.safetensors").rename(folder.parent / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("../weights.safetensors")
    check_checkpoint(folder)


def test_what_a_link_leads_to_is_never_published(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(ValueError, match=r"README\.md: leads out of the folder"):
        export_to_folder(folder, None, tmp_path / "export")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    (adapter / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (adapter / "x.png").symlink_to(secret)
    with pytest.raises(ValueError, match=r"x\.png: leads out of the folder"):
        stage_adapter(adapter, tmp_path / "staged", None, "me/mine")
    (adapter / "x.png").unlink()
    os.mkfifo(adapter / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: is a pipe"):
        stage_adapter(adapter, tmp_path / "staged", None, "me/mine")


@pytest.fixture
def adapter(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "a/b"}'
    )
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("adapters", {"0": "someone/else"}, "loads other adapters by name"),
        ("megatron_config", {"a": 1}, "imports another library"),
    ],
)
def test_an_adapter_that_brings_more_along_is_refused(adapter, name, value, words):
    find_adapter(str(adapter))
    edit(adapter, "adapter_config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {name} is .*{words}"):
        find_adapter(str(adapter))


def test_an_adapter_with_a_pipe_or_a_link_out_is_refused(adapter):
    os.mkfifo(adapter / "README.md")
    with pytest.raises(ValueError, match=r"README\.md: is a pipe"):
        find_adapter(str(adapter))
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"README\.md: leads out of the folder"):
        find_adapter(str(adapter))


# ---- settings


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("config.json", ("text_config", "num_hidden_layers")),
        ("config.json", ("gen_vision_config", "num_hidden_layers")),
        ("config.json", ("gen_flow_num_layers",)),
        ("unet/config.json", ("layers_per_block",)),
    ],
)
def test_more_layers_than_any_model_has_are_refused_before_they_are_built(folder, file, path):
    setting(file, *path, value=10**7)(folder)
    with pytest.raises(ValueError, match=rf"{file}: {path[-1]} is 10,000,000, expected at most 10,000"):
        check_checkpoint(folder, with_decoder=True)


def test_another_model_that_the_processor_names_is_refused(folder):
    audio = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "someone/else"}
    edit(folder, "processor_config.json", audio_tokenizer=audio)
    with pytest.raises(ValueError, match=r"processor_config\.json: audio_tokenizer is .*A Pisces has none"):
        load_model(folder, device="cpu")


def test_a_processor_of_another_class_is_named(folder):
    edit(folder, "processor_config.json", processor_class="antigravity")
    with pytest.raises(ValueError, match=r"processor_config\.json: describes a \w+, expected a PiscesProcessor"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["num_image_tokens", "num_gen_image_tokens"])
def test_a_processor_that_counts_otherwise_is_named(folder, name):
    edit(folder, "processor_config.json", **{name: 5})
    with pytest.raises(ValueError, match=rf"processor_config\.json: {name} is 5, but config\.json makes \d vectors"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "value"), [("image_mean", [None, 0, 0]), ("image_std", [0.0, 1, 1]), ("rescale_factor", 1e22)]
)
def test_pixels_that_no_tower_takes_are_named(folder, name, value):
    setting("processor_config.json", "image_processor", name, value=value)(folder)
    with pytest.raises(
        ValueError, match=r"processor_config\.json: image_processor (makes \S+ of a white pixel|cannot prepare)"
    ):
        load_model(folder, device="cpu")


def test_a_token_that_is_not_found_inside_a_text_is_named(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    for entry in content["added_tokens"]:
        entry["single_word"] = entry["content"] == "<|image|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json: image_token '<\|image\|>' is not found inside a text"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("file", "name", "value", "expected"),
    [
        ("unet/config.json", "center_input_sample", ["wrong"], "true or false"),
        ("unet/config.json", "flip_sin_to_cos", "no", "true or false"),
        ("vae/config.json", "force_upcast", 1.5, "true or false"),
        ("scheduler/scheduler_config.json", "clip_sample", "no", "true or false"),
        ("scheduler/scheduler_config.json", "steps_offset", True, "a number"),
        ("unet/config.json", "sample_size", 0, "a whole number of at least 1"),
    ],
)
def test_a_setting_of_the_decoder_is_of_its_kind(folder, file, name, value, expected):
    edit(folder, file, **{name: value})
    with pytest.raises(ValueError, match=rf"{file}: {name} is .*expected {expected}"):
        load_pipeline(folder, device="cpu")


def test_latents_mean_is_a_list(folder):
    edit(folder, "vae/config.json", latents_mean=True)
    with pytest.raises(ValueError, match=r"vae/config\.json: latents_mean is True; expected a list of numbers"):
        check_checkpoint(folder, with_decoder=True)


def test_a_tokenizer_without_padding_is_named_before_drawing(folder):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: pad_token is not set"):
        load_pipeline(folder, device="cpu")
