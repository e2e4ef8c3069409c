"""What a run folder remembers of its first start, and what may differ when the command is given again.

A run that is resumed goes on with the settings it began with: its optimizer, its schedule and its order of rows come
from there. Other settings would train something that no record describes, so `check_start` refuses them before any
heavy work, with the old and the new value; what leaves the result alone (length, saving, logging, pushing, the
machine) may change. Every recipe and every `train_*` command comes through here: `check_start`, `keep_start`, `train`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer, TrainerState
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from finetune.data.schema import Row
from finetune.training.checkpoints import last_complete_checkpoint
from pisces_commands.measurement import current_command, current_commit, hash_files
from pisces_commands.writing import write_json


logger = logging.get_logger(__name__)

STARTED_FILE = "started.json"
# What may change from start to start, by the beginning of its name: length, saving, logging, watching, pushing, and
# where and how fast it is computed.
MAY_CHANGE = (
    "max_steps", "min_steps", "num_train_epochs", "save_", "logging_", "log_", "eval_", "do_", "report_to",
    "run_name", "project", "trackio", "hub_", "push_to_hub", "base_model_id", "output", "results", "heldout",
    "resume", "dry_run", "guard_", "judge_", "picture_cache", "dataloader_", "num_workers", "ddp_", "fsdp",
    "deepspeed", "parallelism", "accelerator_config", "torch_compile", "use_cpu", "bf16", "fp16", "tf32",
    "gradient_checkpointing", "activation_", "attn_implementation", "include_", "disable_tqdm", "debug",
    "skip_memory_metrics", "enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "trust_remote_code", "restore_callback_states", "local_rank", "torch_empty_cache_steps",
    "use_liger_kernel", "ignore_data_skip", "average_tokens_across_devices",
)  # fmt: skip
# Compared by what they name, not by their names
IDENTITIES = ("model_name_or_path", "model_revision", "checkpoint", "data")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def meaning_of(*settings: Any) -> dict[str, Any]:
    """What must stay as it is from start to start, of dataclasses of flags: name -> plain JSON value.

    Batch size, accumulation and processes count by their product, the rows of a step.
    """
    values: dict[str, Any] = {}
    for flags in settings:
        if is_dataclass(flags) and not isinstance(flags, type) and not hasattr(flags, "to_dict"):
            values |= asdict(flags)
        else:
            values |= flags.to_dict() if hasattr(flags, "to_dict") else flags
    if BATCH[0] in values:
        values["rows_per_step"] = values[BATCH[0]] * values.get(BATCH[1], 1) * PartialState().num_processes
    kept = {k: v for k, v in values.items() if not k.startswith(MAY_CHANGE) and k not in (*IDENTITIES, *BATCH)}
    return json.loads(json.dumps(kept, default=str))


def check_start(folder: str | Path, recipe: str, settings: Mapping[str, Any], base: tuple[str, str | None]) -> None:
    """Refuse to go on with a run that was begun with other settings or on other weights.

    Args:
        folder: of the run; one without `started.json` or `run.yaml` is new.
        recipe: name of the command.
        settings: from `meaning_of`.
        base: from `identify_base`.

    Raises:
        ValueError: names the old and the new values, and the ways out.
    """
    began = _read(folder)
    if began is None:
        return
    if began["recipe"] != recipe:
        raise _refusal(folder, [("the recipe", began["recipe"], recipe)])
    both = [name for name in settings if name in began["settings"]]  # a newer library may have a new option
    changed = [(name, began["settings"][name], settings[name]) for name in both]
    changed = [item for item in changed if item[1] != item[2]]
    old_base = began.get("base")
    if old_base and base[1] and old_base["identity"] not in (None, base[1]):
        changed.insert(0, ("the base", " ".join(old_base.values()), " ".join(filter(None, base))))
    if changed:
        raise _refusal(folder, changed)


def keep_start(
    folder: str | Path,
    recipe: str,
    settings: Mapping[str, Any],
    base: tuple[str, str | None],
    data: tuple[Any, str | None],
    command: str,
    anew: bool = False,
    length: Mapping[str, float] | None = None,
) -> None:
    """Write `started.json`, or check the data against it and list this start there; the last step before training.

    Args:
        folder, recipe, settings, base: as for `check_start`.
        data: what the user named, and the rows' identity from `identify_rows`; None for a stream.
        command: of this start, for the list.
        length: "max_steps", "num_train_epochs" and "min_steps" as asked for, for `finished_steps`.
        anew: `--resume False`: the run begins again, and what an earlier one left to resume from is removed.

    Raises:
        ValueError: the data is not that of the first start.
    """
    folder, named = Path(folder), json.loads(json.dumps(data[0], default=str))
    began = None if anew else _read(folder)
    if began is not None and (old := began.get("data")):
        is_same = old["identity"] == data[1] if old["identity"] and data[1] else old["named"] == named
        if not is_same:
            raise _refusal(folder, [("the data", f"{old['named']} ({old['identity']})", f"{named} ({data[1]})")])
    if not PartialState().is_main_process:
        return
    if anew:
        _remove_checkpoints(folder)
    start = {"command": command, "commit": current_commit(), "length": dict(length or {})}
    content = {
        "recipe": recipe,
        "settings": dict(settings),
        "base": {"named": str(base[0]), "identity": base[1]},
        "data": {"named": named, "identity": data[1]},
        **{key: value for key, value in (began or {}).items() if key != "starts"},
        "starts": [*(began or {}).get("starts", []), start],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED_FILE, content)


def _read(folder: str | Path) -> dict[str, Any] | None:
    """What the first start left; of a run that an earlier version finished, its `run.yaml`."""
    path = Path(folder) / STARTED_FILE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if (record := read_record(folder)) and isinstance(record.get("settings"), dict):
        return {"recipe": record["recipe"], "settings": meaning_of(*record["settings"].values())}
    return None


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The `run.yaml` of a finished run."""
    path = Path(folder) / "run.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def _refusal(folder: str | Path, changed: Sequence[tuple[str, Any, Any]]) -> ValueError:
    listed = "; ".join(f"{name} {old!r}, now {new!r}" for name, old, new in changed[:4])
    more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
    return ValueError(
        f"{folder} was begun with other settings: {listed}{more}. A run goes on as it began: give the old values "
        "again, or choose another output folder."
    )


def _remove_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        logger.warning(f"{path} is of an earlier run and was removed, because resuming is turned off.")
        shutil.rmtree(path, ignore_errors=True)


def finished_steps(folder: str | Path, length: Mapping[str, float]) -> int | None:
    """How many steps a finished run has, if what is asked for now needs no more; None if there is something to train.

    Args:
        folder: of the run.
        length: "max_steps" (below 1 the others count), "num_train_epochs" and "min_steps", as asked for now.
    """
    record = read_record(folder)
    if not record or "steps" not in record or not (Path(folder) / "adapter_model.safetensors").is_file():
        return None
    if length["max_steps"] > 0:
        return record["steps"] if record["steps"] >= length["max_steps"] else None
    before = record["starts"][-1]["length"]
    if before.get("max_steps", 1) > 0 or record["steps"] < length["min_steps"]:
        return None
    return record["steps"] if before["num_train_epochs"] >= length["num_train_epochs"] else None


def train(trainer: Trainer, resume: bool = True) -> None:
    """Train from the last complete checkpoint of the trainer's folder; if that has all the steps, load it and stop.

    transformers' Trainer asks for the end after a step, never before: resumed at its last step in the middle of an
    epoch, it would train one more.
    """
    last = last_complete_checkpoint(trainer.args.output_dir) if resume else None
    step = int(last.rsplit("-", 1)[1]) if last else 0
    if last is None or not 0 < trainer.args.max_steps <= step:
        trainer.train(resume_from_checkpoint=last)
        return
    trainer._load_from_checkpoint(last)
    trainer.state = TrainerState.load_from_json(os.path.join(last, "trainer_state.json"))
    handler, (args, state, control) = trainer.callback_handler, (trainer.args, trainer.state, trainer.control)
    handler.on_train_begin(args, state, control)  # the guard reads its points, the average of weights is loaded
    handler.on_train_end(args, state, control)


def identify_base(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """A checkpoint's name and what tells two of one name apart: a hash of a folder's weights, or the Hub's commit.

    A folder's files are read once (seconds for each 8 GiB).
    """
    name = str(name)
    if not PartialState().is_main_process:  # one process judges for all
        return name, None
    if Path(name).is_dir():
        weights = sorted(path for path in Path(name).iterdir() if path.suffix in (".safetensors", ".bin"))
        return name, f"sha256 {hash_files(weights)}" if weights else None
    try:
        validate_repo_id(name)
    except HFValidationError:  # loading says what is wrong with the name
        return name, None
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    optional = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    commit = extract_commit_hash(cached_file(name, "config.json", revision=revision, **optional), None)
    return name, f"commit {commit}" if commit else None


def identify_rows(rows: Iterable[Row]) -> str:
    """A hash over ids, words, and names and sizes of pictures, whose pixels are not read."""
    digest = hashlib.sha256()
    for row in rows:
        turns = [row.get(name, []) for name in ("messages", "prompt", "chosen", "rejected")]
        said = [[m["role"], m.get("train", True), [_part(p) for p in m["content"]]] for turn in turns for m in turn]
        digest.update(json.dumps([row.get("id"), said]).encode())
    return f"sha256 {digest.hexdigest()[:16]}"


def identify_folders(folders: Iterable[str | Path]) -> str:
    """A hash over names and sizes of the files of data folders, but for what a command keeps there for itself."""
    digest = hashlib.sha256()
    for folder in map(Path, folders):
        files = (path for path in folder.rglob("*") if path.is_file() and "gen_vectors-" not in str(path))
        for path in sorted(files):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
    return f"sha256 {digest.hexdigest()[:16]}"


def train_part(trainer: Trainer, name: str, run: Any, base: str | None = None) -> None:
    """`check_start`, `keep_start` and `train` for the `train_*` commands, whose flags are one dataclass.

    Args:
        trainer: its output folder keeps the checkpoints, and `started.json` beside them.
        name: of the command.
        run: its flags, with `data` and `resume`.
        base: checkpoint folder that the command starts from, if it does.

    Raises:
        ValueError: the folder was begun with other settings, data or weights.
    """
    folder, settings = trainer.args.output_dir, meaning_of(run)
    start = identify_base(base) if base else ("", None)
    if run.resume:
        check_start(folder, name, settings, start)
    data = (run.data, identify_folders(run.data))
    keep_start(folder, name, settings, start, data, current_command(), anew=not run.resume)
    train(trainer, run.resume)


def _part(part: dict[str, Any]) -> Any:
    if part["type"] == "text":
        return part["text"]
    picture = part["image"]
    if isinstance(picture, str) and os.path.isfile(picture):
        return [os.path.basename(picture), os.path.getsize(picture)]
    return len(picture) if isinstance(picture, (str, bytes)) else list(getattr(picture, "size", []))
