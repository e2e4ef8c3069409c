"""Plain text mixed into the rows of a run, so that a language model keeps what it knew: `prepare_rehearsal`.

Trained on drawings alone, a language model opens an image whatever it is asked. So a share of the rows are everyday
questions, answered by the model itself before its first step: what it learns from them is to stay as it is, in its own
words. None of them is in the guard's set. `load_rows` mixes them in.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from finetune.guard.metrics import answer_texts
from pisces_commands.writing import write_whole


PROMPTS = Path(__file__).parents[1] / "data" / "rehearsal_prompts.txt"
FILE_NAME = "rehearsal.jsonl"
ROW_PREFIX = "rehearsal-"
# one row in five; Scialom et al., "Fine-tuned Language Models are Continual Learners" (2022), keep their earlier tasks
# with a few per cent, but those had not been told to answer every prompt with one new token
DEFAULT_SHARE = 0.2
MAX_NEW_TOKENS = 48


class Rehearsal(NamedTuple):
    """Rows to mix in: a file, and which share of all rows they shall be."""

    path: Path
    share: float


def prepare_rehearsal(share: float | None, folder: str | Path, model: Any, processor: Any) -> Rehearsal | None:
    """Let the model answer everyday questions, and keep the answers in the run's folder; a resumed run reads them.

    Args:
        share: of the rows; None: `DEFAULT_SHARE` for a checkpoint with new tokens, which is a language model that
            has not been trained to draw yet, otherwise 0.
        folder: of the run.
        model: the checkpoint, or a new adapter on it, before its first step.
        processor: its processor.

    Returns:
        None for a share of 0, and for a model that ends none of its answers.
    """
    if share is None:
        share = DEFAULT_SHARE if model.config.new_token_ids else 0.0
    if not share:
        return None
    path, state = Path(folder) / FILE_NAME, PartialState()
    if state.is_main_process and not path.is_file():
        print("rehearsal: the model answers everyday questions, to keep what it knows ...", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _answered_rows(model, processor))
        write_whole(path, lines)
    state.wait_for_everyone()
    if not (count := len(path.read_text(encoding="utf-8").splitlines())):
        return None
    if state.is_main_process:
        print(f"rehearsal: {share:.0%} of the rows are {count} questions with the model's own answers", flush=True)
    return Rehearsal(path, share)


@torch.no_grad()
def _answered_rows(model: Any, processor: Any) -> list[dict[str, Any]]:
    prompts = [line.strip() for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [{"messages": [_turn("user", prompt), _turn("assistant", "")]} for prompt in prompts]
    was_training, device = model.training, next(model.parameters()).device
    is_moved = device.type == "cpu" and torch.cuda.is_available()
    model.eval()
    try:
        if is_moved:  # Trainer puts it there later anyhow, or cuts it into shards
            model.to(PartialState().device)
        answers = answer_texts(_plain(model), processor, rows, 16, MAX_NEW_TOKENS)
    finally:
        model.train(was_training)
        if is_moved:
            model.to(device)
    kept = [(prompt, said) for prompt, said in zip(prompts, answers, strict=True) if said is not None and said.strip()]
    return [
        {"id": f"{ROW_PREFIX}{number}", "messages": [_turn("user", prompt), _turn("assistant", said)]}
        for number, (prompt, said) in enumerate(kept)
    ]


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
