"""Scores one trained arm: questions by exact answers, drawings by what a reader reads off the drawn vectors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from evaluation.runs.summaries import answer_summary, batches, summarize
from evaluation.scenes.benchmark import answer_questions
from evaluation.study.reader import VectorReader, caption_of, encode_rows, read_rows, scene_labels, score_readings


CAPTIONS = {"short": "describe", "detailed": "describe_detail"}


@torch.no_grad()
def draw_captions(model, processor, captions: list[str], batch_size: int = 100) -> torch.Tensor:
    """Draw each caption once: (I, M, Dg), fp32 on the CPU. The arms' heads regress, so nothing is random."""
    drawn = []
    for chunk in batches(captions, batch_size, "drawing"):
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "text", "text": caption}]}] for caption in chunk],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            generation_mode="image",
        ).to(model.device)
        drawn.append(model.generate(**inputs, generation_mode="image", use_cache=True).float().cpu())
    return torch.cat(drawn)


def score_drawing(model, processor, reader: VectorReader, data: Path, rows: list[dict]) -> dict[str, Any]:
    """Draw every row from its short and from its detailed caption.

    Returns:
        for "short" and "detailed": the categories of `score_readings`, and "vector_r2" = 1 - squared error of the
        drawn vectors / variance of the true ones about their mean at each position.
    """
    truth = scene_labels([row["truth"] for row in rows], reader.words)
    true_vectors = encode_rows(model, processor, data, rows)
    variance = (true_vectors - true_vectors.mean(0)).square().mean()
    scores: dict[str, Any] = {}
    for name, kind in CAPTIONS.items():
        drawn = draw_captions(model, processor, [caption_of(row, kind) for row in rows])
        error = (drawn - true_vectors).square().mean()
        scores[name] = summarize(score_readings(reader.read(drawn), truth))
        scores[name]["vector_r2"] = round(float(1 - error / variance), 4)
    return scores


def score_checkpoint(
    model, processor, reader_folder: Path, data: Path, sides: str, num_questions: int
) -> dict[str, Any]:
    """Everything about one arm; `sides` holds "u" and "g" as far as it was trained for them."""
    reader, facts = VectorReader.load(reader_folder)
    rows = read_rows(data)
    scores: dict[str, Any] = {"ceiling": facts["ceiling"]}
    if "u" in sides:
        asked = SimpleNamespace(vision_language_model=model, processor=processor)
        outcomes, _ = answer_questions(asked, data, rows, "question", num_questions)
        scores["understanding"] = answer_summary(outcomes)
    if "g" in sides:
        scores["drawing"] = score_drawing(model, processor, reader, data, rows)
    return scores
