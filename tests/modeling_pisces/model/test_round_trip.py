"""`save_pretrained` and `from_pretrained` keep every bit, and every Auto class gives the class it promises."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration, PiscesModel, PiscesProcessor
from tests.fixtures import make_config, make_model, make_processor


UNDERSTANDING_ONLY = {"gen_vision_config": None}
VARIANTS = {
    "regression head": {},
    "flow head": {"gen_head_type": "flow"},
    "linear head": {"gen_head_type": "linear"},
    "understanding only": UNDERSTANDING_ONLY,
    "tied embeddings": {"tie_word_embeddings": True},
}


def assert_same_bits(found: torch.nn.Module, expected: torch.nn.Module):
    """All parameters and all buffers, also those that no file holds."""
    for kind in ("named_parameters", "named_buffers"):
        found_tensors, tensors = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(found_tensors) == list(tensors)
        for name, tensor in tensors.items():
            assert found_tensors[name].dtype == tensor.dtype, name
            assert torch.equal(found_tensors[name], tensor), name


def comparable(config: PiscesConfig) -> dict:
    """A config without what describes the moment: from where, by which version, and the dtype that loading notes."""
    content = json.loads(config.to_json_string(use_diff=False))
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for name in ("_name_or_path", "transformers_version", "dtype"):
            part.pop(name, None)
    return content


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """As `from_pretrained(dtype=...)` does; `model.to(dtype)` would also round the rotary frequencies, no weights."""
    for tensor in [
        *model.parameters(),
        *(buffer for name, buffer in model.named_buffers() if name in model.state_dict()),
    ]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_keep_every_bit(variant, dtype, max_shard_size, tmp_path):
    model = cast_weights(make_model(**VARIANTS[variant]), dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    loaded, report = PiscesForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_bits(loaded, model)
    assert not any(report.values()), report
    assert comparable(loaded.config) == comparable(model.config)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()


def test_bf16_weights_load_as_fp32_only_when_asked(tmp_path):
    cast_weights(make_model(), torch.bfloat16).save_pretrained(tmp_path)
    assert PiscesForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert PiscesForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_tied_embeddings_are_one_tensor_before_and_after_and_stored_once(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = PiscesForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    untied = make_model()
    untied.save_pretrained(tmp_path / "untied")
    stored, stored_untied = (
        path.stat().st_size for path in (tmp_path / "model.safetensors", tmp_path / "untied/model.safetensors")
    )
    assert stored_untied - stored > untied.lm_head.weight.numel() * 4 - 1000


def test_saving_what_was_loaded_writes_the_same_files(tmp_path):
    make_model().save_pretrained(tmp_path / "0")
    for turn in (1, 2):  # the first turn notes the dtype in the parts of the config
        PiscesForConditionalGeneration.from_pretrained(tmp_path / str(turn - 1)).save_pretrained(tmp_path / str(turn))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "0/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def test_auto_model_gives_the_backbone_without_a_loading_report(folder, caplog):
    import logging

    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)  # it does not propagate to the root
    try:
        model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    finally:
        library.removeHandler(caplog.handler)
    assert type(model) is PiscesModel
    assert_same_bits(model, make_model().model)
    assert not any(report.values()), report
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("auto_class", [AutoModelForMultimodalLM, AutoModelForImageTextToText])
def test_auto_classes_with_a_head_give_the_whole_model(auto_class, folder):
    model, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert type(model) is PiscesForConditionalGeneration
    assert not any(report.values()), report
    assert_same_bits(model, make_model())


def test_auto_config_and_auto_processor_read_the_same_folder(folder):
    assert comparable(AutoConfig.from_pretrained(folder)) == comparable(
        PiscesForConditionalGeneration.from_pretrained(folder).config
    )
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is PiscesProcessor
    assert (processor.num_image_tokens, processor.num_gen_image_tokens) == (9, 4)


def test_a_loaded_processor_prepares_the_same_inputs(folder):
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB")
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "again, please"}]},
        {"role": "assistant", "content": [{"type": "image", "image": picture}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = make_processor().apply_chat_template(conversation, **options)
    found = AutoProcessor.from_pretrained(folder).apply_chat_template(conversation, **options)
    assert set(found) == set(expected) >= {"input_ids", "pixel_values", "gen_pixel_values"}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_loading_the_generation_tower_alone_finds_its_own_config(folder):
    from modeling_pisces import PiscesGenVisionConfig

    found = PiscesGenVisionConfig.from_pretrained(folder)
    assert found.hidden_size == make_config().gen_vision_config.hidden_size
    assert found.hidden_size != make_config().vision_config.hidden_size
