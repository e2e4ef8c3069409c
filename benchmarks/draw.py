"""Seconds per drawn picture with a loaded pipeline, by batch size; and beside another version, in one run.

`python -m benchmarks.draw --model pisces-tiny --output results/draw.json` draws one prompt at a time, as `pisces draw`
does, and in batches. `--against FOLDER` names an older checkout of this repository, which draws the same prompts with
its own code and its own `pisces-tiny` in a process of its own, in turn with this one: what a version gained. Seconds
are processor time of the process that draws: on a shared machine the wall clock measures the neighbours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import summarize_pairs, write_result


PROMPTS = (
    "a red circle",
    "two blue stars",
    "a yellow heart left of a purple square",
    "three crosses on a dark background",
)
ROOT = Path(__file__).parents[1]
# reads "SEED SIZE" lines and answers each with seconds; older checkouts know the pipeline and nothing of this file
CHILD = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from modeling_pisces import PiscesPipeline
pipeline = PiscesPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
prompts = json.loads(sys.argv[3])
for line in sys.stdin:
    seed, size = map(int, line.split())
    batch = [prompts[(seed + i) % len(prompts)] for i in range(size)]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(size)]
    start = time.process_time()
    pipeline(batch, generator=generators)
    print(json.dumps(time.process_time() - start), flush=True)
"""


class Drawer:
    """A process that draws with the code of one checkout."""

    def __init__(self, model: str, checkout: Path, threads: int):
        command = [sys.executable, "-W", "ignore", "-c", CHILD, model, str(threads), json.dumps(PROMPTS)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.checkout, self.process = checkout, subprocess.Popen(command, cwd=checkout, env=environment, **pipes)

    def draw(self, seed: int, size: int = 1) -> float:
        """Seconds for a batch of so many prompts.

        Raises:
            ValueError: the process ended, with its own error before this one.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{seed} {size}\n")
            return json.loads(self.process.stdout.readline())
        except (OSError, json.JSONDecodeError):
            raise ValueError(f"{self.checkout}: drawing ended with code {self.process.wait()}; see above.") from None


@contextmanager
def drawer(model: str, checkout: Path, threads: int) -> Iterator[Drawer]:
    """A drawer that has drawn once already."""
    started = Drawer(model, checkout, threads)
    try:
        started.draw(0)
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def compare(ours: Drawer, older: Drawer, rounds: int) -> dict[str, Any]:
    """The same prompts one at a time, in turn."""
    pairs = [(ours.draw(seed), older.draw(seed)) for seed in range(rounds * len(PROMPTS))]
    return summarize_pairs(pairs, baseline="older")


def throughput(ours: Drawer, sizes: list[int], rounds: int) -> list[dict[str, float]]:
    """Seconds per picture by batch size, all sizes in turn in each round; the gain over the first size."""
    found = [[ours.draw(seed, size) / size for size in sizes] for seed in range(rounds)]
    lines = []
    for place, size in enumerate(sizes):
        gains = [line[0] / line[place] for line in found]
        seconds = statistics.median(line[place] for line in found)
        lines.append({"batch": size, "per_picture_s": round(seconds, 4), "gain": round(statistics.median(gains), 2)})
    return lines


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument("--rounds", type=COUNT, default=3)
    parser.add_argument("--batch_sizes", type=COUNT, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="an older checkout, with its pisces-tiny")
    parser.add_argument("--threads", type=COUNT, default=1)
    arguments = parser.parse_args()
    older = arguments.against
    if older is not None and not (older / "modeling_pisces").is_dir():
        parser.error(f"argument --against: {older}: no modeling_pisces in it, expected a checkout of this repository")
    model = Path(arguments.model).resolve().as_posix() if Path(arguments.model).is_dir() else arguments.model
    measured: dict[str, Any] = {"threads": arguments.threads, "load_average": round(os.getloadavg()[0], 2)}
    with drawer(model, ROOT, arguments.threads) as ours:
        times = [ours.draw(seed) for seed in range(arguments.rounds * len(PROMPTS))]
        measured["seconds_per_image_median"] = round(statistics.median(times), 3)
        measured |= {"slowest": round(max(times), 3), "pictures": len(times)}
        if older is not None:
            with drawer("pisces-tiny", older.resolve(), arguments.threads) as before:
                measured["against_older"] = compare(ours, before, arguments.rounds)
        measured["batches"] = throughput(ours, arguments.batch_sizes, arguments.rounds)
    bar = "<= 3 s per image; batch 32 >= 3 times the throughput of batch 1"
    write_result(arguments.output, "draw", bar, measured)


if __name__ == "__main__":
    run_command(main)
