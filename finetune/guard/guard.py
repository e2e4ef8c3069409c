"""The guard: a few rows of each side and some plain text, measured before, during and after training.

The language model serves both sides, so that learning to draw can cost answers, learning to answer can cost drawings,
both can cost what it knew without pictures, and no number of the run itself would show it. Recipes call
`load_guard_rows` (in `guard.rows`) and `add_guard`; `TwoSidedGuard` is a callback for any `Trainer` of a Pisces. It
prints, logs through the trainer to whatever `--report_to` names, writes `guard.json` and sheets of drawings, and warns
when a side falls. `run.yaml` and the card get their part from `guard_record`. How a side is measured is in
`guard.metrics`, pixels are in `guard.pictures`.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from finetune.data.schema import Row
from finetune.guard.metrics import (
    Metrics,
    measure_drawing,
    measure_editing,
    measure_losses,
    measure_understanding,
    right_texts,
)
from finetune.guard.pictures import load_decoder, make_sheet, report_picture
from finetune.guard.rows import GuardArguments
from finetune.guard.table import point_table
from pisces_commands.writing import write_json, write_whole


logger = logging.get_logger(__name__)

GUARD_FILE = "guard.json"
SIDES = ("understanding", "drawing", "editing", "text")
LEAST_RIGHT = 0.1  # of the texts, before training: a model that knows no text gets one of 56 by chance
MEANS_LESS = ("text_loss", "image_loss")  # the metrics that fall when things get better, judged in proportion


class Fall(NamedTuple):
    """A metric that got worse by more than the tolerance."""

    side: str
    metric: str
    before: float
    now: float


def add_guard(
    trainer: Trainer, rows: Mapping[str, Sequence[Row]], flags: GuardArguments, settings: Any, trained: Sequence[str]
) -> "TwoSidedGuard | None":
    """Watch a recipe's run; without rows there is nothing to add.

    Args:
        trainer: the recipe's, before it trains.
        rows: from `load_guard_rows`.
        flags: the guard's flags.
        settings: the recipe's `AdapterConfig`; names the checkpoint, whose decoder makes the sheets.
        trained: the sides that the recipe trains: "understanding", "generation", "editing".
    """
    if not rows:
        return None
    decoder = None
    if rows.keys() & {"drawing", "editing"}:
        source = {"revision": settings.model_revision, "trust_remote_code": trainer.args.trust_remote_code}
        model = base_of(trainer.model)
        decoder = load_decoder(settings.model_name_or_path, model, trainer.processing_class, **source)
    sides = ["drawing" if side == "generation" else side for side in trained]
    guard = TwoSidedGuard(trainer, rows, sides, flags.guard_steps, flags.guard_tolerance, decoder)
    trainer.add_callback(guard)
    return guard


def base_of(model: Any) -> Any:
    """The Pisces inside a PEFT model, with the adapter in it; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class TwoSidedGuard(TrainerCallback):
    """Measures rows of both sides before the first step, now and then, and after the last; warns when one falls.

    Every process measures the same rows, so that all stay in step; the first one prints and writes. The random numbers
    of training are left as they were. A resumed run goes on with the points of its `guard.json`; if that is missing,
    the model without its adapter tells what was before, or, without an adapter, the first point is that of the
    resumption. Of a model in shards (FSDP, ZeRO-3) only losses are measured.

    Args:
        trainer: a `Trainer` with a Pisces, its processor as `processing_class`. Add the guard with `add_callback`.
        rows: "understanding": rows with words in assistant turns; "drawing": rows with pictures there; "editing": rows
            that show a picture before they draw; "text": questions without pictures and what a right answer holds. Any
            may be absent. Text is watched as far as it goes: where the first look finds no right answer, there is
            nothing to lose.
        trained: which of them the run trains, for the wording of warnings and for `guard.json`.
        every: steps between two measurements; None: a quarter of the run.
        tolerance: a warning says when a share, R^2 or cosine falls by more than this, or a loss rises by more than
            this part of itself.
        decoder: a pipeline from `guard.pictures.load_decoder`; None makes no sheets.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Mapping[str, Sequence[Row]],
        trained: Sequence[str] = (),
        every: int | None = None,
        tolerance: float = 0.05,
        decoder: Any = None,
    ):
        self.trainer, self.decoder = trainer, decoder
        self.rows = {side: list(chosen) for side, chosen in rows.items() if chosen}
        self.trained, self.every, self.tolerance = list(trained), every, tolerance
        self.folder = Path(trainer.args.output_dir)
        self.points: list[dict[str, Any]] = []

    # ---- when ----

    def on_train_begin(self, args, state, control, **kwargs):
        self._interval = self.every or max(1, math.ceil(state.max_steps / 4))
        self.points = self._earlier_points(state.global_step)
        if not self.points and state.global_step and isinstance(self.trainer.model, PeftModel):
            with self.trainer.model.disable_adapter():
                self._add_point(0)
        elif self.points and "text" not in self.points[0]:  # the first look found nothing to lose
            self.rows.pop("text", None)
        elif not self.points:
            self._add_point(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.rows and state.global_step % self._interval == 0:
            self._add_point(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.points and self.points[-1]["step"] != state.global_step:
            self._add_point(state.global_step)

    # ---- one measurement ----

    def _add_point(self, step: int) -> None:
        """Measure, log, print, write, warn."""
        point: dict[str, Any] = {"step": step}
        start, sheets = time.perf_counter(), {}
        with self._undisturbed():
            for side in list(self.rows):
                point[side], drawn = self._measure(side)
                if side == "text" and not self._can_text(point):
                    del self.rows[side], point[side]
                    continue
                if drawn is not None and self.decoder is not None and self.trainer.is_world_process_zero():
                    sheets[side] = make_sheet(self.decoder, self.rows[side], drawn, step)
        point["seconds"] = round(time.perf_counter() - start, 2)
        if not self.rows:
            return
        self.points.append(point)
        self._log({f"eval_guard_{side}_{name}": v for side in self.rows for name, v in point[side].items()})
        if not self.trainer.is_world_process_zero():
            return
        fallen = [(fall.side, fall.metric) for fall in find_falls(self.points, self.tolerance)]
        print(point_table(self.points, fallen, self.trained), flush=True)
        self._write()
        for side, sheet in sheets.items():
            self._keep_sheet(sheet, step, side)
        for fall in find_falls(self.points, self.tolerance):
            logger.warning(self._warn(fall, step))

    def _can_text(self, point: dict[str, Any]) -> bool:
        """Note which texts are right, and how many of the first point's still are; False: nothing to lose."""
        right = point["text"].pop("right_rows", None)
        if right is None:  # of a model in shards
            return True
        if not self.points and len(right) < LEAST_RIGHT * len(self.rows["text"]):
            self._say(
                f"guard: {len(right)} of {len(self.rows['text'])} plain-text questions are answered right before "
                "training, too few to watch."
            )
            return False
        point["text_right"] = right
        before = set((self.points[0] if self.points else point)["text_right"])
        point["text"]["kept"] = len(before & set(right)) / len(before)
        return True

    def _say(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            print(text, flush=True)

    def _log(self, numbers: Metrics) -> None:
        """Log through the trainer; "eval_" puts the curves beside those of `--eval_data` in every tracker."""
        control = self.trainer.control
        should_log = control.should_log
        self.trainer.log(numbers)
        control.should_log = should_log  # a log takes the request back, and the step's own losses come after us

    def _measure(self, side: str) -> tuple[Metrics, torch.Tensor | None]:
        rows, processor = self.rows[side], self.trainer.processing_class
        batch_size = self.trainer.args.per_device_eval_batch_size
        model = base_of(self.trainer.model)
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            wrapped = self.trainer.model_wrapped
            return measure_losses(wrapped, processor, rows, side, batch_size, model.config), None
        if side == "text":
            right = right_texts(model, processor, rows, batch_size)
            names = [str(row.get("id", number)) for number, row in enumerate(rows)]
            found = [name for name, is_right in zip(names, right, strict=True) if is_right]
            return {"right": len(found) / len(rows), "right_rows": found}, None  # type: ignore[dict-item]
        if side == "understanding":
            return measure_understanding(model, processor, rows, batch_size), None
        if side == "editing":
            return measure_editing(model, processor, rows, batch_size)
        return measure_drawing(model, processor, rows, batch_size)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode, no gradients; then mode, random numbers and the throughput's clock are as before."""
        model = self.trainer.model
        was_training = model.training
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        clock = getattr(self.trainer, "clock_stopped", nullcontext)
        with clock(), torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            try:
                yield
            finally:
                model.train(was_training)

    # ---- what is kept ----

    def _earlier_points(self, step: int) -> list[dict[str, Any]]:
        """The points up to `step` that the same rows left in the folder; none in a run that starts at 0."""
        path, points = self.folder / GUARD_FILE, []
        if step and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            own = self._row_ids()
            if "text" not in found["rows"]:  # watched no more when the first look found no right answer
                own.pop("text", None)
            if found["rows"] == own:
                points = [point for point in found["points"] if point["step"] <= step]
        # what the first process found counts for all: another node may not see the file, and would measure alone
        return broadcast_object_list([points])[0]

    def _row_ids(self) -> dict[str, list[str]]:
        return {side: [str(row.get("id", "")) for row in rows] for side, rows in self.rows.items()}

    def record(self) -> dict[str, Any]:
        """Settings, falls from the first to the last point, and all points, as JSON types."""
        falls = [fall._asdict() for fall in find_falls(self.points, self.tolerance)]
        return {"trained": self.trained, "tolerance": self.tolerance, "falls": falls, "points": self.points}

    def _write(self) -> None:
        """Write `guard.json` anew, whole or not at all."""
        content = self.record() | {"rows": self._row_ids()}
        write_json(self.folder / GUARD_FILE, content)

    def _keep_sheet(self, sheet: Any, step: int, side: str) -> None:
        name = f"step-{step:06d}" + ("" if side == "drawing" else f"-{side}")
        write_whole(self.folder / "guard" / f"{name}.png", sheet.save)
        report_picture(self.trainer, sheet, step, side)

    def _warn(self, fall: Fall, step: int) -> str:
        whose = "which this run trains" if fall.side in self.trained else "which this run does not train"
        advice = "mix rows of what it could do before into --data"
        if fall.side == "text":
            whose, advice = "what the language model knew without pictures", "raise --rehearse"
        elif fall.side not in self.trained:
            advice = "mix rows of that side into --data with finetune.lora_joint"
        return (
            f"guard, step {step}: {fall.side}, {whose}, got worse: {fall.metric} {fall.before:.4g} -> {fall.now:.4g}, "
            f"more than --guard_tolerance {self.tolerance} allows. Lower --learning_rate or --lora_r, train fewer "
            f"steps, or {advice}."
        )


def find_falls(points: Sequence[Mapping[str, Any]], tolerance: float) -> list[Fall]:
    """What got worse from the first to the last point by more than `tolerance`; see `TwoSidedGuard`."""
    falls = []
    for side in SIDES:
        for metric, before in points[0].get(side, {}).items():
            now = points[-1][side][metric]
            worse = (now - before) / max(before, 1e-8) if metric in MEANS_LESS else before - now
            if not worse <= tolerance:  # NaN counts as worse
                falls.append(Fall(side, metric, before, now))
    return falls


def guard_record(trainer: Trainer) -> dict[str, Any] | None:
    """What the guard of a trainer found, as in `guard.json` without the rows' ids; None if nothing was watched."""
    guards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TwoSidedGuard)]
    return guards[0].record() if guards and guards[0].points else None


def guarded_rows(trainer: Trainer, side: str) -> list[Row]:
    """The rows of a side that the guard of a trainer watches."""
    guards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TwoSidedGuard)]
    return guards[0].rows.get(side, []) if guards else []


def guard_table(guard: Mapping[str, Any]) -> str:
    """First and last point as a Markdown table, for the adapter's card."""
    first, last = guard["points"][0], guard["points"][-1]
    fallen = {(fall["side"], fall["metric"]) for fall in guard["falls"]}
    lines = ["| side | metric | before | after | |", "|---|---|---|---|---|"]
    for side in SIDES:
        what = f"{side} (trained)" if side in guard["trained"] else f"{side} (not trained)"
        for metric, before in first.get(side, {}).items():
            mark = "worse" if (side, metric) in fallen else ""
            lines.append(f"| {what} | {metric} | {before:.4g} | {last[side][metric]:.4g} | {mark} |")
    return "\n".join(lines)
