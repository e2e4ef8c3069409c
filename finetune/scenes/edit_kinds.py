"""What can be changed in a scene, in words and exactly: one instruction, the scene before and the scene after.

`finetune.scenes.edits` writes rows of these for training and for a score. Everything that an instruction does not name
stays where it is to the last digit, so a drawing can be held to it. An object is called by a name that means no other.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from finetune.scenes.layout import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneObject,
    are_neighbours,
    is_held_out,
    make_scene,
    sample_scene,
)
from finetune.scenes.questions import references
from finetune.scenes.text import PLACE_PHRASES, with_article


# (kind, colour that its instruction names): never in training rows, where each kind still names six colours
HELD_OUT_EDITS = frozenset({("recolor", "purple"), ("recolor", "cyan"), ("add", "orange"), ("add", "pink")})
MAX_OBJECTS = 4
MIN_GAP = {"side": 2.0, "diagonal": 1.0}  # 64ths of the side, between bounding boxes; as finetune.scenes.layout keeps


@dataclass
class Edit:
    """An instruction in several wordings (the first is the plain one), and the scene that it asks for.

    `ops` says the same for a program, in order. Each is {"op", "cell": [row, col]} with, for "set" and "add", "color",
    "shape" or "size"; for "move" and "swap" the other cell as "to"; "background" has no cell but a "background".
    """

    kind: str
    wordings: tuple[str, ...]
    target: Scene
    ops: list[dict[str, Any]]

    def say(self, rng: random.Random) -> str:
        """One of the wordings, with small freedoms: capital letter, full stop."""
        text = rng.choice(self.wordings)
        text = text[0].upper() + text[1:] if rng.random() < 0.35 else text
        return text + "." if rng.random() < 0.35 else text


def cell(item: SceneObject) -> list[int]:
    return [item.row, item.col]


def looks(scene: Scene) -> dict[tuple[int, int], tuple[str, str, str]]:
    """(shape, color, size) by cell."""
    return {(item.row, item.col): (item.shape, item.color, item.size) for item in scene.objects}


def touched_cells(before: Scene, after: Scene) -> set[tuple[int, int]]:
    """Cells that look different afterwards, also those that are empty now."""
    one, other = looks(before), looks(after)
    return {place for place in {*one, *other} if one.get(place) != other.get(place)}


def is_allowed(scene: Scene, touched: set[tuple[int, int]]) -> bool:
    """Whether the objects of the touched cells keep their distance from all others, and no two large ones stand side
    by side: the scenes of `finetune.scenes.layout` never show that."""
    for one, other in itertools.combinations(scene.objects, 2):
        if not touched & {(one.row, one.col), (other.row, other.col)}:
            continue
        if one.size == other.size == "large" and are_neighbours((one.row, one.col), (other.row, other.col)):
            return False
        reach = sum((0.88 if item.shape == "square" else 1.0) * item.radius for item in (one, other))
        kind = "side" if one.row == other.row or one.col == other.col else "diagonal"
        if max(abs(one.x - other.x), abs(one.y - other.y)) - reach < MIN_GAP[kind]:
            return False
    return True


def _changed(scene: Scene, old: list[SceneObject], new: list[SceneObject]) -> Scene:
    """The scene with other objects in the place of `old`, in reading order; its layout has no canonical words."""
    kept = [replace(item) for item in scene.objects if all(item is not gone for gone in old)]
    objects = sorted([*kept, *new], key=lambda item: (item.row, item.col))
    return replace(scene, objects=objects, kind="free", place=None)


def _fresh(rng: random.Random, words: tuple[str, str, str], place: tuple[int, int]) -> SceneObject:
    """One new object of (shape, color, size) in a cell."""
    return make_scene(rng, [words], [place]).objects[0]


def _empty_cells(scene: Scene) -> list[tuple[int, int]]:
    return [place for place in itertools.product(range(3), range(3)) if place not in looks(scene)]


def _to_place(place: tuple[int, int]) -> str:
    """ "to the top left"."""
    return "to the " + PLACES[3 * place[0] + place[1]]


def _recolor(scene: Scene, rng: random.Random) -> Edit:
    item = rng.choice(scene.objects)
    color = rng.choice([name for name in COLORS if name != item.color])
    name = rng.choice(references(scene, item))
    rgb = _fresh(rng, (item.shape, color, item.size), (item.row, item.col)).rgb
    target = _changed(scene, [item], [replace(item, color=color, rgb=rgb)])
    wordings = (
        f"make the {name} {color}",
        f"paint the {name} {color}",
        f"turn the {name} {color}",
        f"change the color of the {name} to {color}",
    )
    return Edit("recolor", wordings, target, [{"op": "set", "cell": cell(item), "color": color}])


def _reshape(scene: Scene, rng: random.Random) -> Edit:
    item = rng.choice(scene.objects)
    shape = rng.choice([name for name in SHAPES if name != item.shape])
    name = rng.choice(references(scene, item))
    target = _changed(scene, [item], [replace(item, shape=shape)])
    wordings = (
        f"turn the {name} into {with_article(shape)}",
        f"make the {name} {with_article(shape)}",
        f"change the shape of the {name} to {with_article(shape)}",
    )
    return Edit("reshape", wordings, target, [{"op": "set", "cell": cell(item), "shape": shape}])


def _resize(scene: Scene, rng: random.Random) -> Edit:
    item = rng.choice(scene.objects)
    size = next(name for name in SIZES if name != item.size)
    name = rng.choice(references(scene, item))
    radius = _fresh(rng, (item.shape, item.color, size), (item.row, item.col)).radius
    target = _changed(scene, [item], [replace(item, size=size, radius=radius)])
    more = {"small": "smaller", "large": "larger"}[size]
    wordings = (f"make the {name} {size}", f"make the {name} {more}", f"change the size of the {name} to {size}")
    return Edit("resize", wordings, target, [{"op": "set", "cell": cell(item), "size": size}])


def _move(scene: Scene, rng: random.Random) -> Edit:
    item, place = rng.choice(scene.objects), rng.choice(_empty_cells(scene))
    name = rng.choice(references(scene, item))
    new = _fresh(rng, (item.shape, item.color, item.size), place)
    moved = replace(item, row=new.row, col=new.col, x=new.x, y=new.y)
    wordings = (f"move the {name} {_to_place(place)}", f"put the {name} {PLACE_PHRASES[new.place][0]}")
    ops = [{"op": "move", "cell": cell(item), "to": list(place)}]
    return Edit("move", wordings, _changed(scene, [item], [moved]), ops)


def _add(scene: Scene, rng: random.Random) -> Edit | None:
    if len(scene.objects) == MAX_OBJECTS:
        return None
    place, shape, color = rng.choice(_empty_cells(scene)), rng.choice(SHAPES), rng.choice(tuple(COLORS))
    size = rng.choice(tuple(SIZES))
    new = _fresh(rng, (shape, color, size), place)
    words = with_article(f"{'small ' if size == 'small' else ''}{color} {shape}")  # large is what goes unsaid
    where = PLACE_PHRASES[new.place][0]
    wordings = (f"add {words} {where}", f"put {words} {where}", f"draw {words} {where} too")
    ops = [{"op": "add", "cell": list(place), "shape": shape, "color": color, "size": size}]
    return Edit("add", wordings, _changed(scene, [], [new]), ops)


def _remove(scene: Scene, rng: random.Random) -> Edit | None:
    if len(scene.objects) == 1:
        return None
    item = rng.choice(scene.objects)
    name = rng.choice(references(scene, item))
    wordings = (f"remove the {name}", f"take the {name} away", f"delete the {name}", f"erase the {name}")
    return Edit("remove", wordings, _changed(scene, [item], []), [{"op": "remove", "cell": cell(item)}])


def _background(scene: Scene, rng: random.Random) -> Edit:
    name = next(name for name in BACKGROUNDS if name != scene.background)
    rgb = make_scene(rng, [], [], name).background_rgb
    target = replace(_changed(scene, [], []), background=name, background_rgb=rgb)
    wordings = (
        f"make the background {name}",
        f"change the background to {name}",
        f"put it on a {name} background",
    )
    return Edit("background", wordings, target, [{"op": "background", "background": name}])


def _swap(scene: Scene, rng: random.Random) -> Edit | None:
    if len(scene.objects) == 1:
        return None
    one, other = rng.sample(scene.objects, 2)
    if (one.shape, one.color, one.size) == (other.shape, other.color, other.size):
        return None
    names = [rng.choice(references(scene, item)) for item in (one, other)]
    swapped = [replace(a, row=b.row, col=b.col, x=b.x, y=b.y) for a, b in ((one, other), (other, one))]
    wordings = tuple(text.format(*names) for text in ("swap the {} and the {}", "exchange the {} and the {}"))
    ops = [{"op": "swap", "cell": cell(one), "to": cell(other)}]
    return Edit("swap", wordings, _changed(scene, [one, other], swapped), ops)


def _nothing(scene: Scene, rng: random.Random) -> Edit:
    wordings = ("change nothing", "leave everything as it is", "keep the picture as it is", "draw the same picture")
    return Edit("nothing", wordings, _changed(scene, [], []), [])


def _impossible(scene: Scene, rng: random.Random) -> Edit:
    """About an object that is not there; the right answer is the picture as it is."""
    shape = rng.choice([name for name in SHAPES if all(item.shape != name for item in scene.objects)])
    color = rng.choice([name for name in COLORS if ("recolor", name) not in HELD_OUT_EDITS])
    place = rng.choice(PLACES)
    wording = rng.choice((f"make the {shape} {color}", f"remove the {shape}", f"move the {shape} to the {place}"))
    return Edit("impossible", (wording,), _changed(scene, [], []), [])


SINGLE: dict[str, Callable[[Scene, random.Random], Edit | None]] = {
    "recolor": _recolor,
    "reshape": _reshape,
    "resize": _resize,
    "move": _move,
    "add": _add,
    "remove": _remove,
    "background": _background,
    "swap": _swap,
}
UNCHANGED: dict[str, Callable[[Scene, random.Random], Edit | None]] = {"nothing": _nothing, "impossible": _impossible}
KINDS = (*SINGLE, *UNCHANGED, "two", "chained")


def _mirror(scene: Scene, rng: random.Random) -> Edit:
    """Left and right exchanged; the places of a row are swapped, or one of them is emptied."""
    moved = [replace(item, col=2 - item.col, x=64 - item.x) for item in scene.objects]
    wordings = ("mirror the picture", "flip the picture from left to right", "show it in a mirror")
    ops = []
    for place in sorted(looks(scene)):
        other = (place[0], 2 - place[1])
        if place[1] != 1 and (other not in looks(scene) or place < other):
            ops.append({"op": "swap" if other in looks(scene) else "move", "cell": list(place), "to": list(other)})
    return Edit("mirror", wordings, _changed(scene, scene.objects, moved), ops)


def _everything(scene: Scene, rng: random.Random) -> Edit | None:
    """All objects in one colour."""
    color = rng.choice(tuple(COLORS))
    old = [item for item in scene.objects if item.color != color]
    if len(scene.objects) == 1 or not old:
        return None
    new = [
        replace(item, color=color, rgb=_fresh(rng, (item.shape, color, item.size), (item.row, item.col)).rgb)
        for item in old
    ]
    wordings = (f"make everything {color}", f"paint all objects {color}", f"turn every object {color}")
    return Edit(
        "everything",
        wordings,
        _changed(scene, old, new),
        [{"op": "set", "cell": cell(i), "color": color} for i in old],
    )


# kinds that pisces-tiny was never shown: what an adapter can be taught, and how much of the rest that costs
NEW_KINDS: dict[str, Callable[[Scene, random.Random], Edit | None]] = {"mirror": _mirror, "everything": _everything}


def make_edit(scene: Scene, rng: random.Random, kind: str) -> Edit | None:
    """One instruction of a kind, but not of "two" and "chained"; None where this draw does not fit the scene."""
    edit = (SINGLE | UNCHANGED | NEW_KINDS)[kind](scene, rng)
    if edit is None or not is_allowed(edit.target, touched := touched_cells(scene, edit.target)):
        return None
    if not touched and edit.target.background == scene.background and kind not in UNCHANGED:
        return None
    return edit


def is_held_out_edit(edit: Edit) -> bool:
    """Whether training never shows the scene that it ends in, or names this colour in such an instruction."""
    kinds = {"set": "recolor", "add": "add"}
    named = {(kinds.get(op["op"]), op.get("color")) for op in edit.ops}
    return is_held_out(edit.target) or bool(named & HELD_OUT_EDITS)


def sample_edits(rng: random.Random, kind: str, split: str = "train") -> tuple[Scene, list[Edit]]:
    """A scene and one edit of it; of "chained" two, the second of what the first gives. "two" is one instruction.

    Args:
        kind: of `KINDS` or `NEW_KINDS`.
        split: "train" shows no held-out combination and names no held-out colour, "heldout" does one of them.

    Raises:
        ValueError: an unknown kind or split.
    """
    if kind not in (*KINDS, *NEW_KINDS) or split not in SPLITS:
        known = (*KINDS, *NEW_KINDS)
        raise ValueError(f"kind {kind!r}, split {split!r}: expected one of {known} and one of {SPLITS}.")
    while True:
        scene = sample_scene(rng, rng.choice(SPLITS) if split == "heldout" else "train")
        kinds = rng.sample(tuple(SINGLE), 2) if kind in ("two", "chained") else [kind]
        edits: list[Edit] = []
        touched: set[tuple[int, int]] = set()
        for name in kinds:
            before = edits[-1].target if edits else scene
            edit = make_edit(before, rng, name)
            changes = set() if edit is None else touched_cells(before, edit.target)
            if edit is None or touched & changes:  # the second never undoes the first
                break
            touched |= changes
            edits.append(edit)
        if len(edits) == len(kinds):
            held_out = is_held_out(scene) or any(map(is_held_out_edit, edits))
            if held_out == (split == "heldout"):
                return scene, [_as_one(*edits)] if kind == "two" else edits


def _as_one(first: Edit, second: Edit) -> Edit:
    wordings = tuple(
        f"{one} {link} {other}"
        for one, other, link in itertools.product(first.wordings, second.wordings, ("and then", "and"))
    )
    return Edit("two", wordings, second.target, first.ops + second.ops)
