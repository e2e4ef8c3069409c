"""Supervised finetuning of both sides: TRL's `SFTTrainer` with the model's own two losses.

`PiscesSFTTrainer` is what the LoRA recipes train with; whoever writes a recipe of their own can use it like TRL's.
Rows are conversations (`{"messages": [...]}`), made into batches by `PiscesDataCollator`. What is trained is decided
before, by `finetune.training.adapters` or by hand.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from finetune.data.collator import PiscesDataCollator
from finetune.guard.loss_totals import LossTotals, count_targets
from finetune.training.learning_rate import give_rows_their_rate
from finetune.training.run_habits import RunHabits
from finetune.training.sft_config import PiscesSFTConfig
from finetune.training.start_margin import StartMargin


class PiscesSFTTrainer(RunHabits, SFTTrainer):
    """Trains any mixture of understanding, drawing and text, each side normalised by its own count.

    The loss of one optimizer step is `text_loss_sum / num_text_tokens + image_loss_weight * image_loss_sum /
    num_image_vectors`, both counts taken over the whole accumulation window and all processes. TRL's own path computes
    the cross entropy from `lm_head.weight` and never meets the image loss.

    Args:
        model: a `PiscesForConditionalGeneration` or a PEFT model around one.
        args: a `PiscesSFTConfig`.
        train_dataset: any torch or `datasets` dataset of rows with "messages".
        eval_dataset: the same, or a dict of them; None for no evaluation.
        processing_class: the checkpoint's `PiscesProcessor`.
        data_collator: rows to model inputs; None takes `PiscesDataCollator(processing_class)`.
        kwargs: further arguments of `SFTTrainer`.

    Raises:
        ValueError: a stream of unknown length without `max_steps`, or as rows to evaluate on.
    """

    _name = "Pisces SFT"
    _tag_names = ["pisces", "lora", "image-text-to-text", "text-to-image"]
    stand_in = {"messages": []}
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # declared there as None alone

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PiscesSFTConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[list], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if args.max_steps <= 0 and not has_length(train_dataset):
            raise ValueError("the rows are a stream of unknown length. Set --max_steps.")
        eval_sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if any(rows is not None and not has_length(rows) for rows in eval_sets):
            raise ValueError(
                "the rows to evaluate on are a stream without an end. Give --eval_data a file or a folder."
            )
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        forward = vars(base).get("forward")  # usually none of its own: the class has it
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator or PiscesDataCollator(processing_class),
            **kwargs,
        )
        # TRL has put a forward on the model that can fuse lm_head and cross entropy. Not needed, and a copy of the
        # model would still call it on the original.
        vars(base).pop("forward", None)
        if forward is not None:
            base.forward = forward
        # transformers before 5.19 does not know `loss_is_scaled_for_ga`, and reads this instead
        self.model_accepts_loss_kwargs: bool = True
        self._start_margin = StartMargin(base) if StartMargin.is_needed(base) else None
        self._keep_sharded_sums_exact()
        self._window = self._new_totals()  # since the last log
        self._evaluation: LossTotals | None = None  # while an evaluation runs
        self._window_start, self._pause_s = time.perf_counter(), 0.0

    def _new_totals(self) -> LossTotals:
        return LossTotals(self.model.config, self.args.device)

    def _keep_sharded_sums_exact(self) -> None:
        """Under FSDP2 in bf16: leave what the model returns, and the sum of gradients over processes, in fp32.

        accelerate's policy casts both to bf16: sums of losses and the vectors' moments would keep three digits.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if plugin is not None and policy is not None and plugin.fsdp_version == 2:
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and isinstance(optimizer, torch.optim.Optimizer):
            give_rows_their_rate(optimizer, self.model)
        return optimizer

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Text tokens and image vectors with a loss in the accumulation window, over all processes: (2,)."""
        return self.accelerator.reduce(count_targets(batch_samples, self.model.config).to(device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_training = num_items_in_batch is not None and "labels" in inputs
        margin = self._start_margin if is_training else None
        with nullcontext() if margin is None else margin.listening():
            outputs = model(**inputs, use_cache=False, skip_logits=not return_outputs)
        counts = num_items_in_batch
        if counts is None:  # evaluation: this batch alone; `evaluation_loop` has the numbers of the whole set
            counts = torch.stack([outputs.num_text_tokens, outputs.num_image_vectors])
        counts = counts.clamp(min=1)
        loss = outputs.text_loss_sum / counts[0]
        if margin is not None:
            loss = loss + margin.loss_sum(inputs["labels"]) / counts[0]
        if outputs.image_loss_sum is not None:
            loss = loss + self.model.config.image_loss_weight * outputs.image_loss_sum / counts[1]
        totals, num_rows = self._window, len(inputs["input_ids"])
        if self._evaluation is not None:
            totals, num_rows = self._evaluation, num_rows - self._num_repeated_rows(num_rows)
        totals.add(outputs, _count_tokens(inputs, num_rows))
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the counts are everybody's, and gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        if num_repeated := self._num_repeated_rows(len(inputs["input_ids"])):
            inputs["labels"][-num_repeated:] = -100
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs.get("labels")

    def _num_repeated_rows(self, num_rows: int) -> int:
        """Rows at the end of this process's batch that are there only to give every process a batch of one size.

        accelerate fills the last round of all processes with rows from the start; `remainder` of the round are new.
        """
        loader = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
            return 0
        new_here = loader.remainder - self.accelerator.process_index * num_rows
        return num_rows - min(max(new_here, 0), num_rows)

    def _parts_of_loss(self) -> str:
        sides = {name: value for name, value in self._window.read().items() if name.endswith("_loss")}
        return f" (since the last log: {sides})"

    # ---- what is logged ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a point of the training curve; evaluations and the summary of the run come here too
            logs.update(self._read_window())
        super().log(logs, start_time)

    def _read_window(self) -> dict[str, float]:
        numbers = self._window.read(self.accelerator)
        numbers.pop("loss")  # Trainer's own is the mean over the steps that were taken
        now = time.perf_counter()
        elapsed_s = now - self._window_start - self._pause_s
        numbers["tokens_per_s"] = round(numbers["num_input_tokens"] / elapsed_s, 2)
        numbers["vectors_per_s"] = round(numbers["num_image_vectors"] / elapsed_s, 2)
        numbers["peak_memory_gib"] = round(peak_memory_gib(), 3)
        # from the log, because that is what a resumed run gets back
        past = next(
            (p["total_input_tokens"] for p in reversed(self.state.log_history) if "total_input_tokens" in p), 0
        )
        numbers["total_input_tokens"] = past + numbers.pop("num_input_tokens")
        self._window.reset()
        self._window_start, self._pause_s = now, 0.0
        return numbers

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Time that throughput does not count: evaluations and checkpoints."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._pause_s += time.perf_counter() - start

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._evaluation = self._new_totals()
        try:
            with self.clock_stopped():
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            numbers = self._evaluation.read(self.accelerator)
        finally:
            self._evaluation = None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in numbers.items()})
        return output

    # ---- what is written ----

    def _save_checkpoint(self, model, trial) -> None:
        with self.clock_stopped():
            super()._save_checkpoint(model, trial)


def _count_tokens(inputs: dict[str, torch.Tensor], num_rows: int) -> torch.Tensor | int:
    """Tokens of the first `num_rows` rows."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"][:num_rows].numel() if mask is None or mask.ndim != 2 else mask[:num_rows].sum()


def peak_memory_gib() -> float:
    """Most memory held so far: by torch on the accelerator if there is one, otherwise by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB on Linux
