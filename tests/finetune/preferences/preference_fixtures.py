"""Pairs in memory and on disk, and a trainer's curve, for the tests of the preference and reward recipes."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from tests.finetune.lora_fixtures import make_picture


ANSWERS = (("red", "a green one"), ("a blue square", "no"), ("two", "a star above a heart"), ("left", "right of it"))


def text_turn(role: str, text: str, *pictures: Any) -> dict[str, Any]:
    shown = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def make_text_pair(seed: int) -> dict[str, Any]:
    """A question about a picture, with lengths that differ by seed."""
    chosen, rejected = ANSWERS[seed % len(ANSWERS)]
    return {
        "id": f"text-{seed}",
        "prompt": [text_turn("user", "what color is it?"[: 8 + seed], make_picture(seed))],
        "chosen": [text_turn("assistant", chosen)],
        "rejected": [text_turn("assistant", rejected)],
    }


def make_picture_pair(seed: int) -> dict[str, Any]:
    """A prompt and two pictures."""
    turns = [
        {"role": "assistant", "content": [{"type": "image", "image": make_picture(seed + offset)}]}
        for offset in (100, 200)
    ]
    prompt = [text_turn("user", ANSWERS[seed % len(ANSWERS)][0])]
    return {"id": f"draw-{seed}", "prompt": prompt, "chosen": turns[:1], "rejected": turns[1:]}


def save_pairs(folder: Path, pairs: list[dict[str, Any]]) -> Path:
    """`pairs.jsonl` with the pictures beside it, named inside the messages."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, pair in enumerate(copy.deepcopy(pairs)):
        for name in ("prompt", "chosen", "rejected"):
            for part in (part for message in pair[name] for part in message["content"]):
                if part["type"] == "image":
                    part["image"].save(folder / f"{name}-{number}.png")
                    part["image"] = f"{name}-{number}.png"
        lines.append(json.dumps(pair))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def curve(trainer: Any, name: str = "loss") -> list[float]:
    return [point[name] for point in trainer.state.log_history if name in point]


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def dpo_flags(start: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Three steps of a DPO recipe on the CPU."""
    settings = "--max_steps 3 --learning_rate 1e-2 --logging_steps 1 --lr_scheduler_type constant --lora_r 4".split()
    settings += ["--use_cpu", "True", "--disable_tqdm", "True"]
    return ["--model_name_or_path", str(start), "--data", str(data), "--output_dir", str(output), *settings, *more]
