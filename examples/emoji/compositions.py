"""What a name is made of, and which pictures training never sees: pairs of a thing and an attribute, whole concepts.

An attribute is a skin tone, a colour or a time. Training sees each concept with other attributes and each attribute
with other concepts, but never the two together; a drawing of such a pair cannot come from memory.
"""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from examples.emoji.source import TONES, Emoji


COLORS = ("light blue", *"red orange yellow green blue purple brown black grey white pink".split())
COLORED = re.compile(rf"({'|'.join(COLORS)}) (heart|circle|square|book|apple)")
COLORED_BY_ANOTHER_NAME = {"closed book": ("book", "red")}
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
CLOCK = re.compile(rf"({'|'.join(HOURS)}) (o'clock|thirty)")
MIRRORED = " facing right"  # of what faces left
NO_TONE = "yellow"  # how a person without a skin tone is drawn
HELDOUT_TIMES_PER_KIND = 2  # full hours, and half hours
SPLITS = ("train", "heldout", "concepts")


@dataclass(frozen=True)
class Composition:
    """`concept` has `attribute`, of `attribute_kind` "tone", "color" or "time"; both are None where it has none."""

    concept: str
    attribute_kind: str | None = None
    attribute: str | None = None


def compose(emoji: Emoji) -> Composition:
    """The parts of a name; two people of different tones have no single attribute."""
    if emoji.takes_tone:
        if len(emoji.tones) > 1:
            return Composition(emoji.name)
        return Composition(emoji.name, "tone", emoji.tones[0] if emoji.tones else NO_TONE)
    if found := COLORED.fullmatch(emoji.name):
        return Composition(found[2], "color", found[1])
    if emoji.name in COLORED_BY_ANOTHER_NAME:
        concept, color = COLORED_BY_ANOTHER_NAME[emoji.name]
        return Composition(concept, "color", color)
    if CLOCK.fullmatch(emoji.name):
        return Composition("clock", "time", emoji.name)
    return Composition(emoji.name)


def split_emoji(emojis: Sequence[Emoji], seed: int, num_concepts: int) -> dict[str, str]:
    """The split of each code: "train", "heldout" (compositions) or "concepts" (whole ones, for reconstruction).

    It depends on names and seed, not on pictures, so that two vendors have the same one.

    Raises:
        ValueError: fewer than twice `num_concepts` names stand alone, so training would be left without them.
    """
    rng = random.Random(f"emoji-split-{seed}")
    heldout = {*_heldout_tones(emojis, rng), *_heldout_colors(emojis, rng), *_heldout_times(emojis, rng)}
    alone = [emoji.code for emoji in emojis if _stands_alone(emoji)]
    if 2 * num_concepts > len(alone):
        raise ValueError(
            f"--unseen_concepts {num_concepts}: only {len(alone)} of {len(emojis)} pictures have a name of their own, "
            f"and at least half of them are for training. Give at most {len(alone) // 2}."
        )
    unseen = set(rng.sample(sorted(alone), num_concepts))
    return {
        emoji.code: "heldout" if emoji.code in heldout else "concepts" if emoji.code in unseen else "train"
        for emoji in emojis
    }


def _stands_alone(emoji: Emoji) -> bool:
    """No relative of it is drawn in another tone, colour or hour, so that leaving it out leaves all of it out.

    Families and flags have relatives of other names: territories fly the flag of their country.
    """
    is_plain = compose(emoji) == Composition(emoji.name) and not emoji.takes_tone
    return is_plain and emoji.subcategory not in ("family", "person-symbol", "country-flag")


def relatives(name: str) -> str:
    """What the man, the woman, the person and their mirror images share: "pilot" of "woman pilot"."""
    words = name.removesuffix(MIRRORED).split()
    return " ".join(word for word in words if word not in ("man", "woman", "person")) or name


def _heldout_tones(emojis: Iterable[Emoji], rng: random.Random) -> list[str]:
    """One tone of every second job, gesture or body part, for all relatives of it, each tone as often as the others.

    A dark-skinned man who is a pilot would show most of a dark-skinned woman who is one. Couples are left out, because
    their mixed pairs show each tone of theirs.
    """
    codes: dict[str, dict[str, str]] = defaultdict(dict)
    for emoji in emojis:
        if emoji.takes_tone and len(emoji.tones) == 1:
            codes[emoji.name][emoji.tones[0]] = emoji.code
    couples = {emoji.name for emoji in emojis if len(emoji.tones) > 1}
    toned = [name for name, tones in codes.items() if len(tones) == len(TONES) and name not in couples]
    names = sorted(name for name in toned if not name.endswith(MIRRORED))
    rng.shuffle(names)
    shared = list(dict.fromkeys(map(relatives, names)))
    tone_of = dict(zip(shared[: len(shared) // 2], itertools.cycle(TONES.values()), strict=False))
    return [codes[name][tone_of[relatives(name)]] for name in toned if relatives(name) in tone_of]


def _heldout_colors(emojis: Iterable[Emoji], rng: random.Random) -> list[str]:
    """A quarter of the colours of each thing; every colour is one that two other things show in training."""
    codes: dict[str, dict[str, str]] = defaultdict(dict)
    for emoji in emojis:
        if (parts := compose(emoji)).attribute_kind == "color" and parts.attribute:
            codes[parts.concept][parts.attribute] = emoji.code
    shown = {color: sum(color in colors for colors in codes.values()) for color in COLORS}
    taken: list[str] = []
    for concept in sorted(codes):
        colors = [color for color in sorted(codes[concept]) if shown[color] > 2]
        rng.shuffle(colors)
        for color in colors[: len(codes[concept]) // 4]:
            shown[color] -= 1
            taken.append(codes[concept][color])
    return taken


def _heldout_times(emojis: Iterable[Emoji], rng: random.Random) -> list[str]:
    """Full hours and half hours, of different hours: each hour and each half is seen, in another pair."""
    codes = {emoji.name: emoji.code for emoji in emojis if compose(emoji).attribute_kind == "time"}
    hours = [hour for hour in HOURS if f"{hour} o'clock" in codes and f"{hour} thirty" in codes]
    rng.shuffle(hours)
    number = min(HELDOUT_TIMES_PER_KIND, len(hours) // 4)
    names = [f"{hour} o'clock" for hour in hours[:number]] + [f"{hour} thirty" for hour in hours[number : 2 * number]]
    return [codes[name] for name in names]
