"""One picture's language part, and one answer, beside stock models of transformers of equal language-model shape.

`python -m benchmarks.peers --output results/peers.json`. Random weights, fp32, one thread, a process for each
contestant; the processes wait for their turn and run one after the other, round by round, so that ratios compare what
the same machine did in the same minutes. Seconds are processor time; memory is what a process grew by beyond its
imports, model included. Janus draws 576 tokens and always with guidance; Emu3 draws 8,190, of which the first are
timed and the rest is reckoned at the same price. What turns vectors or tokens into pixels is not part of it; the
decoder of `pisces-tiny` is timed apart, by its steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from benchmarks.contestants.models import CONTESTANTS, EMU3_TIMED, EMU3_TOKENS, Run
from benchmarks.floors.checking import RETURN_MEMORY, resident, seconds
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result


SHAPES = ("384x6", "512x8", "768x10")
ROOT = Path(__file__).parents[1]
# who is compared with whom: ours, and the peers with how many times their timed work one picture takes
GROUPS: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "one picture": (
        ("pisces regression", "pisces regression guided", "pisces flow", "pisces flow guided"),
        {"llama 64 tokens": 1.0, "janus guided": 1.0, "emu3 guided": EMU3_TOKENS / EMU3_TIMED},
    ),
    "one answer": (("pisces answer",), {"llava answer": 1.0}),
}
DECODER_STEPS = (4, 8, 16, 32)
BAR = "guided against Janus: regression <= 0.10, flow <= 0.12; 64 vectors against 64 Llama tokens <= 1.00"


class Contestant:
    """A child that has built its model and runs it when told to."""

    def __init__(self, name: str, shape: str):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", "--child", name, "--shapes", shape]
        environment = os.environ | RETURN_MEMORY | {"OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.name, self.process = name, subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def run(self) -> dict[str, float]:
        """Seconds of one run, and MiB that the process has grown by so far."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write("run\n")
            return json.loads(self.process.stdout.readline())
        except (OSError, json.JSONDecodeError) as error:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}; its error is above.") from error

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(run: Run, before: int) -> None:
    """What a child does: run once for every line it reads."""
    for _ in sys.stdin:
        start = time.process_time()
        run()
        took = time.process_time() - start
        print(json.dumps({"seconds": took, "mib": (resident("VmHWM") - before) / 2**20}), flush=True)


@contextmanager
def contestants(names: Iterable[str], shape: str) -> Iterator[dict[str, Contestant]]:
    with ExitStack() as stack:
        started = {name: Contestant(name, shape) for name in names}
        for contestant in started.values():
            stack.callback(contestant.close)
        yield started


def compare(rounds: list[dict[str, dict[str, float]]], ours: str, peer: str, times: float) -> dict[str, Any]:
    """Ratios ours / peer round by round."""
    ratios = [found[ours]["seconds"] / (found[peer]["seconds"] * times) for found in rounds]
    sizes = rounds[-1][ours]["mib"], rounds[-1][peer]["mib"]
    return {
        "ours": ours,
        "peer": peer,
        "ours_s": round(statistics.median(found[ours]["seconds"] for found in rounds), 3),
        "peer_s": round(statistics.median(found[peer]["seconds"] for found in rounds) * times, 3),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "ours_mib": round(sizes[0], 1),
        "peer_mib": round(sizes[1], 1),
        "memory_ratio": round(sizes[0] / sizes[1], 3),
        "rounds": len(rounds),
        **({} if times == 1 else {"peer_reckoned_from": f"{1 / times:.4f} of its tokens"}),
    }


def measure(group: str, shape: str, num_rounds: int) -> Iterator[list[dict[str, Any]]]:
    """All of a group in turn, round by round, after one warm-up of ours; the table after each round."""
    ours, peers = GROUPS[group]
    rounds: list[dict[str, dict[str, float]]] = []
    with contestants((*ours, *peers), shape) as ready:
        for name in ours:
            ready[name].run()
        for _ in range(num_rounds):
            rounds.append({name: contestant.run() for name, contestant in ready.items()})
            yield [compare(rounds, mine, peer, times) for peer, times in peers.items() for mine in ours]


def decoder_seconds(repeats: int) -> dict[str, float]:
    """pisces-tiny's own decoder from ready vectors to pixels, by steps."""
    from modeling_pisces import PiscesPipeline

    pipeline = PiscesPipeline.from_pretrained(ROOT / "pisces-tiny", load_language_model=False)
    pipeline.set_progress_bar_config(disable=True)
    vectors = torch.randn(1, 16, pipeline.unet.config.encoder_hid_dim)
    return {
        str(steps): round(seconds(partial(pipeline, image_vectors=vectors, num_inference_steps=steps), repeats), 4)
        for steps in DECODER_STEPS
    }


def shape_of(text: str) -> tuple[int, int]:
    """ "512x8" is a width of 512 and 8 layers.

    Raises:
        argparse.ArgumentTypeError: it is not of this form.
    """
    width, _, layers = text.partition("x")
    if not (width.isascii() and layers.isascii() and width.isdigit() and layers.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxLAYERS, such as 512x8")
    if int(width) % 64 or not int(width) or not int(layers):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a width that is a multiple of 64, and at least one layer"
        )
    return int(width), int(layers)


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="results file to write")
    parser.add_argument("--rounds", type=COUNT, default=3)
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=[shape_of(shape) for shape in SHAPES])
    parser.add_argument("--child", choices=CONTESTANTS, help="be one contestant (internal)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if arguments.child:
        before = resident("VmRSS")
        return serve(CONTESTANTS[arguments.child](*arguments.shapes[0]), before)
    if not arguments.output:
        parser.error("--output is missing: name the results file")
    measured: dict[str, Any] = {
        "setting": "random weights, fp32, one thread, batch 1, prompts of 32 tokens, vectors of 1792",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "load_average": [round(os.getloadavg()[0], 2)],
        "shapes": {},
    }
    for width, layers in arguments.shapes:
        tables = measured["shapes"][f"width {width}, {layers} layers"] = {}
        for group in GROUPS:
            for table in measure(group, f"{width}x{layers}", arguments.rounds):
                tables[group] = table
                write_result(arguments.output, "peers", BAR, measured)  # what is done is kept
        measured["load_average"].append(round(os.getloadavg()[0], 2))
    measured["pisces_tiny_decoder_s_by_steps"] = decoder_seconds(arguments.rounds)
    write_result(arguments.output, "peers", BAR, measured)


if __name__ == "__main__":
    run_command(main)
