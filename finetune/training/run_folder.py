"""What a finished run leaves in its folder: adapter, `run.yaml`, processor and card; and the push to the Hub.

Called by the recipes after training. Checkpoints of the run lie beside these files and are never pushed: they hold the
optimizer's state, which is of no use to others and no safetensors.
"""

import json
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import PartialState
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.utils import logging

from finetune.guard.guard import guard_record, guard_table, guarded_rows
from finetune.guard.verdict import advice, judge_run
from finetune.training.adapter_card import write_card
from finetune.training.adapters import AdapterConfig
from finetune.training.checkpoints import last_complete_checkpoint, may_be_full
from finetune.training.learning_rate import rule_for
from finetune.training.recipe import RecipeArguments, Rows
from finetune.training.sft_config import PiscesSFTConfig
from finetune.training.sft_trainer import PiscesSFTTrainer
from finetune.training.starts import (
    STARTED_FILE,
    check_start,
    finished_steps,
    identify_base,
    keep_start,
    meaning_of,
    train,
)
from modeling_pisces.hub.publish import stage_adapter
from pisces_commands.measurement import current_commit, describe_hardware
from pisces_commands.writing import WriteError, scratch_folder, write_json, write_whole


logger = logging.get_logger(__name__)

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "torchao")
SHEET = "learned.png"


class RunStart(NamedTuple):
    """What a run begins with; from `begin_run`, for `train_run`."""

    recipe: str
    settings: dict[str, Any]
    base: tuple[str, str | None]
    data: Any
    resume: bool
    length: dict[str, float]


def begin_run(
    name: str, recipe: RecipeArguments, training: PiscesSFTConfig, adapter: AdapterConfig
) -> RunStart | None:
    """Judge a run before any heavy work: its push, and that its folder was not begun with something else.

    Returns:
        what `train_run` needs; None if the folder holds the finished run that is asked for. Nothing in it is changed
        then, and it is pushed if that was asked for.

    Raises:
        ValueError: as `check_push` and `starts.check_start`.
    """
    check_push(recipe, training, adapter)
    folder = training.output_dir
    settings = meaning_of(recipe, training, adapter)
    base = identify_base(str(adapter.model_name_or_path), adapter.model_revision)
    length = {name: getattr(training, name) for name in ("max_steps", "num_train_epochs")}
    length["min_steps"] = getattr(recipe, "min_steps", 0)
    start = RunStart(name, settings, base, recipe.data, recipe.resume, length)
    if not recipe.resume:
        return start
    check_start(folder, name, settings, base)
    steps = finished_steps(folder, start.length)
    if steps is None or recipe.dry_run:
        return start
    print(
        f"{folder} holds this run, finished with {steps} steps: nothing was trained and nothing changed. To train on, "
        "raise --max_steps; to train something else, choose another --output_dir."
    )
    if training.push_to_hub and PartialState().is_main_process:
        print(f"pushed: {push_run(Path(folder), training, recipe.base_model_id)}")
    return None


def train_run(trainer: Trainer, start: RunStart, rows: Rows) -> None:
    """Record the start in the run's folder and train, from the last complete checkpoint if there is one.

    Raises:
        ValueError: the folder was begun with other data.
    """
    recipe, settings, base, data, resume, length = start
    if trainer.args.max_steps <= 0 < length["min_steps"]:
        steps = math.ceil(trainer.args.num_train_epochs * steps_per_epoch(trainer))
        trainer.args.max_steps = int(length["min_steps"]) if steps < length["min_steps"] else -1
    command = command_line(recipe, sys.argv[1:])
    keep_start(trainer.args.output_dir, recipe, settings, base, (data, rows.identity), command, not resume, length)
    train(trainer, resume)


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps of one pass over the rows that are trained, over all processes."""
    batches = len(trainer.get_train_dataloader())  # of this process
    return max(1, math.ceil(batches / trainer.args.gradient_accumulation_steps))


def save_run(
    trainer: PiscesSFTTrainer,
    name: str,
    recipe: RecipeArguments,
    adapter: AdapterConfig,
    rows: Rows,
) -> Path:
    """Write adapter, processor, `run.yaml` and card into the run's folder, and push them if asked.

    Returns:
        the folder.

    Raises:
        WriteError: the disk is full; the message names the checkpoint that holds the same weights.
        ValueError: `--push_to_hub` with a base that others cannot find.
    """
    folder = Path(trainer.args.output_dir)
    try:
        trainer.save_model(str(folder), _internal_call=True)  # gathers shards; the push is ours, below
        if trainer.is_world_process_zero():
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle
            store_adapter_in(folder, adapter.adapter_dtype)
            _write_records(trainer, folder, name, recipe, adapter, rows)
    except Exception as error:
        if not may_be_full(error):
            raise
        last = last_complete_checkpoint(folder)
        raise WriteError(
            f"the adapter could not be written to {folder} ({' '.join(str(error).split())}). "
            f"{f'Its weights are safe in {last}' if last else 'No checkpoint was kept'}. Free some space and start "
            "the same command again: nothing is trained twice."
        ) from error
    if not (folder / "adapter_model.safetensors").is_file() and trainer.is_world_process_zero():
        raise WriteError(
            f"{folder} got no adapter_model.safetensors. Under FSDP set fsdp_state_dict_type: FULL_STATE_DICT."
        )
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        print(f"pushed: {push_run(folder, trainer.args)}")
    return folder


def _write_records(trainer, folder: Path, name: str, recipe, adapter: AdapterConfig, rows: Rows) -> None:
    learned = _judge(trainer, folder, recipe, adapter, rows)
    facts = {
        "recipe": name,
        "base_model": recipe.base_model_id or adapter.model_name_or_path,
        "adapter_id": trainer.args.hub_model_id or str(folder),
        "data": describe_rows(recipe.data, rows),
    }
    if learned:
        facts["learned"] = learned["said"]
    if (guard := guard_record(trainer)) is not None:
        facts["guard"] = guard_table(guard)
    record = run_record(name, recipe, trainer.args, adapter) | {
        "learning_rate": {
            "used": trainer.args.learning_rate,
            "rule": rule_for(trainer.model, trainer.args, adapter.flavour),
            "width": trainer.model.config.text_config.hidden_size,
        },
        "data": facts["data"],
        "guard": guard,
        "learned": learned,
        "steps": trainer.state.global_step,
        "starts": json.loads((folder / STARTED_FILE).read_text(encoding="utf-8"))["starts"],
        "curve": trainer.state.log_history,
    }
    _name_base(folder, str(facts["base_model"]), adapter.model_revision)
    write_card(folder, trainer.model, trainer.state.log_history, facts)
    # last: where it is, the run is finished
    write_whole(folder / "run.yaml", yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


def _judge(trainer, folder: Path, recipe, adapter: AdapterConfig, rows: Rows) -> dict[str, Any] | None:
    """Say whether the run learned its pictures, and write the sheet; None where nothing can be drawn."""
    if not recipe.judge_rows or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    source = {"revision": adapter.model_revision, "trust_remote_code": trainer.args.trust_remote_code}
    heldout = guarded_rows(trainer, "editing") or guarded_rows(trainer, "drawing") or trainer.eval_dataset
    try:
        verdict = judge_run(
            trainer, str(adapter.model_name_or_path), rows.dataset, heldout, recipe.judge_rows, **source
        )
    except (ValueError, OSError, RuntimeError) as error:  # the adapter is trained and saved: nothing of that is lost
        logger.warning(
            f"the run could not be judged ({' '.join(str(error).split())[:300]}). --judge_rows 0 leaves it."
        )
        return None
    if verdict is None:
        return None
    facts, picture = verdict
    write_whole(folder / SHEET, picture.save)
    num_seen = trainer.state.global_step * meaning_of(trainer.args)["rows_per_step"]
    change = advice(facts["trained"], adapter.flavour, num_seen / max(1, len(rows.lengths or [1])))
    print(f"learned: {facts['said']} Look at {folder / SHEET}.", flush=True)
    if change:
        logger.warning(f"this run has hardly learned its pictures: {facts['said']} {change}")
    return {**facts, "advice": change}


def store_adapter_in(folder: Path, dtype: str) -> None:
    """Store a finished adapter in another dtype; checkpoints of the run, from which it goes on, stay in fp32.

    Raises:
        ValueError: float16 cannot hold a value.
    """
    path = folder / "adapter_model.safetensors"
    if dtype == "float32" or not path.is_file():
        return
    state = {name: value.to(getattr(torch, dtype)) for name, value in load_file(path).items()}
    if lost := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"--adapter_dtype {dtype}: {lost[0]} has values that it cannot hold. Use bfloat16.")
    write_whole(path, lambda target: save_file(state, target, metadata={"format": "pt"}))


def _name_base(folder: Path, base: str, revision: str | None) -> None:
    """Let the adapter name its base as others find it; PEFT writes whatever path it was loaded from."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"], config["revision"] = base, None if revision == "main" else revision
    write_json(path, config, indent=2)


def run_record(
    name: str, recipe: RecipeArguments, training: PiscesSFTConfig, adapter: AdapterConfig
) -> dict[str, Any]:
    """All settings of a run, and where it ran, as plain YAML values."""
    settings = {"recipe": asdict(recipe), "training": training.to_dict(), "adapter": asdict(adapter)}
    return {
        "recipe": name,
        "command": command_line(name, sys.argv[1:]),
        "commit": current_commit(),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "hardware": describe_hardware(),
        "settings": json.loads(json.dumps(settings, default=str)),
    }


def command_line(name: str, arguments: Sequence[str]) -> str:
    """The command of a run, without the token that it may have been given."""
    words = list(arguments)
    for place, word in enumerate(words):
        if place and words[place - 1] == "--hub_token":
            words[place] = "..."
        elif word.startswith("--hub_token="):
            words[place] = "--hub_token=..."
    return shlex.join(["python", "-m", f"finetune.{name}", *words])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_rows(data: Any, rows: Rows) -> str:
    """One sentence: sources, number of rows, sides, what was left out."""
    if rows.lengths is None:
        return f"{data}: a stream."
    sides = ", ".join(f"{count} {side}" for side, count in sorted(rows.sides.items()))
    left_out = f"; {len(rows.too_long)} were too long and left out" if rows.too_long else ""
    return f"{data}: {len(rows.lengths)} rows ({sides}){left_out}."


def check_push(recipe: RecipeArguments, training: PiscesSFTConfig, adapter: AdapterConfig) -> None:
    """Refuse, before training, a push that could not be used: no name, or a base that only this machine has.

    Raises:
        ValueError: with the flag to add.
    """
    if not training.push_to_hub:
        return
    if not training.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id OWNER/NAME.")
    if Path(str(adapter.model_name_or_path)).is_dir() and not recipe.base_model_id:
        raise ValueError(
            f"--push_to_hub: the base {adapter.model_name_or_path} is a folder of this machine. Add --base_model_id "
            "OWNER/NAME, under which others find it."
        )


def push_run(folder: Path, training: PiscesSFTConfig, base: str | None = None) -> str:
    """Push adapter, processor, card and `run.yaml` in one commit, to a private repository unless told otherwise.

    Args:
        folder: of a finished run, which stays as it is; checkpoints and logs are not sent.
        training: names the repository.
        base: Hub id of the base, if the folder names another one.

    Returns:
        the commit's URL.
    """
    api = HfApi(token=training.hub_token)
    repo_id = api.create_repo(training.hub_model_id, private=training.hub_private_repo, exist_ok=True).repo_id
    with scratch_folder(folder) as held:
        staged = held / "adapter"
        names = stage_adapter(folder, staged, base, repo_id)
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=staged / name) for name in names]
        # not upload_folder: it may send several commits, and the first of them would be half an adapter
        return str(api.create_commit(repo_id, additions, commit_message="Upload a Pisces adapter").commit_url)
