"""Measures `curation/` on planted faults, kills, numbers of processes, speed and memory; writes results/curation.json.

    python -m benchmarks.curation --part faults --count 20000
    python -m benchmarks.curation --part kills
    python -m benchmarks.curation --part engines
    python -m benchmarks.curation --part speed

Each part replaces its own entry of the results file. `docs/curation.md` shows the numbers.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.material.curation_faults import Scenes, plant, shaded_photo
from curation.records.scanning import run_scan
from curation.run import main as run
from curation.stages.benchmarks import contamination_settings, run_contamination
from curation.stages.copies import CopyRules
from curation.stages.deduplication import run_dedup
from curation.stages.filtering import run_filter
from modeling_pisces.records.sources import list_pictures, sources_of
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import one_line_ending
from pisces_commands.measurement import current_command, current_commit, describe_hardware
from pisces_commands.shards import Workers
from pisces_commands.writing import write_json


SETTINGS = {"size": {"short_side": 64}, "looks": {"max_one_color": 0.995, "min_entropy": 0.05}}
CONFIG = "size: {short_side: 64}\nlooks: {max_one_color: 0.995, min_entropy: 0.05}\ndedup: {}\nexport: {}\n"


# ---- planted faults


def measure_faults(folder: Path, count: int, num_scored: int) -> dict[str, Any]:
    """Precision and recall of every rule on rendered pictures of which it is known what was done to them."""
    truth = plant(folder / "raw", count)
    workers, seconds = Workers(), {}
    started = time.process_time()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = round(time.process_time() - started, 1), time.process_time()

    index = run_scan(folder / "index", sources_of([str(folder / "raw" / "train")]), workers)
    lap("scan")
    run_filter(index, SETTINGS, workers)
    lap("filter")
    run_dedup(index, CopyRules())
    lap("dedup")
    benchmark = folder / "raw" / "benchmark"
    paths: dict[str, Any] = {"pictures": [str(benchmark / "pictures")], "prompts": [str(benchmark / "prompts.txt")]}
    paths["ngram"] = 60  # whole prompts: captions of one grammar share any eight words in a row
    run_contamination(index, contamination_settings(paths, "benchmark"), workers)
    lap("contamination")
    columns = ("id", "duplicate_of", "benchmark")
    rows = {row["id"]: row for row in index.iter_rows("export", columns)}
    found = {name: score_rule(rows, truth, name) for name in RULES}
    found["swapped caption"] = measure_agreement(folder, truth, num_scored)
    lap("agreement, scan of its part included")
    return {
        "pictures": len(rows),
        "side_pixels": 256,
        "planted": dict(Counter(fault["fault"] for fault in truth.values() if fault["fault"])),
        "rules": found,
        "dropped_by": dict(Counter(row["rule"] or "kept" for row in rows.values())),
        "cpu_s": seconds,
    }


# what is looked for: the rules that count as finding it, and whether a hit must name the right partner
RULES = {
    "exact": (("copy_file", "copy_pixels"), ("exact copy", "other PNG")),
    "re-encoded": (("copy_near",), ("JPEG q50", "half size")),
    "crop": (("copy_crop",), ("crop",)),
    "truncated": (("unreadable",), ("truncated",)),
    "blank": (("flat",), ("blank",)),
    "held-out picture": (("benchmark_picture",), ("held-out picture",)),
    "benchmark prompt": (("benchmark_prompt",), ("benchmark prompt",)),
}


def score_rule(rows: dict[str, dict], truth: dict[str, dict], name: str) -> dict[str, Any]:
    """Precision: of the rows that the rules dropped, those that are what they say. Recall: of the planted, the found.

    A copy counts as found when one of the pair goes and names the other; by whichever rule for copies.
    """
    rules, faults = RULES[name]
    dropped = [row for row in rows.values() if row["rule"] in rules]
    planted = [(id, fault) for id, fault in truth.items() if fault["fault"] in faults]
    if rules[0].startswith("copy"):
        right = sum(_origin(truth, row["id"]) == _origin(truth, row["duplicate_of"]) for row in dropped)
        names = [row["id"] for row in rows.values() if row["rule"] and row["rule"].startswith("copy")]
        gone = {id for id in names if _origin(truth, id) == _origin(truth, rows[id]["duplicate_of"])}
        found = sum(id in gone or fault["of"] in gone for id, fault in planted)
    else:
        right = sum(truth[row["id"]]["fault"] in faults for row in dropped)
        found = sum(rows[id]["rule"] in rules for id, _ in planted)
    return {
        "precision": round(right / len(dropped), 4) if dropped else None,
        "recall": round(found / len(planted), 4),
        "dropped": len(dropped),
        "planted": len(planted),
    }


def _origin(truth: dict[str, dict], id: str) -> str:
    return truth[id]["of"] or id


def measure_agreement(folder: Path, truth: dict[str, dict], count: int) -> dict[str, Any]:
    """Swapped captions among the first rows, found by the agreement of pisces-tiny at its threshold."""
    part = folder / "raw" / "train" / "scored.jsonl"
    lines = [json.loads(line) for line in (folder / "raw" / "train" / "metadata.jsonl").read_text().splitlines()]
    wanted = [line for line in lines if truth[line["id"]]["fault"] in (None, "swapped caption")]
    swapped = [line for line in wanted if truth[line["id"]]["fault"]]
    plain = [line for line in wanted if not truth[line["id"]]["fault"]]
    share = len(swapped) / len(wanted)
    chosen = sorted(
        [*swapped[: round(count * share)], *plain[: count - round(count * share)]], key=lambda line: line["id"]
    )
    part.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    index = run_scan(folder / "index-scored", sources_of([str(part)]), Workers())
    run_filter(index, {"agreement": {"model": "pisces-tiny", "min": AGREEMENT}}, Workers())
    rows = {row["id"]: row for row in index.iter_rows("dedup", ("id", "agreement"))}
    dropped = [id for id, row in rows.items() if row["rule"] == "agreement"]
    right = sum(truth[id]["fault"] == "swapped caption" for id in dropped)
    planted = sum(truth[id]["fault"] == "swapped caption" for id in rows)
    return {
        "precision": round(right / max(len(dropped), 1), 4),
        "recall": round(right / max(planted, 1), 4),
        "dropped": len(dropped),
        "planted": planted,
        "scored": len(rows),
        "threshold": AGREEMENT,
    }


AGREEMENT = 1.0  # nats; the score of a right caption was 1.9 or more for 95 of 100 pictures of another seed


# ---- stopping


def measure_kills(folder: Path, count: int = 600, kills: int = 20) -> dict[str, Any]:
    """`kill -9` at random moments of one run after another, then a run that may end; against an undisturbed one."""
    plant(folder / "raw", count)
    (folder / "config.yaml").write_text(CONFIG)
    command = ["--config", str(folder / "config.yaml"), "--data", str(folder / "raw" / "train"), "--processes", "1"]
    command += ["--rows_per_shard", "16"]
    started = time.monotonic()
    assert run([*command, "--output", str(folder / "whole")]) == 0
    whole_s = time.monotonic() - started
    randoms, done, moments = random.Random(0), 0, []
    while done < kills:
        child = os.fork()  # libraries are imported: what is killed is the work, not the start of Python
        if child == 0:
            os._exit(run([*command, "--output", str(folder / "killed")]))
        time.sleep(randoms.uniform(0.02, 1.5 * whole_s / kills))
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:  # it was over: begin again, so that all kills hit work
            shutil.rmtree(folder / "killed")
            shutil.rmtree(folder / "killed.index")
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        moments.append(sum(1 for path in (folder / "killed.index").rglob("*.parquet")))
    assert run([*command, "--output", str(folder / "killed")]) == 0
    whole, killed = _tree(folder / "whole"), _tree(folder / "killed")
    ids = [id for name in sorted(whole) if name.startswith("data/") for id in _ids(folder / "killed" / name)]
    return {
        "pictures": count,
        "kills": kills,
        "shards_there_at_each_kill": moments,
        "same_bytes": whole == killed,
        "files": len(whole),
        "rows_exported_twice": len(ids) - len(set(ids)),
    }


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _ids(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["id"])["id"].to_pylist()


def measure_engines(folder: Path, count: int = 1000) -> dict[str, Any]:
    """The bytes of one process against two, and against Ray with a worker killed in its shard."""
    plant(folder / "raw", count)
    (folder / "config.yaml").write_text(CONFIG)
    command = [
        "--config",
        str(folder / "config.yaml"),
        "--data",
        str(folder / "raw" / "train"),
        "--rows_per_shard",
        "50",
    ]
    for name, flags in (("one", ["--processes", "1"]), ("two", ["--processes", "2"])):
        assert run([*command, "--output", str(folder / name), *flags]) == 0
    one = _tree(folder / "one")
    found: dict[str, Any] = {"pictures": count, "two_processes_same_bytes": _tree(folder / "two") == one}
    try:
        import ray
    except ImportError:
        return {**found, "ray": "not installed here: not run"}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "curation.run",
            *command,
            "--output",
            str(folder / "ray"),
            "--engine",
            "ray",
            "--processes",
            "2",
        ],
    )
    killed = None
    while killed is None and process.poll() is None:
        time.sleep(0.05)
        scanned = folder / "ray.index" / "scan"
        if scanned.is_dir() and any(scanned.glob("*.parquet")):
            killed = _kill_a_ray_worker()
    assert process.wait() == 0
    return {
        **found,
        "ray": ray.__version__,
        "ray_worker_killed": killed,
        "ray_same_bytes": _tree(folder / "ray") == one,
    }


def _kill_a_ray_worker() -> str | None:
    """Kill a worker of ours that runs a shard; Ray names its processes after the task."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = status.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if name.startswith("ray::_make_shard"):
            os.kill(int(status.parent.name), signal.SIGKILL)
            return name.split()[0]
    return None


# ---- speed and memory


def measure_speed(folder: Path, count: int = 1500, pairs: int = 3) -> dict[str, Any]:
    """Pictures per second of a scan with two processes, and of PIL that only decodes the same files with two."""
    found: dict[str, Any] = {}
    for kind in ("scene PNG 256", "photo JPEG 1024"):
        pictures = folder / kind.replace(" ", "-")
        _make_pictures(pictures, kind, count if "PNG" in kind else count // 5)
        paths = [str(path) for path in list_pictures(pictures)]
        ratios, rates = [], []
        for _ in range(pairs):
            decode_s = _timed("decode", paths)
            scan_s = _timed("scan", paths)
            ratios.append(decode_s / scan_s)
            rates.append(len(paths) / scan_s)
        found[kind] = {
            "pictures": len(paths),
            "scan_per_s": round(sorted(rates)[pairs // 2], 1),
            "scan_over_decode": round(sorted(ratios)[pairs // 2], 3),
            "all_ratios": [round(ratio, 3) for ratio in ratios],
        }
    found["peak_memory_mib"] = {str(n): _peak_memory(folder, n) for n in (500, 2000, 8000)}
    return found


def _make_pictures(folder: Path, kind: str, count: int) -> None:
    folder.mkdir(parents=True)
    if "PNG" in kind:
        scenes = Scenes(folder.with_suffix(".scenes"), count, seed=9)
    for number in range(count):
        if "PNG" in kind:
            scenes.picture(number).save(folder / f"{number:06d}.png")
        else:
            shaded_photo(number, 1024).save(folder / f"{number:06d}.jpg", quality=90)


def _timed(what: str, paths: list[str]) -> float:
    """Seconds of the work itself on two processes that are already there."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    parts = [paths[start : start + 50] for start in range(0, len(paths), 50)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_work, ["decode"] * 2, [paths[:20]] * 2))  # libraries are imported, files are in the cache
        started = time.perf_counter()
        list(pool.map(_work, [what] * len(parts), parts))
        return time.perf_counter() - started


def _work(what: str, paths: list[str]) -> None:
    from PIL import Image

    from curation.records.scanning import scan_picture

    for path in paths:
        if what == "decode":
            with Image.open(path) as image:
                image.convert("RGB")
        else:
            scan_picture(Path(path).read_bytes(), 10**8)


def _peak_memory(folder: Path, count: int) -> dict[str, float]:
    """Peak resident memory of scan and dedup, each in a process of its own, on copies of few pictures' files."""
    raw = folder / f"memory-{count}"
    source = list_pictures(folder / "scene-PNG-256")
    raw.mkdir()
    for number in range(count):
        os.link(source[number % len(source)], raw / f"{number:06d}.png")
    peaks = {}
    for stage in ("scan", "dedup"):
        flags = ["--data", str(raw), "--processes", "1"] if stage == "scan" else ["--no_crops"]
        code = (
            f"import sys, resource; from curation.{stage} import main; main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, "--index", str(folder / f"memory-{count}.index"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[stage] = round(int(done.stdout.split()[-1]) / 1024, 1)
    return peaks


PARTS = {
    "faults": "precision and recall of each rule",
    "kills": "kill -9 at random moments",
    "engines": "one process, two, Ray",
    "speed": "pictures per second, memory",
}


def main(arguments: list[str] | None = None) -> None:
    """The command: measure one part and put it into the results file."""
    parser = LineParser(prog="python -m benchmarks.curation", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True, help="; ".join(f"{k}: {v}" for k, v in PARTS.items()))
    parser.add_argument("--count", type=COUNT, help="pictures (default: 20000 for faults)")
    parser.add_argument("--scored", type=COUNT, default=2000, help="pictures whose captions are scored by the model")
    parser.add_argument("--output", default="results/curation.json")
    options = parser.parse_args(arguments)
    with one_line_ending(), tempfile.TemporaryDirectory() as folder:
        given = {"count": options.count} if options.count else {}
        if options.part == "faults":
            found = measure_faults(Path(folder), options.count or 20000, options.scored)
        else:
            found = {"kills": measure_kills, "engines": measure_engines, "speed": measure_speed}[options.part](
                Path(folder), **given
            )
        _merge(Path(options.output), options.part, found)


def _merge(path: Path, part: str, found: dict[str, Any]) -> None:
    results = json.loads(path.read_text()) if path.is_file() else {"benchmark": "curation"}
    place = {"command": current_command(), "commit": current_commit(), "hardware": describe_hardware()}
    results[part] = {**found, **place}
    write_json(path, results)
    print(json.dumps(results[part], indent=1))


if __name__ == "__main__":
    main()
