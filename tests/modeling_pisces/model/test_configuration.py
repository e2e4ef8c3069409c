"""Claims about `PiscesConfig` and `PiscesGenVisionConfig`: published sizes, derived counts, round trips, refusals."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from modeling_pisces import PiscesConfig, PiscesForConditionalGeneration, PiscesGenVisionConfig
from tests.fixtures import make_config


def test_defaults_have_the_published_sizes():
    config = PiscesConfig()
    assert (config.num_image_tokens, config.num_gen_image_tokens, config.gen_vector_size) == (729, 64, 1792)
    assert (config.gen_grid_side, config.image_feature_size) == (8, 1152)
    text = config.text_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("llama", 4096, 32, 128256)
    assert text.rope_parameters["rope_type"] == "llama3"
    assert config.gen_head_type == "mlp" and config.image_loss_weight == 1.0 and config.gen_input_noise == 0.0


def test_full_size_parameter_counts_are_those_of_the_parts():
    with torch.device("meta"):
        model = PiscesForConditionalGeneration(PiscesConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    count["lm_head"] = model.lm_head.weight.numel()
    assert count["language_model"] + count["lm_head"] == 8_030_261_248  # as its model card says
    assert count["vision_tower"] == 428_225_600 - 15_238_352  # SigLIP so400m/14-384 without its pooling head
    assert 4.2e9 < count["gen_vision_tower"] < 4.5e9  # EVA-CLIP-E: 4.4 billion with its pooling and head
    assert count["multi_modal_projector"] == (1152 + 1) * 4096 + (4096 + 1) * 4096
    assert count["gen_projector"] == (1792 + 1) * 4096 + (4096 + 1) * 4096
    assert count["gen_head"] == (4096 + 1) * 4096 + (4096 + 1) * 1792


def test_derived_counts_follow_the_towers():
    config = make_config()
    assert (config.num_image_tokens, config.num_gen_image_tokens, config.gen_vector_size) == (9, 4, 12)
    clip = {"model_type": "clip_vision_model", "hidden_size": 24, "image_size": 12, "patch_size": 4}
    assert make_config(vision_config=clip).num_image_tokens == 10  # with the class token
    assert make_config(vision_config=clip, vision_feature_select_strategy="default").num_image_tokens == 9
    assert make_config(gen_vision_config=clip, gen_pool_stride=1).gen_vector_size == 24
    registers = {"model_type": "dinov2_with_registers", "image_size": 12, "patch_size": 4, "num_register_tokens": 2}
    assert make_config(vision_config=registers).num_image_tokens == 12
    assert make_config(vision_feature_layer=[-2, -1]).image_feature_size == 48


def test_understanding_only_config_has_no_generated_vectors():
    config = make_config(gen_vision_config=None)
    assert not config.has_generation
    assert (config.num_gen_image_tokens, config.gen_vector_size, config.gen_grid_side) == (0, 0, 0)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"gen_vision_config": None},
        {"gen_vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4}},
        {
            "gen_head_type": "flow",
            "gen_flow_hidden_size": 20,
            "vision_feature_layer": [-2, -1],
            "gen_input_noise": 0.1,
        },
        {"gen_loss_type": "cosine"},
        {"text_config": {"model_type": "gemma2", "vocab_size": 320, "hidden_size": 32}},  # tied
    ],
)
def test_saved_config_loads_equal(overrides, tmp_path):
    config = make_config(**overrides)
    config.save_pretrained(tmp_path)
    for loaded in (PiscesConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert type(loaded.gen_vision_config) is type(config.gen_vision_config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "num_gen_image_tokens" not in stored and "num_image_tokens" not in stored


def test_default_config_round_trips(tmp_path):
    PiscesConfig().save_pretrained(tmp_path)
    loaded = PiscesConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"_name_or_path": ""} == PiscesConfig().to_dict()


def test_gen_vision_config_loads_from_a_whole_checkpoint(tmp_path):
    """The stock vision configs share one key and would load the understanding tower here."""
    make_config().save_pretrained(tmp_path)
    gen = PiscesGenVisionConfig.from_pretrained(tmp_path)
    assert (gen.model_type, gen.hidden_size, gen.output_size) == ("pisces_gen_vision", 20, 12)
    assert SiglipVisionConfig.from_pretrained(tmp_path).hidden_size == 24


def test_config_objects_are_kept_as_they_are():
    text = LlamaConfig(vocab_size=320)
    vision = CLIPVisionConfig(image_size=8, patch_size=4)
    config = make_config(text_config=text, vision_config=vision)
    assert config.text_config is text and config.vision_config is vision


def test_tied_embeddings_of_the_text_config_reach_the_top():
    text = {"model_type": "llama", "vocab_size": 320, "tie_word_embeddings": True}
    assert make_config(text_config=text).tie_word_embeddings
    assert not make_config().tie_word_embeddings


def test_auto_model_builds_the_gen_tower_alone():
    tower = AutoModel.from_config(make_config().gen_vision_config)
    assert type(tower).__name__ == "PiscesGenVisionModel"


SIGLIP2 = {"model_type": "siglip2_vision_model"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"gen_pool_stride": 3}, ["gen_pool_stride 3", "4 x 4"]),
        ({"gen_pool_stride": 0}, ["gen_pool_stride 0", "4 x 4"]),
        ({"gen_pool_stride": "2"}, ["gen_pool_stride", "int", "str"]),
        ({"gen_image_token_id": 262}, ["four different ids", "'image_token_id': 262", "'gen_image_token_id': 262"]),
        ({"gen_end_token_id": 320}, ["'gen_end_token_id': 320", "vocabulary of 320"]),
        ({"image_token_id": -1}, ["'image_token_id': -1", "vocabulary of 320"]),
        ({"vision_feature_layer": 5}, ["vision_feature_layer 5", "2 layers", "-3 to 2"]),
        ({"vision_feature_layer": []}, ["vision_feature_layer []", "2 layers"]),
        ({"vision_feature_select_strategy": "cls"}, ["vision_feature_select_strategy", "default", "full", "cls"]),
        ({"gen_head_type": "diffusion"}, ["gen_head_type", "mlp", "linear", "flow", "diffusion"]),
        ({"projector_hidden_act": "gleu"}, ["projector_hidden_act 'gleu'", "gelu"]),
        ({"gen_loss_type": "l1"}, ["gen_loss_type", "mse", "cosine", "l1"]),
        ({"gen_loss_type": "cosine", "gen_head_type": "flow"}, ["gen_loss_type 'cosine'", "'flow'", "'mlp'"]),
        ({"gen_flow_num_steps": 0}, ["gen_flow_num_steps 0", "at least 1"]),
        ({"gen_flow_hidden_size": 0}, ["gen_flow_hidden_size is 0", "at least 1"]),
        ({"image_loss_weight": -1.0}, ["image_loss_weight is -1.0", ">= 0"]),
        ({"gen_input_noise": float("nan")}, ["gen_input_noise is nan", ">= 0"]),
        ({"text_config": {"model_type": "lama"}}, ["text_config", "'lama'", "upgrade transformers"]),
        ({"vision_config": SIGLIP2}, ["siglip2_vision_model", "image_size None", "siglip_vision_model"]),
        (
            {"vision_config": {"model_type": "dinov2", "image_size": 2, "patch_size": 4}},
            ["image_size 2", "patch_size 4"],
        ),
    ],
)
def test_impossible_values_are_refused_with_both_values(overrides, words):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        make_config(**overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"patch_size": 15}, ["patch_size 15", "image_size 448"]),
        ({"num_attention_heads": 3}, ["num_attention_heads 3", "hidden_size", "1792"]),
        ({"patch_size": 0}, ["patch_size is 0", "at least 1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "at least 1"]),
        ({"output_size": 0}, ["output_size is 0", "at least 1"]),
        ({"hidden_act": "gleu"}, ["hidden_act 'gleu'", "gelu"]),
        ({"norm_position": "middle"}, ["norm_position", "pre", "post", "middle"]),
    ],
)
def test_impossible_gen_tower_values_are_refused_with_both_values(values, words):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        PiscesGenVisionConfig(**values)
    for word in words:
        assert word in str(error.value)


def test_an_impossible_value_in_a_saved_file_is_refused_at_load(tmp_path):
    make_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gen_pool_stride": 3}))
    with pytest.raises(StrictDataclassError, match="gen_pool_stride 3 does not divide"):
        PiscesConfig.from_pretrained(tmp_path)


def test_auto_map_can_be_read_and_is_written_only_when_it_says_something(tmp_path):
    """TRL reads it of every class outside transformers; what is empty must not reach config.json."""
    config = make_config()
    assert config.auto_map == {} and config.auto_map is not make_config().auto_map
    config.save_pretrained(tmp_path / "plain")
    for written in (json.loads((tmp_path / "plain" / "config.json").read_text()), config.to_dict()):
        assert "auto_map" not in written
    assert "auto_map" not in config.to_diff_dict() and "auto_map" not in config.to_json_string(use_diff=False)
    loaded = AutoConfig.from_pretrained(tmp_path / "plain")
    assert loaded.auto_map == {} and loaded.to_diff_dict() == config.to_diff_dict()
    config.auto_map = {"AutoModel": "modeling_pisces.PiscesModel"}
    config.save_pretrained(tmp_path / "named")
    assert AutoConfig.from_pretrained(tmp_path / "named", trust_remote_code=False).auto_map == config.auto_map


def test_a_user_who_registers_a_class_of_their_own_gets_its_auto_map(tmp_path):
    """`register_for_auto_class` writes into the config's `auto_map`, of this model and of no other."""

    class OwnModel(PiscesForConditionalGeneration):
        pass

    OwnModel.register_for_auto_class("AutoModelForMultimodalLM")
    OwnModel(make_config()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written == {"AutoModelForMultimodalLM": "test_configuration.OwnModel"}
    assert make_config().auto_map == {}
