"""Rows of every kind, a tiny checkpoint and a trainer, for the tests of the LoRA recipes."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch.utils.data import Dataset

from finetune.training.adapters import AdapterConfig, add_adapter
from finetune.training.sft_config import PiscesSFTConfig
from finetune.training.sft_trainer import PiscesSFTTrainer
from tests.fixtures import make_model, make_processor


WORDS = ("red", "a blue square", "two", "left of the green one", "no", "a star above a heart")


def make_picture(seed: int) -> Image.Image:
    rng = random.Random(seed)
    picture = Image.new("RGB", (16, 16), tuple(rng.randrange(256) for _ in range(3)))
    picture.paste(tuple(rng.randrange(256) for _ in range(3)), (2, 3, 5 + rng.randrange(9), 6 + rng.randrange(9)))
    return picture


def make_row(kind: str, seed: int) -> dict[str, Any]:
    """One row of a kind: understand, draw, edit (a picture in, a picture out) or text; lengths differ by seed."""
    words = WORDS[seed % len(WORDS)]
    picture = {"type": "image", "image": make_picture(seed)}
    text = {"type": "text", "text": words}
    asked = {"understand": [picture, text], "draw": [text], "edit": [picture, text], "text": [text]}[kind]
    drawn = {"type": "image", "image": make_picture(seed + 100)}
    answered = {"understand": [text], "draw": [drawn], "edit": [drawn], "text": [text]}[kind]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"id": f"{kind}-{seed}", "messages": messages}


def make_rows(kinds: str) -> list[dict[str, Any]]:
    """One row per letter: u(nderstand), d(raw), e(dit), t(ext)."""
    names = {"u": "understand", "d": "draw", "e": "edit", "t": "text"}
    return [make_row(names[letter], seed) for seed, letter in enumerate(kinds)]


class ListRows(Dataset):
    """Rows in a list, as a torch dataset."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def save_checkpoint(folder: Path, **config) -> Path:
    """A random checkpoint with its processor, as a user would have one."""
    make_model(**config).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def save_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON Lines with their pictures beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, number = [], 0
    for row in rows:
        messages = []
        for message in row["messages"]:
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"].save(folder / f"{number}.png")
                    part, number = {"type": "image", "image": f"{number}.png"}, number + 1
                parts.append(part)
            messages.append({"role": message["role"], "content": parts})
        lines.append(json.dumps({"id": row["id"], "messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


def make_adapted(
    flavour: str = "portable", sides=("understanding", "generation"), seed: int = 0, **config
) -> PeftModel:
    """A random model with a new adapter of rank 4."""
    model = make_model(seed, **config)
    torch.manual_seed(seed)
    return add_adapter(model, AdapterConfig(model_name_or_path="tiny", lora_r=4, flavour=flavour), sides)


def make_trainer(model, rows, output: Path, eval_rows=None, callbacks=(), **settings) -> PiscesSFTTrainer:
    settings = {
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        **settings,
    }
    return PiscesSFTTrainer(
        model=model,
        args=PiscesSFTConfig(output_dir=str(output), **settings),
        train_dataset=rows if not isinstance(rows, list) else ListRows(rows),
        eval_dataset=None if eval_rows is None else ListRows(eval_rows),
        processing_class=make_processor(),
        callbacks=list(callbacks),
    )
