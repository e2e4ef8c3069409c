"""Finding placeholders and checking that each image has exactly its vectors. Used by the model only."""

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


def check_placeholder_runs(
    mask: torch.BoolTensor, vectors: torch.Tensor | None, vectors_per_image: int, kind: str
) -> None:
    """Check placeholders against vectors, per row and per image, so that two wrong rows cannot cancel.

    Every run of neighbouring placeholders must hold a whole number of images, and all runs together as many as were
    given. Rows and a row's images count from 0. Skipped while compiling or exporting, where values are not known.

    Args:
        mask: (B, T) bool.
        vectors: (images, vectors per image, width), or None when no image was given.
        vectors_per_image: placeholders that one image needs.
        kind: "image" or "generated image", for the message.

    Raises:
        ValueError: names row, image, found and expected.
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
    for row, length in _run_lengths(mask):
        more = max(round(length / vectors_per_image), 1)  # images that this run was meant to hold
        if length != more * vectors_per_image:
            found = length - (more - 1) * vectors_per_image
            raise ValueError(
                f"Image features and image tokens do not match: row {row}, {kind} {per_row[row] + more - 1}: the "
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


def _run_lengths(mask: torch.BoolTensor) -> list[tuple[int, int]]:
    """(row, length) of each maximal run of True, in reading order."""
    padded = nn.functional.pad(mask.to(torch.int8), (1, 1))
    change = padded.diff(dim=-1)  # +1 where a run starts, -1 one past its end
    starts, ends = (change == 1).nonzero(), (change == -1).nonzero()
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    return [(row, end - start) for (row, start), (_, end) in pairs]
