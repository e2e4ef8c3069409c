"""What kind of value each option of `generate` takes, so that a wrong one is refused by name before anything runs.

`generation_options_pisces` says which options are followed in which mode, and judges those of drawing. Ranges are
GenerationMixin's own business; it stumbles over other kinds of values with errors that name no option.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch


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


__all__ = ["OPTION_KINDS", "check_option_values"]
