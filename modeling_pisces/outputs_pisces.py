"""What the model and `generate` return, and the name under which their key-value cache travels.

transformers calls the cache `past_key_values` up to 5.23 and `cache` from 5.24 on, as an argument, as a field of
outputs and as a key of `model_kwargs`. This file is the only one that knows both names: everything else asks
`CACHE_NAME` and `one_cache`.
"""

# B rows, T tokens, D language-model width, I understanding images, J generated/target images,
# N understanding vectors per image, M generated vectors per image, Dg width of a generated vector
import warnings
from dataclasses import dataclass, fields

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)


CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)


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


def _flat(values: tuple) -> tuple:
    """Nested outputs as tuples, as transformers' own multimodal outputs hand them out with `return_dict=False`."""
    return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in values)


@dataclass
class PiscesModelOutputWithPast(BaseModelOutputWithPast):
    """Backbone output; the cache stands under the name that the installed transformers gives it (`CACHE_NAME`).

    Args:
        image_outputs: output of `get_image_features`, if images were given; `pooler_output` (I, N, D) is projected.
            Only `pooler_output` is set where `image_features` were given instead of pictures.
        image_hidden_states: (I, N, D), the same `pooler_output`.
        gen_image_vectors: (J, M, Dg) clean generated vectors that were placed, if any were given.
        gen_image_mask: (B, T) bool, True at each placeholder of a generated vector.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    image_hidden_states: torch.FloatTensor | None = None
    gen_image_vectors: torch.FloatTensor | None = None
    gen_image_mask: torch.BoolTensor | None = None

    def to_tuple(self) -> tuple:
        return _flat(super().to_tuple())


@dataclass
class PiscesCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `PiscesForConditionalGeneration`. A side that the batch lacks has None as its loss and count 0.

    Args:
        loss: text_loss + image_loss_weight * image_loss, over the sides that are present.
        text_loss: cross entropy in nats, mean over labelled text tokens.
        image_loss: the head's squared error, mean over elements of labelled vectors.
        text_loss_sum: sum of the cross entropy over labelled text tokens.
        num_text_tokens: number of labelled text tokens.
        image_loss_sum: sum over labelled vectors of their image loss; for "mse" the mean squared error of a vector.
        num_image_vectors: number of labelled vectors.
        image_target_mean: (Dg,) mean of the labelled vectors; with it the variances of several batches add up.
        image_target_variance: variance of the labelled vectors about their per-channel mean; what predicting that mean
            would score, so that R^2 = 1 - image_loss / image_target_variance for a regression by "mse".
        logits: (B, T, vocabulary), or None where `skip_logits` left them out.
        image_outputs, image_hidden_states: as in `PiscesModelOutputWithPast`.
        image_loss_per_vector: (labelled vectors,) what `image_loss_sum` is the sum of, in reading order.
    """

    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    text_loss_sum: torch.FloatTensor | None = None
    num_text_tokens: torch.LongTensor | None = None
    image_loss_sum: torch.FloatTensor | None = None
    num_image_vectors: torch.LongTensor | None = None
    image_target_mean: torch.FloatTensor | None = None
    image_target_variance: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    image_hidden_states: torch.FloatTensor | None = None
    image_loss_per_vector: torch.FloatTensor | None = None

    def to_tuple(self) -> tuple:
        return _flat(super().to_tuple())


@dataclass
class PiscesGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns in "interleaved" mode, and in "image" mode with `return_dict_in_generate=True`.

    Args:
        sequences: (B, T) ids, the prompt included; a drawn image stands as its placeholders, so that
            `model(input_ids=sequences, gen_image_vectors=image_vectors)` reads everything back (for prompts without
            images of their own).
        image_vectors: (J, M, Dg) drawn images in reading order of `sequences`; (B, M, Dg) in "image" mode.
        image_rows: (J,) the row of `sequences` in which each image stands.
        past_key_values or cache (`CACHE_NAME`): the cache, if one was used.
    """

    image_vectors: torch.FloatTensor | None = None
    image_rows: torch.LongTensor | None = None


__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "PiscesCausalLMOutputWithPast",
    "PiscesGenerateOutput",
    "PiscesModelOutputWithPast",
]
