"""Computed against measured, on the processor at hand: the same counting at three sizes, then the real thing.

Time: the processor's own matrix throughput, memory bandwidth and price of calling an operator are measured first, in
the same process, and take the place of a data sheet's. Memory: a process of its own trains or draws, and what its
resident size grew by is compared with what was counted. glibc keeps freed blocks; a child hands them back, so that
resident means in use.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors.counting import weight_bytes
from benchmarks.floors.devices import Device
from benchmarks.floors.models import GEN, GEN_START, IMAGE, add_lora, make_model, small_size
from benchmarks.floors.training import MetaStep, Row, Rows
from benchmarks.floors.work import PROMPT_TOKENS, cache_bytes, vectors


SIZES = ((512, 8), (768, 10), (1024, 12))  # width, layers
ROWS = Rows(tuple(Row(384, labels=200, shown=64) for _ in range(2)), packed=False)
RANK = 16
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median processor time: on a shared machine the wall clock measures the neighbours."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def this_processor(repeats: int = 5) -> Device:
    """One thread in fp32: a product of layers' size, a vector times 256 MiB of such matrices, a toy's drawing."""
    side = 1024
    left, right = torch.randn(side, side), torch.randn(side, side)
    flops = 2 * side**3 / seconds(lambda: left @ right, repeats)
    matrices, vector = [torch.randn(side, side) for _ in range(64)], torch.randn(1, side)
    product = torch.nn.functional.linear
    bandwidth = 4 * 64 * side**2 / seconds(lambda: [product(vector, matrix) for matrix in matrices], repeats)
    toy = vectors(make_model(small_size(64, 8), torch.float32))  # nothing in it takes longer than calling it
    calls = sum(phase.operators * phase.times for phase in toy.phases)
    operator_s = seconds(draw(64, 8), 1) / calls
    return Device("this processor, one thread", flops, bandwidth, 0.0, "measured in the same run", operator_s)


def real_batch(config: Any, rows: Rows) -> dict[str, torch.Tensor]:
    """Rows of `checking` as a model takes them: a picture's vectors, words, an answer."""
    batch, tokens = rows.shape
    input_ids = torch.randint(10, config.text_config.vocab_size, (batch, tokens))
    input_ids[:, : config.num_image_tokens] = IMAGE
    labels = input_ids.clone()
    labels[:, : tokens - rows.rows[0].labels] = -100
    features = torch.randn(batch, config.num_image_tokens, config.image_feature_size)
    return {"input_ids": input_ids, "labels": labels, "image_features": features}


def train(width: int, num_layers: int) -> Callable[[], None]:
    """A training step of the real model, adapter and AdamW, without gradient checkpointing."""
    model = make_model(small_size(width, num_layers), torch.float32, "cpu")
    adapted = add_lora(model, RANK)
    batch = real_batch(model.config, ROWS)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])

    def step() -> None:
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def draw(width: int, num_layers: int) -> Callable[[], None]:
    model = make_model(small_size(width, num_layers), torch.float32, "cpu")
    text: Any = model.config.text_config
    input_ids = torch.randint(10, text.vocab_size, (1, PROMPT_TOKENS))
    input_ids[:, -1] = GEN_START
    assert GEN not in input_ids
    mask = torch.ones_like(input_ids)
    return lambda: model.generate(input_ids=input_ids, attention_mask=mask, generation_mode="image")


WORK = {"lora": train, "drawing": draw}


# ---- memory, in children


def resident(name: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most so far (`ru_maxrss` would survive exec)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


def child(work: str, width: int, num_layers: int) -> None:
    """Warm up at a toy size, note the size, do the work, print how much more was resident at most."""
    torch.set_num_threads(1)
    WORK[work](64, 1)()
    before = resident("VmRSS")
    run = WORK[work](width, num_layers)
    run()
    run()
    print(json.dumps(resident("VmHWM") - before))


def grown(work: str, width: int, num_layers: int) -> int:
    code = f"from benchmarks.floors import checking; checking.child({work!r}, {width}, {num_layers})"
    root = Path(__file__).parents[2]
    environment = os.environ | RETURN_MEMORY | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


# ---- computed


def computed(width: int, num_layers: int, processor: Device) -> dict[str, dict[str, float]]:
    """Seconds and bytes of both kinds of work, counted at the same size."""
    config = small_size(width, num_layers)
    step, model = MetaStep(config, RANK, torch.float32), make_model(config, torch.float32)
    drawing = vectors(model)
    keys = cache_bytes(model, 1, PROMPT_TOKENS + config.num_gen_image_tokens)
    return {
        "lora": {
            "seconds": step.task("lora", ROWS).forecast(processor),
            "bytes": sum(step.memory(ROWS).values()),
        },
        "drawing": {"seconds": drawing.forecast(processor), "bytes": weight_bytes(model) + keys},
    }


def check(sizes: tuple[tuple[int, int], ...] = SIZES, repeats: int = 3) -> dict[str, Any]:
    """For each size and each work: computed, measured, and computed / measured - 1."""
    processor, lines = this_processor(), []
    for width, num_layers in sizes:
        for work, expected in computed(width, num_layers, processor).items():
            took = seconds(WORK[work](width, num_layers), repeats)
            size = grown(work, width, num_layers)
            lines.append(
                {
                    "work": work,
                    "shape": f"width {width}, {num_layers} layers",
                    "seconds_computed": round(expected["seconds"], 3),
                    "seconds_measured": round(took, 3),
                    "seconds_error": round(expected["seconds"] / took - 1, 3),
                    "mib_computed": round(expected["bytes"] / 2**20, 1),
                    "mib_measured": round(size / 2**20, 1),
                    "mib_error": round(expected["bytes"] / size - 1, 3),
                }
            )
    return {
        "processor": {
            "gflops": round(processor.flops / 1e9, 1),
            "gb_per_s": round(processor.bandwidth / 1e9, 2),
            "microseconds_per_operator": round(processor.operator_s * 1e6, 2),
            "source": processor.source,
        },
        "lines": lines,
    }
