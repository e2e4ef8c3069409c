"""What `PiscesPipeline` refuses before any model runs: parts that do not fit each other, and impossible requests.

Each function looks at one thing and raises a ValueError with the value, the expectation and the next step. The
pipeline calls them at the start of a call, and `check_decoder` also before it loads a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor


if TYPE_CHECKING:  # the export asks `check_decoder` where diffusers may be absent
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def decoder_vector_size(unet: UNet2DConditionModel) -> int:
    """Width Dg of the vectors that this U-Net reads.

    Raises:
        ValueError: the blocks of the U-Net attend to vectors of different widths.
    """
    if unet.config.encoder_hid_dim is not None:
        return unet.config.encoder_hid_dim
    width = unet.config.cross_attention_dim
    widths = {width} if isinstance(width, int) else set(width)
    if len(widths) > 1:
        raise ValueError(
            f"unet: cross_attention_dim {width} differs between blocks; expected one width in all of them."
        )
    return widths.pop()


def check_decoder(
    unet: UNet2DConditionModel, vae: AutoencoderKL | AutoencoderTiny | None, vector_size: int, source: str
) -> None:
    """Refuse a U-Net that cannot work with these vectors, this VAE or the conditions that the pipeline provides.

    Args:
        vector_size: width Dg of the vectors.
        source: where they come from, for the message.

    Raises:
        ValueError: naming the two values that do not agree.
    """
    if decoder_vector_size(unet) != vector_size:
        raise ValueError(
            f"{source} has vectors of width {vector_size} but the decoder's U-Net reads width "
            f"{decoder_vector_size(unet)} (cross_attention_dim, or encoder_hid_dim where it is set). "
            "Use a decoder trained on this model's generation encoder."
        )
    channels = unet.config.in_channels
    expected = (1, 3) if vae is None else (vae.config.latent_channels,)
    if channels not in expected or unet.config.out_channels != channels:
        space = "pixels, because there is no VAE," if vae is None else "the latents of this VAE"
        raise ValueError(
            f"unet: in_channels {channels} and out_channels {unet.config.out_channels}, but {space} have "
            f"{' or '.join(map(str, expected))} channels. Pass the VAE that the U-Net was trained with (vae=None for "
            "a pixel-space decoder)."
        )
    _check_added_embedding(unet, vector_size)


def _check_added_embedding(unet: UNet2DConditionModel, vector_size: int) -> None:
    kind = unet.config.addition_embed_type
    if kind not in (None, "text_time"):
        raise ValueError(
            f"unet: addition_embed_type {kind!r} is not supported; expected None or 'text_time' (SDXL). "
            "Only the vectors, their mean and the picture's sizes are available as conditions."
        )
    if unet.config.class_embed_type is not None or unet.config.num_class_embeds is not None:
        raise ValueError("unet: class labels (class_embed_type, num_class_embeds) are not supported; expected None.")
    if kind is None:
        return
    time_size, found = unet.config.addition_time_embed_dim, unet.config.projection_class_embeddings_input_dim
    # six numbers: original height and width, crop top and left, target height and width
    if found != vector_size + 6 * time_size:
        raise ValueError(
            f"unet: projection_class_embeddings_input_dim is {found}, expected {vector_size + 6 * time_size} = vector "
            f"width {vector_size} + 6 x addition_time_embed_dim {time_size}. Build the U-Net with that value: the "
            "mean of the vectors takes the place of SDXL's pooled text embedding."
        )


def check_vectors(name: str, vectors: Tensor) -> None:
    """Refuse what is not a floating, finite (B, M, Dg) tensor."""
    if not isinstance(vectors, Tensor):
        raise ValueError(f"{name} is a {type(vectors).__name__}; expected a tensor of shape (B, M, Dg).")
    if vectors.ndim != 3 or 0 in vectors.shape:
        raise ValueError(
            f"{name} has shape {tuple(vectors.shape)}; expected (B, M, Dg): pictures, vectors per picture, width. "
            "Add the first axis with [None] for a single picture."
        )
    if not vectors.is_floating_point() or not torch.isfinite(vectors).all():
        raise ValueError(f"{name} has dtype {vectors.dtype} or non-finite values; expected finite floating numbers.")


def check_generators(generator: Generators, num_samples: int) -> Generators:
    """A list holds one generator per sample; one generator for one sample is the same as a list of one."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != num_samples or not all(isinstance(one, torch.Generator) for one in generator):
            raise ValueError(
                f"generator is a list of {len(generator)} but {num_samples} pictures were asked for (prompts x "
                "num_images_per_prompt); expected one torch.Generator per picture, or a single one for all."
            )
        return list(generator)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is a {type(generator).__name__}; expected a torch.Generator or a list of them, for example "
            "torch.Generator().manual_seed(0)."
        )
    return [generator] if generator is not None and num_samples == 1 else generator


def check_latents(latents: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    """Given starting noise has one row per picture and the size of its latents."""
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; expected {shape}: pictures, channels, height and width in "
            "latents. Pass height= and width= for another size."
        )


def check_settings(
    output_type: str, num_images_per_prompt: int, num_inference_steps: int, guidance_scale: float
) -> None:
    """Refuse settings of a wrong kind or out of range, by their name."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}.")
    counts = {"num_images_per_prompt": num_images_per_prompt, "num_inference_steps": num_inference_steps}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1.")
    if not isinstance(guidance_scale, (int, float)) or not 0 <= guidance_scale < float("inf"):
        raise ValueError(
            f"guidance_scale is {guidance_scale!r}; expected a finite number >= 0. 1 or less means no guidance."
        )


def check_callback_names(names: Sequence[str], known: Sequence[str]) -> None:
    """A callback can only be shown tensors that the loop has."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"callback_on_step_end_tensor_inputs names {unknown}; expected some of {list(known)}.")


def check_vector_options(options: dict[str, Any]) -> None:
    """Options of `model.generate` that the pipeline sets itself cannot be given a second time."""
    reserved = {"prompt", "generator", "generation_mode", "num_return_sequences", "num_images_per_prompt"}
    if given := sorted(reserved & set(options)):
        raise ValueError(
            f"vector_kwargs: {', '.join(given)} is set by the pipeline. Use its own prompt=, generator= and "
            "num_images_per_prompt=."
        )


def check_one_given(first: str, second: str, values: tuple[Any, Any], needs_one: bool = True) -> None:
    """Of two arguments that say the same thing, exactly one (or at most one) may be given."""
    num_given = sum(value is not None for value in values)
    if num_given == 2 or (needs_one and num_given == 0):
        expected = "exactly one" if needs_one else "at most one"
        found = "both" if num_given else "neither"
        raise ValueError(f"{found} of {first} and {second} given; expected {expected}. Pass {first}= or {second}=.")


def prompt_list(name: str, prompts: Any) -> list[str]:
    """One prompt or several, as a non-empty list of strings; empty strings are prompts too."""
    rows = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ValueError(f"{name} is {prompts!r:.80}; expected a string or a non-empty list of strings.")
    for row, text in enumerate(rows):
        if not isinstance(text, str):
            raise ValueError(f"{name} {row} is a {type(text).__name__}; expected a string.")
    return list(rows)


def check_rows(name: str, found: int, num_rows: int) -> None:
    """The negative side has one row for all, or one for each row that is drawn."""
    if found not in (1, num_rows):
        expected = "1" if num_rows == 1 else f"1 or {num_rows}"
        raise ValueError(f"{name} has {found} rows for {num_rows} to draw; expected {expected}.")


def check_size_pairs(**pairs: tuple[int, int]) -> None:
    """SDXL's sizes and crop are pairs of integers, in pixels."""
    for name, pair in pairs.items():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(value, int) for value in pair):
            raise ValueError(f"{name} is {pair!r}; expected two integers, (height, width) or (top, left) in pixels.")


def check_default_negative(value: str) -> None:
    """Refuse a default negative that no pipeline knows, before anything is built."""
    if value not in ("empty", "zeros"):
        raise ValueError(
            f'default_negative is {value!r}; expected "empty" (the empty prompt) or "zeros" (all-zero vectors).'
        )
