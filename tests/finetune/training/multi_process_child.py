"""One process of a training run over several; `test_multi_process.py` starts it and reads what it leaves.

    torchrun --standalone --nproc_per_node 2 -m tests.finetune.training.multi_process_child FOLDER

It trains every case of `CASES` by turns and leaves, in FOLDER/CASE, the curve, the weights, a saved model, and what
was really distributed. `train_case` is also what the test calls for the single process to compare with. How the
processes work together is the launcher's to say, as in a run of a user.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset, SequentialSampler

from finetune.data.collator import PiscesDataCollator
from finetune.training.adapters import train_in_full_precision
from finetune.training.checkpoints import last_complete_checkpoint
from finetune.training.sft_config import PiscesSFTConfig
from finetune.training.sft_trainer import PiscesSFTTrainer
from tests.finetune.lora_fixtures import ListRows, make_adapted, make_rows
from tests.fixtures import make_model, make_processor


WORLD_SIZE = 2
ROWS_PER_PROCESS = 2


@dataclass(frozen=True)
class Case:
    """What is trained, and the rows: process 0 takes the first two of every four, process 1 the others."""

    trained: str
    kinds: str
    accumulation: int = 1
    bf16: bool = False  # the frozen weights and the computation, as on a GPU
    stream: bool = False
    checkpointing: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.kinds) // (WORLD_SIZE * ROWS_PER_PROCESS * self.accumulation)


CASES = {
    "portable_apart": Case("portable", "uuddttdduudd"),
    "full_apart": Case("full", "uuddddtuuudd"),  # the sides change places
    "full_mixed": Case("full", "udtedtuuudtedetuuted" + "ddtu", accumulation=2),
    "everything_apart": Case("everything", "uuddddtuuudd"),
    "tower_apart": Case("everything and the vision tower", "uuddttdduudd"),
    "stream_apart": Case("portable", "dduuuuddttdd", stream=True),
    "checkpointed_apart": Case("full", "uuddttddutdd", checkpointing=True),
    "bf16_apart": Case("full", "uudduudduudd", bf16=True),
}
RESUMED = "full_apart"
EVAL_KINDS = "udted"  # five rows: the last round of two processes with two rows each has one row and three repeats

ASKED_KINDS = "ude"


class Stream(IterableDataset):
    """The rows of a case, without a length."""

    def __init__(self, kinds: str):
        self.kinds = kinds

    def __iter__(self):
        return iter(make_rows(self.kinds))


class InOrder(PiscesSFTTrainer):
    """Takes rows as they lie, so that a case can say which process sees what, and notes what this one saw."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sides: list[str] = []

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        pictures = {"u": "pixel_values", "d": "gen_pixel_values"}
        self.sides.append("".join(letter for letter, name in pictures.items() if inputs.get(name) is not None))
        return super().compute_loss(model, inputs, *args, **kwargs)


def make_case_model(case: Case):
    """The model of a case, its adapter (if any) moved away from its start, where one half of it has no gradient."""
    if case.trained in ("portable", "full"):
        model = make_adapted(case.trained)
        if case.bf16:
            train_in_full_precision(model.bfloat16())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator)
        return model
    model = make_model()
    model.model.gen_vision_tower.requires_grad_(False)
    model.model.vision_tower.requires_grad_("tower" in case.trained)
    return model


def make_case_trainer(case: Case, folder: Path, num_processes: int, **settings) -> PiscesSFTTrainer:
    rows = ROWS_PER_PROCESS * WORLD_SIZE // num_processes
    args = PiscesSFTConfig(
        output_dir=str(folder),
        max_steps=case.num_steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=ROWS_PER_PROCESS,
        gradient_accumulation_steps=case.accumulation,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        bf16=case.bf16,
        gradient_checkpointing=case.checkpointing,
        disable_tqdm=True,
        report_to="none",
        **{"save_strategy": "no", **settings},
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    return InOrder(
        model=make_case_model(case),
        args=args,
        train_dataset=Stream(case.kinds) if case.stream else ListRows(make_rows(case.kinds)),
        eval_dataset=ListRows(make_rows(EVAL_KINDS)),
        processing_class=make_processor(),
    )


def whole_weights(trainer: PiscesSFTTrainer) -> dict[str, torch.Tensor]:
    """Name -> whole tensor of everything that is trained; every process has to call it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named.items()}


def train_case(name: str, folder: Path, num_processes: int = 1) -> PiscesSFTTrainer:
    """Train, evaluate and save one case; what is found is written by the first process."""
    case, folder = CASES[name], folder / name
    trainer = make_case_trainer(case, folder, num_processes)
    trainer.train()
    (folder / f"sides_{trainer.args.process_index}.json").write_text(json.dumps(trainer.sides))
    evaluation = trainer.evaluate()
    weights, logits = whole_weights(trainer), answer(trainer)
    trainer.save_model(str(folder / "saved"))
    if trainer.is_world_process_zero():
        save_file(weights, folder / "weights.safetensors")
        save_file({"logits": logits}, folder / "answer.safetensors")
        facts = describe(trainer) | {"curve": trainer.state.log_history, "evaluation": evaluation}
        (folder / "facts.json").write_text(json.dumps(facts))
    return trainer


def answer(trainer: PiscesSFTTrainer) -> torch.Tensor:
    """What the trained model says to some rows, before it is saved; every process has to call it."""
    batch = PiscesDataCollator(make_processor())(make_rows(ASKED_KINDS))
    with torch.no_grad():
        return trainer.model.eval()(**batch).logits.clone()


def describe(trainer: PiscesSFTTrainer) -> dict:
    """What was really distributed, and how."""
    sharded = [n for n, p in trainer.model.named_parameters() if isinstance(p, DTensor)]
    halves = [
        n for n, p in trainer.model.named_parameters() if isinstance(p, DTensor) and p.to_local().numel() < p.numel()
    ]
    return {
        "world_size": trainer.args.world_size,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "wrapper": type(trainer.model_wrapped).__name__,
        "is_fsdp_enabled": trainer.is_fsdp_enabled,
        "num_parameters": len(list(trainer.model.parameters())),
        "num_sharded": len(sharded),
        "num_divided": len(halves),
    }


def resume_case(name: str, folder: Path) -> None:
    """Train again from the checkpoint after the first step; leaves the weights at the end."""
    case, folder = CASES[name], folder / f"{name}_resumed"
    make_case_trainer(case, folder, WORLD_SIZE, save_strategy="steps", save_steps=1, save_total_limit=None).train()
    state = PartialState()
    if state.is_main_process:
        for step in range(2, case.num_steps + 1):
            shutil.rmtree(folder / f"checkpoint-{step}")
    state.wait_for_everyone()
    trainer = make_case_trainer(case, folder, WORLD_SIZE)
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = whole_weights(trainer)
    if state.is_main_process:
        save_file(weights, folder / "weights.safetensors")
        facts = {"checkpoint": checkpoint, "num_batches": len(trainer.sides), "curve": trainer.state.log_history}
        (folder / "facts.json").write_text(json.dumps(facts))


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard on a CPU, which torch can and accelerate passes over without a word, taking DDP.

    accelerate turns to FSDP where processes each have an accelerator; this says so, with the device still "cpu" and
    the backend still gloo. Everything after that is the path of a GPU: its `fully_shard`, checkpoints, evaluation.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in CASES:
        train_case(name, folder, WORLD_SIZE)
    resume_case(RESUMED, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
