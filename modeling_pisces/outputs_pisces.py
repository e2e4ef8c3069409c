"""What the model and `generate` return. Data only."""

# B rows, T tokens, D language-model width, I understanding images, J generated/target images,
# N understanding vectors per image, M generated vectors per image, Dg width of a generated vector
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput


@dataclass
class PiscesModelOutputWithPast(BaseModelOutputWithPast):
    """Backbone output.

    Args:
        image_hidden_states: (I, N, D) projected understanding vectors, if images were given.
        gen_image_vectors: (J, M, Dg) clean generated vectors that were placed, if any were given.
        gen_image_mask: (B, T) bool, True at each placeholder of a generated vector.
    """

    image_hidden_states: torch.FloatTensor | None = None
    gen_image_vectors: torch.FloatTensor | None = None
    gen_image_mask: torch.BoolTensor | None = None


@dataclass
class PiscesCausalLMOutputWithPast(ModelOutput):
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
        image_loss_per_vector: (labelled vectors,) what `image_loss_sum` is the sum of, in reading order.
    """

    loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    image_loss: torch.FloatTensor | None = None
    text_loss_sum: torch.FloatTensor | None = None
    num_text_tokens: torch.LongTensor | None = None
    image_loss_sum: torch.FloatTensor | None = None
    num_image_vectors: torch.LongTensor | None = None
    image_target_mean: torch.FloatTensor | None = None
    image_target_variance: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    image_loss_per_vector: torch.FloatTensor | None = None


@dataclass
class PiscesGenerateOutput(ModelOutput):
    """What `generate` returns in "interleaved" mode, and in "image" mode with `return_dict_in_generate=True`.

    Args:
        sequences: (B, T) ids, the prompt included; a drawn image stands as its placeholders, so that
            `model(input_ids=sequences, gen_image_vectors=image_vectors)` reads everything back (for prompts without
            images of their own).
        image_vectors: (J, M, Dg) drawn images in reading order of `sequences`; (B, M, Dg) in "image" mode.
        image_rows: (J,) the row of `sequences` in which each image stands.
        past_key_values: the cache, if one was used.
    """

    sequences: torch.LongTensor | None = None
    image_vectors: torch.FloatTensor | None = None
    image_rows: torch.LongTensor | None = None
    past_key_values: Cache | None = None


__all__ = ["PiscesCausalLMOutputWithPast", "PiscesGenerateOutput", "PiscesModelOutputWithPast"]
