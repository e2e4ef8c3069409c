"""The world of the scenes that pisces-tiny lives in: words, places, sizes, held-out combinations, and `sample_scene`.

`finetune.scenes` draws what is sampled here and `finetune.scenes.text` speaks about it. The world has little entropy
on purpose: whatever a caption leaves unsaid (place, background, size) has one canonical value, because a model that
regresses image vectors would otherwise average the possibilities into blur. Only unsaid colours are random.
"""

import colorsys
import itertools
import random
from dataclasses import asdict, dataclass


SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLORS = {
    "red": (222, 32, 38),
    "orange": (250, 138, 12),
    "yellow": (246, 218, 30),
    "green": (42, 166, 62),
    "cyan": (22, 198, 216),
    "blue": (36, 72, 214),
    "purple": (134, 44, 184),
    "pink": (250, 126, 188),
}
BACKGROUNDS = {"light": (245, 245, 245), "dark": (24, 24, 24)}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")

# All lengths are in 64ths of the picture's side, so they do not depend on the size it is drawn at.
LATTICE = (12.0, 32.0, 52.0)
SIZES = {"large": 9.0, "small": 6.0}
JITTER = 2.0
# Cells are 20 apart. Large beside small keeps 20 - 2 * 1.0 - 9.5 - 6.5 = 2; large squares on a diagonal, whose corners
# reach furthest, keep 20 - 2 * 1.0 - 2 * 0.88 * 9.5 = 1.3 on both axes.
CROWDED_JITTER = 1.0
RADIUS_JITTER = 0.5

# Never in a training scene. Every shape still comes in seven colours there.
HELD_OUT_PAIRS = frozenset(
    {
        ("cyan", "circle"),
        ("pink", "square"),
        ("purple", "triangle"),
        ("orange", "star"),
        ("green", "heart"),
        ("yellow", "cross"),
    }
)
# (first, relation, second); "right of" and "below" are the same facts read backwards.
HELD_OUT_RELATIONS = frozenset(
    {
        ("heart", "left of", "cross"),
        ("star", "left of", "square"),
        ("triangle", "left of", "circle"),
        ("circle", "above", "heart"),
        ("square", "above", "triangle"),
        ("cross", "above", "star"),
    }
)
SPLITS = ("train", "heldout")

# How often each kind of scene is drawn. "pair": two objects in a row or column; "same": equal objects;
# "list": three or four objects in the canonical layout; "free": two to four objects anywhere.
KINDS = {"single": 0.27, "pair": 0.29, "same": 0.2, "list": 0.06, "free": 0.18}


@dataclass
class SceneObject:
    """One shape: words for what it is, the lattice cell, and its exact geometry (64ths of the side) and colour."""

    shape: str
    color: str
    size: str
    row: int
    col: int
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        """The name of the lattice cell, for example "top left"."""
        return PLACES[3 * self.row + self.col]


@dataclass
class Scene:
    """A picture in words and numbers. `kind` is a key of `KINDS`; `place` is None in the canonical layout."""

    background: str
    background_rgb: tuple[int, int, int]
    objects: list[SceneObject]
    kind: str
    place: str | None

    def truth(self) -> dict:
        """The scene as JSON types; `Scene.from_truth` is its inverse."""
        return asdict(self)

    @classmethod
    def from_truth(cls, truth: dict) -> "Scene":
        """Rebuild the scene that `truth()` wrote, also after a round trip through JSON."""
        objects = [SceneObject(**{**item, "rgb": tuple(item["rgb"])}) for item in truth["objects"]]
        return cls(**{**truth, "background_rgb": tuple(truth["background_rgb"]), "objects": objects})


def cell_of(place: str | None) -> tuple[int, int]:
    """(row, col) of a place name; None means the center."""
    return divmod(PLACES.index(place or "center"), 3)


def pair_cells(axis: str, place: str | None) -> list[tuple[int, int]]:
    """The two cells of a "row" (left, right) or "column" (top, bottom), as far apart as the place allows."""
    row, col = cell_of(place)
    spread = {0: (0, 1), 1: (0, 2), 2: (1, 2)}
    if axis == "row":
        return [(row, other) for other in spread[col]]
    return [(other, col) for other in spread[row]]


def group_cells(num_objects: int, place: str | None) -> list[tuple[int, int]]:
    """The canonical layout of one to four objects at a place, in reading order."""
    row, col = cell_of(place)
    if num_objects == 1:
        return [(row, col)]
    if num_objects == 2:
        return pair_cells("column" if row == 1 and col != 1 else "row", place)
    if num_objects == 3 and row == col == 1:
        return [(0, 1), (2, 0), (2, 2)]
    if num_objects == 3 and row != 1 and col != 1:
        return sorted([(row, col), (row, 1), (1, col)])
    if num_objects == 3:
        return [(row, other) for other in range(3)] if col == 1 else [(other, col) for other in range(3)]
    rows, cols = ((0, 2) if axis == 1 else sorted({axis, 1}) for axis in (row, col))
    return list(itertools.product(rows, cols))


def are_neighbours(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two cells share a side, so that two large objects would touch."""
    return abs(first[0] - second[0]) + abs(first[1] - second[1]) == 1


def is_crowded(cells: list[tuple[int, int]]) -> bool:
    """Whether some cells are neighbours; objects of such a layout are small without a word about it."""
    return any(are_neighbours(a, b) for a, b in itertools.combinations(cells, 2))


def relations_between(first: SceneObject, second: SceneObject) -> set[str]:
    """Every relation that holds from `first` to `second`, by lattice column and row."""
    found = set()
    if first.col != second.col:
        found.add("left of" if first.col < second.col else "right of")
    if first.row != second.row:
        found.add("above" if first.row < second.row else "below")
    return found


def is_held_out_relation(first_shape: str, relation: str, second_shape: str) -> bool:
    """Whether this fact about two shapes, read either way, never occurs in training scenes."""
    if relation in ("right of", "below"):
        first_shape, second_shape = second_shape, first_shape
        relation = "left of" if relation == "right of" else "above"
    return (first_shape, relation, second_shape) in HELD_OUT_RELATIONS


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows a held-out colour and shape, or two shapes in a held-out relation."""
    if any((item.color, item.shape) in HELD_OUT_PAIRS for item in scene.objects):
        return True
    return any(
        is_held_out_relation(a.shape, relation, b.shape)
        for a, b in itertools.permutations(scene.objects, 2)
        for relation in relations_between(a, b)
    )


def sample_scene(rng: random.Random, split: str = "train", max_objects: int = 4, kind: str | None = None) -> Scene:
    """Draw a random scene of one to `max_objects` objects.

    Args:
        rng: the only source of randomness.
        split: "train" never shows a held-out combination, "heldout" always does.
        max_objects: 1 to 4; a curriculum raises it.
        kind: a key of `KINDS`; None draws one by the weights there.

    Raises:
        ValueError: unknown split or kind, or a kind that needs more than `max_objects`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {SPLITS}.")
    least = {"single": 1, "pair": 2, "same": 2, "list": 3, "free": 2}
    allowed = [name for name in KINDS if least[name] <= max_objects]
    if not 1 <= max_objects <= 4 or (kind is not None and kind not in allowed):
        raise ValueError(f"kind {kind!r}, max_objects {max_objects}: expected 1 to 4 objects and a kind of {allowed}.")
    kind = kind or rng.choices(allowed, [KINDS[name] for name in allowed])[0]
    num_objects = {"single": 1, "pair": 2}.get(kind) or rng.randint(least[kind], max_objects)
    while True:  # kind and number stay fixed, so that rejection does not favour large scenes in one split
        scene = _draw(rng, kind, num_objects)
        if is_held_out(scene) == (split == "heldout") and not _says_the_same_twice(scene):
            return scene


def _says_the_same_twice(scene: Scene) -> bool:
    """Whether a scene of different objects drew two equal ones ("a red star and a red star")."""
    looks = {(item.color, item.shape) for item in scene.objects}
    return scene.kind in ("pair", "list") and len(looks) < len(scene.objects)


def make_scene(
    rng: random.Random,
    words: list[tuple[str, str, str]],
    cells: list[tuple[int, int]],
    background: str = "light",
    kind: str = "free",
    place: str | None = None,
) -> Scene:
    """Give exact geometry and colour to `words`, one (shape, color, size) per lattice cell (row, col)."""
    objects = []
    for (shape, color, size), cell in zip(words, cells, strict=True):
        crowded = any(max(abs(cell[0] - row), abs(cell[1] - col)) == 1 for row, col in cells)
        jitter = CROWDED_JITTER if crowded else JITTER
        x, y = (round(LATTICE[axis] + rng.uniform(-jitter, jitter), 2) for axis in (cell[1], cell[0]))
        radius = round(SIZES[size] + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER), 2)
        red, green, blue = (min(255, max(0, value + rng.randint(-6, 6))) for value in COLORS[color])
        rgb = (red, green, blue)
        objects.append(SceneObject(shape, color, size, *cell, x, y, radius, rgb))
    shade = rng.randint(-8, 8)
    red, green, blue = (value + shade + rng.randint(-2, 2) for value in BACKGROUNDS[background])
    return Scene(background, (red, green, blue), objects, kind, place)


def name_color(rgb: tuple[int, int, int]) -> str:
    """The name of the nearest colour of the vocabulary."""
    return min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, COLORS[name], strict=True)))


def spread_colors(scene: Scene, rng: random.Random) -> Scene:
    """Give each object of `scene`, in place, any vivid colour that still bears its name.

    Encoder and decoder then learn colour as something continuous that any shape can have, instead of 42 seen pairs. A
    held-out pair stays unseen, because the nearest name decides.
    """
    for item in scene.objects:
        while True:
            hue, saturation, value = rng.random(), rng.uniform(0.5, 1.0), rng.uniform(0.6, 1.0)
            red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
            if name_color((red, green, blue)) == item.color:
                item.rgb = (red, green, blue)
                break
    return scene


def _draw(rng: random.Random, kind: str, num_objects: int) -> Scene:
    """One unfiltered draw of words, cells and geometry."""
    background = "dark" if rng.random() < 0.4 else "light"
    has_place = rng.random() < {"single": 0.6, "pair": 0.35, "same": 0.35, "list": 0.2, "free": 0.0}[kind]
    place = rng.choice(PLACES) if has_place else None
    if kind == "pair":
        cells = pair_cells(rng.choice(("row", "column")), place)
    elif kind == "free":
        cells = sorted(rng.sample(list(itertools.product(range(3), range(3))), num_objects))
    else:
        cells = group_cells(num_objects, place)
    looks = [(rng.choice(SHAPES), rng.choice(tuple(COLORS))) for _ in cells]
    if kind == "same":
        looks = looks[:1] * num_objects
    sizes = _draw_sizes(rng, kind, cells)
    words = [(*look, size) for look, size in zip(looks, sizes, strict=True)]
    return make_scene(rng, words, cells, background, kind, place)


def _draw_sizes(rng: random.Random, kind: str, cells: list[tuple[int, int]]) -> list[str]:
    """Mostly large; small where large neighbours would touch; equal objects share a size."""
    if kind != "free" and is_crowded(cells):
        return ["small"] * len(cells)
    if kind in ("same", "single"):
        return [rng.choices(("large", "small"), (0.8, 0.2))[0]] * len(cells)
    sizes: list[str] = []
    for index, cell in enumerate(cells):
        touches = any(are_neighbours(cell, cells[other]) and sizes[other] == "large" for other in range(index))
        sizes.append("small" if touches or rng.random() < (0.3 if kind == "free" else 0.15) else "large")
    return sizes
