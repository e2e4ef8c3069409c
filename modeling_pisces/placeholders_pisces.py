"""What the model asks of its inputs: ids, masks and vectors that mean something, and each image's exact vectors.

Used by the model only, also for rows that hold several samples, which the recipes build. transformers calls the
key-value cache `past_key_values` up to 5.23 and `cache` from 5.24 on, as an argument, as a field of outputs and as a
key of `model_kwargs`; this file is the only one that knows both names, everything else asks `CACHE_NAME` and
`one_cache`. Checks that look at values
are skipped while compiling or exporting, and in `forward` on a GPU, where each would wait for the device; `generate`
makes them once per call on every device.
"""

# B rows, T tokens, D language-model width
import warnings
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)


def is_tracing() -> bool:
    """Whether values are unknown: while compiling, exporting or tracing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_checked(tensor: torch.Tensor, always: bool) -> bool:
    return not is_tracing() and tensor.device.type != "meta" and (always or tensor.device.type == "cpu")


def _place(bad: torch.BoolTensor) -> str:
    row, position = bad.nonzero()[0].tolist()
    return f"row {row}, position {position}"


def check_tensor(name: str, value: Any) -> None:
    """Refuse lists, arrays and whatever else is no tensor.

    Raises:
        ValueError: names the type.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}; expected a tensor, as PiscesProcessor makes with "
            "return_tensors='pt'."
        )


def check_ids(name: str, ids: torch.Tensor, vocab_size: int, *, ignored: int | None = None, always: bool = False):
    """Refuse what an embedding cannot look up.

    Args:
        name: for the message.
        ids: (B, T).
        vocab_size: rows of the embedding.
        ignored: one more id that is allowed (-100 in labels).
        always: look at the values on a GPU too.

    Raises:
        ValueError: no tensor, no whole numbers, not (B, T), no rows, or an id outside the vocabulary, by row and
            position.
    """
    check_tensor(name, ids)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} has the dtype {ids.dtype}; expected token ids (torch.long), as the processor makes.")
    if ids.ndim != 2 or ids.shape[0] == 0:
        raise ValueError(
            f"{name} has the shape {tuple(ids.shape)}; expected (rows, tokens) with at least one row. Add the batch "
            "dimension with return_tensors='pt' of PiscesProcessor."
        )
    if not _is_checked(ids, always):
        return
    bad = (ids < 0) | (ids >= vocab_size)
    bad = bad if ignored is None else bad & (ids != ignored)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: {_place(bad)} has the id {int(ids[bad][0])}, but the vocabulary ends at {vocab_size - 1}. Use "
            "the tokenizer of this checkpoint, and resize_token_embeddings() after adding tokens."
        )


def check_vectors(name: str, vectors, *, width: int | None = None, always: bool = False):
    """Refuse pictures, features and embeddings that are no floats, not finite, or of a wrong width.

    Args:
        name: for the message.
        vectors: (images or rows, ..., width), or None.
        width: of the last dimension; None does not ask.
        always: look at the values on a GPU too.

    Raises:
        ValueError: names what was found; for values that are not finite, the image or row.
    """
    if not isinstance(vectors, torch.Tensor):
        return
    if not vectors.dtype.is_floating_point:
        raise ValueError(
            f"{name} has the dtype {vectors.dtype}; expected floats, as PiscesProcessor makes them from pictures."
        )
    if width is not None and (vectors.ndim != 3 or vectors.shape[-1] != width):
        raise ValueError(f"{name} has the shape {tuple(vectors.shape)}; expected three dimensions, the last {width}.")
    if _is_checked(vectors, always) and not bool(vectors.isfinite().all()):
        at = (~vectors.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds a value that is not finite (the first at {at}, counted from 0; {vectors[tuple(at)]}). "
            "Look for a division by zero, an overflow in half precision, or a damaged file."
        )


def check_mask_values(mask: torch.Tensor, name: str = "attention_mask"):
    """Refuse other values than 0 and 1 in a (B, T) mask, by row and position."""
    bad = (mask != 0) & (mask != 1)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: {_place(bad)} has the value {mask[bad][0].item()}; expected 1 for real tokens and 0 for padding."
        )


def check_mask(mask: torch.Tensor | None, name: str = "attention_mask", *, ends_real: bool = False):
    """Refuse masks of a prompt that no row of a language model can follow.

    Args:
        mask: (B, T), 1 for real tokens, or None.
        name: for the message.
        ends_real: the next token is read off the last column, which therefore must not be padding.

    Raises:
        ValueError: other values than 0 and 1, rows that are padding only, or padding on the right; by row.
    """
    if not is_row_mask(mask) or not _is_checked(mask, True):
        return
    check_mask_values(mask, name)
    if rows := (~mask.bool().any(-1)).nonzero().flatten().tolist():
        raise ValueError(f"rows {rows} of {name} are all 0 (padding). Leave those rows out, or give them a prompt.")
    if ends_real and (rows := (mask[:, -1] == 0).nonzero().flatten().tolist()):
        raise ValueError(
            f"rows {rows} end in padding (their last {name} is 0), so that nothing could follow their last token. Pad "
            "on the left: processor(..., padding_side='left')."
        )


def check_forward_inputs(
    config, embed: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, **others
) -> None:
    """What `forward` asks of its inputs before any work; values only where looking at them is cheap.

    Args:
        config: the model's.
        embed: the input embedding.
        input_ids: (B, T), or None with embeddings.
        inputs_embeds: (B, T, D), or None with ids.
        others: `pixel_values`, `gen_pixel_values`, `image_features`, `gen_image_vectors`, `attention_mask`.

    Raises:
        ValueError: names the input, what was found and what was expected.
    """
    if input_ids is not None:
        check_ids("input_ids", input_ids, num_ids(embed, config))
    if inputs_embeds is not None and inputs_embeds.shape[:1] == (0,):
        raise ValueError(f"inputs_embeds has the shape {tuple(inputs_embeds.shape)}; expected at least one row.")
    check_vectors("inputs_embeds", inputs_embeds, width=config.text_config.hidden_size)
    check_vectors("pixel_values", others["pixel_values"])
    check_vectors("gen_pixel_values", others["gen_pixel_values"])
    check_vectors("image_features", others["image_features"], width=config.image_feature_size)
    width = config.gen_vector_size if config.has_generation else None
    check_vectors("gen_image_vectors", others["gen_image_vectors"], width=width)
    mask = others["attention_mask"]
    if is_row_mask(mask) and _is_checked(mask, False):
        check_mask_values(mask)


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, under whichever of its two names it was given; warns of the name that transformers has given up.

    Raises:
        ValueError: two different caches were given.
    """
    if past_key_values is not None and CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn(
            "`past_key_values` is deprecated since transformers 5.24. Use `cache`.", FutureWarning, stacklevel=4
        )
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "past_key_values and cache are two names for one thing, and both were given. Pass one of them."
        )
    return cache if past_key_values is None else past_key_values


def is_row_mask(mask) -> bool:
    """Whether this is a (B, T) mask; others say themselves who sees whom, also as one mask for each kind of layer."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def num_ids(embed: nn.Module, config) -> int:
    """How many ids the input embedding can look up."""
    return getattr(embed, "num_embeddings", config.text_config.vocab_size)


def check_labels(name: str, labels: torch.Tensor, shape: tuple[int, int], vocab_size: int) -> torch.LongTensor:
    """Labels as cross entropy wants them; whole numbers of any width are taken.

    Raises:
        ValueError: no tensor, another shape than (B, T), no whole numbers, or ids outside the vocabulary.
    """
    check_tensor(name, labels)
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"{name} has the shape {tuple(labels.shape)}, but the inputs have {tuple(shape)} (rows, tokens). Give one "
            "label per token, -100 where none is wanted."
        )
    check_ids(name, labels, vocab_size, ignored=-100)
    return labels.long()


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
    if token_id >= getattr(embed, "num_embeddings", token_id + 1):  # of a model that only understands
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    placeholder = embed(torch.tensor(token_id, dtype=torch.long, device=inputs_embeds.device))
    return (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(-1)


def find_sample_starts(
    position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None = None
) -> torch.BoolTensor | None:
    """Where a further sample begins in rows that hold several: where the positions of real tokens go back.

    Args:
        position_ids: (B, T), or None, or of another rank (multimodal rotary embeddings), which says nothing here.
        attention_mask: (B, T) or anything else; zeros are padding, whose positions mean nothing.

    Returns:
        (B, T) bool, or None if no row holds a second sample. Always None while compiling or exporting.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2 or is_tracing():
        return None
    if not is_row_mask(attention_mask) or attention_mask.shape != position_ids.shape:
        starts = nn.functional.pad(position_ids[:, 1:] == 0, (1, 0))
    else:
        real = attention_mask.to(position_ids.device).bool()
        places = torch.arange(real.shape[1], device=real.device).expand_as(real)
        last = nn.functional.pad(places.masked_fill(~real, -1).cummax(-1).values[:, :-1], (1, 0), value=-1)
        before = position_ids.gather(1, last.clamp(min=0)).masked_fill(last < 0, -1)  # of the real token before
        # several tokens may share a position, but not across padding, nor the first one
        is_apart = nn.functional.pad(~real[:, :-1], (1, 0)) | (position_ids == 0)
        starts = real & ((position_ids < before) | (is_apart & (position_ids == before)))
    return starts if bool(starts.any()) else None


def check_packed_inputs(
    starts: torch.BoolTensor, attention_mask: torch.Tensor | None, use_cache: bool | None, cache: Cache | None = None
) -> None:
    """Rows of several samples go without a 2-D attention mask and without a cache.

    transformers looks for restarting positions only then; otherwise samples would attend to each other, unnoticed.

    Args:
        starts: (B, T) bool of `find_sample_starts`.
        attention_mask: (B, T), or 4-D, with which samples are the caller's own business, or None.
        use_cache: as given by the caller, None if not given.
        cache: an empty one that was given, or None.

    Raises:
        ValueError: a 2-D mask or a cache was given, or a cache asked for.
    """
    if attention_mask is not None and not is_row_mask(attention_mask):
        return
    if attention_mask is None and not use_cache and cache is None:
        return
    rows = starts.any(-1).nonzero().flatten().tolist()
    given = "use_cache=True" if cache is None else "a cache"
    given = given if attention_mask is None else "an attention_mask"
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
    if is_tracing():
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
