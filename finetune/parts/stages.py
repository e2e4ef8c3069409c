"""Captioned pictures as conversations for the paper's three stages.

A conversation is a list of messages; a picture in a user turn is one to understand, a picture in an assistant turn is
one to draw. `StageConversations` makes them of what is said about each picture, `PiscesDataCollator` turns them into
model inputs with labels. `finetune.train_stages` joins the two.
"""

import random
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from finetune.parts.captioned import PictureData, answers_of
from finetune.scenes.questions import TYPE_WEIGHTS


# What a picture is asked for in a caption turn.
SHORT_REQUESTS = ("describe the picture.", "what is in the picture?", "what do you see?")
DETAILED_REQUESTS = ("describe the picture in detail.", "describe everything in the picture.")
STAGES = ("pretrain", "detail", "instruct", "review")
ASKING_STAGES = ("instruct", "review")
EMPTY_INSTRUCTION_RATE = 0.05  # of edits, as InstructPix2Pix drops its texts (Brooks et al., 2023)
WINDOW_BLOCKS = 16  # blocks whose rows are sorted by length together


def check_stage(stage: str, pattern: str) -> None:
    """Refuse a stage or a pattern of blocks that is not known.

    Raises:
        ValueError: naming the known ones.
    """
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not known. Choose one of {', '.join(STAGES)}.")
    if not pattern or set(pattern) - set("ugde"):
        raise ValueError(
            f"pattern {pattern!r}: expected letters u (understanding), g (generation), d (discussion), e (edits), "
            "e.g. 'ug'."
        )


class StageConversations(Dataset):
    """The whole run of one stage, row by row, in the order in which it is trained.

    Row k belongs to block k // batch_size. A block holds one side only and rows of similar length, because padding
    would otherwise be half of all tokens: each window of 16 blocks of a side is sorted by length, cut into blocks and
    shuffled. What row k says depends on (seed, stage, pattern, k) alone, so that a resumed run sees what the
    uninterrupted one would have seen.

    Args:
        data: captioned pictures; one is as likely as another. To draw, only those with captions are chosen.
        stage: "pretrain" (short captions, both ways), "detail" (the last caption, one in ten short), "instruct"
            (questions and free prompts) or "review" (the same; for scenes with more of what is learned last). A
            picture without questions is described instead, one without captions asked about.
        num_rows: rows of the run.
        batch_size: rows of one block.
        pattern: kinds of successive blocks, repeated: "u" understanding, "g" generation, "d" discussion, where the
            model draws and then answers questions about what it has drawn, "e" edits, where it draws after a picture
            and an instruction.
        num_questions: questions about one picture in one conversation of the last two stages.
        empty_caption_rate: share of drawing rows whose prompt is empty; the negative side of guidance.
        vectors: (pictures, M, Dg) encoded pictures, in the order of `data`, instead of their pixels.
        seed: seed of the order and of every choice.
    """

    def __init__(
        self,
        data: PictureData,
        stage: str,
        num_rows: int,
        batch_size: int,
        pattern: str = "ug",
        num_questions: int = 6,
        empty_caption_rate: float = 0.1,
        vectors: torch.Tensor | None = None,
        seed: int = 0,
    ):
        check_stage(stage, pattern)
        if vectors is not None and len(vectors) != len(data.records):
            raise ValueError(f"{len(vectors)} encoded pictures, {len(data.records)} rows. Encode them again.")
        self.pictures, self.rows = data.pictures, data.records
        self.num_with_texts = data.num_with_texts
        self.drawn = [number for number, row in enumerate(self.rows) if row["captions"]]
        self.edits = [(number, turns) for number, row in enumerate(self.rows) for turns in row.get("edits", ())]
        if not self.drawn and set(pattern) & {"g", "d"}:
            raise ValueError(f"pattern {pattern!r} draws, but no picture has a caption. Add captions, or train 'u'.")
        if not self.edits and "e" in pattern:
            raise ValueError(f"pattern {pattern!r} edits, but the data has no edits. Add some, or leave 'e' out.")
        if not self.num_with_texts and "u" in pattern:
            raise ValueError(f"pattern {pattern!r} asks, but no picture has a text. Add captions, or train 'e' alone.")
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
        if side == "u":
            return {"messages": self._understand(rng.randrange(self.num_with_texts), rng)}
        if side == "e":
            return {"messages": self._edit(*rng.choice(self.edits), rng)}
        number = self.drawn[rng.randrange(len(self.drawn))]
        messages = self._draw(number, rng, self.empty_caption_rate if side == "g" else 0.0)
        return {"messages": messages + (self._discuss(self.rows[number], rng) if side == "d" else [])}

    def _picture(self, number: int) -> Image.Image:
        return Image.fromarray(self.pictures[number].permute(1, 2, 0).numpy())

    def _understand(self, number: int, rng: random.Random) -> list[dict]:
        """One picture and one or several questions about it with their answers."""
        messages = [message for turn in self._questions(self.rows[number], rng) for message in text_turn(*turn)]
        messages[0]["content"].insert(0, {"type": "image", "image": self._picture(number)})
        return messages

    def _questions(self, row: dict, rng: random.Random) -> list[tuple[str, str]]:
        asks = self.stage in ASKING_STAGES or not row["captions"]
        if asks and row["conversations"]:
            weights = TYPE_WEIGHTS.get(self.stage, {})
            chosen = _sample_turns(row["conversations"], self.num_questions, weights, rng)
            return [(rng.choice([q["question"], q.get("paraphrase", q["question"])]), q["answer"]) for q in chosen]
        # one in ten stays short, so that the detailed stage does not unlearn the short answers
        detailed = self.stage != "pretrain" and rng.random() > (0.5 if self.stage in ASKING_STAGES else 0.1)
        return [(rng.choice(DETAILED_REQUESTS if detailed else SHORT_REQUESTS), description(row, detailed))]

    def _draw(self, number: int, rng: random.Random, empty_caption_rate: float) -> list[dict]:
        """A caption as the prompt and the picture as the answer."""
        *short, detailed = self.rows[number]["captions"]
        caption = detailed if self.stage == "detail" and rng.random() > 0.1 else rng.choice(short or [detailed])
        if rng.random() < empty_caption_rate:
            caption = ""
        return self._drawing_turn(caption, number)

    def _drawing_turn(self, text: str, number: int) -> list[dict]:
        """A text and the picture that answers it as two messages."""
        key = "image" if self.vectors is None else "image_vectors"
        drawn = self._picture(number) if self.vectors is None else self.vectors[number]
        return [
            {"role": "user", "content": [{"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "image", key: drawn}]},
        ]

    def _edit(self, source: int, turns: list[dict], rng: random.Random) -> list[dict]:
        """A picture, an instruction, the picture that it gives; of several turns all, or half the time one alone.

        A turn alone shows the picture before it, which is how `PiscesPipeline` edits.
        """
        if len(turns) > 1 and rng.random() < 0.5:
            chosen = rng.randrange(len(turns))
            source, turns = [source, *(turn["picture"] for turn in turns)][chosen], [turns[chosen]]
        texts = [turn["instruction"] for turn in turns]
        if rng.random() < EMPTY_INSTRUCTION_RATE:
            texts[0] = ""
        pictures = [turn["picture"] for turn in turns]
        messages = [part for turn in zip(texts, pictures, strict=True) for part in self._drawing_turn(*turn)]
        messages[0]["content"].insert(0, {"type": "image", "image": self._picture(source)})
        return messages

    def _discuss(self, row: dict, rng: random.Random) -> list[dict]:
        """A description of what was just drawn and one more question about it, in either order."""
        turns = [(rng.choice(SHORT_REQUESTS), description(row, False)), self._questions(row, rng)[0]]
        rng.shuffle(turns)
        return [message for question, answer in turns for message in text_turn(question, answer)]


def text_turn(question: str, answer: str) -> list[dict]:
    """A question and its answer as two messages."""
    return [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", question), ("assistant", answer))
    ]


def description(row: dict, detailed: bool) -> str:
    """What a picture is said to show: the answer to such a question where there is one, else a caption."""
    kind = "describe_detail" if detailed else "describe"
    for turns in row["conversations"]:
        if turns[0].get("type") == kind:
            return turns[0]["answer"]
    texts = row["captions"] or answers_of(row)
    return texts[-1 if detailed else 0]


def _sample_turns(
    conversations: list[list[dict]], number: int, weights: dict[str, float], rng: random.Random
) -> list[dict]:
    """About `number` turns of different conversations, each type with its weight (Efraimidis and Spirakis, 2006).

    Turns of one conversation stay together: a later one may speak of an earlier one.
    """
    keys = [rng.random() ** (1 / weights.get(turns[0].get("type", ""), 1.0)) for turns in conversations]
    chosen: list[dict] = []
    for place in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
        if chosen and len(chosen) + len(conversations[place]) > number:
            break
        chosen += conversations[place]
    return chosen


def _text_length(row: dict[str, Any]) -> int:
    return sum(len(part.get("text", "")) for message in row["messages"] for part in message["content"])
