"""How fast and how small it can be at full size: computed floors per named device, nothing measured but the check.

`python -m benchmarks.roofline --output results/roofline.json` builds the real classes at the paper's size without
weights (Llama-3.1-8B, SigLIP so400m, EVA-CLIP-E, SDXL), counts FLOP and the bytes that must move, and divides by the
numbers of public data sheets. A floor is what no program of these sizes can beat in bf16 on that device; how near a
real run comes is for `benchmarks.gpu` to say. Then the same counting is held against this processor at three sizes,
time and memory, and the errors are written beside it.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.floors.checking import check
from benchmarks.floors.devices import DEVICES
from benchmarks.floors.models import full_size, make_model
from benchmarks.floors.training import MetaStep, fill, recipe_config
from benchmarks.floors.work import Task, decoder, question, vae, vectors
from pisces_commands.arguments import LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import write_result


RECIPES = ("understanding", "generation", "joint")
RANK, STEP_TOKENS = 64, 8192  # of the recipes for one GPU: finetune/configs/lora_*_8b.yaml
# rank, tokens of a step, checkpointing, NF4; the last is finetune/configs/lora_joint_24gb.yaml
MEMORY = (
    *((64, tokens, False, False) for tokens in (2048, 4096, 8192, 16384)),
    *((64, tokens, True, False) for tokens in (8192, 16384)),
    (16, 2048, False, True),
    (16, 2048, True, True),
)
FORMULA = (
    "floor = sum over phases of times * max(FLOP / FLOP/s, bytes / bytes/s); "
    "weights move once per call, the cache once per step"
)
BAR = "computed within 15 % of measured memory and 30 % of measured time at three sizes"


def tasks() -> Iterator[Task]:
    """What a user waits for, at full size in bf16."""
    dtype = torch.bfloat16
    model = make_model(full_size(), dtype)
    yield question(model)
    yield vectors(model)
    yield vectors(model, guided=True)
    yield vectors(model, batch=32)
    yield renamed(vectors(make_model(full_size("flow"), dtype)), "64 vectors, flow head of 16 steps")
    size, count = model.config.gen_vector_size, model.config.num_gen_image_tokens
    yield decoder(25, size, count, dtype)
    yield decoder(50, size, count, dtype)
    yield decoder(25, size, count, dtype, guided=False)
    yield vae(dtype)


def renamed(task: Task, name: str) -> Task:
    return Task(name, task.phases)


def describe(task: Task, **more: Any) -> dict[str, Any]:
    seconds = {device.name: float(f"{task.floor(device):.3g}") for device in DEVICES}
    sizes = {"tflop": float(f"{task.flop / 1e12:.4g}"), "gigabytes": float(f"{task.bytes / 1e9:.4g}")}
    return {"task": task.name, **more, **sizes, "floor_s": seconds}


def recipes() -> Iterator[dict[str, Any]]:
    """A LoRA step of each recipe, packed and padded to the same room; the share of padding is lost time."""
    config = recipe_config(full_size())
    step = MetaStep(config, RANK, torch.bfloat16)
    for recipe in RECIPES:
        for packed in (True, False):
            rows = fill(recipe, STEP_TOKENS, packed, config)
            batch, length = rows.shape
            name = f"LoRA step, {recipe}, {'packed' if packed else 'padded'}"
            task = step.task(name, rows)
            per_token = float(f"{task.flop / rows.tokens / 1e9:.4g}")
            padding = round(1 - rows.tokens / (batch * length), 3)
            more = {"rows": len(rows.rows), "real_tokens": rows.tokens, "padding": padding}
            yield describe(task, **more, gflop_per_real_token=per_token)


def memory() -> Iterator[dict[str, Any]]:
    """GiB of a joint LoRA step by tokens and precision; a device needs about 1 GiB more for its own context."""
    config = full_size()
    made: dict[tuple[int, bool], MetaStep] = {}
    for rank, tokens, checkpointing, quantized in MEMORY:
        if (rank, checkpointing) not in made:
            made[rank, checkpointing] = MetaStep(config, rank, torch.bfloat16, checkpointing)
        parts = made[rank, checkpointing].memory(fill("joint", tokens, True, config), quantized)
        yield {
            "weights_in": "NF4" if quantized else "bf16",
            "rank": rank,
            "tokens": tokens,
            "gradient_checkpointing": checkpointing,
            "gib": round(sum(parts.values()) / 2**30, 1),
            **{f"{name}_gib": round(size / 2**30, 2) for name, size in parts.items()},
        }


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="results file to write")
    parser.add_argument("--no_check", action="store_true", help="leave out what runs on this processor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured: dict[str, Any] = {
        "kind": "computed, not measured, but for `check`",
        "formula": FORMULA,
        "devices": {device.name: device.source for device in DEVICES},
        "floors": [],
    }
    for task in tasks():
        measured["floors"].append(describe(task))
        print_floor(measured["floors"][-1])
    measured["recipes"] = []
    for line in recipes():
        measured["recipes"].append(line)
        print_floor(line)
    measured["memory"] = []
    for line in memory():
        measured["memory"].append(line)
        more = ", checkpointing" if line["gradient_checkpointing"] else ""
        print(f"computed  {line['gib']:6.1f} GiB  LoRA step, {line['weights_in']}, {line['tokens']} tokens{more}")
    if not arguments.no_check:
        measured["check"] = check()
    write_result(arguments.output, "roofline", BAR, measured)


def print_floor(line: dict[str, Any]) -> None:
    seconds = ", ".join(f"{name} {value:g} s" for name, value in line["floor_s"].items())
    print(f"computed  {line['task']}: {line['tflop']:g} TFLOP; at least {seconds}", flush=True)


if __name__ == "__main__":
    run_command(main)
