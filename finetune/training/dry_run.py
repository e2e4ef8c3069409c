"""The preflight of every recipe: what would be trained, on what, and whether it fits. Writes nothing, trains nothing.

`--dry_run True` ends a recipe after its data is loaded and prints this report. It runs the collator once, on the first
row, so that the decoded example is exactly what the trainer would see.
"""

import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from finetune.guard.ceiling import MAX_PICTURES, ceiling_sentences, describe_ceiling, drawn_pictures, find_ceiling
from finetune.guard.guard import base_of
from finetune.guard.pictures import load_decoder
from finetune.training.adapters import trainable_parameters
from finetune.training.recipe import Rows


MAX_LISTED = 10  # rows of the overflow list


def print_report(
    rows: Rows, collator: Callable[[list], dict[str, Any]], processor: Any, model: Any, training: TrainingArguments
) -> None:
    """Print the report of one run, section by section."""
    batch = collator(list(islice(iter_items(rows.dataset), 1)))
    print(f"rows      {describe_lengths(rows)}")
    for row_id, length in rows.too_long[:MAX_LISTED]:
        print(f"          too long, left out: row {row_id}, {length} tokens")
    if len(rows.too_long) > MAX_LISTED:
        print(f"          ... and {len(rows.too_long) - MAX_LISTED} more")
    print(f"trained   {describe_parameters(model)}")
    print(parameter_table(model))
    print("example   the first row; what carries a loss stands in >> <<, a picture as its placeholder and a count")
    print(mark_targets(batch, processor))
    for place, line in enumerate(describe_decoder(rows, processor, model, training)):
        print(f"{'decoder' if place == 0 else '':<8}  {line}")
    print(f"memory    {describe_memory(model, rows, batch, training)}")
    print("nothing was trained and nothing was written")


def describe_decoder(rows: Rows, processor: Any, model: Any, training: TrainingArguments) -> list[str]:
    """What the checkpoint's decoder can draw of the first pictures that these rows draw; nothing without either."""
    pictures = drawn_pictures(islice(iter_items(rows.dataset), MAX_PICTURES))
    base = base_of(model)
    if not pictures or not base.config._name_or_path:
        return []
    trust = {"trust_remote_code": getattr(training, "trust_remote_code", False)}
    decoder = load_decoder(base.config._name_or_path, base, processor, **trust)
    if decoder is None:
        return []
    was_training = model.training
    model.eval()
    found = find_ceiling(decoder, pictures)
    model.train(was_training)
    return ceiling_sentences(describe_ceiling(found))


def iter_items(dataset: Any) -> Iterator[Any]:
    """The items of a map-style dataset in order, or of a stream."""
    if isinstance(dataset, IterableDataset):
        return iter(dataset)
    return (dataset[index] for index in range(len(dataset)))


def describe_lengths(rows: Rows) -> str:
    """Rows by side, and the spread of their token lengths."""
    if rows.lengths is None:
        return "a stream; its rows are counted and checked as they come"
    lengths = sorted(rows.lengths)
    sides = ", ".join(f"{count} {side}" for side, count in sorted(rows.sides.items()))
    packs = f", in {len(rows.dataset)} packs" if rows.packed else ""
    late = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    return (
        f"{len(lengths)} ({sides}){packs}; tokens: {sum(lengths)} in all, shortest {lengths[0]}, "
        f"median {statistics.median(lengths):g}, 95 % below {late + 1}, longest {lengths[-1]}; "
        f"{len(rows.too_long)} too long"
    )


def describe_parameters(model: nn.Module) -> str:
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%})"


def parameter_table(model: nn.Module) -> str:
    """Trained parameters by module and kind, one line for all layers: number of tensors, elements, dtype."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, parameter in trainable_parameters(model).items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split(".") if part != "default")
        group = groups.setdefault((kind, str(parameter.dtype).removeprefix("torch.")), [0, 0])
        group[0] += 1
        group[1] += parameter.numel()
    width = max(len(kind) for kind, _ in groups)
    return "\n".join(
        f"          {kind:<{width}}  x {count:<3} {elements:>12,}  {dtype}"
        for (kind, dtype), (count, elements) in groups.items()
    )


def mark_targets(batch: dict[str, torch.Tensor], processor: Any) -> str:
    """The first row of a batch as text, its targets between >> and <<, runs of one token as "token x count"."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    if (mask := batch.get("attention_mask")) is not None:
        real = mask[0].bool().tolist()
        ids, labels = ([v for v, keep in zip(values, real, strict=True) if keep] for values in (ids, labels))
    pieces, position = [], 0
    while position < len(ids):
        is_target, end = labels[position] != -100, position
        while end < len(ids) and (labels[end] != -100) == is_target:
            end += 1
        text = _decode_runs(ids[position:end], processor.tokenizer)
        pieces.append(f">>{text}<<" if is_target else text)
        position = end
    return "".join(pieces)


def _decode_runs(ids: list[int], tokenizer: Any) -> str:
    text, position = "", 0
    while position < len(ids):
        end = position
        while end < len(ids) and ids[end] == ids[position]:
            end += 1
        if end - position > 2:
            text += f"{tokenizer.decode(ids[position])} x {end - position} "
        else:
            end = next((i for i in range(position, len(ids) - 2) if ids[i] == ids[i + 1] == ids[i + 2]), len(ids))
            text += tokenizer.decode(ids[position:end])
        position = end
    return text


def describe_memory(model: Any, rows: Rows, batch: dict[str, torch.Tensor], training: TrainingArguments) -> str:
    """An estimate, with its parts; see `estimate_memory`."""
    tokens = max(rows.lengths) if rows.lengths and not rows.packed else batch["input_ids"].shape[1]
    labelled = int((batch["labels"] != -100).sum())
    parts = estimate_memory(
        model,
        tokens * training.per_device_train_batch_size,
        labelled * training.per_device_train_batch_size,
        bool(training.gradient_checkpointing),
        training.bf16 or training.fp16,
    )
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    return (
        f"about {sum(parts.values()) / 2**30:.2f} GiB for {training.per_device_train_batch_size} of the longest rows "
        f"at a time ({listed}); an estimate, fragmentation and the towers' activations not counted"
    )


def estimate_memory(
    model: Any, num_tokens: int, num_targets: int, checkpointing: bool, half_precision: bool
) -> dict[str, float]:
    """Bytes of one training step on one device: weights, gradients, AdamW's two moments, activations, logits.

    Activations per token and layer are 8 D + 3 F numbers (D width, F feed-forward width): inputs of the norms and of
    all linear layers, queries, keys, values and the gate, with an attention that keeps no scores. With checkpointing,
    D per layer and one layer whole. Logits exist for positions with a target only, in fp32 with their gradient.
    """
    text = model.config.text_config
    trained = trainable_parameters(model).values()
    weight = next(p for p in model.get_input_embeddings().parameters())
    size = 2 if half_precision else weight.element_size()
    layer = 8 * text.hidden_size + 3 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    layers = text.num_hidden_layers
    kept = layers * text.hidden_size + layer if checkpointing else layers * layer
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return {
        "weights": float(sum(p.numel() * p.element_size() for p in model.parameters())),
        "gradients": float(gradients),
        "optimizer": float(2 * gradients),
        "activations": float(num_tokens * kept * size),
        "logits": float(num_targets * text.vocab_size * (size + 4 + 4)),
    }
