"""What is said about a scene: short and detailed captions, and the same captions in other words.

Captions keep the convention of `finetune.scenes.layout`: whatever one leaves unsaid has its canonical value in the
picture, so every caption here pins its scene down to colours that it does not name. `finetune.scenes` writes them,
`finetune.scenes.prompts` asks for pictures with the same forms. Questions are in `finetune.scenes.questions`.
"""

import random
import re

from finetune.scenes.layout import PLACES, Scene, SceneObject, group_cells, is_crowded, pair_cells


NUMBER_WORDS = ("zero", "one", "two", "three", "four")
PLACE_PHRASES = {
    "top left": ("in the top left", "in the top left corner", "in the upper left", "at the top left"),
    "top": ("at the top", "at the top of the picture", "on the top"),
    "top right": ("in the top right", "in the top right corner", "in the upper right", "at the top right"),
    "left": ("on the left", "on the left side", "at the left"),
    "center": ("in the center", "in the middle", "in the centre", "at the center"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left": ("in the bottom left", "in the bottom left corner", "in the lower left", "at the bottom left"),
    "bottom": ("at the bottom", "at the bottom of the picture", "on the bottom"),
    "bottom right": ("in the bottom right", "in the bottom right corner", "in the lower right", "at the bottom right"),
}
# Other words for the same thing; the first of each is the plain form that captions are built from.
SYNONYMS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath", "underneath"),
    "on a dark background": ("on a dark background", "with a dark background", "on a black background"),
    "on a light background": ("on a light background", "with a light background", "on a white background"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    **{word: (word, str(number)) for number, word in enumerate(NUMBER_WORDS) if number > 1},
}
_WORDINGS = {phrases[0]: phrases for phrases in (*PLACE_PHRASES.values(), *SYNONYMS.values())}
_PLAIN = re.compile(rf"\b({'|'.join(sorted(_WORDINGS, key=len, reverse=True))})\b")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PREFIXES = (
    *("picture of", "a picture of", "an image of", "a drawing of", "a photo of"),
    *("draw", "please draw", "show", "show me", "paint", "make a picture of", "generate an image of"),
)


def with_article(words: str) -> str:
    """ "red star" -> "a red star", "orange star" -> "an orange star"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def pluralize(words: str) -> str:
    """ "red star" -> "red stars", "cross" -> "crosses"."""
    return words + ("es" if words.endswith("s") else "s")


def join_list(parts: list[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def name_object(item: SceneObject, say_color: bool = True, say_size: bool = False) -> str:
    """The object without an article: "small red star"."""
    return " ".join([item.size] * say_size + [item.color] * say_color + [item.shape])


def find_layouts(scene: Scene) -> list[tuple[str, str]]:
    """Every (layout, place) whose convention gives exactly this picture; layout is "group", "row" or "column".

    Sizes count: a crowded layout must be all small, since a caption says nothing about size there.
    """
    cells = [(item.row, item.col) for item in scene.objects]
    if is_crowded(cells) and any(item.size == "large" for item in scene.objects):
        return []
    found = [("group", place) for place in PLACES if group_cells(len(cells), place) == cells]
    if len(cells) == 2:
        found += [(axis, place) for axis in ("row", "column") for place in PLACES if pair_cells(axis, place) == cells]
    return found


def _says_size(scene: Scene, item: SceneObject) -> bool:
    """Small is said, except where a canonical layout is small anyway."""
    crowded = is_crowded([(other.row, other.col) for other in scene.objects])
    return item.size == "small" and not (crowded and find_layouts(scene))


def _phrase_layout(scene: Scene, layout: str, colors: list[bool]) -> list[str]:
    """The objects of a scene in one canonical layout, without place and background; empty where words cannot tell."""
    items = scene.objects
    names = [name_object(item, color, _says_size(scene, item)) for item, color in zip(items, colors, strict=True)]
    if layout == "group" and len(items) > 1 and len({name_object(item, True, True) for item in items}) == 1:
        return [f"{NUMBER_WORDS[len(items)]} {pluralize(names[0])}"]
    repeated = len({item.shape for item in items}) < len(items)
    if len(set(names)) < len(names) or (repeated and not all(colors)):
        return []  # "a star and a star", "a star left of a red star"
    nouns = [with_article(name) for name in names]
    if layout == "group":
        return [join_list(nouns)]
    relation = "left of" if layout == "row" else "above"
    return [f"{nouns[0]} {relation} {nouns[1]}", f"{nouns[1]} {INVERSE[relation]} {nouns[0]}"]


def _phrase_places(scene: Scene, say_color: bool = True) -> str:
    """Every object with its place: right for any layout. A small object is called small."""
    return join_list(
        [
            f"{with_article(name_object(item, say_color, item.size == 'small'))} {PLACE_PHRASES[item.place][0]}"
            for item in scene.objects
        ]
    )


def describe(scene: Scene) -> str:
    """The one plain short caption with every colour: a function of what can be seen, so it can be an exact answer."""
    background = " on a dark background" if scene.background == "dark" else ""
    layouts = find_layouts(scene)
    # where "A and B" and "A left of B" look the same, the relation says more
    for layout, place in sorted(layouts, key=lambda found: found[0] == "group" and len(scene.objects) == 2):
        where = "" if place == "center" else " " + PLACE_PHRASES[place][0]
        for phrase in _phrase_layout(scene, layout, [True] * len(scene.objects)):
            return phrase + where + background
    return _phrase_places(scene) + background


def describe_in_detail(scene: Scene) -> str:
    """Every object with size, colour, shape and place, in reading order, and the background."""
    items = sorted(scene.objects, key=lambda item: (item.row, item.col))
    parts = [f"{with_article(name_object(item, True, True))} {PLACE_PHRASES[item.place][0]}" for item in items]
    return f"{join_list(parts)} on a {scene.background} background"


def short_captions(scene: Scene, rng: random.Random) -> list[str]:
    """All plain short captions that are true to the convention, coloured ones first within each layout.

    Optional words (a light background, the center) are said in about one caption of four.
    """
    num_objects = len(scene.objects)
    colorings = [[True] * num_objects, [False] * num_objects]
    if num_objects == 2:
        colorings.append(rng.choice(([True, False], [False, True])))
    captions = []
    for layout, place in find_layouts(scene):
        for colors in colorings:
            for phrase in _phrase_layout(scene, layout, colors):
                captions.append(phrase + _phrase_setting(scene, place, rng))
    if num_objects > 1:
        is_repeated = len({item.shape for item in scene.objects}) < num_objects
        for say_color in (True,) if is_repeated else (True, False):
            captions.append(_phrase_places(scene, say_color) + _phrase_setting(scene, None, rng))
    return list(dict.fromkeys(captions))


def _phrase_setting(scene: Scene, place: str | None, rng: random.Random) -> str:
    """The place and background that a caption must name, and now and then those it may name."""
    words = ""
    if place not in (None, "center") or (place == "center" and rng.random() < 0.2):
        words += " " + PLACE_PHRASES[place][0]
    if scene.background == "dark" or rng.random() < 0.25:
        words += f" on a {scene.background} background"
    return words


def reword(text: str, rng: random.Random) -> str:
    """The same caption in slightly other words: synonyms, articles, a prefix, capital letters, a full stop."""
    # one pass, so that "at the top left" is not read again as "at the top" + "left"
    text = _PLAIN.sub(lambda match: rng.choice(_WORDINGS[match[0]]) if rng.random() < 0.5 else match[0], text)
    text = _reword_articles(text, rng)
    if rng.random() < 0.4:
        text = f"{rng.choice(PREFIXES)} {text}"
    if rng.random() < 0.35:
        text = text[0].upper() + text[1:]
    elif rng.random() < 0.04:
        text = text.upper()
    return text + "." if rng.random() < 0.35 else text


def _reword_articles(text: str, rng: random.Random) -> str:
    """Mostly unchanged; sometimes every article is dropped, or the objects get "the"."""
    choice = rng.random()
    if choice < 0.15:
        return re.sub(r"\b(a|an|the) (?!left|right|top|bottom|upper|lower|center|centre|middle|picture)", "", text)
    if choice < 0.3:
        return re.sub(r"\b(a|an) (?!dark|light|black|white)", "the ", text)
    return text


def caption_prompts(scene: Scene, rng: random.Random, num_short: int = 6, rewording: float = 0.5) -> list[str]:
    """Up to `num_short` short captions and, last, the detailed one.

    The first is always plain; each other one is reworded with probability `rewording`.
    """
    plain = short_captions(scene, rng)
    rng.shuffle(plain)
    picked = (plain * num_short)[:num_short]
    short = [picked[0]] + [reword(text, rng) if rng.random() < rewording else text for text in picked[1:]]
    detailed = describe_in_detail(scene)
    return [*dict.fromkeys(short), reword(detailed, rng) if rng.random() < rewording / 2 else detailed]
