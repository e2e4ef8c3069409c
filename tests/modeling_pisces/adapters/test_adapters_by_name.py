"""Claims about adapters written and loaded by other people's classes, and about where PEFT's own words put them."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from modeling_pisces import PISCES_PEFT_EXCLUDE_MODULES, PiscesForConditionalGeneration
from tests.fixtures import make_config, make_model, make_processor


# ids of tests/fixtures.py
BOS, PAD, IMAGE, GEN, START, END = 256, 261, 262, 263, 264, 265
TARGETS = r"model\.language_model\..*\.(q_proj|v_proj)"


def make_prompts() -> dict[str, torch.Tensor]:
    rows = [[BOS, *[IMAGE] * 9, 31, 8], [BOS, 5, 6, 7]]
    ids = torch.tensor([[PAD] * (12 - len(row)) + row for row in rows])
    pixels = torch.linspace(-1, 1, 3 * 12 * 12).view(1, 3, 12, 12)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


def make_batch() -> dict[str, torch.Tensor]:
    """An answer about a picture and a drawn picture, in one row."""
    ids = torch.tensor([[BOS, *[IMAGE] * 9, 31, START, *[GEN] * 4, END, 7]])
    pixels = torch.linspace(-1, 1, 3 * 12 * 12).view(1, 3, 12, 12)
    drawn = torch.linspace(1, -1, 3 * 16 * 16).view(1, 3, 16, 16)
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels, "gen_pixel_values": drawn}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a mixed batch, and a drawing."""
    with torch.no_grad():
        logits = model(**make_batch(), skip_logits=False).logits
        return logits, model.generate(**make_prompts(), generation_mode="image")


# ---- loading by name -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


KINDS = [(None, None), (None, ["gen_head"]), ("CAUSAL_LM", ["gen_head"])]


@pytest.fixture(scope="module", params=KINDS, ids=["portable", "full", "full with a task type"])
def adapter(request, base, tmp_path_factory):
    """A folder with an adapter, its task type, and what the adapted model puts out."""
    model = AutoModelForMultimodalLM.from_pretrained(base)
    task_type, copies = request.param
    settings = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=copies, task_type=task_type)
    model = randomize(get_peft_model(model, settings))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(folder)
    return str(folder), task_type, outputs(model)


def test_auto_peft_model_loads_an_adapter(adapter):
    folder, task_type, expected = adapter
    if task_type is None:
        model = AutoPeftModel.from_pretrained(folder, import_allowlist=["modeling_pisces"])
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(model.get_base_model()) is PiscesForConditionalGeneration
    for found, wanted in zip(outputs(model.eval()), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("auto_class", [AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM])
def test_auto_model_loads_an_adapter_with_its_base(auto_class, adapter):
    folder, _, expected = adapter
    copies = json.loads((Path(folder) / "adapter_config.json").read_text())["modules_to_save"]
    if copies and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("transformers 5.16 leaves an adapter's whole copies out, and reports them as missing")
    for found, wanted in zip(outputs(auto_class.from_pretrained(folder)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


# ---- targets by PEFT's words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q_proj|v_proj)"])
def test_the_exclude_pattern_keeps_any_target_inside_the_language_model(targets):
    settings = LoraConfig(r=2, target_modules=targets, exclude_modules=PISCES_PEFT_EXCLUDE_MODULES)
    model = get_peft_model(make_model(), settings).train()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * (7 if targets == "all-linear" else 2)
    assert all(".language_model." in name for name in trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**make_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_adapters_that_can_never_learn_are_named_once(targets, head):
    model = get_peft_model(make_model(gen_head_type=head), LoraConfig(r=2, target_modules=targets)).train()
    with pytest.warns(UserWarning, match=r"layers of gen_vision_tower carry adapters \(such as layers\.0\.") as seen:
        model(**make_batch()).loss.backward()
    message = next(str(warning.message) for warning in seen if "gen_vision_tower carry" in str(warning.message))
    assert "never get a gradient" in message and "PISCES_PEFT_EXCLUDE_MODULES" in message
    assert f'r"{PISCES_PEFT_EXCLUDE_MODULES}"' in message
    (pattern,) = re.findall(r'target_modules=r"(.*?)"', message)
    regular = get_peft_model(make_model(), LoraConfig(r=2, target_modules=pattern))
    assert all(".language_model." in name for name, p in regular.named_parameters() if p.requires_grad)
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert idle and all(".gen_vision_tower." in name for name in idle)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**make_batch())


def test_training_everything_or_measuring_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_model().train()(**make_batch()).loss.backward()
        get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear")).eval()(**make_batch())


def test_the_exclude_pattern_matches_every_part_but_the_language_model():
    for head in ("mlp", "linear", "flow"):
        names = [name for name, _ in make_model(gen_head_type=head).named_modules() if name not in ("", "model")]
        left = [name for name in names if not re.fullmatch(PISCES_PEFT_EXCLUDE_MODULES, name)]
        assert left == [name for name in names if name.startswith("model.language_model")]


# ---- prompts that are learned --------------------------------------------------------------------------------------


PROMPT_METHODS = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def make_confusable_model() -> PiscesForConditionalGeneration:
    """A layer of the understanding tower has as many rows as the vocabulary."""
    vision = make_config().vision_config.to_dict() | {"intermediate_size": 320}
    return make_model(vision_config=vision)


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_a_learned_prompt_finds_the_word_embeddings_trains_both_sides_and_survives_saving(method, tmp_path):
    model = make_confusable_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = get_peft_model(model, PROMPT_METHODS[method]())
    assert adapted.word_embeddings is model.get_input_embeddings()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("prompt_encoder" in name for name in trained)
    randomize(adapted)
    out = adapted.train()(**make_batch())
    # a prompt in front of the embeddings predicts the row's first token, a prefix in the cache does not
    assert int(out.num_image_vectors) == 4 and int(out.num_text_tokens) == (4 if method == "prefix tuning" else 5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_confusable_model(), tmp_path).eval()
    with torch.no_grad():
        expected = adapted(**make_batch())
        found = loaded(**make_batch())
        plain = make_confusable_model()(**make_batch())
    for name in ("logits", "text_loss", "image_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)
    assert abs(expected.text_loss - plain.text_loss) > 1e-4 and abs(expected.image_loss - plain.image_loss) > 1e-4
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_any_other_submodule_is_found_under_its_own_name():
    model = make_model()
    assert model.get_submodule("model.gen_head") is model.model.gen_head
    with pytest.raises(AttributeError):
        model.get_submodule("embeddings.position_embeddings")


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_a_learned_prompt_answers_as_a_plain_loop_over_forward(method):
    adapted = randomize(get_peft_model(make_confusable_model(), PROMPT_METHODS[method]()))
    prompts = make_prompts()
    prompts = {"input_ids": prompts["input_ids"][:1], "pixel_values": prompts["pixel_values"]}
    ids = prompts["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            logits = adapted(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompts["pixel_values"]
            ).logits
        scores = logits[:, -1].clone()
        scores[:, [IMAGE, GEN, START, END]] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 319}
    answer = adapted.generate(**prompts, attention_mask=torch.ones_like(prompts["input_ids"]), **settings)
    assert torch.equal(answer[:, -5:], ids[:, -5:])
    plain = make_confusable_model().generate(**prompts, **settings)
    assert not torch.equal(answer[:, -5:], plain[:, -5:])
