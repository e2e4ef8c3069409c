"""Rows of a data folder as conversations, and conversations as batches.

A conversation is a list of messages; a picture in a user turn is one to understand, a picture in an assistant turn is
one to draw. `StageConversations` makes them from scenes for the paper's three stages, `PiscesDataCollator` turns any
conversations into model inputs with labels. `finetune.train_stages` joins the two.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from finetune.data.readers.paths import locate_file
from finetune.parts.pictures import read_scene_rows


# What a picture is asked for in a caption turn; the same words that `finetune.scenes.questions` uses for its
# questions.
SHORT_REQUESTS = ("describe the picture.", "what is in the picture?", "what do you see?")
DETAILED_REQUESTS = ("describe the picture in detail.", "describe everything in the picture.")
STAGES = ("pretrain", "detail", "instruct", "review")
# Types that take longest to learn are asked more often; the others have weight 1.
QUESTION_WEIGHTS = {
    "instruct": {"compare": 3.0, "where": 2.0, "color": 2.0, "background": 0.5, "size": 0.5},
    "review": {
        "color": 3.0,
        "compare": 3.0,
        "relation": 3.0,
        "where": 2.0,
        "shape": 2.0,
        "exist": 0.7,
        "count": 0.7,
        "size": 0.7,
        "background": 0.3,
        "describe": 0.4,
        "describe_detail": 0.2,
    },
}
WINDOW_BLOCKS = 16  # blocks whose rows are sorted by length together


class StageConversations(Dataset):
    """The whole run of one stage, row by row, in the order in which it is trained.

    Row k belongs to block k // batch_size. A block holds one side only and rows of similar length, because padding
    would otherwise be half of all tokens: each window of 16 blocks of a side is sorted by length, cut into blocks and
    shuffled. What row k says depends on (seed, stage, pattern, k) alone, so that a resumed run sees what the
    uninterrupted one would have seen.

    Args:
        data: a data folder with `scenes.jsonl` and its pictures, or several; one row is as likely as another.
        stage: "pretrain" (short captions, both ways), "detail" (detailed captions, one in ten short), "instruct"
            (questions and free prompts) or "review" (the same, with more of what is learned last).
        num_rows: rows of the run.
        batch_size: rows of one block.
        pattern: kinds of successive blocks, repeated: "u" understanding, "g" generation, "d" discussion, where the
            model draws and then answers questions about what it has drawn.
        num_questions: questions about one picture in one conversation of the last two stages.
        empty_caption_rate: share of drawing rows whose prompt is empty; the negative side of guidance.
        vectors: (pictures, M, Dg) encoded pictures, in the order of the folders, instead of their pixels.
        seed: seed of the order and of every choice.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
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
        if not pattern or set(pattern) - {"u", "g", "d"}:
            raise ValueError(
                f"pattern {pattern!r}: expected letters u (understanding), g (generation), d (discussion), e.g. 'ug'."
            )
        folders = [data] if isinstance(data, (str, Path)) else data
        self.rows = [row for folder in folders for row in read_rows(Path(folder))]
        if vectors is not None and len(vectors) != len(self.rows):
            raise ValueError(f"{len(vectors)} encoded pictures, {len(self.rows)} rows in {data}. Encode them again.")
        self.stage, self.num_rows, self.batch_size, self.pattern = stage, num_rows, batch_size, pattern
        self.num_questions, self.empty_caption_rate = num_questions, empty_caption_rate
        self.vectors, self.seed = vectors, seed
        self._window = lru_cache(maxsize=2)(self._make_window)  # one for each side

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        block, position = divmod(index, self.batch_size)
        repeat, place = divmod(block, len(self.pattern))
        side = self.pattern[place]
        number = repeat * self.pattern.count(side) + self.pattern[:place].count(side)  # of this block within its side
        window, block_in_window = divmod(number, WINDOW_BLOCKS)
        return self._window(side, window)[block_in_window][position]

    def _make_window(self, side: str, window: int) -> list[list[dict[str, Any]]]:
        """The blocks of one window: rows of similar length together, the blocks in random order."""
        rng = random.Random(f"{self.seed}-{self.stage}-{side}-{window}")
        rows = [self._make_row(side, rng) for _ in range(WINDOW_BLOCKS * self.batch_size)]
        rows.sort(key=_text_length)
        blocks = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        rng.shuffle(blocks)
        return blocks

    def _make_row(self, side: str, rng: random.Random) -> dict[str, Any]:
        number = rng.randrange(len(self.rows))
        row = self.rows[number]
        if side == "u":
            return {"messages": self._understand(row, rng)}
        messages = self._draw(row, number, rng, self.empty_caption_rate if side == "g" else 0.0)
        return {"messages": messages + (self._discuss(row, rng) if side == "d" else [])}

    def _understand(self, row: dict, rng: random.Random) -> list[dict]:
        """One picture and one or several questions about it with their answers."""
        messages = [message for turn in self._questions(row, rng) for message in text_turn(*turn)]
        messages[0]["content"].insert(0, {"type": "image", "image": row["image"]})
        return messages

    def _questions(self, row: dict, rng: random.Random) -> list[tuple[str, str]]:
        if self.stage in QUESTION_WEIGHTS:
            weights = QUESTION_WEIGHTS[self.stage]
            chosen = _sample_questions(row["questions"], self.num_questions, weights, rng)
            return [(rng.choice([q["question"], q["paraphrase"]]), q["answer"]) for q in chosen]
        # one in ten stays short, so that the detailed stage does not unlearn the short answers
        answers = {q["type"]: q["answer"] for q in row["questions"]}
        detailed = self.stage == "detail" and rng.random() > 0.1
        requests = DETAILED_REQUESTS if detailed else SHORT_REQUESTS
        return [(rng.choice(requests), answers["describe_detail" if detailed else "describe"])]

    def _draw(self, row: dict, number: int, rng: random.Random, empty_caption_rate: float) -> list[dict]:
        """A caption as the prompt and the picture as the answer."""
        *short, detailed = row["captions"]
        caption = detailed if self.stage == "detail" and rng.random() > 0.1 else rng.choice(short or [detailed])
        if rng.random() < empty_caption_rate:
            caption = ""
        picture = {"image": row["image"]}
        if self.vectors is not None:
            picture = {"image_vectors": self.vectors[number]}
        return [
            {"role": "user", "content": [{"type": "text", "text": caption}]},
            {"role": "assistant", "content": [{"type": "image", **picture}]},
        ]

    def _discuss(self, row: dict, rng: random.Random) -> list[dict]:
        """A description of what was just drawn and one more question about it, in either order."""
        answers = {q["type"]: q["answer"] for q in row["questions"]}
        turns = [(rng.choice(SHORT_REQUESTS), answers["describe"]), self._questions(row, rng)[0]]
        rng.shuffle(turns)
        return [message for question, answer in turns for message in text_turn(question, answer)]


def text_turn(question: str, answer: str) -> list[dict]:
    """A question and its answer as two messages."""
    return [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", question), ("assistant", answer))
    ]


def _sample_questions(questions: list[dict], number: int, weights: dict[str, float], rng: random.Random) -> list[dict]:
    """At most `number` different questions, each type with its weight (Efraimidis and Spirakis, 2006)."""
    keys = [rng.random() ** (1 / weights.get(question["type"], 1.0)) for question in questions]
    return [questions[i] for i in sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:number]]


def _text_length(row: dict[str, Any]) -> int:
    return sum(len(part.get("text", "")) for message in row["messages"] for part in message["content"])


def read_rows(folder: Path) -> list[dict]:
    """The rows of a data folder, each picture with its path.

    Raises:
        ValueError: no `scenes.jsonl`, or nothing in it.
    """
    path = folder / "scenes.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing. Write it with `python -m finetune.scenes --output {folder} ...`.")
    rows = list(read_scene_rows(folder))
    if not rows:
        raise ValueError(f"{path} has no rows. Write it again with `python -m finetune.scenes`.")
    return [{**row, "image": locate_file(folder, row["image"])} for row in rows]
