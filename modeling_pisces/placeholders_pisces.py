"""Finding placeholders, and checking that each image has exactly its vectors, also with several samples in a row.

Used by the model only; rows of several samples are built by the recipes.
"""

import torch
from torch import nn


def placeholder_mask(
    input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, embed: nn.Module, token_id: int
) -> torch.BoolTensor:
    """Mark the placeholders of one kind.

    Args:
        input_ids: (B, T), or None when only embeddings were given; then a placeholder is found by its embedding.
        inputs_embeds: (B, T, D).
        embed: the input embedding.
        token_id: the placeholder.

    Returns:
        (B, T) bool, on the device of `inputs_embeds`.
    """
    if input_ids is not None:
        return (input_ids == token_id).to(inputs_embeds.device)
    placeholder = embed(torch.tensor(token_id, dtype=torch.long, device=inputs_embeds.device))
    return (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(-1)


def find_sample_starts(
    position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None = None
) -> torch.BoolTensor | None:
    """Where a further sample begins in rows that hold several: where the positions start again from 0.

    Args:
        position_ids: (B, T), or None, or of another rank (multimodal rotary embeddings), which says nothing here.
        attention_mask: (B, T) or anything else; zeros beside padding mean nothing.

    Returns:
        (B, T) bool, or None if no row holds a second sample. Always None while compiling or exporting.
    """
    if position_ids is None or position_ids.ndim != 2 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    starts = position_ids[:, 1:] == 0
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        real = attention_mask.to(starts.device).bool()
        starts = starts & real[:, 1:] & real[:, :-1]
    return nn.functional.pad(starts, (1, 0)) if bool(starts.any()) else None


def check_packed_inputs(starts: torch.BoolTensor, attention_mask: torch.Tensor | None, use_cache: bool | None) -> None:
    """Rows of several samples go without a 2-D attention mask and without a cache.

    transformers looks for restarting positions only then; otherwise samples would attend to each other, unnoticed.

    Args:
        starts: (B, T) bool of `find_sample_starts`.
        attention_mask: (B, T), or 4-D, with which samples are the caller's own business, or None.
        use_cache: as given by the caller, None if not given.

    Raises:
        ValueError: a 2-D mask was given or a cache asked for.
    """
    if (attention_mask is not None and attention_mask.ndim != 2) or (attention_mask is None and not use_cache):
        return
    rows = starts.any(-1).nonzero().flatten().tolist()
    given = "use_cache=True" if attention_mask is None else "an attention_mask"
    raise ValueError(
        f"position_ids restart inside rows {rows}, which therefore hold several samples, but {given} was given: "
        "samples would attend to each other. Leave it out; padding at the end of a row can be a sample of its own."
    )


def check_placeholder_runs(
    mask: torch.BoolTensor,
    vectors: torch.Tensor | None,
    vectors_per_image: int,
    kind: str,
    starts: torch.BoolTensor | None = None,
) -> None:
    """Check placeholders against vectors, per row, sample and image, so that two wrong ones cannot cancel.

    Every run of neighbouring placeholders must hold a whole number of images, and all runs together as many as were
    given. Rows and a row's images count from 0. Skipped while compiling or exporting, where values are not known.

    Args:
        mask: (B, T) bool.
        vectors: (images, vectors per image, width), or None when no image was given.
        vectors_per_image: placeholders that one image needs.
        kind: "image" or "generated image", for the message.
        starts: (B, T) bool, where a sample begins in rows that hold several; a run ends there.

    Raises:
        ValueError: names row, image, found and expected; in rows of several samples the sample's number too.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if vectors is None and mask.shape[1] == 1:
        return  # one decoding step
    num_images = 0 if vectors is None else vectors.shape[0]
    if vectors_per_image == 0 and bool(mask.any()):
        raise ValueError(
            f"Image features and image tokens do not match: the prompts have placeholders of a {kind}, but this "
            "checkpoint has gen_vision_config=None (understanding only). Leave drawn images out of the prompt."
        )
    if vectors is not None and vectors.shape[1] != vectors_per_image:
        raise ValueError(
            f"each {kind} has {vectors.shape[1]} vectors, but the config says {vectors_per_image}. Check the size of "
            "the pixel values against the tower's image_size."
        )
    per_row = [0] * mask.shape[0]
    for row, start, end in _runs(mask, starts):
        length = end - start
        more = max(round(length / vectors_per_image), 1)  # images that this run was meant to hold
        if length != more * vectors_per_image:
            found = length - (more - 1) * vectors_per_image
            where = f"row {row}" if starts is None else f"row {row} (sample {int(starts[row, : start + 1].sum())})"
            raise ValueError(
                f"Image features and image tokens do not match: {where}, {kind} {per_row[row] + more - 1}: the "
                f"prompt has {found} placeholders but one {kind} takes {vectors_per_image}. Build prompts with "
                "PiscesProcessor, which inserts one per vector, and do not truncate them (max_length=None)."
            )
        per_row[row] += more
    if sum(per_row) != num_images:
        raise ValueError(
            f"Image features and image tokens do not match: the prompts have placeholders for {sum(per_row)} {kind}s "
            f"(per row: {per_row}) but {num_images} were given. Pass one {kind} per placeholder, in the same order; "
            "PiscesProcessor keeps both together."
        )


def _runs(mask: torch.BoolTensor, starts: torch.BoolTensor | None) -> list[tuple[int, int, int]]:
    """(row, start, end) of each maximal run of True that no sample's start divides, in reading order."""
    follows = nn.functional.pad(mask[:, :-1], (1, 0))  # the place before is a placeholder, of the same sample
    if starts is not None:
        follows = follows & ~starts
    is_first = mask & ~follows
    is_last = mask & ~nn.functional.pad((mask & follows)[:, 1:], (0, 1))
    pairs = zip(is_first.nonzero().tolist(), is_last.nonzero().tolist(), strict=True)
    return [(row, start, last + 1) for (row, start), (_, last) in pairs]
