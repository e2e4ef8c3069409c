"""Seconds per drawn picture with a loaded pipeline, one prompt at a time, as `pisces draw` does it.

`python -m benchmarks.draw --model pisces-tiny --output results/draw.json`
"""

import argparse
import statistics
import time

import torch

from modeling_pisces import PiscesPipeline
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result


PROMPTS = (
    "a red circle",
    "two blue stars",
    "a yellow heart left of a purple square",
    "three crosses on a dark background",
)


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument("--rounds", type=COUNT, default=3)
    arguments = parser.parse_args()
    pipeline = PiscesPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str, seed: int) -> float:
        start = time.perf_counter()
        pipeline(prompt, generator=torch.Generator().manual_seed(seed))
        return time.perf_counter() - start

    draw(PROMPTS[0], 0)  # warm-up
    times = [draw(prompt, seed) for seed in range(arguments.rounds) for prompt in PROMPTS]
    measured = {"seconds_per_image_median": round(statistics.median(times), 3)}
    measured |= {"slowest": round(max(times), 3), "pictures": len(times), "threads": torch.get_num_threads()}
    write_result(arguments.output, "draw", "<= 3 s per image on two cores", measured)


if __name__ == "__main__":
    run_command(main)
