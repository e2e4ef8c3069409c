"""Which embedding finds pictures best, by a picture and by words, on rendered scenes; writes results/search.json.

    python -m finetune.scenes --output scenes --num_scenes 10000 --split heldout --seed 2026
    python -m benchmarks.search --scenes scenes
    python -m benchmarks.search --part speed

Each part replaces its own entry of the results file. `docs/search.md` shows the numbers, and the default kind of
`pisces embed` follows from them. By a picture: the scene itself, saved again as a JPEG. By words: a caption of one,
and what is found is right if it is the scene itself, or, since many look alike, one with the same contents.
"""

import argparse
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modeling_pisces.checkpoint.loading import load_model, quiet_libraries
from modeling_pisces.console.embedding import DEFAULT_KIND, KINDS, POOLS, embed_images, embed_texts
from modeling_pisces.console.search_index import SearchIndex, has_usearch, search_exact, write_index
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import one_line_ending
from pisces_commands.measurement import current_command, current_commit, describe_hardware, wilson_interval
from pisces_commands.writing import write_json


TOP = 10
QUALITIES = (90, 50)  # of the JPEG
CAPTIONS = {"a caption": 0, "the most detailed caption": -1}


def measure_scenes(
    model_folder: str, scenes: Path, num_queries: int, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Recall of every kind over the pictures of a scenes folder; `save` is called after each."""
    rows = [json.loads(line) for line in (scenes / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = np.linspace(0, len(rows) - 1, min(num_queries, len(rows))).astype(int)
    contents = np.array([_contents(row) for row in rows])
    model, processor = load_model(Path(model_folder), "cpu")
    finder = _Finder(model, processor, [scenes / row["image"] for row in rows])
    same = np.array([(contents == contents[row]).sum() for row in asked])
    chance = {"the scene itself": _chance(np.ones(1), len(rows)), "the same contents": _chance(same, len(rows))}
    measured: dict[str, Any] = {
        "model": model_folder,
        "pictures": len(rows),
        "different contents": len(set(contents.tolist())),
        "queries": len(asked),
        "default": DEFAULT_KIND,
        "bar": "recall@1 by picture >= 0.99",
        "by picture": {},
        "by words": {"random order": chance},
    }
    for kind in KINDS:
        index, by_picture = finder.index(kind), measured["by picture"].setdefault(kind, {})
        by_picture["width"] = index.shape[1]
        for quality in QUALITIES:
            found = _nearest(index, finder.jpegs(kind, asked, quality))
            by_picture[f"JPEG {quality}"] = _recalls(found == asked[:, None])
        for name, which in CAPTIONS.items() if KINDS[kind].texts else ():
            found = _nearest(index, finder.words(kind, name, [rows[row]["captions"][which] for row in asked]))
            measured["by words"].setdefault(kind, {})[name] = {
                "the scene itself": _recalls(found == asked[:, None]),
                "the same contents": _recalls(contents[found] == contents[asked][:, None]),
            }
        if kind == DEFAULT_KIND:
            measured["met"] = all(by_picture[f"JPEG {quality}"]["recall@1"][0] >= 0.99 for quality in QUALITIES)
        save(measured)
    return measured


def _contents(row: dict[str, Any]) -> str:
    """What a scene shows: its background, and shape, colour, size and cell of each object."""
    truth = row["truth"]
    objects = sorted([o["shape"], o["color"], o["size"], o["row"], o["col"]] for o in truth["objects"])
    return json.dumps([truth["background"], objects])


class _Finder:
    """Vectors by kind; what several kinds pool is computed once."""

    def __init__(self, model: Any, processor: Any, files: list[Path]):
        self.model, self.processor, self.files = model, processor, files
        self.made: dict[Any, NDArray[np.float32]] = {}

    def index(self, kind: str) -> NDArray[np.float16]:
        found = self._pooled(kind, "index", lambda base: self._embed(base, [str(file) for file in self.files]))
        return found.astype(np.float16)  # as on the disk

    def jpegs(self, kind: str, rows: NDArray, quality: int) -> NDArray[np.float32]:
        again = [_jpeg(self.files[row], quality) for row in rows]
        return self._pooled(kind, quality, lambda base: self._embed(base, again))

    def words(self, kind: str, name: str, texts: list[str]) -> NDArray[np.float32]:
        return self._pooled(kind, name, lambda base: embed_texts(self.model, self.processor, texts, base))

    def _embed(self, kind: str, images: list[Any]) -> NDArray[np.float32]:
        return embed_images(self.model, self.processor, images, kind)

    def _pooled(self, kind: str, what: Any, make: Any) -> NDArray[np.float32]:
        base = "gen_all" if kind in POOLS else kind
        if (base, what) not in self.made:
            self.made[base, what] = make(base)
        found = self.made[base, what]
        if kind == base:
            return found
        pooled = POOLS[kind](torch.from_numpy(found).unflatten(1, (-1, self.model.config.gen_vector_size)))
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()


def _jpeg(file: Path, quality: int) -> Image.Image:
    content = io.BytesIO()
    load_image(file).save(content, "JPEG", quality=quality)
    return load_image(content.getvalue())


def _nearest(index: NDArray, queries: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.stack([rows for rows, _ in search_exact(index, queries, TOP)])


def _recalls(is_right: NDArray[np.bool_]) -> dict[str, Any]:
    """Shares of queries with something right among the first 1 and 10, with Wilson intervals."""
    shares = {}
    for count in (1, TOP):
        right = int(is_right[:, :count].any(1).sum())
        low, high = wilson_interval(right, len(is_right))
        shares[f"recall@{count}"] = [round(value, 4) for value in (right / len(is_right), low, high)]
    return shares


def _chance(num_right: NDArray, total: int) -> dict[str, float]:
    """What a random order would reach, computed."""
    missed = [math.comb(total - int(right), TOP) / math.comb(total, TOP) for right in num_right]
    return {
        "recall@1": round(float(num_right.mean() / total), 5),
        f"recall@{TOP}": round(1 - float(np.mean(missed)), 5),
    }


# ---- speed


def measure_speed(num_rows: int, width: int, num_queries: int) -> dict[str, Any]:
    """Exact search and the graph over random vectors in groups, as an index on disk has them; one thread."""
    randoms = np.random.default_rng(0)
    centers = randoms.normal(size=(1000, width))
    result: dict[str, Any] = {
        "rows": num_rows,
        "width": width,
        "queries": num_queries,
        "vectors": "1,000 random groups",
    }
    with tempfile.TemporaryDirectory() as name:
        folder, step = Path(name), 50_000
        parts = []
        for start in range(0, num_rows, step):
            count = min(step, num_rows - start)
            block = centers[randoms.integers(0, 1000, count)] + randoms.normal(size=(count, width))
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            np.save(folder / f"{start}.npy", block.astype(np.float16))
            parts.append((folder / f"{start}.npy", [{"id": str(start + row)} for row in range(count)]))
        about = {"model": {"name": "none", "digest": "none"}, "kind": DEFAULT_KIND}
        started = time.perf_counter()
        write_index(folder, "exact", about, parts, graph=False)
        result["write_s"] = round(time.perf_counter() - started, 2)
        index = SearchIndex(folder)
        queries = np.asarray(index.vectors[:: max(num_rows // num_queries, 1)][:num_queries], np.float32)
        queries = queries + randoms.normal(size=queries.shape).astype(np.float32) * 0.05
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        result["index_mb"] = round((folder / index.head["files"]["vectors"]).stat().st_size / 1e6, 1)
        exact = index.search(queries, TOP)
        for count in (1, num_queries):
            started = time.perf_counter()
            index.search(queries[:count], TOP)
            result[f"exact_s_for_{count}"] = round(time.perf_counter() - started, 3)
        if has_usearch():
            result["graph"] = _measure_graph(folder, about, parts, queries, exact)
    return result


def _measure_graph(folder: Path, about: dict, parts: list, queries: NDArray, exact: list) -> dict[str, Any]:
    started = time.perf_counter()
    write_index(folder, "graph", about, parts, graph=True)
    built = time.perf_counter() - started
    index = SearchIndex(folder)
    index.search(queries[:1], TOP)
    started = time.perf_counter()
    found = index.search(queries, TOP)
    seconds = time.perf_counter() - started
    shared = [
        len({hit.row for hit in ours} & {hit.row for hit in theirs}) for ours, theirs in zip(found, exact, strict=True)
    ]
    return {
        "build_s": round(built, 1),
        "file_mb": round((folder / index.head["files"]["graph"]).stat().st_size / 1e6, 1),
        f"s_for_{len(queries)}": round(seconds, 3),
        f"recall@{TOP} against exact": round(sum(shared) / (TOP * len(queries)), 4),
    }


def main(argv: list[str] | None = None) -> int:
    parser = LineParser(prog="python -m benchmarks.search", description="Measure embeddings and search.")
    parser.add_argument("--part", choices=["scenes", "speed"], default="scenes")
    parser.add_argument("--model", default="pisces-tiny")
    parser.add_argument("--scenes", metavar="FOLDER", help="what python -m finetune.scenes wrote")
    parser.add_argument("--queries", type=COUNT, default=2000)
    parser.add_argument("--rows", type=COUNT, default=1_000_000, help="of the index whose speed is measured")
    parser.add_argument("--output", default="results/search.json")
    options = parser.parse_args(argv)
    with one_line_ending("search: error: "), quiet_libraries():
        torch.set_num_threads(1)
        if options.part == "speed":
            measured = measure_speed(options.rows, 128, min(options.queries, 100))
        elif options.scenes is None or not (Path(options.scenes) / "scenes.jsonl").is_file():
            raise ValueError(f"--scenes {options.scenes}: expected a folder that python -m finetune.scenes wrote.")
        else:
            save = partial(_save, options)
            measured = measure_scenes(options.model, Path(options.scenes), options.queries, save)
        _save(options, measured)
        print(json.dumps(measured, indent=1))
    return 0


def _save(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    about = {"command": current_command(), "commit": current_commit(), "hardware": describe_hardware()}
    path = Path(options.output)
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, found | {options.part: measured | about})


if __name__ == "__main__":
    raise SystemExit(main())
