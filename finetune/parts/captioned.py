"""Captioned pictures of any data spec, brought to one size once: what every part is trained from.

`prepare` reads data as the recipes take it (`docs/data.md`) and writes a folder: `pictures.bin`, every picture once as
uint8 at the size of the towers, and `records.jsonl`, what is said about each of them. The file of pictures is mapped,
not read: a run holds in memory what its batch needs. `python -m finetune.parts prepare` calls it, and every command
of a part whose `--data` is no such folder yet.
"""

# I pictures, S side in pixels
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from finetune.data.load import load_source, resolve_format
from finetune.data.pictures import PictureFolder
from finetune.data.readers.files import Record, read_jsonl
from finetune.data.readers.paths import locate_found
from finetune.data.schema import (
    BadRecord,
    DataError,
    Row,
    allowed_bad_records,
    iter_pictures,
    show,
    too_many_bad,
)
from finetune.data.spec import DataSpec, parse_specs
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import UsageError
from pisces_commands.writing import whole_folder, write_json


INDEX_FILE, PICTURES_FILE, RECORDS_FILE = "prepared.json", "pictures.bin", "records.jsonl"
VERSION = 1
# Why a row trains no part; a count of each is printed.
SEVERAL, NO_PICTURE = "show or draw several pictures", "have no picture"


@dataclass
class PictureData:
    """Pictures with what is said about them.

    `pictures` is (I, 3, S, S) uint8, RGB, backed by a file. `records` has one dict per picture:
    "id"; "captions", texts to draw it from, the most detailed last; "conversations", lists of turns
    {"question", "answer"} (scenes: also "type" and "paraphrase"); "truth" where the data has one; "edits" where the
    picture is the source of some: lists of turns {"instruction", "picture"}, the place of the picture that it gives.
    Pictures that nothing is said about, the results of edits, come last.
    """

    pictures: torch.Tensor
    records: list[dict[str, Any]]

    @property
    def captions(self) -> list[list[str]]:
        """Each picture's captions; what is answered about it where it has none."""
        return [record["captions"] or answers_of(record) for record in self.records]

    @property
    def num_with_texts(self) -> int:
        """How many pictures have captions or questions: the first ones."""
        return next((place for place, texts in enumerate(self.captions) if not texts), len(self.records))

    @property
    def with_texts(self) -> "PictureData":
        """The pictures that something is said about, which is what towers and decoder are trained from.

        Raises:
            ValueError: there are none.
        """
        if not self.num_with_texts:
            raise ValueError("the data has edits only, but this part learns from captions or questions. Add some.")
        return PictureData(self.pictures[: self.num_with_texts], self.records[: self.num_with_texts])


def is_described(record: dict[str, Any]) -> bool:
    """Whether anything is said about a picture."""
    return bool(record["captions"] or answers_of(record))


def answers_of(record: dict[str, Any]) -> list[str]:
    """Every answer about a picture, in order."""
    return [turn["answer"] for turns in record["conversations"] for turn in turns]


# ---- reading a prepared folder


def load_pictures(
    data: Any, image_size: int | None = None, limit: int | None = None, folder: str | Path | None = None
) -> PictureData:
    """The pictures of a data spec, or of a folder that `prepare` wrote.

    Args:
        data: as `finetune.data.load.load_data` takes it, or such a folder.
        image_size: side that every picture is brought to; None: the one that they all have.
        limit: only the first pictures.
        folder: where `prepare` writes them; not needed for a folder that it wrote.

    Raises:
        ValueError: data that cannot be read, or pictures of different sizes and no `image_size`.
    """
    if (ready := prepared_folder(data)) is None:
        if folder is None:
            raise ValueError(f"{data}: not prepared, and no folder to prepare it in.")
        ready = prepare(data, image_size, folder)
    index = _read_index(ready)
    side = index["image_size"]
    if image_size not in (None, side):
        raise ValueError(f"{ready}: pictures of {side} pixels, asked for were {image_size}. Prepare them again.")
    shape = (index["num_pictures"], 3, side, side)
    path = ready / PICTURES_FILE
    if path.stat().st_size != int(np.prod(shape)):
        raise ValueError(f"{path}: not whole. Delete {ready}; the same command writes it again.")
    pictures = np.memmap(path, dtype=np.uint8, mode="c", shape=shape)
    records = [json.loads(line) for line in (ready / RECORDS_FILE).read_text(encoding="utf-8").splitlines()]
    return PictureData(torch.from_numpy(pictures)[:limit], records[:limit])


def prepared_folder(data: Any) -> Path | None:
    """The folder that `prepare` wrote, where `data` names exactly one."""
    if isinstance(data, (list, tuple)) and len(data) == 1:
        data = data[0]
    if isinstance(data, (str, Path)) and (Path(data) / INDEX_FILE).is_file():
        return Path(data)
    return None


def _read_index(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    if index.get("version") != VERSION:
        raise ValueError(f"{folder}: prepared in format {index.get('version')}, this one reads {VERSION}. Delete it.")
    return index


def has_changed(folder: Path, data: Any) -> bool:
    """Whether the files of `data` are others than those that a folder was prepared from; False where they are gone."""
    specs = parse_specs(data)
    if not all(Path(spec.path).exists() for spec in specs):
        return False
    return _read_index(folder)["made_of"]["files"] != _fingerprint(specs)["files"]


# ---- writing one


def prepare(
    data: Any,
    image_size: int | None,
    folder: str | Path,
    heldout_share: float = 0.0,
    heldout: str | Path | None = None,
) -> Path:
    """Write the pictures of `data` and what is said about them; a folder that holds just that is kept.

    Args:
        data: as `finetune.data.load.load_data` takes it; each picture counts once, so weights have no effect.
        image_size: side that every picture is brought to, whatever its shape; None: the one that they all have.
        folder: to write.
        heldout_share: of the pictures; these go to `heldout` instead.

    Returns:
        `folder`.

    Raises:
        DataError: data that cannot be read, has more bad records than allowed, or no picture with a text.
    """
    folder, specs = Path(folder), parse_specs(data)
    made_of = {**_fingerprint(specs), "image_size": image_size, "heldout_share": heldout_share}
    is_there = (folder / INDEX_FILE).is_file() and (heldout is None or (Path(heldout) / INDEX_FILE).is_file())
    if is_there and _read_index(folder).get("made_of") == made_of:
        return folder
    if any(spec.weight is not None for spec in specs):
        print("data: weights have no effect on the parts of a model; each picture counts once.")
    with whole_folder(folder, sync=False) as partial:
        collected = _Collection(partial / PICTURES_FILE, image_size)
        for spec in specs:
            collected.read(spec)
        collected.close()
        if note := collected.what_was_left_out():
            print(note)
        kept = [place for place, record in enumerate(collected.records) if is_described(record) or "edits" in record]
        if not kept:
            raise DataError(f"{specs[0].label}: found no picture with a text; expected captions, or questions.")
        if heldout is not None and len(kept) < 2:
            raise DataError(f"{specs[0].label}: found 1 picture with a text; expected two or more, one to measure on.")
        if heldout is not None:
            chosen = choose_heldout([collected.records[place]["id"] for place in kept], heldout_share)
            with whole_folder(heldout, sync=False) as other:
                _write_part(other, partial, sorted(kept[place] for place in chosen), collected, made_of)
            kept = [place for number, place in enumerate(kept) if number not in chosen]
        _write_part(partial, partial, kept, collected, made_of)
    return folder


def choose_heldout(ids: Sequence[str], share: float) -> set[int]:
    """Places of the pictures that are kept from training: at least one, at most half, by the digest of their names."""
    number = min(max(1, round(share * len(ids))), len(ids) // 2)
    digests = [hashlib.sha256(name.encode()).digest() for name in ids]
    return set(sorted(range(len(ids)), key=digests.__getitem__)[:number])


def _write_part(folder: Path, source: Path, places: Sequence[int], collected: "_Collection", made_of: dict) -> None:
    """The pictures at `places` of the file in `source`, the results of their edits, their records and the index."""
    side, found = int(collected.image_size or 0), collected.records
    edits = [turn["picture"] for place in places for turns in found[place].get("edits", ()) for turn in turns]
    places = sorted({*places, *edits}, key=lambda place: (not is_described(found[place]), place))
    place_of = {place: number for number, place in enumerate(places)}
    records = [_moved(found[place], place_of) for place in places]
    pictures = np.memmap(source / PICTURES_FILE, dtype=np.uint8, mode="r").reshape(-1, 3, side, side)
    if places != list(range(len(pictures))):
        with (folder / "part.bin").open("wb") as file:
            for place in places:
                file.write(pictures[place].tobytes())
        (folder / "part.bin").replace(folder / PICTURES_FILE)
    with (folder / RECORDS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    index = {"version": VERSION, "image_size": side, "num_pictures": len(records), "made_of": made_of}
    write_json(folder / INDEX_FILE, index)


def _moved(record: dict[str, Any], place_of: dict[int, int]) -> dict[str, Any]:
    """The record with the pictures of its edits at their new places; edits of which one is elsewhere are left out."""
    if "edits" not in record:
        return record
    edits = [turns for turns in record["edits"] if all(turn["picture"] in place_of for turn in turns)]
    moved = [[{**turn, "picture": place_of[turn["picture"]]} for turn in turns] for turns in edits]
    return {**record, "edits": moved}


class _Collection:
    """Pictures as they are found, each once, and what the rows say about them."""

    def __init__(self, path: Path, image_size: int | None):
        self.file, self.image_size, self.asked_size = path.open("wb"), image_size, image_size
        self.records: list[dict[str, Any]] = []
        self.left_out: Counter[str] = Counter()
        self._places: dict[Any, int] = {}

    def close(self) -> None:
        self.file.close()

    def read(self, spec: DataSpec) -> None:
        """Every row of one source.

        Raises:
            DataError: more bad records than it allows.
        """
        bad: list[BadRecord] = []
        number = 0
        progress = tqdm(_records_of(spec), desc=f"{spec.label}: pictures", delay=2, leave=False, disable=None)
        for place, item in progress:
            number += 1
            try:
                if isinstance(item, DataError):
                    raise item
                self._add(item, spec)
            except UsageError:  # not one bad record, but a flag that is missing
                raise
            except ValueError as error:
                bad.append(BadRecord(place, str(error)))
        if len(bad) > allowed_bad_records(spec.max_bad_records, number):
            raise too_many_bad(spec.label, bad, len(bad), number, spec.max_bad_records)
        if bad:
            print(f"{spec.label}: {len(bad)} of {number} records are bad and left out; the first: {bad[0]}.")

    def _add(self, item: dict[str, Any], spec: DataSpec) -> None:
        if "messages" not in item:  # a record that says all about one picture
            self._record(item["image"], item["id"]).update(item["record"])
            return
        pictures = [part["image"] for _, part in iter_pictures(item)]
        if instructions := edits_of(item):
            places = [self._place(picture, item["id"]) for picture in pictures]
            edits = [{"instruction": text, "picture": at} for text, at in zip(instructions, places[1:], strict=True)]
            self.records[places[0]].setdefault("edits", []).append(edits)
            return
        if len(pictures) != 1:
            self.left_out[SEVERAL if pictures else NO_PICTURE] += 1
            return
        captions, turns = texts_of(item, spec.request)
        record = self._record(pictures[0], item["id"])
        record["captions"] += [caption for caption in captions if caption not in record["captions"]]
        record["captions"].sort(key=len)  # stable: the most detailed is the last
        record["conversations"] += [turns] if turns else []

    def _record(self, source: Any, name: str) -> dict[str, Any]:
        return self.records[self._place(source, name)]

    def _place(self, source: Any, name: str) -> int:
        """Where the record of a picture stands, which is read and written where it is new."""
        key = source if isinstance(source, str) else hashlib.sha256(_bytes_of(source)).digest()
        if key not in self._places:
            self.file.write(self._read_picture(source).tobytes())
            self._places[key] = len(self.records)
            self.records.append({"id": name, "captions": [], "conversations": []})
        return self._places[key]

    def _read_picture(self, source: Any) -> np.ndarray:
        picture = load_image(source)
        if self.image_size is None:
            self.image_size = picture.width
        size = (self.image_size, self.image_size)
        if picture.size != size and self.asked_size is None:
            name = source if isinstance(source, str) else "a picture"
            found = sorted({size, picture.size})
            raise UsageError(
                f"{name}: pictures of several sizes or not square, {found}. Say --image_size, such as 64."
            )
        if picture.size != size:
            # as the processor of the finished checkpoint does it: to a square, bicubic, on bytes
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(picture).transpose(2, 0, 1)

    def what_was_left_out(self) -> str:
        counts = ", ".join(f"{count} rows {reason}" for reason, count in self.left_out.items())
        return counts and f"data: {counts}; the parts learn from one picture with its texts, so these are left out."


def _bytes_of(source: Any) -> bytes:
    return source if isinstance(source, bytes) else f"{source.size}".encode() + source.tobytes()


def edits_of(row: Row) -> list[str]:
    """The instructions of a row that shows one picture and answers each text with another; of any other row none."""
    messages = [message for message in row["messages"] if message["role"] != "system"]
    kinds = [[part["type"] for part in message["content"]] for message in messages]
    asked, drawn = kinds[::2], kinds[1::2]
    is_edit = drawn == [["image"]] * len(asked) and all(turn == ["text"] for turn in asked[1:])
    if not is_edit or sorted(asked[0]) != ["image", "text"]:
        return []
    return [part["text"] for message in messages[::2] for part in message["content"] if part["type"] == "text"]


def texts_of(row: Row, request: str) -> tuple[list[str], list[dict[str, str]]]:
    """What a row says about its one picture: captions to draw it from, and questions with their answers.

    Args:
        request: a question that asks for the caption; its answer is one.
    """
    captions, turns, asked = [], [], []
    for message in row["messages"]:
        text = " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
        if message["role"] != "assistant":
            asked.append(text)
            continue
        question, asked = " ".join(filter(None, asked)), []
        if any(part["type"] == "image" for part in message["content"]):
            captions += [question] if question else []
        elif question == request or not question:
            captions += [text] if text else []
        else:
            turns.append({"question": question, "answer": text})
    return captions, turns


# ---- records by source


def _records_of(spec: DataSpec) -> Iterator[tuple[str, Any]]:
    """Every record of a source with its place: a row, a record of one picture, or what is wrong with it."""
    spec, found_format = resolve_format(spec)
    if found_format == "scenes":
        spec.check_keys(found_format)
        yield from _scenes(spec)
        return
    rows = load_source(spec)
    if not hasattr(rows, "store"):
        yield from rows.iter_checked()  # a stream: opened as it comes
        return
    yield from ((record.place, DataError(record.reason)) for record in rows.left_out)
    for index in range(len(rows)):
        try:
            yield rows.place(index), rows.store.row(index)
        except ValueError as error:
            yield rows.place(index), DataError(str(error))


def _scenes(spec: DataSpec) -> Iterator[tuple[str, Any]]:
    """The records of a `scenes.jsonl` with all that they say; as rows they would lose types and other wordings."""
    folder = Path(spec.path)
    locate_found(folder, folder / "scenes.jsonl", spec.allow_outside_paths)
    pictures = PictureFolder(folder, spec.allow_outside_paths, spec.allow_urls)
    for number, record in enumerate(read_jsonl(folder / "scenes.jsonl")):
        if spec.max_rows is not None and number == spec.max_rows:
            return
        try:
            yield record.place, _scene(record, pictures)
        except ValueError as error:
            yield record.place, DataError(str(error))


def _scene(record: Record, pictures: PictureFolder) -> dict[str, Any]:
    row = record.value
    if isinstance(row, DataError):
        raise row
    texts = [row.get(key) for key in ("captions", "questions")] if isinstance(row, dict) else []
    if not texts or not isinstance(row.get("image"), str) or not all(isinstance(part or [], list) for part in texts):
        raise DataError(f"found {show(row)}, expected an object with image, captions and questions")
    captions, questions = (part or [] for part in texts)
    if not all(isinstance(text, str) for text in captions):
        raise DataError(f"captions: found {show(captions)}, expected texts")
    if not all(isinstance(turn, dict) and {"question", "answer"} <= turn.keys() for turn in questions):
        raise DataError(f"questions: found {show(questions)}, expected objects with question and answer")
    found = {"captions": captions, "conversations": [[turn] for turn in questions]}
    found |= {"truth": row["truth"]} if isinstance(row.get("truth"), dict) else {}
    return {"id": str(row.get("id", record.default_id)), "image": pictures.locate(row["image"]), "record": found}


def _fingerprint(specs: list[DataSpec]) -> dict[str, Any]:
    """Which data this is: the specs, and one digest of names, sizes and times of their files."""
    digest = hashlib.sha256()
    for spec in specs:
        for path in (Path(name) for name in (spec.path, spec.image_folder) if name):
            files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
            for file in files:
                if file.is_file():
                    status = file.stat()
                    digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return {"specs": [asdict(spec) for spec in specs], "files": digest.hexdigest()}
