"""What `generate` does with each option while it draws: follow it, refuse it by name, or say why it can mean nothing.

`generation_pisces.py` asks before any heavy work. Text mode is GenerationMixin's own and follows what it follows. One
table holds every argument of `GenerationMixin.generate` and every field of `GenerationConfig`; a test walks both.
"""

# B rows, T tokens of the negative prompt, D language-model width
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .placeholders_pisces import (
    CACHE_NAMES,
    check_cache,
    check_encoded,
    check_ids,
    check_mask,
    check_mask_shape,
    check_place,
    check_positions,
    check_tensor,
    check_vectors,
    layer_types_of,
    num_ids,
    placeholder_mask,
)


_TENSORS = ("input_ids", "inputs_embeds", "pixel_values", "gen_pixel_values", "attention_mask")
_NEGATIVE_TENSORS = ("negative_prompt_ids", "negative_prompt_attention_mask")
IMAGE_INPUTS = ("pixel_values", "image_features", "gen_pixel_values", "gen_image_vectors")

FOLLOWED, REFUSED, NO_EFFECT = "followed", "refused", "no effect"

_SAMPLES_NO_TOKEN = "image mode chooses no tokens"
_FIXED_LENGTH = "the config fixes the number of vectors"
_BEAMS = "vectors cannot be searched with beams"
_DRAFTS = "vectors are not drafted by a smaller model or looked up in the prompt"
_LOOP = "the drawing loop is this model's own"

# option names: (in "image" mode, in "interleaved" mode, why not followed)
_GROUPS: list[tuple[str, str, str, str]] = [
    (
        "inputs generation_config use_cache cache_implementation cache_config max_cache_len compile_config "
        "disable_compile num_return_sequences return_dict_in_generate bos_token_id pad_token_id eos_token_id "
        "guidance_scale negative_prompt_ids negative_prompt_attention_mask",
        FOLLOWED,
        FOLLOWED,
        "",
    ),
    # harmless where one call serves all three modes, as transformers' pipelines do
    ("max_length max_new_tokens min_length min_new_tokens", NO_EFFECT, FOLLOWED, _FIXED_LENGTH),
    ("do_sample", NO_EFFECT, FOLLOWED, _SAMPLES_NO_TOKEN),
    ("streamer", REFUSED, FOLLOWED, "image mode writes no text to stream"),
    (
        "logits_processor stopping_criteria prefix_allowed_tokens_fn temperature top_k top_p min_p top_h typical_p "
        "epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size "
        "encoder_no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias "
        "watermarking_config output_scores output_logits max_time",
        REFUSED,
        FOLLOWED,
        _SAMPLES_NO_TOKEN,
    ),
    (
        "num_beams num_beam_groups diversity_penalty early_stopping length_penalty low_memory constraints "
        "force_words_ids penalty_alpha dola_layers",
        REFUSED,
        REFUSED,
        _BEAMS,
    ),
    (
        "assistant_model is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_early_exit "
        "assistant_confidence_threshold assistant_lookbehind target_lookbehind assistant_ensemble_weight "
        "assistant_tokenizer prompt_lookup_num_tokens max_matching_ngram_size use_mtp speculation_type",
        REFUSED,
        REFUSED,
        _DRAFTS,
    ),
    ("custom_generate trust_remote_code synced_gpus prefill_chunk_size", REFUSED, REFUSED, _LOOP),
    ("continuous_batching_config", REFUSED, REFUSED, "continuous batching knows text only"),
    ("output_attentions output_hidden_states", REFUSED, REFUSED, "the states of drawing are not kept"),
    (
        "stop_strings token_healing tokenizer",
        REFUSED,
        REFUSED,
        "drawing has no tokenizer; stopping_criteria=[StopStringCriteria(tokenizer, ...)] works in interleaved mode",
    ),
    ("decoder_start_token_id", REFUSED, REFUSED, "the model has no encoder"),
    ("transformers_version", NO_EFFECT, NO_EFFECT, "it describes the file"),
]
# {option: {mode: (what is done, why not more)}}
OPTIONS = {
    name: {"image": (image, reason), "interleaved": (interleaved, reason)}
    for names, image, interleaved, reason in _GROUPS
    for name in names.split()
}
# arguments of forward that mean nothing here, and names that the drawing loops use among themselves
_NO_OPTIONS = ("labels", "shift_labels", "logits_to_keep", "skip_logits", "guidance", "token_streamer")
# drawing is refused even where only the checkpoint's file asks: the answer would not be what the file says
_REFUSED_FROM_FILES = ("num_beams", "stop_strings", "token_healing")


def check_drawing_options(mode: str, kwargs: dict, defaults: GenerationConfig) -> None:
    """Refuse what drawing does not do: options given in this call, and those of a file that would change the answer.

    Args:
        mode: "image" or "interleaved".
        kwargs: of this call, `generation_config` among them.
        defaults: the checkpoint's; what merely lies there and cannot matter is passed over.

    Raises:
        ValueError: names every such option and the reason.
    """
    if wrong := [name for name in _NO_OPTIONS if kwargs.get(name) is not None]:
        raise ValueError(f"{', '.join(wrong)}: no option of generate, and it would change nothing. Leave it out.")
    stock = _stock_values()
    config = kwargs.get("generation_config")
    known = {*stock, *OPTIONS, *inspect.signature(GenerationMixin.generate).parameters}
    given = {name: value for name, value in kwargs.items() if name in known}
    for name in stock if config is not None else ():
        if not _is_same(value := getattr(config, name, None), getattr(defaults, name, None)):
            given.setdefault(name, value)
    for name in _REFUSED_FROM_FILES:
        given.setdefault(name, getattr(defaults if config is None else config, name, None))
    refused: dict[str, list[str]] = {}
    for name, value in given.items():
        # what a newer transformers adds most likely shapes tokens
        unknown = (REFUSED if mode == "image" else FOLLOWED, _SAMPLES_NO_TOKEN)
        what, reason = OPTIONS[name][mode] if name in OPTIONS else unknown
        if what == REFUSED and _asks_for_something(value, stock.get(name)):
            refused.setdefault(reason, []).append(name)
    if kwargs.get("cache_implementation") == "paged":
        refused.setdefault("continuous batching knows text only", []).append("cache_implementation='paged'")
    if refused:
        told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in refused.items())
        raise ValueError(f"generation_mode {mode!r} does not follow {told}. Leave that out, or generate text.")


def _stock_values() -> dict:
    """{field of GenerationConfig: what transformers takes where nobody says anything}."""
    defaults: dict = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    fields = {name: value for name, value in vars(GenerationConfig()).items() if not name.startswith("_")}
    return fields | {name: value for name, value in defaults.items() if name in fields}


def _is_same(one, other) -> bool:
    plain = (bool, int, float, str, list, tuple, dict)
    return one is other or (isinstance(one, plain) and isinstance(other, plain) and one == other)


def _asks_for_something(value, stock) -> bool:
    is_empty = isinstance(value, (list, tuple, dict)) and not value
    return not (value is None or value is False or is_empty or _is_same(value, stock))


def option_value(name: str, kwargs: dict, defaults: GenerationConfig):
    """An option of this call, else of the `generation_config` given in it, else of the checkpoint."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    value = getattr(kwargs.get("generation_config"), name, None)
    return getattr(defaults, name, None) if value is None else value


def check_number(name: str, value, *, whole: bool = False, least: float = 0) -> None:
    """Refuse what is no finite number of at least `least`; booleans and strings are none.

    Raises:
        ValueError: names the value and what was expected.
    """
    is_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < least:
        kind = "a whole number" if whole else "a finite number"
        bound = "" if least == -math.inf else f" of at least {least}"
        raise ValueError(f"{name} is {value!r}; expected {kind}{bound}.")


def check_scores(scores: torch.Tensor, writes: torch.BoolTensor | None = None) -> None:
    """Refuse to choose tokens by scores (B, V) that are NaN, or -inf everywhere; -inf is a token not to be written.

    Args:
        writes: (B,) rows that choose a token at all; None: all of them.

    Raises:
        ValueError: names the rows.
    """
    if torch.compiler.is_compiling():
        return
    writes = torch.ones_like(scores[:, 0], dtype=torch.bool) if writes is None else writes
    is_nan = scores.isnan().any(-1) & writes
    is_empty = (scores == -math.inf).all(-1) & writes
    if bool(is_empty.any()):
        raise ValueError(
            f"rows {is_empty.nonzero().flatten().tolist()} may write no token at all. Allow one in suppress_tokens, "
            "prefix_allowed_tokens_fn or the logits_processor of this call; placeholders of images do not count."
        )
    if bool(is_nan.any()):
        raise ValueError(
            f"the scores of rows {is_nan.nonzero().flatten().tolist()} are not numbers (NaN): no token can be chosen. "
            "Look for weights that are not finite, an overflow in half precision (try bfloat16 or float32), or a "
            "guidance_scale of nan."
        )


def check_generators(generator, num_rows: int) -> None:
    """One `torch.Generator`, a list with one per drawn row, or None.

    Raises:
        ValueError: another number, or something else.
    """
    if isinstance(generator, (list, tuple)) and len(generator) != num_rows:
        raise ValueError(
            f"{len(generator)} generators were given for {num_rows} drawn rows (batch x "
            "num_return_sequences). Pass one generator, or a list with one per row."
        )
    for one in generator if isinstance(generator, (list, tuple)) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator holds {type(one).__name__} {one!r}; expected torch.Generator, for example "
                "torch.Generator().manual_seed(0)."
            )


def check_streamer(streamer) -> None:
    """One object with `put` and `end`, as transformers' streamers have them.

    Raises:
        ValueError: something else, such as a list.
    """
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(
            f"streamer is a {type(streamer).__name__} without put() and end(). Pass one streamer, for example "
            "TextIteratorStreamer(processor.tokenizer)."
        )


@dataclass
class Guidance:
    """Classifier-free guidance of drawn vectors: v = v_empty + scale * (v_prompt - v_empty).

    Args:
        scale: more than 1 keeps closer to the prompt; 0 draws the empty prompt.
        ids: (B or 1, T) the empty, or negative, prompt of each row; it ends in `<|gen_start|>`. A row holds no
            placeholders, or those of all its prompt's pictures, which it then shows again.
        mask: (B or 1, T), 0 at padding on the left.
    """

    scale: float
    ids: torch.LongTensor
    mask: torch.LongTensor


def empty_prompt(
    input_ids: torch.LongTensor, mask: torch.Tensor | None, bos_id: int | None, start_id: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """What guidance compares a prompt with where nobody gave one: its beginning-of-text token, if any, and the start.

    As `GenerationMixin` does for text, which takes the prompt's last token: nothing that the user wrote is left, and
    no template has to be known. A checkpoint trained on empty turns does better with that turn as
    `negative_prompt_ids`.

    Args:
        input_ids: (B, T) prompts.
        mask: (B, T), or None without padding.
        bos_id: token that begins a text, or None.
        start_id: `<|gen_start|>`.

    Returns:
        ids and mask, (B, 2) each.
    """
    first = torch.zeros_like(input_ids[:, 0]) if mask is None else mask[:, -input_ids.shape[1] :].long().argmax(-1)
    has_bos = input_ids.gather(1, first.unsqueeze(1)) == (-1 if bos_id is None else bos_id)  # (B, 1)
    ids = torch.cat([input_ids.gather(1, first.unsqueeze(1)), input_ids.new_full(has_bos.shape, start_id)], dim=1)
    return ids, torch.cat([has_bos, torch.ones_like(has_bos)], dim=1).long()


def check_inputs(model, mode: str, kwargs: dict) -> None:
    """Refuse prompts that mean nothing, before any heavy work; looks at values on every device, once per call.

    Args:
        model: a `PiscesForConditionalGeneration`.
        mode: "text", "image" or "interleaved".
        kwargs: of `generate`.

    Raises:
        ValueError: names the input, what was found and what was expected.
    """
    if getattr(kwargs["generation_config"], "is_assistant", False):
        _blind_draft(model, kwargs)
        return  # a draft is asked again and again, with inputs that the main model has checked
    for name in (*_TENSORS, *_NEGATIVE_TENSORS):
        # as one mask for each kind of layer, a mask is a dict
        if kwargs.get(name) is not None and not (name == "attention_mask" and isinstance(kwargs[name], dict)):
            check_tensor(name, kwargs[name])
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        found = "neither" if ids is None else "both"
        raise ValueError(f"generate takes a prompt as input_ids or as inputs_embeds; {found} came. Pass one of them.")
    embed = model.get_input_embeddings()
    for name in (*_TENSORS, *_NEGATIVE_TENSORS, *IMAGE_INPUTS, "position_ids"):
        check_place(name, kwargs.get(name), embed)
    if ids is not None:
        check_ids("input_ids", ids, num_ids(embed, model.config), always=True)
    widths = {"inputs_embeds": model.config.text_config.hidden_size, "image_features": model.config.image_feature_size}
    for name in ("inputs_embeds", *IMAGE_INPUTS):
        check_vectors(name, kwargs.get(name), width=widths.get(name), always=True)
    check_encoded(kwargs.get("mm_encoder_outputs"), always=True)
    prompt = embeds if ids is None else ids
    if prompt.ndim < 2 or 0 in prompt.shape[:2]:
        raise ValueError(f"the prompt has the shape {tuple(prompt.shape)}; expected at least one row and one token.")
    rows, tokens = prompt.shape[:2]
    mask, cache = kwargs.get("attention_mask"), _given_cache(kwargs)
    check_cache(cache)
    check_mask_shape(mask, rows, tokens, cache is not None, layer_types_of(model.config))
    check_positions(kwargs.get("position_ids"), rows, tokens, mask)
    check_mask(mask, ends_real=mode != "image" or ids is None)
    if (copies := option_value("num_return_sequences", kwargs, model.generation_config)) is not None:
        check_number("num_return_sequences", copies, whole=True, least=1)
    copies = copies or 1
    beams = option_value("num_beams", kwargs, model.generation_config) or 1
    _check_cache(cache, prompt, mask, rows * max(copies, beams))
    if mode == "text":
        _check_text_guidance(model, kwargs, rows * max(copies, beams))
    if mode != "text":
        check_generators(kwargs.get("generator"), rows * copies)


def _blind_draft(model, kwargs: dict):
    """A draft of another width cannot read the main model's images; it reads their placeholders, as LLaVA's do."""
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    width = model.config.text_config.hidden_size
    if encoded is None or encoded.pooler_output[0].shape[-1] == width:
        return
    id_ = torch.tensor(model.config.image_token_id, device=model.device)
    shape = (len(encoded.pooler_output), len(encoded.pooler_output[0]), width)
    blank = BaseModelOutputWithPooling(pooler_output=model.get_input_embeddings()(id_).expand(shape))
    kwargs["mm_encoder_outputs"] = kwargs["mm_encoder_outputs"] | {"image": blank}


def _given_cache(kwargs: dict):
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _check_cache(cache, prompt: torch.Tensor, mask: torch.Tensor | None, num_rows: int):
    """A given cache has the rows to be generated and less than all tokens. Whose tokens they are, it does not say."""
    length = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if not length:
        return
    keys = getattr(cache.layers[0], "keys", None) if getattr(cache, "layers", None) else None
    if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[0] != num_rows:
        raise ValueError(
            f"the cache given holds {keys.shape[0]} rows, but {num_rows} are generated. Pass the cache of these rows, "
            "or none."
        )
    covered = prompt.shape[1] if mask is None or mask.ndim != 2 else max(mask.shape[1], prompt.shape[1])
    if length >= covered:
        raise ValueError(
            f"the cache given as cache or past_key_values holds {length} tokens and the prompt has {covered}: "
            "nothing is left to start from. Pass the whole sequence with at least one new token, or the new "
            "tokens with the whole attention_mask."
        )
    if covered > prompt.shape[1] and covered != length + prompt.shape[1]:
        raise ValueError(
            f"the attention_mask covers {covered} tokens, but the cache given holds {length} and the prompt "
            f"{prompt.shape[1]} more. Pass the mask of both together, or the whole sequence."
        )


def _check_text_guidance(model, kwargs: dict, num_rows: int):
    """Guidance of tokens is GenerationMixin's own: it looks at nothing, and repeats no negative prompt."""
    scale = option_value("guidance_scale", kwargs, model.generation_config)
    if scale is None:
        return
    scale = scale.item() if isinstance(scale, torch.Tensor) and scale.ndim == 0 else scale
    check_number("guidance_scale", scale, least=-math.inf)
    ids, mask = (kwargs.get(name) for name in _NEGATIVE_TENSORS)
    if scale != 1 and ids is not None:
        _check_negative_prompt(model, ids, mask, {num_rows}, f"one row for each of the {num_rows} generated rows")
        if bool(((ids == model.config.image_token_id) | (ids == model.config.gen_image_token_id)).any()):
            raise ValueError(
                "negative_prompt_ids holds placeholders, but while text is written images cannot be given to it. "
                "Leave them out."
            )
        check_mask(mask, "negative_prompt_attention_mask", ends_real=True)


def set_guidance(model, kwargs: dict) -> None:
    """Put `guidance` in place of the options that GenerationMixin would take for guidance of tokens.

    Args:
        model: a `PiscesForConditionalGeneration`.
        kwargs: of `generate`; changed in place.

    Raises:
        ValueError: a scale that is no number, a negative prompt that cannot be followed, or a cache beside guidance.
    """
    scale = option_value("guidance_scale", kwargs, model.generation_config)
    ids = kwargs.pop("negative_prompt_ids", None)
    mask = kwargs.pop("negative_prompt_attention_mask", None)
    if scale is not None:
        check_number("guidance_scale", scale)
        kwargs["guidance_scale"] = None
    if ids is None and mask is not None:
        raise ValueError("negative_prompt_attention_mask came without negative_prompt_ids. Pass both or neither.")
    if scale is None or scale == 1:
        if ids is not None:
            raise ValueError(
                f"negative_prompt_ids means nothing with guidance_scale {scale!r}, which is off. Pass a "
                "guidance_scale such as 3.0, or leave the negative prompt out."
            )
        return
    cache = _given_cache(kwargs)
    if cache is not None and (int(cache.get_seq_length()) or type(cache) is not DynamicCache):
        raise ValueError(
            f"guidance_scale {scale} runs an empty prompt beside each prompt, and the {type(cache).__name__} given "
            "holds the prompts alone. Pass the whole prompt and leave the cache out; cache_implementation makes one."
        )
    ids, mask = _default_empty_prompt(model, kwargs) if ids is None else _negative_prompt(model, kwargs, ids, mask)
    kwargs["guidance"] = Guidance(float(scale), ids, mask)


def _default_empty_prompt(model, kwargs: dict) -> tuple[torch.LongTensor, torch.LongTensor]:
    prompt, start = kwargs.get("input_ids"), model.config.gen_start_token_id
    bos = option_value("bos_token_id", kwargs, model.generation_config)
    bos = getattr(model.config.get_text_config(), "bos_token_id", None) if bos is None else bos
    if prompt is None:  # embeddings: the token is known by its own
        embeds = kwargs["inputs_embeds"]
        prompt = embeds.new_full(embeds.shape[:2], start, dtype=torch.long)
        if bos is not None:
            is_bos = placeholder_mask(None, embeds, model.get_input_embeddings(), bos)
            prompt = prompt.masked_fill(is_bos, bos)
    return empty_prompt(prompt, kwargs.get("attention_mask"), bos, start)


def _negative_prompt(model, kwargs: dict, ids, mask) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The caller's, checked, with `<|gen_start|>` at its end."""
    start = model.config.gen_start_token_id
    rows = next(kwargs[name].shape[0] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
    _check_negative_prompt(model, ids, mask, {1, rows}, f"one row, or one for each of the {rows} prompts")
    _check_negative_images(model, kwargs, ids)
    if mask is None:
        pad = option_value("pad_token_id", kwargs, model.generation_config)
        mask = torch.ones_like(ids) if pad is None else (ids != pad).long()
    check_mask(mask, "negative_prompt_attention_mask", ends_real=True)
    opened = ids[:, -1:] == start
    if not bool(opened.all()):
        if bool(opened.any()):
            raise ValueError(
                "some rows of negative_prompt_ids end in <|gen_start|> and others do not. Build them all alike."
            )
        ids = torch.cat([ids, torch.full_like(ids[:, :1], start)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids, mask.long()


def _check_negative_prompt(model, ids, mask, rows: set[int], expected: str):
    config = model.config
    check_ids("negative_prompt_ids", ids, num_ids(model.get_input_embeddings(), config), always=True)
    if ids.shape[0] not in rows or ids.shape[1] == 0 or (mask is not None and mask.shape != ids.shape):
        masked = "" if mask is None else f" and its mask {tuple(mask.shape)}"
        raise ValueError(
            f"negative_prompt_ids has the shape {tuple(ids.shape)}{masked}; expected {expected}, and a mask of the "
            "same shape."
        )


def _check_negative_images(model, kwargs: dict, ids: torch.LongTensor):
    """A negative prompt shows none of its prompt's pictures, or all of them; it has none of its own."""
    config, prompt, embeds = model.config, kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    for token, kind in ((config.image_token_id, "shown"), (config.gen_image_token_id, "drawn")):
        found = (ids == token).sum(-1)
        if not bool(found.any()):
            continue
        mask = prompt == token if prompt is not None else None
        if mask is None:
            mask = placeholder_mask(None, embeds, model.get_input_embeddings(), token)
        own = mask.sum(-1).to(found.device)
        found = found.expand_as(own)
        wrong = ((found != 0) & (found != own)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"negative_prompt_ids holds placeholders of {kind} images: row {row} has {int(found[row])} and its "
                f"prompt {int(own[row])}; expected none, or the same number, because the prompt's own images are "
                "shown again."
            )


def padded_on_the_left(kwargs: dict, start_id: int) -> None:
    """Move padding behind a prompt before it, so that a `<|gen_start|>` can be appended; changes `kwargs` in place.

    Masked where it was, it would still take up places in the windows of layers that look back a fixed way.

    Raises:
        ValueError: names rows that open an image and are padded then.
    """
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or bool((mask[:, -1] != 0).all()):
        return
    behind = mask.bool().flip(-1).long().argmax(-1, keepdim=True)  # (B, 1) columns of padding at the end
    last = mask.shape[1] - 1 - behind
    opened = (ids.gather(1, last.to(ids.device)) == start_id) & (behind > 0).to(ids.device)
    if rows := opened.flatten().nonzero().flatten().tolist():
        raise ValueError(
            f"rows {rows} open an image with <|gen_start|> and then are padded. Pad on the left: "
            "processor(..., padding_side='left')."
        )
    places = (torch.arange(ids.shape[1], device=mask.device) - behind) % ids.shape[1]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if (value := kwargs.get(name)) is not None:
            kwargs[name] = value.gather(1, places.to(value.device))


class KeptScores:
    """What "interleaved" mode keeps of its scores, one (B, vocabulary) per token, where they are asked for."""

    def __init__(self, config: GenerationConfig):
        wanted = config.return_dict_in_generate
        self.scores: tuple[torch.Tensor, ...] | None = () if wanted and config.output_scores else None
        self.logits: tuple[torch.Tensor, ...] | None = () if wanted and config.output_logits else None

    def add(self, logits: torch.Tensor, scores: torch.Tensor, tokens: torch.LongTensor, placed: torch.BoolTensor):
        """Scores of a token that the loop placed say so: 0 for it, -inf for all others."""
        if self.logits is not None:
            self.logits += (logits,)
        if self.scores is not None:
            forced = torch.full_like(scores, -float("inf")).scatter(1, tokens.unsqueeze(1), 0.0)
            self.scores += (torch.where(placed.unsqueeze(1), forced, scores),)


class TokenStream:
    """Hands a streamer the prompt and each token; the vectors between the two ends of an image are left out.

    Args:
        streamer: with `put` and `end`, or None.
        input_ids: (B, T) prompt; one that ends in `<|gen_start|>` is handed over without it, and that as the first
            token, so that who skips the prompt sees both ends of the image.
        config: the model's.
    """

    def __init__(self, streamer, input_ids: torch.LongTensor, config):
        self.streamer = streamer
        if streamer is None:
            return
        opened = input_ids.shape[1] > 0 and bool((input_ids[:, -1] == config.gen_start_token_id).all())
        streamer.put((input_ids[:, :-1] if opened else input_ids).cpu())
        if opened:
            streamer.put(input_ids[:, -1].cpu())

    def put(self, tokens: torch.LongTensor, is_silent: torch.BoolTensor):
        """The tokens of a step, (B,), unless no row says anything by them."""
        if self.streamer is not None and not bool(is_silent.all()):
            self.streamer.put(tokens.cpu())

    def end(self):
        if self.streamer is not None:
            self.streamer.end()


def check_drawn(vectors: torch.Tensor, rows) -> None:
    """Refuse to hand out vectors that are not finite, (J, M, Dg), where image j belongs to row `rows[j]`.

    Raises:
        ValueError: names the rows.
    """
    bad = ~vectors.isfinite().flatten(1).all(-1)
    if bool(bad.any()):
        found = sorted({list(rows)[image] for image in bad.nonzero().flatten().tolist()})
        raise ValueError(
            f"the vectors drawn in rows {found} are not finite. Look for weights that are not finite, for an overflow "
            "(half precision: try bfloat16 or float32), or for a large guidance_scale."
        )


# ---- what kind of value each option takes -----------------------------------------------------------------------
# Ranges are GenerationMixin's own business. It stumbles over other kinds of values with errors that name no option.


def _is_whole(value: Any) -> bool:
    value = value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63


def _is_real(value: Any) -> bool:
    value = value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool) or (_is_whole(value) and value in (0, 1))


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(of, value))


def _are_whole(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim < 2 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return _is_whole(value) or _is_list(value, _is_whole)


def _is_bias(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, tuple) and all(map(_is_whole, key)) and _is_real(v) for key, v in value.items())
    return _is_list(value, lambda pair: isinstance(pair, (list, tuple)) and len(pair) == 2)


def _is_decay(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and _is_whole(value[0]) and _is_real(value[1])


def _are_words(value: Any) -> bool:
    return _is_list(value, lambda one: _is_whole(one) or _is_list(one, _is_whole))


_KINDS: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "max_length max_new_tokens min_length min_new_tokens top_k no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "num_beams num_beam_groups prompt_lookup_num_tokens max_matching_ngram_size "
        "assistant_early_exit assistant_lookbehind target_lookbehind prefill_chunk_size "
        "max_cache_len bos_token_id pad_token_id decoder_start_token_id",
        _is_whole,
        "a whole number",
    ),
    (
        "temperature top_p top_h min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty max_time "
        "encoder_repetition_penalty length_penalty diversity_penalty penalty_alpha assistant_confidence_threshold "
        "assistant_ensemble_weight num_assistant_tokens",
        _is_real,
        "a number",
    ),
    (
        "do_sample use_cache output_scores output_logits output_attentions output_hidden_states remove_invalid_values "
        "return_dict_in_generate renormalize_logits token_healing low_memory disable_compile synced_gpus is_assistant "
        "use_mtp trust_remote_code",
        _is_switch,
        "True or False",
    ),
    (
        "eos_token_id forced_bos_token_id forced_eos_token_id",
        _are_whole,
        "token ids: a whole number or a list of them",
    ),
    (
        "suppress_tokens begin_suppress_tokens",
        lambda value: _are_whole(value) and not _is_whole(value),
        "token ids: a list of whole numbers",
    ),
    (
        "bad_words_ids force_words_ids",
        lambda value: _is_list(value, _are_words),
        "a list of lists of token ids",
    ),
    ("sequence_bias", _is_bias, "a dict from tuples of token ids to numbers, or a list of such pairs"),
    ("exponential_decay_length_penalty", _is_decay, "a pair of a whole number and a number"),
    ("stopping_criteria logits_processor", lambda value: _is_list(value, callable), "a list of functions"),
    ("prefix_allowed_tokens_fn", callable, "a function of the row and its tokens"),
    ("watermarking_config", lambda value: hasattr(value, "validate"), "a WatermarkingConfig"),
    ("compile_config", lambda value: hasattr(value, "to_dict"), "a CompileConfig"),
    ("assistant_model", lambda value: hasattr(value, "generate"), "a model"),
    ("tokenizer assistant_tokenizer", lambda value: hasattr(value, "decode"), "a tokenizer"),
    ("cache_implementation num_assistant_tokens_schedule", lambda value: isinstance(value, str), "a name"),
    ("cache_config", lambda value: isinstance(value, dict), "a dict of settings"),
    (
        "stop_strings",
        lambda value: isinstance(value, str) or _is_list(value, lambda one: isinstance(one, str)),
        "a text or a list of texts",
    ),
    ("early_stopping", lambda value: _is_switch(value) or value == "never", 'True, False or "never"'),
    ("custom_generate", lambda value: isinstance(value, str) or callable(value), "a name or a function"),
]
OPTION_KINDS = {name: (is_right, expected) for names, is_right, expected in _KINDS for name in names.split()}


def check_option_values(kwargs: dict) -> None:
    """Refuse options of a kind that no generation can follow; None is always "not given".

    Args:
        kwargs: of `generate`; the fields of its `generation_config` are looked at too.

    Raises:
        ValueError: names the option, its value and what was expected.
    """
    config = kwargs.get("generation_config")
    for name, (is_right, expected) in OPTION_KINDS.items():
        for value in (kwargs.get(name), getattr(config, name, None)):
            if value is not None and not is_right(value):
                shown = repr(value)[:60]
                shown = shown if shown.isprintable() else f"a {type(value).__name__}"
                raise ValueError(f"{name} is {shown}; expected {expected}. Leave it out to have the checkpoint's own.")


__all__ = [
    "FOLLOWED",
    "IMAGE_INPUTS",
    "NO_EFFECT",
    "OPTIONS",
    "OPTION_KINDS",
    "REFUSED",
    "Guidance",
    "KeptScores",
    "TokenStream",
    "check_drawing_options",
    "check_drawn",
    "check_inputs",
    "check_number",
    "check_option_values",
    "check_streamer",
    "option_value",
    "padded_on_the_left",
    "set_guidance",
]
