"""Captions of a shard by our own model or a server: short, detailed, checked, with the agreement before and after.

`curation.caption` and `curation.run` call `run_captions`. The first captions stay in the index; an export chooses.
"""

import json
from typing import Any

import pyarrow as pa
from PIL import Image

from curation.models.dual import kind_of
from curation.models.pisces import load_judge
from curation.models.scoring import agreements, blocks, identity
from curation.rules.words import check_caption, clean_caption
from curation.shards.index import Index
from curation.shards.runner import run_stage
from curation.shards.tables import make_table
from pisces_commands.chat_server import ChatServer
from pisces_commands.shards import Workers


STYLES = ("short", "detailed")
DEFAULTS: dict[str, Any] = {
    "styles": list(STYLES),
    "model": None,
    "server": None,
    "server_model": None,
    "short": "describe the picture.",
    "detailed": "describe the picture in detail.",
    "max_new_tokens": 256,
    "agreement": None,  # a model that compares words and picture, before and after
    "max_loss": None,  # a new caption may agree less than the old one by this much
}
TABLE = pa.schema(
    [
        ("rule", pa.string()),
        ("detail", pa.string()),
        *((f"caption_{style}", pa.string()) for style in STYLES),
        *((f"refused_{style}", pa.string()) for style in STYLES),  # why a caption that was written is not used
        *((f"agreement_{name}", pa.float64()) for name in ("before", *STYLES)),
        ("captioner", pa.string()),
        ("caption_settings", pa.string()),  # JSON: requests and sampling
    ]
)


def caption_settings(settings: Any, where: str) -> dict[str, Any]:
    """The group `caption` of a YAML file with its defaults.

    Raises:
        ValueError: an unknown key, a value that cannot be, or not exactly one writer.
    """
    if not isinstance(settings, dict) or (unknown := sorted(set(settings) - set(DEFAULTS))):
        found = repr(unknown[0]) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{where}: caption: no key {found}, expected some of {', '.join(DEFAULTS)}.")
    filled = {**DEFAULTS, **settings}
    styles = filled["styles"]
    if not isinstance(styles, list) or not styles or not set(styles) <= set(STYLES):
        raise ValueError(f"{where}: caption: styles: found {styles!r}, expected some of {', '.join(STYLES)}.")
    if bool(filled["model"]) == bool(filled["server"]):
        raise ValueError(f"{where}: caption: name one writer, either model (a Pisces checkpoint) or server (a URL).")
    if filled["server"] and not filled["server_model"]:
        raise ValueError(f"{where}: caption: server_model is missing: the name that the server has for its model.")
    tokens = filled["max_new_tokens"]
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"{where}: caption: max_new_tokens: found {tokens!r}, expected a whole number above 0.")
    if filled["max_loss"] is not None and filled["agreement"] is None:
        raise ValueError(f"{where}: caption: max_loss has no effect without agreement, the model that compares.")
    return filled


def run_captions(index: Index, settings: dict[str, Any], workers: Workers) -> bool:
    """Write captions for every kept picture that is alone in its record.

    Returns:
        False: other parts have to make their shards first.

    Raises:
        ValueError: an earlier stage is not done, or a model is not there.
    """
    index.require("caption")
    if settings["model"] and (kind := kind_of(settings["model"])) != "pisces":
        raise ValueError(f"{settings['model']}: a {kind}, expected a Pisces checkpoint. Others can run as a --server.")
    if settings["server"]:
        ChatServer(settings["server"], settings["server_model"])
    models = {name: identity(settings[name]) for name in ("model", "agreement") if settings[name]}
    index.set_stage("caption", {**settings, "models": models})
    return run_stage(index, "caption", caption_shard, workers)


def caption_shard(index: Index, number: int) -> pa.Table:
    """The table of `TABLE` for one shard; nulls for rows that are not captioned."""
    settings = index.stages["caption"]
    rows = index.read(number, "caption", ("picture", "num_pictures", "shape", "text", "agreement"))
    wanted = [row["rule"] is None and row["shape"] == "caption" and row["num_pictures"] == 1 for row in rows]
    written: list[dict[str, Any]] = [{} for _ in rows]
    named = ("styles", "short", "detailed", "max_new_tokens")
    how = json.dumps({**{name: settings[name] for name in named}, "temperature": 0}, sort_keys=True)
    who = settings["models"].get("model") or f"{settings['server_model']} at {settings['server']}"
    for places, images in blocks(index, number, wanted):
        for place in places:
            written[place] |= {"captioner": who, "caption_settings": how}
        if settings["agreement"]:
            _put_agreement(written, "agreement_before", places, images, [rows[p]["text"] for p in places], settings)
        for style in settings["styles"]:
            _write_style(written, style, places, images, settings)
    return make_table(written, TABLE)


def _write_style(
    written: list[dict], style: str, places: list[int], images: list[Image.Image], settings: dict
) -> None:
    answers = _answers(images, settings[style], settings)
    texts = [clean_caption(text) for text, _ in answers]
    for place, text, (_, was_cut) in zip(places, texts, answers, strict=True):
        problem = check_caption(text, was_cut=was_cut)
        written[place][f"refused_{style}" if problem else f"caption_{style}"] = problem or text
    if not settings["agreement"]:
        return
    name = f"agreement_{style}"
    _put_agreement(written, name, places, images, [written[p].get(f"caption_{style}") for p in places], settings)
    for place in places:
        before, after = written[place].get("agreement_before"), written[place].get(name)
        if None not in (before, after, settings["max_loss"]) and after < before - settings["max_loss"]:
            written[place].pop(f"caption_{style}")
            written[place][f"refused_{style}"] = f"agreement {after:.4g} after {before:.4g}"


def _answers(images: list[Image.Image], request: str, settings: dict) -> list[tuple[str, bool]]:
    """What the writer says of each picture, and whether it was cut."""
    limit = settings["max_new_tokens"]
    if settings["model"]:
        return load_judge(settings["model"]).answer(images, request, limit)
    server = ChatServer(settings["server"], settings["server_model"])
    return [server.answer(image, request, limit) for image in images]


def _put_agreement(written, name: str, places, images, texts: list[str | None], settings: dict) -> None:
    if any(texts):
        values = agreements(settings["agreement"], images, [text or "nothing" for text in texts])
        for place, text, value in zip(places, texts, values, strict=True):
            written[place][name] = value if text else None
