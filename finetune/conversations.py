"""Rows of a data folder as conversations, and conversations as batches.

A conversation is a list of messages; a picture in a user turn is one to understand, a picture in an assistant turn is
one to draw. `StageConversations` makes them from scenes for the paper's three stages, `PiscesDataCollator` turns any
conversations into model inputs with labels. `finetune.train_stages` joins the two.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from modeling_pisces import PiscesProcessor


# What a picture is asked for in a caption turn; the same words that `finetune.scene_questions` uses for its questions.
SHORT_REQUESTS = ("describe the picture.", "what is in the picture?", "what do you see?")
DETAILED_REQUESTS = ("describe the picture in detail.", "describe everything in the picture.")
STAGES = ("pretrain", "detail", "instruct")


class StageConversations(Dataset):
    """The whole run of one stage, row by row, in the order in which it is trained.

    Row k belongs to block k // batch_size; a block holds one side only, because understanding rows are several times
    longer than drawing rows and would pad them. What row k says depends on (seed, stage, k) alone, so that a resumed
    run sees what the uninterrupted one would have seen.

    Args:
        data: data folder with `scenes.jsonl` and its pictures.
        stage: "pretrain" (short captions, both ways), "detail" (detailed captions, one in ten short) or "instruct"
            (questions and free prompts).
        num_rows: rows of the run.
        batch_size: rows of one block.
        pattern: sides of successive blocks, "u" understanding and "g" generation, repeated.
        num_questions: questions about one picture in one conversation of the "instruct" stage.
        empty_caption_rate: share of drawing rows whose prompt is empty; the negative side of guidance.
        vectors: (pictures, M, Dg) encoded pictures, in the order of the folder, instead of their pixels.
        seed: seed of the order and of every choice.
    """

    def __init__(
        self,
        data: str | Path,
        stage: str,
        num_rows: int,
        batch_size: int,
        pattern: str = "ug",
        num_questions: int = 6,
        empty_caption_rate: float = 0.1,
        vectors: torch.Tensor | None = None,
        seed: int = 0,
    ):
        if stage not in STAGES:
            raise ValueError(f"stage {stage!r} is not known. Choose one of {', '.join(STAGES)}.")
        if not pattern or set(pattern) - {"u", "g"}:
            raise ValueError(f"pattern {pattern!r}: expected letters u (understanding) and g (generation), e.g. 'ug'.")
        self.folder = Path(data)
        self.rows = read_rows(self.folder)
        if vectors is not None and len(vectors) != len(self.rows):
            raise ValueError(f"{len(vectors)} encoded pictures, {len(self.rows)} rows in {data}. Encode them again.")
        self.stage, self.num_rows, self.batch_size, self.pattern = stage, num_rows, batch_size, pattern
        self.num_questions, self.empty_caption_rate = num_questions, empty_caption_rate
        self.vectors, self.seed = vectors, seed

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        side = self.pattern[index // self.batch_size % len(self.pattern)]
        rng = random.Random(f"{self.seed}-{self.stage}-{index}")
        number = rng.randrange(len(self.rows))
        row = self.rows[number]
        return {"messages": self._understand(row, rng) if side == "u" else self._draw(row, number, rng)}

    def _understand(self, row: dict, rng: random.Random) -> list[dict]:
        """One picture and one or several questions about it with their answers."""
        messages = []
        for turn, (question, answer) in enumerate(self._questions(row, rng)):
            parts = [{"type": "text", "text": question}]
            if turn == 0:
                parts.insert(0, {"type": "image", "image": str(self.folder / row["image"])})
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages

    def _questions(self, row: dict, rng: random.Random) -> list[tuple[str, str]]:
        if self.stage == "instruct":
            chosen = rng.sample(row["questions"], min(self.num_questions, len(row["questions"])))
            return [(rng.choice([q["question"], q["paraphrase"]]), q["answer"]) for q in chosen]
        # one in ten stays short, so that the detailed stage does not unlearn the short answers
        answers = {q["type"]: q["answer"] for q in row["questions"]}
        detailed = self.stage == "detail" and rng.random() > 0.1
        requests = DETAILED_REQUESTS if detailed else SHORT_REQUESTS
        return [(rng.choice(requests), answers["describe_detail" if detailed else "describe"])]

    def _draw(self, row: dict, number: int, rng: random.Random) -> list[dict]:
        """A caption as the prompt and the picture as the answer."""
        *short, detailed = row["captions"]
        caption = detailed if self.stage == "detail" and rng.random() > 0.1 else rng.choice(short or [detailed])
        if rng.random() < self.empty_caption_rate:
            caption = ""
        picture = {"image": str(self.folder / row["image"])}
        if self.vectors is not None:
            picture = {"image_vectors": self.vectors[number]}
        return [
            {"role": "user", "content": [{"type": "text", "text": caption}]},
            {"role": "assistant", "content": [{"type": "image", **picture}]},
        ]


def read_rows(folder: Path) -> list[dict]:
    """The rows of a data folder.

    Raises:
        ValueError: no `scenes.jsonl`, or nothing in it.
    """
    path = folder / "scenes.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing. Write it with `python -m finetune.scenes --output {folder} ...`.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not rows:
        raise ValueError(f"{path} has no rows. Write it again with `python -m finetune.scenes`.")
    return rows


class PiscesDataCollator:
    """Conversations to model inputs with labels on what the assistant wrote and drew.

    Args:
        processor: a `PiscesProcessor`.
    """

    def __init__(self, processor: PiscesProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            [row["messages"] for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"text_kwargs": {"padding_side": "right"}},
        )
        is_assistant = batch.pop("assistant_masks").bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_assistant, -100)
        return dict(batch)
