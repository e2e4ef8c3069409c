"""What the npm packages hold: which emoji there are, their names, keywords and skin tones, and where the pictures lie.

`make_data` reads from here. The packages are `emoji-datasource-google` (or `-twitter`) for pictures and `emojilib` for
plain English names; the names in the data source are those of Unicode ("WHITE DOWN POINTING BACKHAND INDEX").
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
VARIATION_SELECTOR = "\ufe0f"  # says "in colour"; the two packages disagree on where it stands
MAX_KEYWORDS = 3
# emojilib 4 calls these as it calls another one, so that no name would tell them apart
OWN_NAMES = {
    "0023-FE0F-20E3": "keycap hash",
    "002A-FE0F-20E3": "keycap asterisk",
    "1F935": "person in tuxedo",
    "1F9D4": "person with beard",
}
# what emojilib leaves out of a name, as people say it
REWORDINGS = (
    (r"^flag (?!in hole)", "flag of "),
    (r"^(man|woman|person) (red|curly|white|blond) hair$", r"\1 with \2 hair"),
    (r"^(man|woman|person) bald$", r"bald \1"),
    (r"^(man|woman) beard$", r"\1 with beard"),
    (r"^(kiss|couple with heart) (man|woman) (man|woman)$", r"\1, \2 and \3"),
    (r"^family (\w+) (\w+) (\w+) (\w+)$", r"family of \1, \2, \3 and \4"),
    (r"^family (?!of)(\w+) (\w+) (\w+)$", r"family of \1, \2 and \3"),
    (r"^family (?!of)(\w+) (\w+)$", r"family of \1 and \2"),
    (r"^(black|white) large square$", r"\1 square"),
)
# (category, beginning of the subcategory) to the answer of "what kind of thing is it?"; the first that fits counts
KINDS = (
    ("Smileys & Emotion", "face", "face"),
    ("Smileys & Emotion", "cat-face", "face"),
    ("Smileys & Emotion", "monkey-face", "face"),
    ("Smileys & Emotion", "heart", "heart"),
    ("Smileys & Emotion", "", "symbol"),
    ("People & Body", "person-symbol", "symbol"),
    ("People & Body", "person", "person"),
    ("People & Body", "family", "person"),
    ("People & Body", "hand", "hand"),
    ("People & Body", "", "body part"),
    ("Animals & Nature", "animal", "animal"),
    ("Animals & Nature", "", "plant"),
    ("Food & Drink", "dishware", "object"),
    ("Food & Drink", "", "food"),
    ("Travel & Places", "place", "place"),
    ("Travel & Places", "transport", "transport"),
    ("Travel & Places", "sky", "sky"),
    ("Travel & Places", "time", "clock"),
    ("Travel & Places", "", "object"),
    ("Activities", "", "activity"),
    ("Objects", "clothing", "clothing"),
    ("Objects", "", "object"),
    ("Symbols", "geometric", "shape"),
    ("Symbols", "", "symbol"),
    ("Flags", "", "flag"),
)


@dataclass(frozen=True)
class Emoji:
    """One picture of a vendor and what its name says.

    `code` is the code points ("1f469-1f3ff-200d-1f33e"), `name` is without the skin tone, `tones` are those that are
    drawn: none (yellow), one, or two for two people of different tones. `takes_tone` holds for all tones of a name.
    `is_drawn` is whether this vendor has the picture.
    """

    code: str
    name: str
    keywords: tuple[str, ...]
    kind: str
    subcategory: str
    tones: tuple[str, ...]
    takes_tone: bool
    is_drawn: bool
    file: Path


def read_emoji(source: Path, vendor: str) -> list[Emoji]:
    """All emoji that the package lists, drawn by the vendor or not, in Unicode's order of code points.

    Args:
        source: the folder that holds the packages, for example `node_modules`.
        vendor: "google" or "twitter".

    Raises:
        ValueError: a package is not there or is not what it is taken for.
    """
    package = _package_folder(source, f"emoji-datasource-{vendor}")
    entries = _read_json(package / "emoji.json", list)
    names = _read_json(_package_folder(source, "emojilib") / "dist" / "emoji-en-US.json", dict)
    names = {key.replace(VARIATION_SELECTOR, ""): value for key, value in names.items()}
    try:
        found = [emoji for entry in entries for emoji in _read_entry(entry, vendor, names, package)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{package / 'emoji.json'}: found an entry without {error}, expected the entries of emoji-datasource 16. "
            f"Install that version: npm install emoji-datasource-{vendor}@16"
        ) from error
    return sorted(found, key=lambda emoji: emoji.code)


def _package_folder(source: Path, name: str) -> Path:
    """`SOURCE/NAME`, or `SOURCE/NAME/package` as a tar file of npm unpacks."""
    for folder in (source / name, source / name / "package"):
        if (folder / "package.json").is_file():
            return folder
    raise ValueError(
        f"{source}: no package {name} in it. Get it with `npm install --prefix FOLDER {name}` and give "
        "--source FOLDER/node_modules."
    )


def _read_json(path: Path, expected: type) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected it in this package. Install the package again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Install the package again.") from error
    if not isinstance(content, expected):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a {expected.__name__} of emoji.")
    return content


def _read_entry(entry: dict[str, Any], vendor: str, names: dict[str, list[str]], package: Path) -> Iterator[Emoji]:
    """An entry and its skin tones; nothing for a bare patch of skin."""
    if entry["category"] == "Component":
        return
    variations = entry.get("skin_variations", {})
    characters = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
    words = names.get(characters.replace(VARIATION_SELECTOR, ""), [])
    name = OWN_NAMES.get(entry["unified"]) or plain_name(words[0] if words else entry["short_name"])
    for modifiers, drawn in [("", entry), *variations.items()]:
        yield Emoji(
            code=drawn["unified"].lower(),
            name=name,
            keywords=_keywords(words[1:], name),
            kind=kind_of(entry["category"], entry["subcategory"]),
            subcategory=entry["subcategory"],
            tones=tuple(dict.fromkeys(TONES[code] for code in modifiers.split("-") if code)),
            takes_tone=bool(variations),
            is_drawn=bool(drawn.get(f"has_img_{vendor}")),
            file=package / "img" / vendor / "64" / drawn["image"],
        )


def plain_name(text: str) -> str:
    """ "three_o_clock" and "man_red_hair" as words: "three o'clock", "man with red hair"."""
    words = re.sub(r"[^a-z0-9'&.-]+", " ", text.lower().replace("_", " ")).strip()
    words = words.replace(" o clock", " o'clock")
    for pattern, wording in REWORDINGS:
        words = re.sub(pattern, wording, words)
    return words


def _keywords(words: list[str], name: str) -> tuple[str, ...]:
    """The first few plain words that the name does not say already."""
    known = set(name.split())
    plain = [word.lower() for word in words if re.fullmatch(r"[A-Za-z][A-Za-z ]{2,}", word)]
    return tuple([word for word in dict.fromkeys(plain) if not known & set(word.split())][:MAX_KEYWORDS])


def kind_of(category: str, subcategory: str) -> str:
    """What sort of thing it is, as the answer to a question; "symbol" for a category that is not known."""
    fitting = (kind for known, start, kind in KINDS if known == category and subcategory.startswith(start))
    return next(fitting, "symbol")
