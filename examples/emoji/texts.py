"""What is said about an emoji: captions to draw from, and questions with one exact short answer.

All words follow from the name and its parts, never from the picture. Answers are lower case without a full stop. A
caption always says the skin tone or colour, because the picture shows one.
"""

import random
import re
from typing import NamedTuple

from examples.emoji.compositions import NO_TONE, compose
from examples.emoji.source import Emoji


MAX_QUESTIONS = 6
YES_NO_KINDS = ("person", "animal", "flag", "face", "food", "object")
FRAMES = ("an emoji of {}", "a picture of {}", "a small drawing of {}", "{} on white")
WHAT_IS_IT = ("what is it?", "what is this?", "what does the picture show?")


class Question(NamedTuple):
    """What is asked, the only right answer, and the type that scores are grouped by."""

    question: str
    answer: str
    type: str


def title(emoji: Emoji) -> str:
    """The shortest caption that fits this picture and no other: the name, with the skin tone where one is drawn."""
    if not emoji.tones:
        return emoji.name
    return f"{emoji.name} with {' and '.join(emoji.tones)} skin"


def with_article(words: str) -> str:
    """ "a clock", "an apple"; plurals, flags of somewhere, food and numbers go without."""
    head = re.split(r" (?:and|at|behind|facing|holding|in|of|on|with) ", words)[0]
    if re.search(r"[^su']s$", head) or re.match(r"(flag of|food|people|men|women|\d)\b", words):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def captions(emoji: Emoji, rng: random.Random) -> list[str]:
    """Different captions of one picture: title, title in a frame, keywords, and a detailed sentence last."""
    found = [title(emoji), rng.choice(FRAMES).format(with_article(title(emoji)))]
    parts = compose(emoji)
    if emoji.keywords:
        found.append(", ".join([title(emoji), *emoji.keywords]))
    elif parts.attribute_kind == "color":
        found.append(f"{with_article(parts.concept)} in {parts.attribute}")
    return list(dict.fromkeys([*found, describe(emoji)]))


def describe(emoji: Emoji) -> str:
    """One detailed sentence that names every part of the name."""
    parts = compose(emoji)
    if parts.attribute_kind == "color":
        words = f"{with_article(parts.concept)}, its color is {parts.attribute}"
    elif parts.attribute_kind == "time":
        words = f"a round clock, its hands show {spoken_time(emoji.name)}"
    elif emoji.takes_tone:
        words = f"{_someone(emoji)}, {_skin(emoji)}"
    elif emoji.kind in with_article(emoji.name):
        words = with_article(emoji.name)
    else:
        words = f"{with_article(emoji.name)}, {with_article(emoji.kind)}"
    return f"{words}, drawn as an emoji on a white background"


def _someone(emoji: Emoji) -> str:
    if (found := person_with_job(emoji)) and found[0]:
        return f"a {found[0]} who works as {with_article(found[1])}"
    return with_article(emoji.name)


def person_with_job(emoji: Emoji) -> tuple[str, str] | None:
    """("woman", "pilot") of "woman pilot", ("", "pilot") of "pilot"; None where the name is no job."""
    if emoji.subcategory != "person-role":
        return None
    found = re.fullmatch(r"(?:(man|woman) )?(\w+(?: officer| worker)?)", emoji.name)
    return (found[1] or "", found[2]) if found and found[2] not in ("man", "woman") else None


def _skin(emoji: Emoji) -> str:
    if len(emoji.tones) > 1:
        return f"the skin of one is {emoji.tones[0]} and of the other {emoji.tones[1]}"
    return f"the skin is {emoji.tones[0] if emoji.tones else NO_TONE}"


def spoken_time(name: str) -> str:
    """ "half past one" for "one thirty"."""
    return re.sub(r"(\w+) thirty", r"half past \1", name)


def questions(emoji: Emoji, rng: random.Random) -> list[Question]:
    """At most six questions in random order; the name, and the attribute if there is one, are always asked."""
    parts = compose(emoji)
    asked = [Question(rng.choice(WHAT_IS_IT), emoji.name, "name")]
    if parts.attribute_kind == "tone" and parts.attribute:
        asked.append(Question("which skin tone is it?", parts.attribute, "tone"))
    if parts.attribute_kind == "color" and parts.attribute:
        asked.append(Question(f"what color is the {parts.concept}?", parts.attribute, "color"))
    if parts.attribute_kind == "time":
        asked.append(Question("what time is it?", emoji.name, "time"))
    others = [Question("what kind of thing is it?", emoji.kind, "kind"), _yes_no(emoji, rng)]
    if emoji.subcategory == "country-flag":
        others.append(Question("whose flag is it?", emoji.name.removeprefix("flag of "), "country"))
    if job := person_with_job(emoji):
        others.append(Question("what is the job?", job[1], "job"))
    if gender := re.match(r"(man|woman)\b", emoji.name):
        others.append(Question("is it a man or a woman?", gender[1], "gender"))
    rng.shuffle(others)
    asked += others[: MAX_QUESTIONS - len(asked)]
    rng.shuffle(asked)
    return asked


def _yes_no(emoji: Emoji, rng: random.Random) -> Question:
    """Yes as often as no: the question is about the right kind half of the time."""
    wrong = [kind for kind in YES_NO_KINDS if kind != emoji.kind]
    is_true = emoji.kind in YES_NO_KINDS and rng.random() < 0.5
    kind = emoji.kind if is_true else rng.choice(wrong)
    return Question(f"is it {with_article(kind)}?", "yes" if is_true else "no", "yes or no")
