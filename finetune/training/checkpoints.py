"""Checkpoints of a run in progress: written whole or removed, and found again after the machine went away.

transformers' Trainer writes `checkpoint-N` file by file. A run that dies in the middle leaves a folder that looks like
the newest checkpoint and cannot be loaded. `PiscesSFTTrainer` writes inside `whole_or_nothing`; recipes resume from
`last_complete_checkpoint`.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from pisces_commands.writing import WriteError, is_write_error


logger = logging.get_logger(__name__)

# What Trainer writes before its state, which comes last; weights are looked at apart.
RESUME_FILES = ("scheduler.pt", "trainer_state.json")
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "latest")  # of one process or DDP, of FSDP, of DeepSpeed


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a run's folder that can be resumed from; None if there is none.

    Incomplete ones are named in a warning and left alone: the run will write them again.
    """
    folder = Path(folder)
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        missing = what_is_missing(path)
        if missing is None:
            return str(path)
        logger.warning(f"{path} is not complete ({missing}); looking for an older checkpoint.")
    return None


def may_be_full(error: Exception) -> bool:
    """Whether saving may have failed for want of space; torch says it in a RuntimeError without a number."""
    return isinstance(error, RuntimeError) or is_write_error(error)


def what_is_missing(checkpoint: Path) -> str | None:
    """The first thing that keeps a checkpoint from being resumed, in words; None if it is complete."""
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no *.safetensors"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # checks the header against the size of the file
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name}: {error}"
    if not any((checkpoint / name).is_file() for name in OPTIMIZER_FILES):
        return f"no {OPTIMIZER_FILES[0]}"
    for name in RESUME_FILES:
        if not (checkpoint / name).is_file():
            return f"no {name}"
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return f"trainer_state.json: {error}"
    step = int(checkpoint.name.split("-")[1])
    return None if state["global_step"] == step else f"trainer_state.json is of step {state['global_step']}"


@contextmanager
def whole_or_nothing(checkpoint: Path) -> Iterator[None]:
    """Write `checkpoint` inside the block; if that fails, it is removed and the error says where to go on.

    Every process of a run enters the block; one of them removes what an earlier attempt left.

    Raises:
        WriteError: writing failed; names the folder, the reason and the last checkpoint that is complete.
    """
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)  # of an earlier attempt: its files must not complete ours
    state.wait_for_everyone()
    try:
        yield
    except Exception as error:
        if not may_be_full(error):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        last = last_complete_checkpoint(checkpoint.parent)
        kept = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint yet"
        free_gib = shutil.disk_usage(checkpoint.parent).free / 2**30
        raise WriteError(
            f"{checkpoint} could not be written ({' '.join(str(error).split())}; {free_gib:.2f} GiB free) and was "
            f"removed. {kept}. Free some space or lower --save_total_limit, then start the same command again: it "
            "goes on from there."
        ) from error


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse to keep trained weights that are not numbers.

    Raises:
        FloatingPointError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2: this process's shard
        if parameter.requires_grad and not torch.isfinite(local).all():
            raise FloatingPointError(
                f"step {step}: {name} holds NaN or infinity, so no checkpoint was written. Lower --learning_rate, set "
                "--max_grad_norm 1.0, or train in --bf16 instead of --fp16, and start the same command again: it goes "
                "on from the last complete checkpoint."
            )
