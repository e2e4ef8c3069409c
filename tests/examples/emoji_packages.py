"""Stand-ins for the npm packages of emoji: the same files and fields, with a few dozen pictures drawn here."""

import json

from PIL import Image, ImageDraw


TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PEOPLE = (
    "man pilot",
    "woman pilot",
    "pilot",
    "woman cook",
    "man_red_hair",
    "thumbs up",
    "woman running",
    "woman running facing right",
)
THINGS = ("anchor", "apple", "boat", "cake", "drum", "egg", "fork", "ghost", "hat", "ink", "jar", "kite")


def write_packages(folder, vendor="google", without=(), only=None):
    """Packages `emoji-datasource-VENDOR` and `emojilib` in a folder; `without`: names that the vendor has not drawn."""
    package = folder / f"emoji-datasource-{vendor}"
    pictures = package / "img" / vendor / "64"
    pictures.mkdir(parents=True, exist_ok=True)
    names, entries = {}, []
    for number, (name, category, subcategory, keywords) in enumerate(_list()):
        if only is not None and name not in only:
            continue
        unified = f"{0x1F400 + number:X}"
        names[chr(int(unified, 16))] = [name.replace(" ", "_"), *keywords]
        entry = _entry(unified, name, vendor, name not in without) | {"category": category, "subcategory": subcategory}
        if category == "People & Body" and subcategory != "family-plain":
            pairs = ["1F3FB-1F3FF", "1F3FF-1F3FB"] if subcategory == "family" else []
            entry["skin_variations"] = {
                key: _entry(f"{unified}-{key}", name, vendor, True) for key in [*TONES, *pairs]
            }
        entries.append(entry)
    for row, entry in enumerate(entries):
        for column, drawn in enumerate([entry, *entry.get("skin_variations", {}).values()]):
            if drawn[f"has_img_{vendor}"]:
                shown = (
                    200 if entry["name"] in ("FLAG NORWAY", "FLAG BOUVET ISLAND") else row
                )  # one drawing, two names
                _draw(shown, column, vendor).save(pictures / drawn["image"])
    (package / "emoji.json").write_text(json.dumps(entries))
    (package / "package.json").write_text("{}")
    (folder / "emojilib" / "dist").mkdir(parents=True, exist_ok=True)
    (folder / "emojilib" / "dist" / "emoji-en-US.json").write_text(json.dumps(names))
    (folder / "emojilib" / "package.json").write_text("{}")
    return folder


def _list():
    yield from ((thing, "Objects", "tool", ["useful", f"of {thing}", "x"]) for thing in THINGS)
    yield from ((f"{name} face", "Smileys & Emotion", "face-smiling", ["smile"]) for name in ("happy", "sad", "tired"))
    yield from ((f"{c} heart", "Smileys & Emotion", "heart", ["love"]) for c in COLORS)
    yield from ((f"{c} circle", "Symbols", "geometric", []) for c in COLORS)
    yield from ((f"{c} square", "Symbols", "geometric", []) for c in COLORS)
    yield from ((f"{hour} o clock", "Travel & Places", "time", []) for hour in HOURS)
    yield from ((f"{hour} thirty", "Travel & Places", "time", []) for hour in HOURS)
    for name in PEOPLE:
        yield name, "People & Body", "person-role" if "pilot" in name or "cook" in name else "person", ["job"]
    yield "kiss", "People & Body", "family", []
    yield "light skin tone", "Component", "skin-tone", []
    yield from ((f"flag {name}", "Flags", "country-flag", []) for name in ("norway", "bouvet island", "chad"))


def _entry(unified, name, vendor, is_drawn):
    return {
        "unified": unified,
        "name": name.upper(),
        "short_name": name,
        "image": f"{unified.lower()}.png",
        f"has_img_{vendor}": is_drawn,
    }


def _draw(row, column, vendor):
    """A shape on nothing, its place and colour by row and column; hidden pixels are green, as drawing programs do."""
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    colour = (row * 37 % 256, row * 11 % 256, column * 40 % 256, 255)
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if vendor == "google" else draw.rectangle
    line = {} if vendor == "google" else {"outline": (0, 0, 0, 255), "width": 5}
    shape((4 + row % 9, 4 + row // 9, 50, 50 + column), fill=colour, **line)
    return image.convert("P") if vendor == "twitter" else image
