"""Claims about TRL's own trainers: they take a checkpoint by name as they take any other, and train drawing too."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from modeling_pisces import PiscesForConditionalGeneration, PiscesModel
from modeling_pisces.hub.export import export_to_folder
from tests.finetune.lora_fixtures import make_picture, save_checkpoint
from tests.fixtures import make_model, make_processor


PICTURES = [make_picture(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """A checkpoint folder as the package writes it."""
    return str(save_checkpoint(tmp_path_factory.mktemp("installed") / "checkpoint"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> str:
    """A checkpoint folder as it is published, with its code."""
    return str(export_to_folder(make_model(), make_processor(), tmp_path_factory.mktemp("exported") / "export"))


@pytest.fixture(params=["installed", "exported"])
def checkpoint(request) -> str:
    return request.getfixturevalue(request.param)


def asked(text: str, with_picture: bool = True) -> list[dict]:
    picture = [{"type": "image"}] if with_picture else []
    return [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]


def answered(text: str) -> list[dict]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def words(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


ANSWERS = [{"messages": asked("what?") + answered("red"), "images": [picture]} for picture in PICTURES]
DRAWN = {"role": "assistant", "content": [{"type": "image"}]}
DRAWINGS = [{"messages": [*asked("draw", False), DRAWN], "images": [picture]} for picture in PICTURES]
PREFERENCES = [
    {"prompt": asked("what?"), "chosen": answered("red"), "rejected": answered("a b"), "images": [picture]}
    for picture in PICTURES
]
TEXT_PREFERENCES = [
    {"prompt": words("user", "x"), "chosen": words("assistant", "red"), "rejected": words("assistant", "b")}
] * 4
LABELLED = [
    {"prompt": words("user", "x"), "completion": words("assistant", "red"), "label": row % 2 == 0} for row in range(4)
]
PROMPTS = [{"prompt": asked("what?"), "image": picture} for picture in PICTURES]


def length_reward(completions, **kwargs) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def arguments(kind, folder: Path, **settings):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
    }
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    return kind(output_dir=str(folder), **defaults | quiet | settings)


ONLINE = {"num_generations": 2, "max_completion_length": 3, "beta": 0.1}  # beta > 0 needs a reference model
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, ANSWERS, {"max_length": None}),
    "dpo": (DPOTrainer, DPOConfig, PREFERENCES, {"max_length": None}),
    "kto": (KTOTrainer, KTOConfig, LABELLED, {}),
    "rloo": (RLOOTrainer, RLOOConfig, PROMPTS, ONLINE),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, ONLINE),
}


def make_trainer(name: str, model, folder: Path, **extra):
    trainer, config, rows, settings = TRAINERS[name]
    extra |= {"reward_funcs": length_reward} if name in ("rloo", "grpo") else {}
    return trainer(model, args=arguments(config, folder, **settings), train_dataset=Dataset.from_list(rows), **extra)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_stock_trainer_takes_a_checkpoint_by_name(name, checkpoint, tmp_path):
    trainer = make_trainer(name, checkpoint, tmp_path)
    assert type(trainer.model) is PiscesForConditionalGeneration
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    stored = PiscesForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(weight, stored[name]) for name, weight in before.items())
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any("language_model" in name for name in moved)
    assert not any("gen_vision_tower" in name for name in moved)
    if (reference := getattr(trainer, "ref_model", None)) is not None:
        assert type(trainer.accelerator.unwrap_model(reference)) is PiscesForConditionalGeneration
        frozen = trainer.accelerator.unwrap_model(reference).state_dict()
        assert all(torch.equal(weight, frozen[name]) for name, weight in before.items())
    assert (name != "sft") == (reference is not None)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_stock_trainer_adds_an_adapter_to_a_loaded_model(name, checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    settings = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    processor = AutoProcessor.from_pretrained(checkpoint)
    trainer = make_trainer(name, model, tmp_path / "run", peft_config=settings, processing_class=processor)
    trainer.train()
    trainer.save_model()
    moved = [name for name, weight in trainer.model.named_parameters() if "lora_B" in name and weight.any()]
    assert len(moved) == 4
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_reward_model_is_refused_by_name(checkpoint, tmp_path):
    rows = Dataset.from_list([{"chosen": words("assistant", "a"), "rejected": words("assistant", "b")}] * 2)
    with pytest.raises(
        ValueError, match=r"PiscesConfig.* for this kind of AutoModel: AutoModelForSequenceClassification"
    ):
        RewardTrainer(checkpoint, args=arguments(RewardConfig, tmp_path), train_dataset=rows)


def test_orpo_trains_text(installed, tmp_path):
    model = AutoModelForMultimodalLM.from_pretrained(installed)
    tokenizer = AutoProcessor.from_pretrained(installed).tokenizer
    args = arguments(ORPOConfig, tmp_path)
    rows = Dataset.from_list(TEXT_PREFERENCES)
    assert ORPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer).train().training_loss > 0


def test_every_auto_class_gives_its_class(checkpoint):
    for auto_class in (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM):
        assert type(auto_class.from_pretrained(checkpoint)) is PiscesForConditionalGeneration
    assert type(AutoModel.from_pretrained(checkpoint)) is PiscesModel


# ---- drawing -------------------------------------------------------------------------------------------------------


def make_drawing_trainer(folder: Path, model=None, rows=DRAWINGS, **settings) -> SFTTrainer:
    model = make_model() if model is None else model
    args = arguments(SFTConfig, folder, **{"max_length": None} | settings)
    rows = Dataset.from_list(rows)
    return SFTTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=make_processor())


def collate(trainer: SFTTrainer, rows: list[dict]) -> dict[str, torch.Tensor]:
    return dict(trainer.data_collator(copy.deepcopy(rows)))


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_stock_sft_trains_drawing_with_the_models_own_loss(head, tmp_path):
    """Text tokens and vectors with a loss share one count, the number of labels."""
    plain = make_model(gen_head_type=head, image_loss_weight=0.7)
    trainer = make_drawing_trainer(tmp_path, copy.deepcopy(plain))
    batch = collate(trainer, DRAWINGS[:2])
    torch.manual_seed(0)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.manual_seed(0)
    expected = plain.train()(**batch)
    count = (batch["labels"][:, 1:] != -100).sum()
    assert int(expected.num_image_vectors) == 8 and int(expected.num_text_tokens) == int(count) - 8
    wanted = (expected.text_loss_sum + 0.7 * expected.image_loss_sum) / count
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    loss.backward()
    wanted.backward()
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert plain.model.gen_head.output.weight.grad.any() and plain.model.gen_projector.linear_1.weight.grad.any()


def test_stock_sft_trains_drawing_through_an_adapter(tmp_path):
    settings = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["gen_head"])
    args = arguments(SFTConfig, tmp_path, max_length=None, gradient_accumulation_steps=2, max_steps=2)
    rows = Dataset.from_list(DRAWINGS)
    trainer = SFTTrainer(
        make_model(), args=args, train_dataset=rows, processing_class=make_processor(), peft_config=settings
    )
    head = trainer.model.base_model.model.model.gen_head.modules_to_save["default"].output.weight
    before = head.detach().clone()
    trainer.train()
    assert not torch.equal(head, before)


def test_a_drawn_picture_lowers_its_own_loss_while_training(tmp_path):
    """Only the image loss can see the head's bias, and only a trained one falls on the rows it is trained on."""
    trainer = make_drawing_trainer(tmp_path, max_steps=20, eval_strategy="steps", eval_steps=1)
    batch = collate(trainer, DRAWINGS)
    with torch.no_grad():
        before = trainer.model.eval()(**batch).image_loss
    trainer.train()
    with torch.no_grad():
        after = trainer.model.eval()(**batch).image_loss
    assert after < 0.7 * before
    losses = [point["eval_loss"] for point in trainer.state.log_history if "eval_loss" in point]
    assert losses[-1] < losses[0]


def test_the_evaluation_loss_holds_the_image_loss_too(tmp_path):
    trainer = make_drawing_trainer(tmp_path, per_device_eval_batch_size=4)
    batch = collate(trainer, DRAWINGS)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch)
    count = (batch["labels"][:, 1:] != -100).sum()
    wanted = (expected.text_loss_sum + expected.image_loss_sum) / count
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"label_smoothing_factor": 0.1, "loss_type": "nll"}, {"compute_loss_func": None}]
)
def test_a_loss_from_logits_alone_is_refused_for_drawings(settings, tmp_path):
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum()}
    extra = own if "compute_loss_func" in settings else {}
    args = arguments(SFTConfig, tmp_path, max_length=None, **{} if extra else settings)
    rows = Dataset.from_list(DRAWINGS)
    trainer = SFTTrainer(make_model(), args=args, train_dataset=rows, processing_class=make_processor(), **extra)
    with pytest.raises(ValueError, match=r"knows text alone and would not train drawing.*PiscesSFTTrainer"):
        trainer.train()


def test_a_picture_drawn_before_is_context_for_any_stock_loss(tmp_path):
    """Without a label on the vectors there is nothing to refuse."""
    trainer = make_drawing_trainer(tmp_path)
    batch = collate(trainer, DRAWINGS[:2])
    batch["labels"][batch["labels"] == trainer.model.config.gen_image_token_id] = -100
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        expected = trainer.model(**batch)
    torch.testing.assert_close(loss, expected.text_loss, rtol=1e-5, atol=0)


def test_a_trainers_forward_without_losses_per_token_is_refused_for_drawings(tmp_path):
    """As of TRL before 1.16, which fuses cross entropy in one number."""
    model = make_model().train()
    source = "def forward(self, **kwargs):\n    self.model(**{n: v for n, v in kwargs.items() if n != 'labels'})\n"
    place = {"__name__": "trl.trainer.sft_trainer"}
    exec(source, place)
    model.forward = place["forward"].__get__(model)
    batch = collate(make_drawing_trainer(tmp_path), DRAWINGS[:2])
    with pytest.raises(ValueError, match=r"of a TRL before 1\.16.*knows text alone"):
        model(**batch)


# ---- published code ------------------------------------------------------------------------------------------------


ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_pisces":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
folder, out = sys.argv[1:]
asked = [{"role": "user", "content": [{"type": "text", "text": "draw"}]}]
drawn = [{"role": "assistant", "content": [{"type": "image"}]}]
rows = [{"messages": asked + drawn, "images": [Image.new("RGB", (16, 16), (seed, 9, 99))]} for seed in (0, 200)]
common = dict(output_dir=out, max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", max_length=None)
try:
    SFTTrainer(folder, args=SFTConfig(**common), train_dataset=Dataset.from_list(rows))
except ValueError as error:
    print("UNTRUSTED", "trust_remote_code=True" in str(error))
trusted = common | {"trust_remote_code": True}
trainer = SFTTrainer(folder, args=SFTConfig(**trusted), train_dataset=Dataset.from_list(rows))
head = trainer.model.model.gen_head.output.weight
before = head.detach().clone()
trainer.train()
print("SFT", type(trainer.model).__module__.split(".")[0], type(trainer.model).__name__, not head.equal(before))
words = {"prompt": asked, "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}
trainer = DPOTrainer(folder, args=DPOConfig(**trusted), train_dataset=Dataset.from_list([words] * 2))
trainer.train()
print("DPO", type(trainer.ref_model).__name__)
"""


@pytest.mark.slow  # a process of its own imports everything again
def test_published_code_trains_where_the_package_is_not_installed(exported, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ALONE, exported, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UNTRUSTED True" in done.stdout
    assert "SFT transformers_modules PiscesForConditionalGeneration True" in done.stdout
    assert "DPO PiscesForConditionalGeneration" in done.stdout
