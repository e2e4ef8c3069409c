"""What a worker does with the records of one shard: answer, draw, edit or embed. `many.py` says which, and writes it.

A model is loaded once per process. On a processor it computes on one thread, so that the same records give the same
bytes whoever computes them. A record that cannot be used is a row with its reason; the others go on.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pisces_commands.chat_server import ChatServer
from pisces_commands.ending import CommandFailed

from ..checkpoint.adapters import attach_adapters, find_adapter
from ..checkpoint.loading import load_model, load_pipeline, quiet_libraries
from ..image_loading_pisces import load_image
from ..records.shapes import IMAGE_TAG, Sample
from ..records.tar import tar_bytes
from .answers import DEFAULT_ANSWER_LENGTH, DEFAULT_QUESTION, answer_questions
from .embedding import embed_images


Row = dict[str, Any]
Item = tuple[Row, Any]  # what the row says already, and what the work needs; None where the row has its error
Written = tuple[list[Row], str, bytes | None]  # rows, and a file beside them: its ending and content


class Opened(NamedTuple):
    """A model as the work needs it; `servers` instead of it for answers from elsewhere."""

    model: Any = None
    processor: Any = None
    pipeline: Any = None
    servers: tuple[ChatServer, ...] = ()


def work_on(command: str, opening: dict[str, Any], options: Row, samples: Iterator[Sample], number: int) -> Written:
    """The rows of a shard, and the file that goes with them.

    Raises:
        ValueError: the model cannot be opened.
        CommandFailed: a server does not answer.
    """
    work = {"describe": _describe, "draw": _draw, "edit": _edit, "embed": _embed}[command]
    with quiet_libraries(), _same_sums():
        return work(open_model(opening, command in ("draw", "edit")), options, samples, number)


@contextmanager
def _same_sums() -> Iterator[None]:
    """One thread: the order of a sum depends on their number, and with it the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_model(opening: dict[str, Any], draws: bool) -> Opened:
    """What `Job.opening` names, once per process.

    Raises:
        ValueError: it cannot be loaded.
    """
    return _open(json.dumps(opening), draws)


@lru_cache(maxsize=1)
def _open(opening: str, draws: bool) -> Opened:
    given = json.loads(opening)
    if given.get("servers"):
        return Opened(servers=tuple(ChatServer(url, given["server_model"]) for url in given["servers"]))
    how = (Path(given["folder"]), given["device"], given["dtype"], given["trust_remote_code"])
    adapters = [find_adapter(folder) for folder in given["adapters"]]
    if draws:
        pipeline = load_pipeline(*how)
        pipeline.set_progress_bar_config(disable=True)
        attach_adapters(adapters, pipeline.vision_language_model, pipeline)
        return Opened(pipeline.vision_language_model, pipeline.processor, pipeline)
    model, processor = load_model(*how)
    attach_adapters(adapters, model, None)
    return Opened(model, processor)


# ---- rows, in the order of the records


def _rows(items: Iterable[Item], work: Callable[[list[Any]], list[Row]], size: int) -> list[Row]:
    """Complete the rows, `size` of them at a time."""
    rows: list[Row] = []
    batch: list[tuple[int, Any]] = []

    def finish() -> None:
        for (place, _), found in zip(batch, _each(work, [needed for _, needed in batch]), strict=True):
            rows[place] |= found
        batch.clear()

    for row, needed in items:
        rows.append(row)
        if "error" not in row:
            batch.append((len(rows) - 1, needed))
        if len(batch) == size:
            finish()
    finish()
    return rows


def _each(work: Callable[[list[Any]], list[Row]], batch: list[Any]) -> list[Row]:
    """Work on a batch; where one of it is refused, one by one, so that the others are not lost."""
    try:
        return work(batch) if batch else []
    except CommandFailed:
        raise
    except ValueError as error:
        if len(batch) == 1:
            return [{"error": _one_line(error)}]
        return [row for needed in batch for row in _each(work, [needed])]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _name_of(sample: Sample, picture: int) -> str | None:
    return sample.names[picture] if picture < len(sample.names) else None


def _pictures(samples: Iterable[Sample]) -> Iterator[tuple[Sample, Row, Image.Image | None]]:
    """(record, its row so far, the opened picture) of each picture; the row says what is wrong with it."""
    for sample in samples:
        if sample.problem or not sample.pictures:
            yield sample, {"id": sample.id, "error": sample.problem or f"{sample.place}: no picture"}, None
            continue
        for number, content in enumerate(sample.pictures):
            row: Row = {"id": sample.id, "image": _name_of(sample, number)}
            if len(sample.pictures) > 1:
                row["picture"] = number
            try:
                if isinstance(content, ValueError):
                    raise content
                yield sample, row, load_image(content)
            except ValueError as error:
                yield sample, row | {"error": f"{sample.place}: {_one_line(error)}"}, None


# ---- describe


def _describe(opened: Opened, options: Row, samples: Iterator[Sample], number: int) -> Written:
    def items() -> Iterator[Item]:
        for sample, row, image in _pictures(samples):
            questions = options["questions"] or [_own_question(sample)]
            for question in questions if image else []:
                yield {**row, "question": question}, (image, question)
            if image is None:
                yield row, None

    def answer(batch: list[tuple[Image.Image, str]]) -> list[Row]:
        if opened.servers:
            server = opened.servers[number % len(opened.servers)]
            length = options["max_new_tokens"] or DEFAULT_ANSWER_LENGTH
            return [{"answer": server.answer(image, question, length)[0].strip()} for image, question in batch]
        answers = answer_questions(opened.model, opened.processor, batch, options["max_new_tokens"])
        return [{"answer": text} for text in answers]

    return _rows(items(), answer, options["batch_size"]), "", None


def _own_question(sample: Sample) -> str:
    """What the record itself asks about its picture, if it does."""
    asked = sample.others.get("question")
    if not isinstance(asked, str) and sample.messages:
        asked = sample.messages[0]["content"].replace(IMAGE_TAG, "").strip()
    return asked if isinstance(asked, str) and asked.strip() else DEFAULT_QUESTION


# ---- draw and edit


def _draw(opened: Opened, options: Row, samples: Iterator[Sample], number: int) -> Written:
    def items() -> Iterator[Item]:
        for place, sample in enumerate(samples):
            prompt = _words(sample)
            if sample.problem or prompt is None:
                reason = sample.problem or f"{sample.place}: no prompt, expected a field prompt, caption or text"
                yield {"id": sample.id, "error": reason}, None
                continue
            seed = _seed(sample, options["seed"])
            for drawn in range(options["num_images"]):
                file = f"{number:06d}-{place:06d}-{drawn}.png"
                row = {"id": sample.id, "prompt": prompt, "seed": seed + drawn, "image": file}
                yield row, (row, prompt, None)

    return _drawn(opened, options, items())


def _edit(opened: Opened, options: Row, samples: Iterator[Sample], number: int) -> Written:
    def items() -> Iterator[Item]:
        for place, (sample, row, image) in enumerate(_pictures(_first_pictures(samples))):
            instruction = options["instruction"] or _words(sample)
            row = {"id": row["id"], "source": row.get("image"), **{k: row[k] for k in ("error",) if k in row}}
            if "error" not in row and instruction is None:
                row["error"] = f"{sample.place}: no instruction. Give --instruction, or a field instruction or prompt"
            if "error" not in row:
                row |= {"prompt": instruction, "seed": _seed(sample, options["seed"])}
                row["image"] = f"{number:06d}-{place:06d}-0.png"
            yield row, (row, instruction, image)

    return _drawn(opened, options, items())


def _first_pictures(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        sample.pictures, sample.names = sample.pictures[:1], sample.names[:1]
        yield sample


def _words(sample: Sample) -> str | None:
    """The prompt or the instruction of a record: the longest caption where there are several."""
    found = [*sample.captions[-1:], sample.others.get("instruction"), sample.others.get("edit_prompt")]
    return next((words for words in found if isinstance(words, str) and words.strip()), None)


def _seed(sample: Sample, default: int) -> int:
    own = sample.others.get("seed")
    return own if isinstance(own, int) and not isinstance(own, bool) and 0 <= own < 2**32 else default


def _drawn(opened: Opened, options: Row, items: Iterator[Item]) -> Written:
    """Draw, and put the pictures into a tar file, each with a JSON file of its prompt: a training set can read it."""
    files: list[tuple[str, bytes]] = []
    settings = {name: options[name] for name in ("num_inference_steps", "guidance_scale") if options[name] is not None}
    if options.get("strength") is not None:
        settings["strength"] = options["strength"]

    def draw(batch: list[tuple[Row, str, Image.Image | None]]) -> list[Row]:
        generators = [torch.Generator("cpu").manual_seed(row["seed"]) for row, _, _ in batch]
        shown = {} if batch[0][2] is None else {"image": [[image] for _, _, image in batch]}
        prompts = [prompt for _, prompt, _ in batch]
        images = opened.pipeline(prompts, generator=generators, **shown, **settings).images
        for (row, _, _), image in zip(batch, images, strict=True):
            files.append((row["image"], _png(image)))
            record = {name: row[name] for name in ("id", "source", "prompt", "seed") if row.get(name) is not None}
            files.append((row["image"].replace(".png", ".json"), json.dumps(record).encode()))
        return [{} for _ in batch]

    rows = _rows(items, draw, options["batch_size"])
    for row in rows:
        if "error" in row:
            row.pop("image", None)
    return rows, ".tar", tar_bytes(files) if files else None


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ---- embed


def _embed(opened: Opened, options: Row, samples: Iterator[Sample], number: int) -> Written:
    vectors: list[np.ndarray] = []

    def embed(batch: list[Image.Image]) -> list[Row]:
        vectors.append(embed_images(opened.model, opened.processor, batch, options["kind"]).astype(np.float16))
        return [{} for _ in batch]

    rows = _rows(((row, image) for _, row, image in _pictures(samples)), embed, options["batch_size"])
    if not vectors:
        return rows, ".npy", None
    file = io.BytesIO()
    np.save(file, np.concatenate(vectors))
    return rows, ".npy", file.getvalue()
