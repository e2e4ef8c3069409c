"""What `PiscesPipeline` refuses before any model runs: parts that do not fit each other, and impossible requests.

Each function looks at one thing and raises a ValueError with the value, the expectation and the next step. The
pipeline calls them at the start of a call, because schedulers are swapped by assignment, and `check_decoder` also
before it loads a language model. The console command asks the same of the files of a checkpoint. Only configurations
and the planned numbers are read, so nothing here needs diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor


if TYPE_CHECKING:  # the export asks `check_decoder` where diffusers may be absent
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
# beginnings of diffusers' class names
EDM = ("EDM", "CosineDPM", "CMStochastic")
READS_FLOW_SIGMAS = ("DPMSolver", "UniPC", "DEIS", "SASolver")
# these keep a signal of exactly zero at the last step; the others put 2 ** -24 there
KEEPS_ZERO_SIGNAL = ("DDIM", "DDPM", "LCM", "TCD")


def integer(value: Any) -> int | None:
    """Python's or numpy's integer as an int; None for everything else, also for booleans."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def finite_number(value: Any) -> float | None:
    """Python's or numpy's finite number; None for everything else, also for booleans."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


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
    if not _is_finite(vectors):
        raise ValueError(
            f"{name} has dtype {vectors.dtype}{_storage(vectors)} or non-finite values; expected finite floating "
            "numbers."
        )


def _is_finite(values: Tensor) -> bool:
    """Whether a tensor holds finite floats that can be looked at: none of 8 bits, sparse, or without values."""
    is_plain = values.layout == torch.strided and not values.is_meta and values.is_floating_point()
    return is_plain and values.dtype.itemsize > 1 and bool(torch.isfinite(values).all())


def _storage(values: Tensor) -> str:
    if values.layout != torch.strided:
        return f", layout {values.layout}"
    return ", no values (device meta)" if values.is_meta else ""


def check_generators(
    generator: Generators, num_samples: int, device: torch.device | str | None = None
) -> list[torch.Generator] | torch.Generator | None:
    """A list holds one generator per sample; one generator for one sample is the same as a list of one.

    `device` is where the noise is needed: a generator lives there or on the CPU.
    """
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if isinstance(generator, (list, tuple)):
        if len(generator) != num_samples or not all(isinstance(one, torch.Generator) for one in generator):
            raise ValueError(
                f"generator is a list of {len(generator)} but {num_samples} pictures were asked for (prompts x "
                "num_images_per_prompt); expected one torch.Generator per picture, or a single one for all."
            )
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is a {type(generator).__name__}; expected a torch.Generator or a list of them, for example "
            "torch.Generator().manual_seed(0)."
        )
    for one in generators:
        if one is not None and device is not None and one.device.type not in ("cpu", torch.device(device).type):
            raise ValueError(
                f"generator is on {one.device}, but the pipeline draws on {device}; expected one there or on the CPU: "
                f'torch.Generator("{torch.device(device).type}").'
            )
    if isinstance(generator, (list, tuple)):
        return generators
    return generators if generator is not None and num_samples == 1 else generator


def check_latents(latents: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    """Given starting noise has one row per picture, the size of its latents, and finite numbers."""
    if latents is None:
        return
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents are a {type(latents).__name__}; expected a tensor of shape {shape}.")
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; expected {shape}: pictures, channels, height and width in "
            "latents. Pass height= and width= for another size."
        )
    if not _is_finite(latents):
        raise ValueError(
            f"latents have dtype {latents.dtype}{_storage(latents)} or non-finite values; expected finite floating "
            "numbers, unit noise."
        )


def check_count(name: str, value: Any) -> int:
    """A number of pictures or steps."""
    count = integer(value)
    if count is None or count < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least 1.")
    return count


def check_guidance(value: Any, name: str = "guidance_scale") -> float:
    """A factor of guidance."""
    number = finite_number(value)
    if number is None or number < 0:
        raise ValueError(f"{name} is {value!r}; expected a finite number >= 0. 1 or less means no guidance.")
    return number


def check_eta(value: Any) -> float:
    """DDIM's share of noise."""
    number = finite_number(value)
    if number is None or not 0 <= number <= 1:
        raise ValueError(f"eta is {value!r}; expected a number from 0 (DDIM) to 1 (DDPM).")
    return number


def check_output_type(value: Any) -> None:
    if value not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {value!r}; expected one of {', '.join(OUTPUT_TYPES)}.")


def check_schedule(name: str, values: Any, num_trained: int | None) -> list:
    """Custom timesteps or sigmas as a plain list: finite numbers from noisy to clean, none of them twice.

    Raises:
        ValueError: naming the first value that cannot be used.
    """
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple, range)) or len(values) == 0:
        raise ValueError(f"{name} is {values!r:.80}; expected a non-empty list of numbers, from noisy to clean.")
    numbers: list = [integer(one) if name == "timesteps" and integer(one) is not None else one for one in values]
    # a sigma has no upper end of its own; a timestep is one that the U-Net was trained at
    end = num_trained if name == "timesteps" and num_trained else math.inf
    for index, value in enumerate(numbers):
        number = finite_number(value)
        if number is None or not 0 <= number < end:
            expected = f"a number from 0 to {end - 1}" if end < math.inf else "a finite number >= 0"
            raise ValueError(f"{name} {index} is {value!r}; expected {expected}.")
        if index and number >= numbers[index - 1]:
            raise ValueError(f"{name} {index} is {value!r} after {numbers[index - 1]!r}; expected falling numbers.")
    return numbers


def check_callback(callback: Callable | None, names: Sequence[str], known: Sequence[str]) -> None:
    """A callback can be called, and can only be shown tensors that the loop has."""
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback_on_step_end is a {type(callback).__name__}; expected a function "
            "f(pipe, step, timestep, tensors) -> tensors."
        )
    if not isinstance(names, (list, tuple, set, frozenset)):
        raise ValueError(f"callback_on_step_end_tensor_inputs is {names!r}; expected a list of some of {list(known)}.")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"callback_on_step_end_tensor_inputs names {unknown}; expected some of {list(known)}.")


def check_callback_result(result: Any, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a callback returned: nothing, or tensors of the shapes that it was shown."""
    if result is None:
        return {}
    if not isinstance(result, Mapping):
        raise ValueError(
            f"callback_on_step_end returned a {type(result).__name__}; expected None or a dict of tensors by name."
        )
    for name, value in result.items():
        if name not in tensors:
            raise ValueError(f"callback_on_step_end returned {name!r}; expected some of {list(tensors)}.")
        before = tensors[name]
        if before is None and value is None:
            continue
        if not isinstance(value, Tensor) or (before is not None and value.shape != before.shape):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            expected = "None" if before is None else f"a tensor of shape {tuple(before.shape)}"
            raise ValueError(f"callback_on_step_end returned {name} as {found}; expected {expected}.")
    return dict(result)


# what the pipeline hands to `generate` itself: how it is called, and what the processor makes of prompts and pictures
_PIPELINES_OWN = frozenset(
    "prompt generator generation_mode num_return_sequences num_images_per_prompt inputs input_ids inputs_embeds "
    "attention_mask pixel_values image_features gen_pixel_values gen_image_vectors".split()
)


def check_vector_options(options: Any) -> dict[str, Any]:
    """Options of `model.generate`: not those that the pipeline sets itself, and numbers that can be drawn with."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"vector_kwargs is {options!r:.80}; expected a dict of options of model.generate.")
    if given := sorted(_PIPELINES_OWN & set(options)):
        raise ValueError(
            f"vector_kwargs: {', '.join(given)} is set by the pipeline. Use its own prompt=, generator= and "
            "num_images_per_prompt=."
        )
    temperature = options.get("image_temperature")
    if temperature is not None and (finite_number(temperature) is None or temperature < 0):
        raise ValueError(f"vector_kwargs: image_temperature is {temperature!r}; expected a finite number >= 0.")
    steps = options.get("num_flow_steps")
    if steps is not None and (integer(steps) is None or steps < 1):
        raise ValueError(f"vector_kwargs: num_flow_steps is {steps!r}; expected an integer of at least 1.")
    return dict(options)


def check_finite(what: str, values: Tensor, advice: str) -> Tensor:
    """Refuse a result that holds NaN or infinity, by the first picture that does."""
    is_finite = torch.isfinite(values).flatten(1).all(1)
    if not is_finite.all():
        row = int((~is_finite).nonzero()[0])
        raise ValueError(f"picture {row}: {what} hold NaN or infinite values. {advice}")
    return values


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


def picture_rows(image: Any, num_prompts: int) -> list[list[Any]]:
    """Pictures to edit, one list for each prompt; they are not opened here.

    Args:
        image: an entry for each prompt, or for a single prompt the entry itself. An entry is a picture, or a list of
            pictures that the prompt shows together. An array of four dimensions is a list.

    Raises:
        ValueError: the entries do not pair up with the prompts, or one holds no picture.
    """
    rows = [_unpacked(entry) for entry in _unpacked(image)]
    for row, pictures in enumerate(rows):
        if not pictures or any(picture is None for picture in pictures):
            raise ValueError(
                f"image {row} holds no picture; expected a picture, or a list of several for one prompt. A prompt "
                "without a picture is drawn in a call of its own, without image=."
            )
        if any(_is_list(picture) for picture in pictures):
            raise ValueError(
                f"image {row} is a list of lists; expected a picture or a list of pictures for each prompt. Pass "
                "image=[[first, second], [third]] for two prompts."
            )
    if len(rows) == num_prompts:
        return rows
    if len(rows) == 1:
        advice = f"To edit one picture in several ways, pass it for each: image=[picture] * {num_prompts}."
    elif num_prompts == 1:
        advice = (
            "To show them all in one prompt, pass image=[[first, second]]; to edit each of them, pass the prompt for "
            f"each: prompt=[prompt] * {len(rows)}."
        )
    else:
        advice = "To show several pictures in one prompt, pass a list of them in its place."
    entries = "1 entry" if len(rows) == 1 else f"{len(rows)} entries"
    prompts = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
    raise ValueError(f"image has {entries} for {prompts}; expected one for each prompt. {advice}")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 4


def _unpacked(value: Any) -> list[Any]:
    return list(value) if _is_list(value) else [value]


def check_strength(value: Any, rows: Sequence[Sequence[Any]] | None, vae: Any, scheduler: Any) -> float | None:
    """How much of the noise is put on the source picture before denoising; None starts from noise alone.

    Args:
        rows: the pictures of each prompt, or None.

    Raises:
        ValueError: no number in (0, 1], or there is not one picture per prompt, a VAE and a scheduler to start with.
    """
    if value is None:
        return None
    number = finite_number(value)
    if number is None or not 0 < number <= 1:
        raise ValueError(
            f"strength is {value!r}; expected a number above 0 and at most 1, the share of the steps that are run on "
            "the source picture. Leave it out to start from noise."
        )
    if rows is None:
        raise ValueError(f"strength is {number:g} but there is no image to start from. Pass image= too.")
    for row, pictures in enumerate(rows):
        if len(pictures) > 1:
            raise ValueError(
                f"strength is {number:g} but prompt {row} shows {len(pictures)} pictures; expected one to start from. "
                "Leave strength out, or show one picture."
            )
    if vae is None:
        raise ValueError(
            f"strength is {number:g} but this pipeline has no VAE, which turns the source picture into latents to "
            "start from. Leave strength out, or pass the vae= that the U-Net was trained with."
        )
    if not hasattr(scheduler, "add_noise") and not hasattr(scheduler, "scale_noise"):
        raise ValueError(
            f"strength is {number:g} but {type(scheduler).__name__} cannot put noise on a picture (no add_noise). "
            "Leave strength out, or swap the scheduler."
        )
    return number


def check_rows(name: str, found: int, num_rows: int) -> None:
    """The negative side has one row for all, or one for each row that is drawn."""
    if found not in (1, num_rows):
        expected = "1" if num_rows == 1 else f"1 or {num_rows}"
        raise ValueError(f"{name} has {found} rows for {num_rows} to draw; expected {expected}.")


def check_size_pairs(**pairs: tuple[int, int]) -> None:
    """SDXL's sizes and crop are pairs of integers, in pixels: a size is positive, a crop may start at 0."""
    for name, pair in pairs.items():
        values = [integer(value) for value in pair] if isinstance(pair, (list, tuple)) else []
        smallest = 0 if name == "crops_coords_top_left" else 1
        if len(values) != 2 or any(value is None or value < smallest for value in values):
            raise ValueError(
                f"{name} is {pair!r}; expected two integers >= {smallest}, (height, width) or (top, left) in pixels."
            )


def check_default_negative(value: str) -> None:
    """Refuse a default negative that no pipeline knows, before anything is built."""
    if not isinstance(value, str) or value not in ("empty", "zeros"):
        raise ValueError(
            f'default_negative is {value!r}; expected "empty" (the empty prompt) or "zeros" (all-zero vectors).'
        )


# ---- schedulers and VAE settings ------------------------------------------------------------------------------------


def prediction_kind(class_name: str, config: Mapping[str, Any]) -> str | None:
    """What a scheduler takes the U-Net's output for: one of PREDICTIONS, "edm" (Karras et al. 2022, networks with
    their own scaling of input and output), or None where its configuration does not say."""
    prediction = config.get("prediction_type")
    # by class, because `from_config` hands settings on to classes that do not read them
    has_flow_sigmas = class_name.startswith(READS_FLOW_SIGMAS) and config.get("use_flow_sigmas")
    if class_name.startswith("FlowM") or prediction == "flow_prediction" or has_flow_sigmas:
        return "flow_prediction"
    return "edm" if class_name.startswith(EDM) else prediction


def check_scheduler_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse settings that end in NaN: a noise schedule without noise or signal, or an unknown prediction.

    Args:
        config: of any diffusers scheduler, as its JSON file holds it.
        source: the file, or the class, for the message.

    Raises:
        ValueError: naming the setting.
    """
    steps = config.get("num_train_timesteps", 1000)
    if integer(steps) is None or steps < 1:
        raise ValueError(f"{source}: num_train_timesteps is {steps!r}; expected an integer of at least 1.")
    prediction = config.get("prediction_type")
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(f"{source}: prediction_type is {prediction!r}; expected one of {', '.join(PREDICTIONS)}.")
    betas = config.get("trained_betas")
    if betas is not None and not isinstance(betas, (list, tuple)):
        betas = betas.tolist() if hasattr(betas, "tolist") else [betas]
    if betas is not None:
        named = {f"trained_betas {index}": value for index, value in enumerate(betas)}
    elif config.get("beta_schedule") == "squaredcos_cap_v2":
        named = {}  # has no start and end
    else:
        named = {name: config[name] for name in ("beta_start", "beta_end") if name in config}
    for name, value in named.items():
        number = finite_number(value)
        if number is None or not 0 < number < 1:
            raise ValueError(f"{source}: {name} is {value!r}; expected a number between 0 and 1, both excluded.")
    class_name = str(config.get("_class_name", source))
    is_epsilon = prediction_kind(class_name, config) in (None, "epsilon")
    if config.get("rescale_betas_zero_snr") and is_epsilon and class_name.startswith(KEEPS_ZERO_SIGNAL):
        found = "is not set, which means" if prediction is None else "is"
        raise ValueError(
            f"{source}: prediction_type {found} 'epsilon' with rescale_betas_zero_snr; expected 'v_prediction' or "
            "'sample', because noise alone says nothing about the picture at a signal of zero."
        )


def check_vae_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a scaling of latents that divides by zero or is no number."""
    factor = config.get("scaling_factor")
    if factor is not None and not finite_number(factor):
        raise ValueError(f"{source}: scaling_factor is {factor!r}; expected a finite number other than 0.")
    shift = config.get("shift_factor")
    if shift is not None and finite_number(shift) is None:
        raise ValueError(f"{source}: shift_factor is {shift!r}; expected a finite number.")
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is not None and not isinstance(values, (list, tuple)):
            raise ValueError(f"{source}: {name} is {values!r}; expected a list of numbers, one per channel.")
        for index, value in enumerate(values or ()):
            if finite_number(value) is None:
                raise ValueError(f"{source}: {name} {index} is {value!r}; expected a finite number.")


def check_scheduler(scheduler: Any, trained: str | None) -> None:
    """Refuse a scheduler whose settings cannot work, or that reads the U-Net's output as something else than it is.

    Args:
        trained: what the U-Net was trained to predict, as `prediction_kind` names it; None if nobody knows.
    """
    name = type(scheduler).__name__
    check_scheduler_config({**scheduler.config, "_class_name": name}, name)
    kind = prediction_kind(name, scheduler.config)
    if trained is None or kind is None or kind == trained:
        return
    if trained in ("edm", "flow_prediction") or kind in ("edm", "flow_prediction"):
        advice = "Use a scheduler of the checkpoint's own kind, for example the one in its scheduler/ folder."
    else:
        advice = f"Use {name}.from_config(pipe.scheduler.config, prediction_type={trained!r})."
    raise ValueError(
        f"scheduler: {name} reads the U-Net's output as {kind!r}, but this U-Net was trained to predict {trained!r}. "
        f"{advice}"
    )


def check_plan(scheduler: Any) -> None:
    """Refuse planned steps that hold no finite numbers."""
    name = type(scheduler).__name__
    for attribute in ("timesteps", "sigmas", "alphas_cumprod", "init_noise_sigma"):
        values = getattr(scheduler, attribute, None)
        if values is not None and not torch.isfinite(torch.as_tensor(values).float()).all():
            raise ValueError(f"scheduler: {name} plans {attribute} that are not finite. Check its settings.")
