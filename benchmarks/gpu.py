"""Everything that is worth measuring on one GPU, in the order of its value, in less than 8 minutes on an H200.

`python -m benchmarks.gpu --output results/gpu.json` builds random weights of the full size on the device and needs no
download: 64 vectors beside their computed floor, a picture of 1024 px end to end, LoRA by setting (tokens per second,
utilisation, memory; packed and padded, checkpointing, compiled, in 4 bit where bitsandbytes is installed). The file is
written after every line, so that a run cut short keeps what it measured; `--budget_s` ends it by itself: nothing is
begun after that time. `--preset tiny` runs the same code on any processor.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import diffusers
import peft
import torch
import transformers
from transformers.utils import logging

from benchmarks.gpu_parts.drawing import measure_picture, measure_vectors
from benchmarks.gpu_parts.lora import PRESETS, Preset, make_adapted, measure, settings_of
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result


BAR = "64 vectors <= 1.15 of their floor; 1024 px < 2 s at 25 steps; mfu >= 0.50; a quantized setting <= 24 GiB"
FORMULA = "mfu = 4 * N * tokens/s / peak; N: parameters of the language model, tokens without padding"

Lines = Iterator[dict[str, Any]]


def measure_lora(preset: Preset, device: str, steps: int) -> Lines:
    """One line for each setting; running out of memory is a result."""
    model, is_quantized = None, None
    for setting in settings_of(preset, device):
        if setting.quantized != is_quantized:
            model = None
            free(device)
            model, is_quantized = make_adapted(preset, device, setting.quantized), setting.quantized
        try:
            numbers = measure(model, setting, preset, device, steps)
        except torch.OutOfMemoryError:
            numbers = {"out_of_memory": True}
            free(device)
        yield asdict(setting) | numbers


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_all(preset: Preset, device: str, repeats: int, steps: int) -> dict[str, Callable[[], Lines]]:
    """In the order of their value."""
    return {
        "vectors": partial(measure_vectors, preset, device, repeats),
        "picture": partial(measure_picture, preset, device, repeats),
        "lora": partial(measure_lora, preset, device, steps),
    }


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="8b")
    parser.add_argument("--repeats", type=COUNT, default=3, help="timed drawings of each case")
    parser.add_argument("--steps", type=COUNT, default=6, help="timed training steps of each setting")
    parser.add_argument("--budget_s", type=COUNT, default=440, help="begin nothing after so many seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.preset == "8b" and arguments.device == "cpu":
        parser.error("--preset 8b needs a GPU, and there is none. Use --preset tiny to try the script.")
    logging.set_verbosity_error()
    start, device = time.perf_counter(), arguments.device
    libraries = (torch, transformers, peft, diffusers)
    measured: dict[str, Any] = {
        "preset": arguments.preset,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "formula": FORMULA,
        "versions": {module.__name__: module.__version__ for module in libraries},
    }
    parts = measure_all(PRESETS[arguments.preset], device, arguments.repeats, arguments.steps)
    measured |= {name: [] for name in parts}
    for name, lines in parts.items():
        for line in lines():
            elapsed = round(time.perf_counter() - start, 1)
            measured[name].append(line | {"at_s": elapsed})
            measured["is_complete"] = False
            write_result(arguments.output, "gpu", BAR, measured)
            if elapsed > arguments.budget_s:
                return
        free(device)
    measured["is_complete"] = True
    write_result(arguments.output, "gpu", BAR, measured)


if __name__ == "__main__":
    run_command(main)
