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

SWITCHES = ("use_cache", "output_hidden_states", "output_attentions")  # arguments of forward that are yes or no


def is_tracing() -> bool:
    """Whether values are unknown: while compiling, exporting or tracing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_checked(tensor: torch.Tensor, always: bool) -> bool:
    return not is_tracing() and tensor.device.type != "meta" and (always or tensor.device.type == "cpu")


def _place(bad: torch.BoolTensor) -> str:
    row, position = bad.nonzero()[0].tolist()
    return f"row {row}, position {position}"


def check_tensor(name: str, value: Any) -> None:
    """Refuse lists, arrays, sparse tensors and whatever else is no tensor of numbers in memory.

    Raises:
        ValueError: names the type.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}; expected a tensor, as PiscesProcessor makes with "
            "return_tensors='pt'."
        )
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else value.layout
        raise ValueError(f"{name} is a tensor of the kind {kind}; expected a dense one: pass {name}.to_dense().")


def is_whole(dtype: torch.dtype) -> bool:
    """Whether a dtype holds whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def check_ids(name: str, ids: torch.Tensor, vocab_size: int, *, ignored: int | None = None, always: bool = False):
    """Refuse what an embedding cannot look up.

    Args:
        name: for the message.
        ids: (B, T).
        vocab_size: rows of the embedding.
        ignored: one more id that is allowed (-100 in labels).
        always: look at the values on a GPU too.

    Raises:
        ValueError: no tensor, no ids of 32 or 64 bits, not (B, T), no rows, or an id outside the vocabulary, by row
            and position.
    """
    check_tensor(name, ids)
    if ids.dtype not in (torch.long, torch.int32):  # an embedding looks up no others
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
    if vectors is None:
        return
    check_tensor(name, vectors)
    if not vectors.dtype.is_floating_point or vectors.dtype.itemsize < 2:
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


def check_encoded(mm_encoder_outputs: Any, *, always: bool = False):
    """What `get_image_features` gave, as `mm_encoder_outputs` hands it on; None without images.

    Args:
        always: look at the values on a GPU too.

    Raises:
        ValueError: another form, or values that are not finite.
    """
    if mm_encoder_outputs is not None and not isinstance(mm_encoder_outputs, dict):
        raise ValueError(
            f"mm_encoder_outputs is a {type(mm_encoder_outputs).__name__}; expected a dict such as {{'image': "
            "model.get_image_features(pixel_values)}."
        )
    encoded = (mm_encoder_outputs or {}).get("image")
    if encoded is None:
        return None
    features = getattr(encoded, "pooler_output", None)
    if features is None:
        raise ValueError(
            f"mm_encoder_outputs['image'] is a {type(encoded).__name__} without pooler_output; expected what "
            "model.get_image_features(pixel_values) returns."
        )
    for one in [features] if isinstance(features, torch.Tensor) else features:
        check_vectors("mm_encoder_outputs['image'].pooler_output", one, always=always)
    return encoded


def check_features(name: str, features: torch.Tensor, source: str) -> torch.Tensor:
    """Refuse vectors of an encoder that are not finite, where looking is cheap; also from finite pixels.

    Args:
        name: whose vectors they are.
        features: (I, N, C).
        source: the name of what was encoded.

    Raises:
        ValueError: names the image.
    """
    if _is_checked(features, False) and not bool(features.isfinite().all()):
        image = int((~features.isfinite()).flatten(1).any(-1).nonzero()[0])
        raise ValueError(
            f"image {image}: the vectors of the {name} are not finite. Look for values in {source} that are far from "
            "normalised pixels, weights that are not finite, or an overflow in half precision."
        )
    return features


def check_place(name: str, value: Any, embed: nn.Module):
    """Refuse inputs without values ("meta") for a model that has them."""
    weight = getattr(embed, "weight", None)
    if isinstance(value, torch.Tensor) and value.is_meta and isinstance(weight, torch.Tensor) and not weight.is_meta:
        raise ValueError(f"{name} is on the device meta and holds no values; expected one on {weight.device}.")


def check_mask_shape(mask: Any, rows: int, tokens: int, has_past: bool, layer_types: Any = None):
    """Refuse masks that do not cover the inputs: a shorter or longer one would be padded or cut in silence.

    Args:
        mask: (B, T so far), one mask of four dimensions, masks by kind of layer, or None.
        rows, tokens: B and T of the new inputs.
        has_past: whether a cache holds tokens before them, which the mask then covers too.
        layer_types: of the language model, by which masks may come; None takes one mask.

    Raises:
        ValueError: names both shapes.
    """
    name = "attention_mask"
    if mask is None or type(mask).__name__ == "BlockMask":  # of flex attention
        return
    if isinstance(mask, dict):
        if not layer_types or not set(layer_types) <= set(mask):
            raise ValueError(
                f"{name} is a dict with {list(mask)!r:.60}; expected a tensor (rows, tokens), 1 for real tokens"
                + (f", or masks for {sorted(set(layer_types))}." if layer_types else ".")
            )
        for kind in set(layer_types):
            check_mask_shape(mask[kind], rows, tokens, has_past)
        return
    check_tensor(name, mask)
    if mask.dtype.is_complex or mask.ndim not in (2, 4):
        raise ValueError(
            f"{name} has the shape {tuple(mask.shape)} and the dtype {mask.dtype}; expected (rows, tokens), 1 for "
            "real tokens and 0 for padding, as PiscesProcessor makes it."
        )
    wrong_rows = mask.shape[0] != rows if mask.ndim == 2 else mask.shape[0] not in (1, rows)
    length = mask.shape[1] if mask.ndim == 2 else mask.shape[-1]
    wrong_length = length < tokens or (mask.ndim == 2 and not has_past and length != tokens)
    if wrong_rows or wrong_length or (mask.ndim == 4 and mask.shape[2] not in (1, tokens)):
        more = " and those of the cache" if has_past else ""
        raise ValueError(
            f"{name} has the shape {tuple(mask.shape)}, but the inputs have {(rows, tokens)} (rows, tokens). Give it "
            f"one value for each of these tokens{more}."
        )


def check_positions(positions: Any, rows: int, tokens: int, mask: Any = None):
    """Refuse positions that do not belong to the inputs, and negative ones of real tokens.

    Args:
        positions: (1 or B, T), or (kinds, B, T) for multimodal rotary embeddings, or None.
        mask: (B, past + T), whose zeros excuse what `mask.cumsum(-1) - 1` says at padding; or None.

    Raises:
        ValueError: names what was found.
    """
    if positions is None:
        return
    check_tensor("position_ids", positions)
    shape = tuple(positions.shape)
    if not is_whole(positions.dtype) or shape[-1:] != (tokens,) or positions.ndim not in (2, 3):
        fits = False
    else:
        fits = shape[-2] in (1, rows)
    if not fits:
        raise ValueError(
            f"position_ids has the shape {shape} and the dtype {positions.dtype}; expected whole numbers of the shape "
            f"{(rows, tokens)} (rows, tokens). Leave them out where positions simply count up."
        )
    if not _is_checked(positions, False):
        return
    negative = positions < 0
    if is_row_mask(mask) and mask.shape == (rows, mask.shape[-1]) and mask.shape[-1] >= tokens:
        negative = negative & (mask[:, -tokens:] != 0).to(negative.device)
    if bool(negative.any()):
        raise ValueError(
            f"position_ids holds {int(positions[negative].min())}; expected positions from 0. Count the real "
            "tokens, as (attention_mask.cumsum(-1) - 1).clamp(min=0) does."
        )


def check_cache(cache: Any):
    """Refuse what is no cache; transformers takes none of the tuples of its older versions.

    Raises:
        ValueError: names the type.
    """
    if cache is not None and not callable(getattr(cache, "get_seq_length", None)):
        raise ValueError(
            f"{CACHE_NAME} is a {type(cache).__name__}; expected a cache such as transformers.DynamicCache(), or none."
        )


def check_logits_to_keep(keep: Any, tokens: int):
    """Refuse a choice of positions that no logits have: a negative number would choose others in silence.

    Raises:
        ValueError: names the value.
    """
    if is_tracing():
        return
    if isinstance(keep, torch.Tensor) and keep.ndim == 1 and is_whole(keep.dtype):
        if not _is_checked(keep, False) or not bool(((keep < -tokens) | (keep >= tokens)).any()):
            return
    elif isinstance(keep, int) and not isinstance(keep, bool) and keep >= 0:
        return
    raise ValueError(
        f"logits_to_keep is {repr(keep)[:60]!r}; expected how many of the last positions (0: all), or a tensor of one "
        f"dimension with whole numbers below {tokens}."
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
        others: `pixel_values`, `gen_pixel_values`, `image_features`, `gen_image_vectors`, `attention_mask`,
            `position_ids`, `cache` and the `SWITCHES`.

    Raises:
        ValueError: names the input, what was found and what was expected.
    """
    for name, value in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds), *others.items()):
        check_place(name, value, embed)
        if name in SWITCHES and not isinstance(value, (bool, int, type(None))):
            raise ValueError(f"{name} is {repr(value)[:60]!r}; expected True or False.")
    if input_ids is not None:
        check_ids("input_ids", input_ids, num_ids(embed, config))
    check_vectors("inputs_embeds", inputs_embeds, width=config.text_config.hidden_size)
    if inputs_embeds is not None and _is_checked(inputs_embeds, False):
        _check_dtype(inputs_embeds, embed)
    name, inputs = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
    if 0 in inputs.shape:
        raise ValueError(f"{name} has the shape {tuple(inputs.shape)}; expected at least one row and one token.")
    check_vectors("pixel_values", others["pixel_values"])
    check_vectors("gen_pixel_values", others["gen_pixel_values"])
    check_vectors("image_features", others["image_features"], width=config.image_feature_size)
    width = config.gen_vector_size if config.has_generation else None
    check_vectors("gen_image_vectors", others["gen_image_vectors"], width=width)
    mask, cache = others["attention_mask"], others["cache"]
    rows, tokens = inputs.shape[:2]
    check_cache(cache)
    check_mask_shape(mask, rows, tokens, cache is not None, layer_types_of(config))
    check_positions(others["position_ids"], rows, tokens, mask)
    if is_row_mask(mask) and _is_checked(mask, False):
        check_mask_values(mask)


def _check_dtype(embeds: torch.Tensor, embed: nn.Module):
    """Embeddings of the model's own dtype: layers take no other, unless autocast brings both together."""
    dtype = getattr(getattr(embed, "weight", None), "dtype", embeds.dtype)
    is_cast = torch.is_autocast_enabled(embeds.device.type)
    if dtype.is_floating_point and dtype.itemsize > 1 and embeds.dtype != dtype and not is_cast:
        raise ValueError(
            f"inputs_embeds has the dtype {embeds.dtype} and the model {dtype}. Pass inputs_embeds.to(model.dtype)."
        )


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


def layer_types_of(config) -> list[str] | None:
    """The kinds of attention of the language model's layers, where it has several; masks may come by kind."""
    return getattr(config.get_text_config(), "layer_types", None)


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
    labels = labels.long() if is_whole(labels.dtype) else labels
    check_ids(name, labels, vocab_size, ignored=-100)
    return labels


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
