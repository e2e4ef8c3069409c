"""The rows that the guard watches: its flags, and reading what they name.

Every recipe's flags include `GuardArguments`, and every recipe calls `load_guard_rows` beside its other data, so that
a wrong path ends the run before anything is trained. What is done with the rows is in `guard`.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers.utils import logging

from finetune.data.load import load_data
from finetune.data.schema import Row, count_pictures, iter_pictures
from finetune.flags.ranges import check_ranges


logger = logging.get_logger(__name__)

# What the guard watches, by the flag that names its rows.
FLAGS = {
    "understanding": "--guard_understanding",
    "drawing": "--guard_drawing",
    "editing": "--guard_editing",
    "text": "--guard_text",
}
EXPECTED = {
    "understanding": "words in an assistant turn",
    "drawing": "a picture in an assistant turn",
    "editing": "a picture in a user turn before one in an assistant turn",
    "text": "a text without pictures",
}
# the third side: facts, sums and instructions that small chat models answer; "|" stands between right answers
PLAIN_TEXT = Path(__file__).parent / "plain_text.jsonl"
OFF = "off"
EXAMPLES = {
    "understanding": "a few dozen pictures with a question and its answer",
    "drawing": "a few dozen pictures with captions",
    "editing": "a few dozen pictures with an instruction and its result",
}
SEARCHED_IN_STREAMS = 50  # rows of a stream that are looked at for each row that is wanted


@dataclass(kw_only=True)
class GuardArguments:
    """Flags of the guard."""

    guard_understanding: list[str] | None = field(
        default=None, metadata={"help": "rows whose answers are watched: paths or specs, as for --data"}
    )
    guard_drawing: list[str] | None = field(
        default=None, metadata={"help": "rows whose drawings are watched: paths or specs, as for --data"}
    )
    guard_editing: list[str] | None = field(
        default=None, metadata={"help": "rows of edits, whose results are watched: paths or specs, as for --data"}
    )
    guard_text: list[str] | None = field(
        default=None,
        metadata={
            "help": "questions without pictures whose answers are watched, as for --data; default: facts, sums and "
            "instructions; off: none"
        },
    )
    guard_steps: int | None = field(
        default=None,
        metadata={"help": "steps between two looks, besides before and after; default: a quarter of the run"},
    )
    guard_rows: int = field(default=32, metadata={"help": "rows of each side, spread evenly over those given"})
    guard_tolerance: float = field(
        default=0.05,  # one answer of 32 is 0.031, so that a warning takes two
        metadata={"help": "warn when a share falls by more, or a loss rises by more than this part of itself"},
    )

    def __post_init__(self):
        for name, value in (("guard_steps", self.guard_steps), ("guard_rows", self.guard_rows)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected a whole number from 1. Leave it out for the default.")
        if not 0 <= self.guard_tolerance < math.inf:
            raise ValueError(f"--guard_tolerance {self.guard_tolerance}: expected a number from 0, for example 0.05.")
        check_ranges(self)


def load_guard_rows(flags: GuardArguments, trained: Sequence[str], draws: bool) -> dict[str, list[Row]]:
    """Read the rows to watch; a warning says which side nothing watches, and how to watch it.

    Args:
        flags: the guard's.
        trained: the sides that the recipe trains: "understanding", "generation", "editing".
        draws: whether the checkpoint can draw.

    Returns:
        rows with opened pictures for "understanding", "drawing", "editing" and "text"; what is not watched is absent.

    Raises:
        ValueError: a source has no row of its side, the checkpoint cannot draw, or what `load_data` refuses.
    """
    given = {"understanding": flags.guard_understanding, "drawing": flags.guard_drawing}
    given |= {"editing": flags.guard_editing}
    for side in ("drawing", "editing"):
        if given[side] and not draws:
            raise ValueError(
                f"{FLAGS[side]}: this checkpoint cannot draw (gen_vision_config=None). Leave the flag out."
            )
    rows = {side: pick_rows(data, side, flags.guard_rows) for side, data in given.items() if data}
    if flags.guard_text != [OFF]:
        own = flags.guard_text is not None  # the set of ours is watched whole
        rows["text"] = pick_rows(flags.guard_text or str(PLAIN_TEXT), "text", flags.guard_rows if own else sys.maxsize)
    for side in given:
        is_trained = {"drawing": "generation"}.get(side, side) in trained
        # few checkpoints edit, so that only who trains it is told
        concerns = {"understanding": True, "drawing": draws, "editing": is_trained}[side]
        if side not in rows and concerns:
            why = "what it could do before can be lost" if is_trained else "though it is not trained, it can get worse"
            logger.warning(
                f"guard: nothing watches {side} in this run; {why}. To measure it before, during and after training, "
                f"add {FLAGS[side]} ROWS: {EXAMPLES[side]} that are not in --data."
            )
    return rows


def pick_rows(data: Any, side: str, number: int) -> list[Row]:
    """`number` rows of one side, spread evenly over a source, or all if it has fewer; pictures opened.

    Raises:
        ValueError: the source has none; names the flag and what such a row has.
    """
    source = load_data(data)
    if isinstance(source, IterableDataset):
        found = (row for row in islice(source, SEARCHED_IN_STREAMS * number) if _has_side(row, side))
        rows = list(islice(found, number))
    else:
        indices = [index for index, row in enumerate(source.iter_rows()) if _has_side(row, side)]
        count = min(number, len(indices))
        rows = [source[indices[place * len(indices) // count]] for place in range(count)]
    if not rows:
        raise ValueError(f"{FLAGS[side]} {data}: none of its rows has {EXPECTED[side]}. Name other rows.")
    return rows


def _has_side(row: Row, side: str) -> bool:
    if side == "drawing":
        return count_pictures(row)[1] > 0
    if side == "editing":
        roles = [role for role, _ in iter_pictures(row)]
        return "assistant" in roles and roles[0] == "user"
    if side == "text" and any(count_pictures(row)):
        return False
    spoken = (part for message in row["messages"] if message["role"] == "assistant" for part in message["content"])
    return any(part["type"] == "text" and part["text"] for part in spoken)
