"""`modeling_pisces/checkpoint/files.py` and `modeling_pisces/checkpoint/info.py`: a broken file is named, a good folder is summed up."""

import json

import pytest
import torch
from safetensors.torch import save_file

from modeling_pisces.checkpoint.files import check_checkpoint, find_checkpoint, read_safetensors_header, weight_files
from modeling_pisces.checkpoint.info import describe_checkpoint, format_checkpoint
from tests.fixtures import make_model


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_header_lists_every_tensor_with_its_size(tmp_path):
    path = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path)
    tensors = {tensor.name: tensor for tensor in read_safetensors_header(path)}
    assert (tensors["a"].num_elements, tensors["a"].num_bytes, tensors["a"].dtype) == (6, 24, "F32")
    assert (tensors["b"].num_elements, tensors["b"].num_bytes, tensors["b"].dtype) == (5, 10, "BF16")


def test_scalar_and_empty_files_have_headers(tmp_path):
    save_file({"one": torch.tensor(1.0)}, tmp_path / "scalar.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    assert read_safetensors_header(tmp_path / "scalar.safetensors")[0].num_elements == 1
    assert read_safetensors_header(tmp_path / "empty.safetensors") == []


@pytest.mark.parametrize("num_bytes_left", [0, 4, 100, -1])
def test_cut_off_weights_are_named(folder, num_bytes_left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes_left])
    with pytest.raises(ValueError, match=r"model\.safetensors: .*(not a safetensors file|cut off)"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [b"version https://example.org/spec/v1\noid sha256:0\n", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_another_kind_of_file_is_not_taken_for_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file \(\d+ bytes\)"):
        check_checkpoint(folder)


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: not found"):
        check_checkpoint(folder)


def test_missing_shard_is_named(good_folder, tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="100KB")
    shards = weight_files(tmp_path)
    assert len(shards) > 1
    check_checkpoint(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name}: not found"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "processor_config.json"])
def test_broken_json_is_named(folder, name):
    (folder / name).write_text('{"half": ')
    with pytest.raises(ValueError, match=f"{name}: not valid JSON"):
        check_checkpoint(folder)


def test_json_that_is_no_object_is_refused(folder):
    (folder / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"config\.json: holds a list, expected a JSON object"):
        check_checkpoint(folder)


def test_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: not found"):
        check_checkpoint(folder)


def test_another_model_is_refused_by_its_type(folder):
    change_config(folder, model_type="llama")
    with pytest.raises(ValueError, match=r"model_type is 'llama', expected 'pisces'"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen_pool_stride": 3}, "gen_pool_stride 3 does not divide"),
        ({"gen_head_type": "forest"}, "gen_head_type"),
        ({"gen_image_token_id": 262}, "four different ids"),
        ({"gen_start_token_id": 999}, "outside the language model's vocabulary"),
    ],
)
def test_wrong_config_value_names_file_and_value_in_one_line(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        check_checkpoint(folder)
    assert str(caught.value).startswith(str(folder / "config.json")) and "\n" not in str(caught.value)


def test_drawing_asks_for_a_decoder(folder):
    check_checkpoint(folder)
    with pytest.raises(ValueError, match=r"model_index\.json: not found, so this checkpoint has no decoder"):
        check_checkpoint(folder, with_decoder=True)


def test_decoder_part_that_the_index_names_must_be_there(folder):
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(ValueError, match=r"unet: not found, though model_index\.json names it"):
        check_checkpoint(folder, with_decoder=True)


def test_names_that_mean_no_checkpoint_say_what_to_give(tmp_path):
    file = tmp_path / "weights.bin"
    file.touch()
    assert find_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"this is a file\. Give a checkpoint folder or a Hub id"):
        find_checkpoint(str(file))
    for name in ("nowhere", "./no/where", "a/b/c", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"no such folder\. Give a checkpoint folder or a Hub id"):
            find_checkpoint(name)
    with pytest.raises(ValueError, match=r"nobody/nothing: no folder of that name here, and the Hub did not give it"):
        find_checkpoint("nobody/nothing")


def test_summary_counts_what_the_model_has(good_folder):
    model, info = make_model(), describe_checkpoint(good_folder)
    assert info["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    parts = {part["name"]: part["num_parameters"] for part in info["parts"]}
    assert parts["vision_tower"] == sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    assert parts["lm_head"] == model.lm_head.weight.numel()
    assert info["understanding"]["num_image_tokens"] == 9
    assert info["generation"]["num_gen_image_tokens"] == 4 and info["generation"]["gen_vector_size"] == 12
    assert info["tokens"]["gen_start_token"] == {"id": 264, "text": "<|gen_start|>"}
    assert info["decoder"] is None
    assert json.loads(json.dumps(info)) == info


def test_summary_of_an_understanding_model_says_so(tmp_path):
    make_model(gen_vision_config=None).save_pretrained(tmp_path)
    info = describe_checkpoint(tmp_path)
    assert info["generation"] is None
    assert "none, this model only understands" in format_checkpoint(info)


def test_summary_for_a_reader_names_parts_and_sizes(good_folder):
    text = format_checkpoint(describe_checkpoint(good_folder))
    for words in ("siglip_vision_model, 12 px, 9 vectors per image", "4 vectors of 12", "<|image|> = 262", "lm_head"):
        assert words in text


def test_an_adapter_in_place_of_a_checkpoint_is_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter, not a whole checkpoint"):
        check_checkpoint(tmp_path)
