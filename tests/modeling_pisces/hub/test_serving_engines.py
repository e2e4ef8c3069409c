"""Claims about serving engines: vLLM finds Pisces by its entry point, and its Transformers backend gets what it asks for.

The questions of the backend were read in vLLM 0.33.0 (`vllm/model_executor/models/transformers`); vLLM itself is not
needed here.
"""

import logging
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from transformers import AutoModel, PreTrainedModel

import pisces_vllm_plugin
from tests.fixtures import make_config, make_model, make_processor


ROOT = Path(__file__).resolve().parents[3]


class Registry:
    """The three things of vLLM's registry that the plugin may touch; overwriting is counted."""

    def __init__(self, *known: str):
        self.models = dict.fromkeys(known, "vllm's own")
        self.calls = 0

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, model_arch, model_cls):
        assert isinstance(model_arch, str) and len(model_cls.split(":")) == 2  # as vLLM checks
        self.calls += 1
        self.models[model_arch] = model_cls


@pytest.fixture
def vllm(monkeypatch):
    def install(*known: str) -> Registry:
        module = ModuleType("vllm")
        module.ModelRegistry = Registry(*known)
        monkeypatch.setitem(sys.modules, "vllm", module)
        return module.ModelRegistry

    return install


# ---- the entry point


def test_registering_twice_registers_once(vllm):
    registry = vllm("TransformersMultiModalForCausalLM")
    pisces_vllm_plugin.register()
    pisces_vllm_plugin.register()
    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    assert registry.models["PiscesForConditionalGeneration"] == backend
    assert registry.calls == 1


def test_what_is_registered_is_what_a_checkpoint_names(tmp_path, vllm):
    registry = vllm("TransformersMultiModalForCausalLM")
    pisces_vllm_plugin.register()
    model = make_model()
    model.save_pretrained(tmp_path)
    (architecture,) = type(model.config).from_pretrained(tmp_path).architectures
    assert architecture in registry.models


def test_without_vllm_nothing_happens(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it raises ImportError
    pisces_vllm_plugin.register()
    assert not caplog.records


def test_a_vllm_without_the_backend_is_named_in_one_warning(vllm, caplog):
    registry = vllm("LlamaForCausalLM")
    with caplog.at_level(logging.WARNING):
        pisces_vllm_plugin.register()
    assert registry.calls == 0
    assert [r.getMessage() for r in caplog.records] == [
        "Pisces is not registered: this vLLM has no TransformersMultiModalForCausalLM. Upgrade vLLM."
    ]


def test_a_package_that_cannot_be_imported_does_not_stop_vllm(vllm, monkeypatch, caplog):
    registry = vllm("TransformersMultiModalForCausalLM")
    monkeypatch.setitem(sys.modules, "modeling_pisces", None)
    with caplog.at_level(logging.WARNING):
        pisces_vllm_plugin.register()
    assert registry.calls == 0
    assert "modeling_pisces cannot be imported here" in caplog.text


def test_the_entry_point_imports_neither_torch_nor_the_package():
    code = "import sys, pisces_vllm_plugin; print([m for m in ('torch', 'transformers', 'modeling_pisces', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_project_declares_the_entry_point():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["vllm.general_plugins"] == {"pisces": "pisces_vllm_plugin:register"}
    assert project["tool"]["setuptools"]["py-modules"] == ["pisces_vllm_plugin"]


# ---- what the backend asks of the model


@pytest.fixture(scope="module")
def backbone():
    """As the backend builds it: from the configuration alone."""
    torch.manual_seed(0)
    return AutoModel.from_config(make_config()).eval()


def test_the_backbone_accepts_an_attention_of_the_engine(backbone):
    assert isinstance(backbone, PreTrainedModel)
    assert backbone.is_backend_compatible()
    assert not hasattr(backbone, "lm_head")  # the engine adds its own


def test_the_engine_is_not_told_to_leave_the_head_unread(backbone, tmp_path):
    """It leaves unread what the wrapped class calls unexpected, also for the head that it adds itself."""
    assert not [
        pattern
        for pattern in backbone._keys_to_ignore_on_load_unexpected or ()
        if re.search(pattern, "lm_head.weight")
    ]
    make_model().save_pretrained(tmp_path)
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]  # and yet AutoModel has nothing to complain of


def test_the_engine_finds_decoder_and_image_encoder_apart(backbone):
    assert backbone.get_decoder() is backbone.language_model
    assert backbone.get_encoder(modality="image") is backbone.vision_tower
    assert len({type(backbone), type(backbone.vision_tower), type(backbone.language_model)}) == 3


def test_only_the_language_model_looks_like_a_decoder_to_the_engine(backbone):
    """It gives each causal attention layer a place in its cache, by `is_causal` (True where unset) and `layer_idx`."""
    causal = [
        name for name, m in backbone.named_modules() if name.endswith("self_attn") and getattr(m, "is_causal", True)
    ]
    assert causal and all(name.startswith("language_model.") for name in causal)


def test_the_text_configuration_is_a_part_of_its_own():
    config = make_config()
    assert config.get_text_config() is config.text_config  # what makes it multimodal for the engine
    assert config.get_text_config() is not config


def test_the_tensor_parallel_plan_is_the_language_models(backbone):
    patterns = set(backbone.tp_plan)
    assert "language_model.layers.*.self_attn.q_proj" in patterns
    assert all(pattern.startswith("language_model.") for pattern in patterns)  # towers are kept whole on every rank


def test_image_features_come_as_one_row_per_image(backbone):
    """The backend calls it so, and splits `pooler_output` by `num_image_patches` (1 per image)."""
    features = backbone.get_image_features(torch.zeros(2, 3, 12, 12), return_dict=True).pooler_output
    assert features.shape == (2, 9, 32)


# ---- what the backend asks of the processor


def test_the_counts_are_those_of_the_expanded_prompt():
    processor = make_processor()
    counts = processor._get_num_multimodal_tokens(image_sizes=[(224, 224), (30, 20)])
    assert list(counts["num_image_tokens"]) == [9, 9] and list(counts["num_image_patches"]) == [1, 1]
    size = processor.image_processor.size
    assert size["height"] == size["width"] == 12  # what it profiles memory with


def test_the_dummy_prompt_of_the_engine_is_expanded_with_offsets():
    """It repeats `image_token`, asks for the offsets of the replacements, and counts each one's commonest token."""
    processor = make_processor()
    assert isinstance(processor.image_token, str)
    assert not hasattr(processor, "image_start_token") and not hasattr(processor, "image_end_token")
    pictures = [Image.new("RGB", (224, 224), color) for color in ("red", "blue")]
    inputs = processor(
        text=processor.image_token * 2, images=pictures, return_text_replacement_offsets=True, return_tensors="pt"
    )
    (entries,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in entries] == ["image", "image"]
    for entry in entries:
        ids = processor.tokenizer(entry["replacement"], add_special_tokens=False)["input_ids"]
        assert ids == [processor.tokenizer.convert_tokens_to_ids(processor.image_token)] * 9
    assert inputs["pixel_values"].shape[0] == 2


def test_the_engine_meets_no_input_that_it_would_have_to_guess_about():
    """Besides ids and masks there are pixel values only; every other key would be cut by the number of images."""
    processor = make_processor()
    inputs = processor(text=processor.image_token, images=[Image.new("RGB", (9, 9))], return_tensors="pt")
    assert set(inputs) - {"input_ids", "attention_mask", "mm_token_type_ids"} == {"pixel_values"}


def test_features_scattered_by_the_engine_give_the_hidden_states_of_forward(backbone):
    """The engine embeds ids, replaces the placeholders' rows itself, and calls the backbone with embeddings."""
    processor = make_processor()
    inputs = processor(
        text=f"{processor.image_token}what?", images=[Image.new("RGB", (20, 30), "red")], return_tensors="pt"
    )
    with torch.no_grad():
        expected = backbone(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).last_hidden_state
        features = backbone.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        embeds = backbone.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == backbone.config.image_token_id] = features.flatten(0, 1)
        positions = torch.arange(embeds.shape[1])[None]
        found = backbone(
            input_ids=None, inputs_embeds=embeds, position_ids=positions, use_cache=False, return_dict=False
        )
    assert torch.allclose(found[0], expected, atol=1e-6)
