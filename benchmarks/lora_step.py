"""What a finetuning step costs: against stock TRL on LLaVA, packed against padded, cached against encoded pictures.

`python -m benchmarks.lora_step --output results/finetune_step.json`. Small random models on one thread; all
numbers are ratios of things timed in turn in one run. Seconds are processor time of this process: on a shared machine
the wall clock measures the neighbours. Four measurements:

- understanding: a LoRA step of `PiscesSFTTrainer` against TRL's `SFTTrainer` on `LlavaForConditionalGeneration` with
  the same weights, adapter, rows and loss (checked), both without gradient checkpointing. Without a GPU TRL runs its
  head over every position; in a second ratio it takes the labelled ones only, as it does on a GPU.
- memory: the largest resident size of a process that trains so, beyond what it has before the first step.
- packing: samples per second of packed rows against padded batches of a mix of short and long rows in random order.
- precompute: drawing steps from a cache on disk against opening and encoding the pictures in every step. The
  generation tower is to its language model as the paper's: 0.55 of its parameters, 8 patches for each token of a row.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from benchmarks.material.lora_models import (
    LANGUAGE_MODEL,
    drawing_row,
    make_config,
    make_llava,
    make_model,
    make_processor,
    question_row,
)
from finetune.data.collator import PiscesDataCollator
from finetune.data.packing import PackedRows, PackingCollator, token_lengths
from finetune.data.picture_cache import CachedPictureCollator, PictureCache
from finetune.precompute import precompute
from finetune.training import packed_attention
from finetune.training.adapters import AdapterConfig, add_adapter
from finetune.training.sft_trainer import PiscesSFTConfig, PiscesSFTTrainer, peak_memory_gib
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.arguments import COUNT, LineParser
from pisces_commands.ending import run_command
from pisces_commands.measurement import paired, write_result


WIDTH, LAYERS, RANK, BATCH_SIZE = 384, 6, 16, 4
VISION = {"hidden_size": 192, "num_hidden_layers": 4, "image_size": 128, "patch_size": 8}  # 256 vectors per picture
# 1024 patches and 64 vectors per picture, as the paper's tower
GEN_VISION = {"hidden_size": 256, "num_hidden_layers": 6, "image_size": 448, "patch_size": 14, "output_size": 256}
# where the towers are not what is measured: 64 vectors per picture on either side
SMALL_VISION = VISION | {"hidden_size": 64, "num_hidden_layers": 1, "image_size": 64}
SMALL_GEN_VISION = GEN_VISION | {"hidden_size": 64, "num_hidden_layers": 1}


# ---- one step


def settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_length": None,
        "per_device_train_batch_size": BATCH_SIZE,
    }


def pisces_trainer(model: Any, processor: Any, folder: str) -> PiscesSFTTrainer:
    adapted = add_adapter(model, AdapterConfig(lora_r=RANK, lora_alpha=2 * RANK))
    arguments = PiscesSFTConfig(**settings(folder))
    return ready(PiscesSFTTrainer(adapted, arguments, [{"messages": []}], processing_class=processor))


def stock_trainer(llava: Any, processor: Any, folder: str) -> SFTTrainer:
    llava.requires_grad_(False)
    picture = Image.new("RGB", (8, 8))
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "?"}], "images": [picture]}])
    return ready(
        SFTTrainer(
            model=llava,
            args=SFTConfig(assistant_only_loss=True, **settings(folder)),
            train_dataset=rows,
            processing_class=processor,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=LANGUAGE_MODEL),
        )
    )


def ready(trainer: Any) -> Any:
    """A trainer whose steps can be driven from outside of its own loop."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def train_step(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Collate, forward, backward, update; returns the loss."""
    batch = trainer.data_collator([dict(row) for row in rows])
    num_items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    loss = trainer.training_step(trainer.model, batch, num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return float(loss)


def with_opened_pictures(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's form of the same rows: the pictures in a column of their own."""
    opened = []
    for row in rows:
        parts = [part for message in row["messages"] for part in message["content"]]
        images = [load_image(part["image"]) for part in parts if part["type"] == "image"]
        messages = [
            {**message, "content": [{"type": "image"} if p["type"] == "image" else p for p in message["content"]]}
            for message in row["messages"]
        ]
        opened.append({"messages": messages, "images": images})
    return opened


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    return seconds


# ---- the measurements


def measure_understanding(folder: str, pairs: int) -> dict[str, Any]:
    config = make_config(WIDTH, LAYERS, VISION, None)
    processor, model = make_processor(config), make_model(config)
    llava = make_llava(model)
    ours, stock = pisces_trainer(model, processor, folder), stock_trainer(llava, processor, folder)
    rng = random.Random(0)
    rows = [question_row(rng, num_turns=2) for _ in range(BATCH_SIZE)]
    stock_rows = with_opened_pictures(rows)

    losses = train_step(ours, rows), train_step(stock, stock_rows)
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1], f"not the same loss: {losses}"
    step, stock_step = timed(lambda: train_step(ours, rows)), timed(lambda: train_step(stock, stock_rows))
    as_it_is = paired(step, stock_step, pairs)
    on_triton, trl.trainer.utils._use_triton = trl.trainer.utils._use_triton, lambda device: True
    as_on_a_gpu = paired(step, stock_step, pairs)
    trl.trainer.utils._use_triton = on_triton
    return {"bar": "ratio <= 1.00", "as_it_runs_here": as_it_is, "stock_head_on_labelled_positions": as_on_a_gpu}


def measure_memory(steps: int = 2) -> dict[str, Any]:
    grown = {side: _in_child(side, steps) for side in ("pisces", "stock")}
    return {
        "bar": "reported",
        "pisces_mib": grown["pisces"],
        "stock_mib": grown["stock"],
        "ratio": round(grown["pisces"] / grown["stock"], 3),
    }


def _in_child(side: str, steps: int) -> float:
    command = [sys.executable, "-m", "benchmarks.lora_step", "--child", side, "--steps", str(steps)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(result.stdout.splitlines()[-1])


def train_and_print_memory(side: str, steps: int) -> None:
    """What a child does: build one side, note its size, train, print how much the largest size grew, in MiB."""
    config = make_config(WIDTH, LAYERS, VISION, None)
    processor, model = make_processor(config), make_model(config)
    rng = random.Random(0)
    rows = [question_row(rng, num_turns=2) for _ in range(BATCH_SIZE)]
    with tempfile.TemporaryDirectory() as folder:
        if side == "pisces":
            trainer = pisces_trainer(model, processor, folder)
        else:
            trainer, rows = stock_trainer(make_llava(model), processor, folder), with_opened_pictures(rows)
            del model
        before = _resident_mib()
        for _ in range(steps):
            train_step(trainer, rows)
    print(round(peak_memory_gib() * 1024 - before, 1))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_packing(folder: str, pairs: int, num_rows: int = 16, capacity: int = 512) -> dict[str, Any]:
    config = make_config(WIDTH, LAYERS, SMALL_VISION, SMALL_GEN_VISION)
    processor, model = make_processor(config), make_model(config)
    rng = random.Random(0)
    kinds = [  # half of the rows short, a quarter long
        lambda: drawing_row(rng, rng.randint(4, 24)),
        lambda: drawing_row(rng, rng.randint(4, 24)),
        lambda: question_row(rng),
        lambda: question_row(rng, num_turns=rng.randint(6, 12)),
    ]
    rows = [kinds[number % 4]() for number in range(num_rows)]
    rng.shuffle(rows)
    lengths = token_lengths(rows, processor)

    def collator(some: list[dict]) -> dict[str, Any]:
        batch = PiscesDataCollator(processor)(some)
        if "gen_pixel_values" in batch:  # as from a cache
            batch["gen_image_vectors"] = model.encode_gen_images(batch.pop("gen_pixel_values"))
        return batch

    batches = [collator(rows[start : start + 2 * BATCH_SIZE]) for start in range(0, num_rows, 2 * BATCH_SIZE)]
    packs = PackedRows(rows, lengths, capacity)
    packed = [PackingCollator(collator)([packs[index]]) for index in range(len(packs))]
    trainer = pisces_trainer(model, processor, folder)
    language_model = model.model.language_model

    def train(batches: list, attention: str) -> Callable[[], float]:
        def run() -> None:
            language_model.set_attn_implementation(attention)
            for batch in batches:
                trainer.training_step(trainer.model, dict(batch), trainer._get_num_items_in_batch([batch], "cpu"))
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()

        return timed(run)

    measured = {}
    for attention in (packed_attention.NAME, "sdpa"):
        result = paired(train(packed, attention), train(batches, "sdpa"), pairs)
        speedups = {f"speedup_{name}": round(1 / result[f"ratio_{other}"], 3) for name, other in _INVERSE}
        measured[attention] = result | speedups | {"samples_per_cpu_s": round(num_rows / result["ours_s"], 2)}
    return {
        "bar": "speedup >= 1.8",
        "rows": f"{num_rows}, {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / num_rows:.0f}",
        "padding": round(1 - sum(lengths) / sum(batch["input_ids"].numel() for batch in batches), 3),
        "unfilled": round(1 - sum(lengths) / sum(batch["input_ids"].numel() for batch in packed), 3),
        **measured,
    }


_INVERSE = (("median", "median"), ("min", "max"), ("max", "min"))


def measure_precompute(folder: str, pairs: int) -> dict[str, Any]:
    config = make_config(WIDTH, LAYERS, VISION, GEN_VISION)
    processor, model = make_processor(config), make_model(config)
    rng = random.Random(0)
    rows = [drawing_row(rng, 40) for _ in range(BATCH_SIZE // 2)]
    cache = PictureCache(Path(folder) / "cache")
    sources = [row["messages"][1]["content"][0]["image"] for row in rows]
    precompute(model, processor, sources, cache, "gen_vectors", batch_size=4)
    tower = sum(p.numel() for p in model.model.gen_vision_tower.parameters())
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    trainer = pisces_trainer(model, processor, folder)
    encode = trainer.data_collator
    cached = CachedPictureCollator(encode, cache, ("gen_vectors",))

    def train(collator: Any) -> Callable[[], float]:
        def run() -> None:
            trainer.data_collator = collator
            train_step(trainer, rows)

        return timed(run)

    result = paired(train(cached), train(encode), pairs)
    speedups = {f"speedup_{name}": round(1 / result[f"ratio_{other}"], 3) for name, other in _INVERSE}
    sizes = {"tower_to_language_model": round(tower / layers, 2), "tokens_per_row": token_lengths(rows, processor)[0]}
    return {"bar": "speedup >= 2.0", **sizes, **result, **speedups}


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="results file to write")
    parser.add_argument("--pairs", type=COUNT, default=3)
    parser.add_argument("--child", choices=("pisces", "stock"), help="train one side and print its memory (internal)")
    parser.add_argument("--steps", type=COUNT, default=3, help="steps of a child")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.child:
        return train_and_print_memory(arguments.child, arguments.steps)
    if not arguments.output:
        parser.error("--output is missing: name the results file")
    measured: dict[str, Any] = {
        "model": f"width {WIDTH}, {LAYERS} layers, vocabulary 8192, LoRA rank {RANK}, fp32, one thread",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)},
        "load_average": [round(os.getloadavg()[0], 2)],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (
            ("understanding", lambda: measure_understanding(folder, arguments.pairs)),
            ("memory", measure_memory),
            ("packing", lambda: measure_packing(folder, max(arguments.pairs - 1, 1))),
            ("precompute", lambda: measure_precompute(folder, arguments.pairs)),
        ):
            measured[name] = measure()
            measured["load_average"].append(round(os.getloadavg()[0], 2))
            write_result(arguments.output, "finetune_step", "see each measurement", measured)  # what is done is kept


if __name__ == "__main__":
    run_command(main)
