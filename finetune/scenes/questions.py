"""Questions about a scene in plain English, each with one exact short answer, lower case and without a full stop.

`finetune.scenes` writes them into the data folder; `questions` is the only entry. A question is asked only where the
picture settles it. Training asks nothing about a held-out combination: its answer there could only be no or zero.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finetune.scenes.layout import (
    COLORS,
    HELD_OUT_PAIRS,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    is_held_out_relation,
    relations_between,
)
from finetune.scenes.text import (
    NUMBER_WORDS,
    PLACE_PHRASES,
    SYNONYMS,
    describe,
    describe_in_detail,
    pluralize,
    with_article,
)


# The most questions of each type that one picture gets.
QUESTION_TYPES = {
    "color": 2,
    "shape": 2,
    "count": 3,
    "relation": 2,
    "compare": 2,
    "exist": 3,
    "where": 2,
    "background": 1,
    "size": 1,
    "describe": 1,
    "describe_detail": 1,
}
# By stage of `finetune.train_stages`: types that take longest to learn are asked more often; others have weight 1.
TYPE_WEIGHTS = {
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


@dataclass
class Question:
    """Ways to ask one thing (the first is the plain one), its answer, and its type, a key of `QUESTION_TYPES`."""

    wordings: tuple[str, ...]
    answer: str
    type: str

    def ask(self, rng: random.Random) -> str:
        """One of the wordings, with small freedoms: capital letter, British spelling, no question mark."""
        text = rng.choice(self.wordings)
        for relation in RELATIONS:
            text = re.sub(rf"(?<!the )\b{relation}\b", lambda match: rng.choice(SYNONYMS[match[0]]), text)
        if rng.random() < 0.3:
            text = text.replace("color", "colour")
        if rng.random() < 0.4:
            text = text[0].upper() + text[1:]
        return text.rstrip("?.") if rng.random() < 0.2 else text


def _name(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def _yes_no(claim: bool) -> str:
    return "yes" if claim else "no"


def _is_unique(scene: Scene, item: SceneObject, *fields: str) -> bool:
    same = [all(getattr(other, f) == getattr(item, f) for f in fields) for other in scene.objects]
    return sum(same) == 1


def references(scene: Scene, item: SceneObject, hidden: str = "") -> list[str]:
    """Names that mean this object and no other in the scene, without naming its `hidden` property."""
    names = []
    if hidden != "shape" and _is_unique(scene, item, "shape"):
        names.append(item.shape)
    if hidden != "color" and _is_unique(scene, item, "color"):
        names.append(f"{item.color} object")
    if hidden not in ("color", "shape") and _is_unique(scene, item, "color", "shape"):
        names.append(_name(item))
    if hidden != "place" and len(scene.objects) > 1:
        names.append(f"object {PLACE_PHRASES[item.place][0]}")
    if len(scene.objects) == 1:
        names.append("object")
    return names


def _ask_color(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    for item in scene.objects:
        for name in references(scene, item, hidden="color"):
            wordings = (
                f"what color is the {name}?",
                f"which color is the {name}?",
                f"what is the color of the {name}?",
            )
            yield Question(wordings, item.color, "color")
    if len(scene.objects) > 1 and _share(scene, "color") and _share(scene, "shape"):
        shapes = pluralize(scene.objects[0].shape)
        yield Question(
            (f"what color are the {shapes}?", "what color are the objects?"), scene.objects[0].color, "color"
        )


def _ask_shape(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    for item in scene.objects:
        for name in references(scene, item, hidden="shape"):
            wordings = (
                f"what shape is the {name}?",
                f"which shape is the {name}?",
                f"what is the shape of the {name}?",
            )
            yield Question(wordings, item.shape, "shape")


def _share(scene: Scene, field: str) -> bool:
    return len({getattr(item, field) for item in scene.objects}) == 1


def _ask_count(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    yield _count_question("objects", len(scene.objects), "shapes")
    present = rng.choice(scene.objects)
    absent_shape, absent_color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    for shape in dict.fromkeys((present.shape, absent_shape)):
        number = sum(item.shape == shape for item in scene.objects)
        yield _count_question(pluralize(shape), number)
    for color in dict.fromkeys((present.color, absent_color)):
        yield _count_question(
            f"{color} objects", sum(item.color == color for item in scene.objects), f"{color} shapes"
        )
    color, shape = rng.choice(((present.color, present.shape), (absent_color, present.shape)))
    if split != "train" or (color, shape) not in HELD_OUT_PAIRS:
        number = sum((item.color, item.shape) == (color, shape) for item in scene.objects)
        yield _count_question(pluralize(f"{color} {shape}"), number)


def _count_question(plural: str, number: int, other_plural: str | None = None) -> Question:
    wordings = [f"how many {name} are there?" for name in (plural, other_plural) if name]
    wordings += [f"how many {plural} do you see?", f"how many {plural} are in the picture?", f"count the {plural}."]
    return Question(tuple(wordings), NUMBER_WORDS[number], "count")


def _may_ask(scene: Scene, split: str, first: SceneObject, relation: str, second: SceneObject) -> bool:
    """False in training for shapes whose order on this axis is held out: the answer would be known without looking."""
    flipped = is_held_out_relation(second.shape, relation, first.shape)
    return split != "train" or not (flipped or is_held_out_relation(first.shape, relation, second.shape))


def _ask_relation(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    """ "what is left of the star?", where exactly one object is; now and then where none is."""
    for item in scene.objects:
        for name in references(scene, item, hidden="place"):
            for relation in RELATIONS:
                there = [other for other in scene.objects if relation in relations_between(other, item)]
                if len(there) > 1 or (not there and rng.random() > 0.03):
                    continue
                wordings = (f"which object is {relation} the {name}?", f"what is {relation} the {name}?")
                yield Question(wordings, _name(there[0]) if there else "nothing", "relation")


def _ask_compare(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    """ "is the circle left of the star?", as often yes as no."""
    if len(scene.objects) < 2:
        return
    for _ in range(4):
        first, second = rng.sample(scene.objects, 2)
        names = [references(scene, item, hidden="place") for item in (first, second)]
        holding = relations_between(first, second)
        wanted = rng.random() < 0.5
        relation = rng.choice([name for name in RELATIONS if (name in holding) == wanted])
        if all(names) and _may_ask(scene, split, first, relation, second):
            one, other = (rng.choice(options) for options in names)
            wordings = (f"is the {one} {relation} the {other}?", f"is {with_article(one)} {relation} the {other}?")
            yield Question(wordings[:1] if "object" in one else wordings, _yes_no(wanted), "compare")


def _ask_exist(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    """Existence and attributes, as often yes as no; a no differs from something present in one word where it can."""
    looks = {(item.color, item.shape) for item in scene.objects}
    for _ in range(4):
        present, wanted = rng.choice(scene.objects), rng.random() < 0.5
        color, shape = present.color, present.shape
        if not wanted:
            color, shape = rng.choice(((rng.choice(tuple(COLORS)), shape), (color, rng.choice(SHAPES))))
        if ((color, shape) in looks) == wanted and (split != "train" or (color, shape) not in HELD_OUT_PAIRS):
            yield _exist_question(with_article(f"{color} {shape}"), wanted)
    present, wanted = rng.choice(scene.objects), rng.random() < 0.5
    for field, words in (("shape", SHAPES), ("color", tuple(COLORS))):
        values = {getattr(item, field) for item in scene.objects}
        value = rng.choice([word for word in words if (word in values) == wanted])
        yield _exist_question(with_article(value if field == "shape" else f"{value} object"), wanted)
    for name in references(scene, present, hidden="color")[:1]:
        color = present.color if wanted else rng.choice([c for c in COLORS if c != present.color])
        if split != "train" or (color, present.shape) not in HELD_OUT_PAIRS:
            yield Question((f"is the {name} {color}?",), _yes_no(wanted), "exist")


def _exist_question(noun: str, answer: bool) -> Question:
    wordings = (f"is there {noun}?", f"is there {noun} in the picture?", f"do you see {noun}?", f"can you see {noun}?")
    return Question(wordings, _yes_no(answer), "exist")


def _ask_where(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    for item in scene.objects:
        for name in references(scene, item, hidden="place"):
            wordings = (
                f"where is the {name}?",
                f"where do you see the {name}?",
                f"where in the picture is the {name}?",
            )
            yield Question(wordings, item.place, "where")


def _ask_background(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    wordings = (
        *("is the background light or dark?", "what is the background?", "what is the background like?"),
        *("is the background dark or light?", "how bright is the background?"),
    )
    yield Question(wordings, scene.background, "background")
    claimed = rng.choice(("light", "dark"))
    yield Question((f"is the background {claimed}?",), _yes_no(claimed == scene.background), "background")


def _ask_size(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    for item in scene.objects:
        for name in references(scene, item):
            wordings = (f"is the {name} small or large?", f"what size is the {name}?", f"how big is the {name}?")
            yield Question(wordings, item.size, "size")


def _ask_describe(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    wordings = ("describe the picture.", "what is in the picture?", "what do you see?", "describe the image.")
    yield Question(wordings, describe(scene), "describe")


def _ask_describe_detail(scene: Scene, rng: random.Random, split: str) -> Iterator[Question]:
    wordings = ("describe the picture in detail.", "describe the image in detail.", "describe everything you see.")
    yield Question(wordings, describe_in_detail(scene), "describe_detail")


def all_questions(scene: Scene, rng: random.Random, split: str = "train") -> list[Question]:
    """Every question that this scene settles, with `rng` choosing the negatives."""
    found: list[Question] = []
    askers = [_ask_color, _ask_shape, _ask_count, _ask_relation, _ask_compare, _ask_exist, _ask_where]
    askers += [_ask_background, _ask_size, _ask_describe, _ask_describe_detail]
    for ask in askers:
        found += ask(scene, rng, split)
    return found


def questions(scene: Scene, rng: random.Random, split: str = "train", rewording: float = 0.6) -> list[dict]:
    """Rows {question, paraphrase, answer, type}, at most `QUESTION_TYPES[type]` of each type.

    `question` is reworded with probability `rewording`; `paraphrase` always asks the same in freely chosen words.
    """
    candidates = all_questions(scene, rng, split)
    rng.shuffle(candidates)
    rows = []
    for kind, most in QUESTION_TYPES.items():
        for item in _pick(candidates, kind, most):
            asked = item.ask(rng) if rng.random() < rewording else item.wordings[0]
            rows.append({"question": asked, "paraphrase": item.ask(rng), "answer": item.answer, "type": kind})
    return rows


def _pick(candidates: Iterable[Question], kind: str, most: int) -> list[Question]:
    """The first `most` of a type that are really different questions."""
    unique = {item.wordings[0]: item for item in candidates if item.type == kind}
    return list(unique.values())[:most]
