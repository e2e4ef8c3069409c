"""A Pisces in PEFT's common tests, with every method of its decoder tests. Copied and run by `run_peft_mixins.py`.

The configurations are PEFT's own; only the target modules are ours, because PEFT knows none for this model type.
"""

import inspect
import re
import tempfile
from dataclasses import fields

import pytest
import torch
from fixtures import make_model
from peft import BeftConfig, CPTConfig, IA3Config, PromptLearningConfig, ShadowConfig
from transformers import AutoModelForMultimodalLM

from modeling_pisces import PISCES_PEFT_EXCLUDE_MODULES

from . import test_decoder_models as decoders
from . import testing_utils
from .testing_common import PeftCommonTester


CHECKPOINT = tempfile.mkdtemp(prefix="pisces-peft-")
make_model().save_pretrained(CHECKPOINT)
testing_utils._HUB_MODEL_ACCESSES[CHECKPOINT] = 0  # nothing to fetch: offline from the first test on

# how PEFT's decoder tests call what needs more than a model and a configuration
EXTRA = {
    "_test_generate_pos_args": {"raises_err": False},
    "_test_add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "_test_passing_input_embeds_works": {"test_name": ""},
    "_test_training_gradient_checkpointing": {"use_reentrant": False},
}
# where they start from an adapter that changes something
NOT_IDENTITY = ("save_pretrained", "merge_layers", "mixed", "unload", "weighted", "disable")
# wide enough for the ranks of PEFT's tests, which the key and value layers of this small model are not
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
COMMON = sorted(set(re.findall(r"self\.(_test_\w+)\(", inspect.getsource(decoders.TestDecoderModels))))


def _settings(config_cls: type, settings: dict) -> dict:
    settings = dict(settings)
    if issubclass(config_cls, PromptLearningConfig) or config_cls in (CPTConfig, ShadowConfig):
        return settings
    if "exclude_modules" in {field.name for field in fields(config_cls)}:
        settings["target_modules"] = [layer.split(".")[1] for layer in LAYERS]
        settings["exclude_modules"] = PISCES_PEFT_EXCLUDE_MODULES
    else:
        settings["target_modules"] = [f"language_model.layers.{i}.{layer}" for i in (0, 1) for layer in LAYERS]
    if config_cls is IA3Config:
        settings["feedforward_modules"] = ["down_proj"]
    return settings


def _reason_to_skip(name: str, config_cls: type, settings: dict) -> str | None:
    if config_cls is ShadowConfig:
        return "looks for decoder layers right below the backbone, and says so; ours are in its language_model"
    if config_cls is BeftConfig and "merge" in name:
        return "merges biases only, and the layers of a Llama have none; PEFT skips its own Llama too"
    if settings.get("alora_invocation_tokens") == [1000] and any(
        part in name for part in ("mixed", "unload", "disable")
    ):
        return "an adapter that no prompt invokes changes nothing, and the test wants a change; PEFT skips it too"
    if name == "_test_generate_with_mixed_adapter_batches_and_beam_search":
        return "reads eos_token_id from the model's config, where only models without parts have it"
    return None


CONFIGS = [(config_cls, _settings(config_cls, settings)) for config_cls, settings in decoders.ALL_CONFIGS]


class TestPisces(PeftCommonTester):
    transformers_class = AutoModelForMultimodalLM

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([[1, 1, 1], [1, 2, 1]]).to(self.torch_device)
        attention_mask = torch.tensor([[1, 1, 1], [1, 0, 1]]).to(self.torch_device)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @pytest.mark.parametrize("name", COMMON)
    @pytest.mark.parametrize(
        "config_cls, settings", CONFIGS, ids=[f"{kind.__name__}{i}" for i, (kind, _) in enumerate(CONFIGS)]
    )
    def test_common(self, name, config_cls, settings):
        if (reason := _reason_to_skip(name, config_cls, settings)) is not None:
            pytest.skip(reason)
        if any(part in name for part in NOT_IDENTITY):
            settings = testing_utils.set_init_weights_false(config_cls, settings)
        arguments = {"model_id": CHECKPOINT, "config_cls": config_cls, "config_kwargs": dict(settings)}
        getattr(self, name)(**arguments, **EXTRA.get(name, {}))
