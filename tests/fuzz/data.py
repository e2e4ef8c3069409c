"""Data folders with planted faults: `python -m tests.fuzz.data [--cases N] [--seed S]`.

A case is a source of some format whose good rows are known, with faults planted between them. All good rows have to
come out, equal and in order; each fault has to be counted and named; nothing may hang, read a file from beside the data
folder, start a process or open a socket. `test_data.py` runs a sample.
"""

import argparse
import gzip
import io
import json
import os
import random
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from finetune.data.load import load_data
from finetune.data.schema import DataError
from tests.finetune.data.data_files import picture, prompt
from tests.fuzz.recording import record


TIMEOUT_S = 20
SECRET = "what stands beside the data folder"
PNG = picture()
TEXTS = (
    "a cat",
    "zwei Hunde, \u00fc",
    'say "hi", now',
    "line one\nline two",
    "{}[]\\",
    "\u732b",
    "x" * 500,
    "nan",
    "0",
)


class Case(NamedTuple):
    """What was written: the path to load, keys of the spec, the good captions in order, and the faults' names."""

    path: Path
    keys: dict[str, Any]
    good: list[str]
    faults: list[str]
    is_exact: bool = True  # one bad record per fault


# ---- values that no record may have, as JSON text

BAD_JSON: dict[str, Callable[[random.Random], str]] = {
    "digits": lambda rng: '{"image": "a.png", "caption": "x", "n": ' + "7" * rng.randint(1001, 9000) + "}",
    "brackets": lambda rng: '{"image": "a.png", "caption": "x", "n": ' + _nested(rng.randint(101, 9000)) + "}",
    "objects": lambda rng: '{"image": "a.png", "caption": "x", "n": ' + '{"a":' * 2000 + "1" + "}" * 2000 + "}",
    "twice": lambda rng: '{"image": "a.png", "caption": "x", "caption": "y"}',
    "number": lambda rng: json.dumps({"image": "a.png", "caption": rng.choice([5, 1.5, True, False, [1], {"a": 1}])}),
    "null": lambda rng: '{"image": "a.png", "caption": null}',
    "NaN": lambda rng: f'{{"image": "a.png", "caption": {rng.choice(["NaN", "Infinity"])}}}',
    "surrogate": lambda rng: '{"image": "a.png", "caption": "\\udc41"}',
    "a list": lambda rng: rng.choice(["[1]", '"text"', "5", "null", "true", "[]"]),
    "messages": lambda rng: rng.choice(['{"messages": [null]}', '{"messages": {}}', '{"messages": [[{}]]}']),
    "nested nulls": lambda rng: rng.choice(NULLS),
    "outside": lambda rng: json.dumps({"image": rng.choice(OUTSIDE), "caption": "x"}),
    "token": lambda rng: '{"image": "a.png", "caption": "<|gen_start|>"}',
}
NULLS = (
    '{"messages": [{"role": null, "content": null}]}',
    '{"messages": [{"role": "user", "content": [null]}]}',
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}, null]}',
    '{"messages": [{"role": "user", "content": [{"type": null, "text": "a"}]}]}',
    '{"messages": null}',
    '{"image": null, "caption": "x"}',
    '{"image": "a.png", "caption": [null]}',
    '{"image": {"bytes": null, "path": null}, "caption": "x"}',
)
OUTSIDE = (
    "../secret.png",
    "x/../../secret.png",
    "/etc/passwd",
    "/dev/zero",
    "link.png",
    "up/secret.png",
    "a.png\0",
    "b" * 6000,
    "file:///etc/passwd",
    "https://127.0.0.1:9/a.png",
    "FTP://127.0.0.1/a.png",
    "%2e%2e/secret.png",
    "..\\secret.png",
    "pipe.png",
    "loop.png",
    "folder.png",
)
BAD_LINES = {
    "syntax": lambda rng: rng.choice(
        ["{broken", '{"a" 1}', "{'a': 1}", '{"a": 1} {"b": 2}', "}{", '{"a": "\x01"}', '{"a": "\0"}', "\0"]
    ),
    "bytes": lambda rng: '{"image": "a.png", "caption": "\udcff\udcfe"}',
}


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def make_folder(outer: Path) -> Path:
    """A data folder with pictures, and with everything in it that should not be followed."""
    folder = outer / "data"
    folder.mkdir()
    (outer / "secret.png").write_bytes(PNG)
    (outer / "secret.txt").write_text(SECRET)
    (folder / "a.png").write_bytes(PNG)
    (folder / "up").symlink_to("..")
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


def mixed(rng: random.Random, faults: dict[str, Any]) -> list[tuple[str | None, str]]:
    """Captions and faults in some order: (caption, "") or (None, name of a fault); at least one of the former."""
    entries: list[tuple[str | None, str]] = [(rng.choice(TEXTS), "") for _ in range(rng.randint(1, 6))]
    entries += [(None, rng.choice(list(faults))) for _ in range(rng.randint(0, 4))]
    rng.shuffle(entries)
    return entries


def long_line(rng: random.Random, folder: Path) -> Case:
    """A line of ten megabytes between others, whose words are all in a field that nobody asked for."""
    long = json.dumps({"image": "a.png", "caption": "long", "other": "y" * 10_000_000})
    lines = [json.dumps({"image": "a.png", "caption": text}) for text in ("before", "after")]
    path = folder / "rows.jsonl"
    path.write_text("\n".join([lines[0], long, lines[1]]) + "\n")
    return Case(path, {}, ["before", "long", "after"], [])


def bomb(rng: random.Random, folder: Path) -> Case:
    """A few kilobytes of gzip that unfold into hundreds of megabytes, in one member or in many of one sample."""
    path, members = folder / "rows.tar", rng.choice([1, 6])
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for key, text in (("0", "before"), ("2", "after")):
            if key == "2":
                for number in range(members):
                    info = tarfile.TarInfo(f"1.{number}.txt" if number else "1.txt")
                    info.size = 300 * 2**20 // members
                    tar.addfile(info, _Zeros())
            for name, content in ((f"{key}.png", PNG), (f"{key}.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return Case(path, {"shuffle_buffer": 1}, ["before", "after"], ["bomb"])


class _Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def _good(entries: list[tuple[str | None, str]]) -> tuple[list[str], list[str]]:
    return [text for text, _ in entries if text is not None], [name for _, name in entries if name]


def jsonl(rng: random.Random, folder: Path) -> Case:
    kinds = BAD_JSON | BAD_LINES
    entries = mixed(rng, kinds)
    lines = [
        kinds[name](rng) if name else json.dumps({"image": "a.png", "caption": text}, ensure_ascii=rng.random() < 0.5)
        for text, name in entries
    ]
    end = rng.choice(["\n", "\r\n", "\r"])
    text = ("\ufeff" if rng.random() < 0.2 else "") + end.join(lines) + (end if rng.random() < 0.7 else "")
    path = folder / "rows.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return Case(path, {}, *_good(entries))


def json_array(rng: random.Random, folder: Path) -> Case:
    entries = mixed(rng, BAD_JSON)
    items = [BAD_JSON[n](rng) if n else json.dumps({"image": "a.png", "caption": text}) for text, n in entries]
    path = folder / "rows.json"
    path.write_text("[" + rng.choice([",", ",\n", " ,\r\n "]).join(items) + "]", encoding="utf-8")
    return Case(path, {}, *_good(entries))


def csv_table(rng: random.Random, folder: Path) -> Case:
    comma, end = rng.choice(",;\t"), rng.choice(["\n", "\r\n", "\r"])
    kinds = {
        "long cell": lambda: f"a.png{comma}" + "y" * rng.randint(131_073, 140_000),
        "cells": lambda: comma.join(["a.png"] * rng.choice([1, 3, 9])),
        "bytes": lambda: f"a.png{comma}\udcff",
        "quotes": lambda: f'a.png{comma}"b" c',
        "outside": lambda: f"../secret.png{comma}x",
        "empty": lambda: f"a.png{comma}",
    }
    entries = mixed(rng, kinds)

    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [kinds[name]() if name else f"a.png{comma}{quoted(text)}" for text, name in entries]
    path = folder / "rows.csv"
    content = end.join([f"image{comma}caption", *lines]) + end
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    return Case(path, {}, *_good(entries))


def tar_shard(rng: random.Random, folder: Path) -> Case:
    kinds = [*BAD_JSON, "link", "hard link", "device", "dots", "absolute", "member twice", "bytes", "no picture"]
    entries = mixed(rng, dict.fromkeys(kinds))
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    for number, (text, name) in enumerate(entries):
        members += _sample(rng, f"{number:04d}", text, name)
    is_cut = rng.random() < 0.3
    path = folder / "rows.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    content, (good, faults) = buffer.getvalue(), _good(entries)
    if is_cut:  # behind the last whole sample
        content, faults = content[:end] + b"\x01" * rng.randint(1, 900), [*faults, "cut"]
    if rng.random() < 0.2:
        content = gzip.compress(content)
    path.write_bytes(content)
    return Case(path, {"shuffle_buffer": 1}, good, faults)


def _sample(rng: random.Random, key: str, text: str | None, fault: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    info = tarfile.TarInfo
    if not fault:
        second = (f"{key}.txt", text.encode()) if rng.random() < 0.5 else (f"{key}.json", _caption(text))
        both = [(info(f"{key}.png"), PNG), (info(second[0]), second[1])]
        return both if rng.random() < 0.5 else both[::-1]
    if fault in BAD_JSON and fault != "outside":
        return [(info(f"{key}.png"), PNG), (info(f"{key}.json"), BAD_JSON[fault](rng).encode())]
    if fault == "outside":
        reference = rng.choice([name for name in OUTSIDE if name != "a.png"])
        return [(info(f"{key}.json"), json.dumps({"image": reference, "caption": "x"}).encode())]
    special = info(f"{key}.txt")
    if fault in ("link", "hard link", "device"):
        special.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[fault]
        special.linkname = "../secret.txt"
        return [(info(f"{key}.png"), PNG), (special, b"")]
    if fault in ("dots", "absolute"):
        start = "../" if fault == "dots" else "/"
        return [(info(f"{start}{key}.png"), PNG), (info(f"{start}{key}.txt"), b"x")]
    texts = {"member twice": [b"x", b"y"], "bytes": [b"\xff"], "no picture": [b"x"]}[fault]
    pictures = [] if fault == "no picture" else [(info(f"{key}.png"), PNG)]
    return [*pictures, *((info(f"{key}.txt"), content) for content in texts)]


def _caption(text: str) -> bytes:
    return json.dumps({"caption": text}).encode()


def picture_folder(rng: random.Random, folder: Path) -> Case:
    for name in ("link.png", "loop.png", "pipe.png"):
        (folder / name).unlink()
    (folder / "folder.png").rmdir()
    (folder / "a.png").unlink()
    kinds: dict[str, Callable[[Path], Any]] = {
        "link": lambda path: path.symlink_to("../secret.txt"),
        "link over links": lambda path: path.symlink_to("up/secret.txt"),
        "absolute link": lambda path: path.symlink_to("/etc/passwd"),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path.name),
        "pipe": os.mkfifo,
        "folder": lambda path: path.mkdir(),
        "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
        "none": lambda path: None,
        "token": lambda path: path.write_text("<|image|>"),
    }
    entries = mixed(rng, kinds)
    for number, (text, name) in enumerate(entries):
        (folder / f"{number:02d}.png").write_bytes(PNG)
        path = folder / f"{number:02d}.txt"
        if name:
            kinds[name](path)
        elif rng.random() < 0.3:  # links inside are fine
            (folder / "texts").mkdir(exist_ok=True)
            (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
            path.symlink_to(f"texts/{number}.txt")
        else:
            path.write_text(text, encoding="utf-8")
    return Case(folder, {}, *_good(entries))


def parquet(rng: random.Random, folder: Path) -> Case:
    groups = [[rng.choice(TEXTS) for _ in range(2)] for _ in range(rng.randint(2, 4))]
    rows = [text for group in groups for text in group]
    table = pa.table({"image": [{"bytes": PNG, "path": None}] * len(rows), "caption": rows})
    path = folder / "rows.parquet"
    pq.write_table(table, path, row_group_size=2, compression="gzip", use_dictionary=False)
    bad = rng.randrange(len(groups)) if rng.random() < 0.7 else None
    if bad is not None:
        begin = pq.ParquetFile(path).metadata.row_group(bad).column(0).data_page_offset
        content = bytearray(path.read_bytes())
        content[begin : begin + 40] = b"\xff" * 40
        path.write_bytes(content)
    good = [text for number, group in enumerate(groups) if number != bad for text in group]
    return Case(path, {"streaming": True, "shuffle_buffer": 1}, good, [] if bad is None else ["row group"] * 2)


FORMATS = (jsonl, json_array, csv_table, tar_shard, picture_folder, parquet)
LARGE = (long_line, bomb)  # seconds each


# ---- what a case may not do


class Watch:
    """Notes opened files outside of allowed folders, processes and sockets; an audit hook cannot be removed."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        self.allowed = tuple(
            {os.path.realpath(path) for path in (sys.prefix, os.getcwd(), "/proc", *filter(None, sys.path))}
        )
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.bind"):
            self.found.append(f"{event} {args[:1]}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith((self.folder + os.sep, *self.allowed)):
                self.found.append(f"open {path}")

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.folder, self.found = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.folder = None


_watch: list[Watch] = []


def check(make: Callable[[random.Random, Path], Case], seed: str) -> str:
    """Run one case; what went wrong, or empty."""
    if not _watch:
        _watch.append(Watch())
        Image.init()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as outer:
        case = make(rng, make_folder(Path(outer)))
        signal.signal(signal.SIGALRM, _too_slow)
        signal.alarm(TIMEOUT_S)
        try:
            with _watch[0].over(case.path if case.path.is_dir() else case.path.parent), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                records = list(load_data({"path": case.path, "max_bad_records": 1.0, **case.keys}).iter_checked())
        except BaseException:
            return traceback.format_exc(limit=-4)
        finally:
            signal.alarm(0)
        return _judge(case, records, Path(outer)) or "; ".join(_watch[0].found)


# ---- the same sources through the commands

COMMANDS = {
    "finetune.check_data": "--data {s}",
    "curation.scan": "--data {s} --index {w}/index --processes 1 --rows_per_shard 3",
}


def check_command(module: str, make: Callable[[random.Random, Path], Case], seed: str) -> str:
    """Run a command on one case, in a copy of this process; what went wrong, or empty."""
    from tests.crash.jobs import Job, open_texts
    from tests.crash.running import Run

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as outer:
        case = make(random.Random(seed), make_folder(Path(outer)))
        work = Path(outer) / "work"
        work.mkdir()
        ended = Run(Job(module, module, COMMANDS[module], "", open_texts), case.path, work).wait()
        if ended.code not in (0, 1, 2) or "Traceback" in ended.errors:
            return f"{module}: exit code {ended.code}: {ended.errors[-500:]}"
        if SECRET in ended.errors:
            return f"{module}: the secret was read"
        if ended.code == 2 and case.good:
            return f"{module}: gave up good records: {ended.errors[-300:]}"
        return ""  # a hang is ended by the run, with a signal


def _judge(case: Case, records: list[tuple[str, Any]], outer: Path) -> str:
    good = [prompt(row) for _, row in records if not isinstance(row, DataError)]
    bad = [f"{place}: {row}" for place, row in records if isinstance(row, DataError)]
    if sorted(good) != sorted(case.good):
        return f"good rows {good}, expected {case.good}; faults {case.faults}"
    if not any(isinstance(row, DataError) for _, row in records) and good != case.good:
        return f"another order: {good}, expected {case.good}"
    if len(bad) != len(case.faults):
        return f"{len(bad)} bad records {bad}, planted {case.faults}"
    if unnamed := [line for line in bad if str(outer) not in line or len(line.splitlines()) != 1 or len(line) > 1000]:
        return f"badly named: {unnamed}"
    return "the secret was read" if SECRET in repr(records) else ""


def _too_slow(*args: Any) -> None:
    raise TimeoutError(f"more than {TIMEOUT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", default=str(time.time_ns()), help="default: a fresh one")
    parser.add_argument(
        "--commands", action="store_true", help="through check_data and curation.scan, not the readers"
    )
    parser.add_argument("--large", action="store_true", help="the large ones alone")
    parser.add_argument("--output", metavar="FILE", help="results file, to which the counts are added")
    options = parser.parse_args()
    start, bad = time.perf_counter(), 0
    if options.commands:
        from tests.crash.running import warm_up_modules

        warm_up_modules(list(COMMANDS))
    for number in range(options.cases):
        makers = LARGE if options.large else FORMATS
        make, seed = makers[number % len(makers)], f"{options.seed}-{number}"
        module = list(COMMANDS)[number // len(makers) % len(COMMANDS)]
        if problem := check_command(module, make, seed) if options.commands else check(make, seed):
            bad += 1
            print(f"{make.__name__} {options.seed}-{number}: {problem}", flush=True)
    surface = f"data{' commands' if options.commands else ''}{' large' if options.large else ''}"
    numbers = {"cases": options.cases, "failures": bad, "seed": options.seed}
    record(options.output, surface, {**numbers, "seconds": round(time.perf_counter() - start)})
    print(f"seed {options.seed}: {options.cases} cases, {bad} failures, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
