"""Checks of a loaded model and processor that no library makes: settings of a wrong kind that load and fail later.

`modeling_pisces/checkpoint/loading.py` calls them once per checkpoint; each refusal names the file that holds the
setting.
"""

import inspect
from pathlib import Path
from typing import Any

from PIL import Image


MAX_PIXEL = 1000.0  # normalised ones are below 3; without rescaling 255 divided by a standard deviation


def check_processor(folder: Path, processor: Any, config: Any) -> None:
    """The processor must be one of Pisces, and count as many vectors per picture as the model makes.

    Raises:
        ValueError: naming the file and both counts.
    """
    path = folder / "processor_config.json"
    if not all(hasattr(processor, name) for name in ("tokenizer", "image_processor", "num_image_tokens")):
        raise ValueError(
            f"{path}: describes a {type(processor).__name__}, expected a PiscesProcessor. Look at processor_class, or "
            "download the checkpoint again."
        )
    draws = processor.can_draw and config.has_generation
    for name in ("num_image_tokens", "num_gen_image_tokens") if draws else ("num_image_tokens",):
        expected, found = getattr(config, name), getattr(processor, name)
        if found != expected:
            raise ValueError(f"{path}: {name} is {found}, but config.json makes {expected} vectors. Repair it.")


def check_part_settings(folder: Path, part: Any) -> None:
    """Settings of a diffusers part must be of the types of their defaults; Python takes ["no"] for True.

    Args:
        folder: of the part.
        part: a loaded U-Net, VAE or scheduler.

    Raises:
        ValueError: naming the first one that is not.
    """
    path = folder / ("scheduler_config.json" if hasattr(part, "set_timesteps") else "config.json")
    for name, parameter in inspect.signature(type(part).__init__).parameters.items():
        default, value = parameter.default, part.config.get(name)
        if value is None or default is None or default is inspect.Parameter.empty:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(default, bool):
            # some may be given for each block
            is_right = isinstance(value, bool) or (
                isinstance(value, (list, tuple)) and set(map(type, value)) <= {bool}
            )
            kind = "true or false"
        elif isinstance(default, (int, float)):
            is_right, kind = is_number or isinstance(value, (list, tuple)), "a number"
        elif isinstance(default, str):
            is_right, kind = isinstance(value, str), "a word"
        else:
            continue
        if not is_right:
            raise ValueError(f"{path}: {name} is {value!r:.80}, expected {kind}. Repair it.")
    sides = part.config.get("sample_size")
    for side in sides if isinstance(sides, (list, tuple)) else [sides]:
        if side is not None and (type(side) is not int or side < 1):
            raise ValueError(
                f"{path}: sample_size is {sides!r:.80}, expected a whole number of at least 1. Repair it."
            )


def check_picture_sizes(folder: Path, processor: Any, config: Any) -> None:
    """Let both image processors prepare a picture, and compare its shape with what the towers take.

    Raises:
        ValueError: one of them cannot, or makes pictures of another size.
    """
    path = folder / "processor_config.json"
    for name, tower in (("image_processor", "vision_config"), ("gen_image_processor", "gen_vision_config")):
        image_processor, tower_config = getattr(processor, name, None), getattr(config, tower, None)
        side = getattr(tower_config, "image_size", None)
        if image_processor is None or not isinstance(side, int):
            continue
        try:
            pixels = image_processor(images=Image.new("RGB", (side, side), "white"), return_tensors="pt").pixel_values
            shape, largest = tuple(pixels.shape), float(pixels.abs().max())  # NaN where one pixel is
        except Exception as error:  # whatever PIL, numpy and transformers say of a setting that they cannot use
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: {name} cannot prepare a picture ({reason}). Repair it.") from error
        if shape != (1, 3, side, side):
            raise ValueError(
                f"{path}: {name} makes pictures of shape {shape[1:]}, but {tower} in "
                f"config.json takes {(3, side, side)}. Give the checkpoint its own image processor."
            )
        if not largest <= MAX_PIXEL:
            raise ValueError(
                f"{path}: {name} makes {largest:g} of a white pixel, expected a number of about 1. Look at its "
                "image_mean, image_std and rescale_factor, or download the checkpoint again."
            )


def check_tokens(folder: Path, processor: Any) -> None:
    """The tokens of pictures must be found wherever they stand in a text, each as one id.

    Raises:
        ValueError: naming the token.
    """
    tokenizer = processor.tokenizer
    drawn = ("gen_image_token", "gen_start_token", "gen_end_token") if processor.can_draw else ()
    for name in ("image_token", *drawn):
        token, token_id = getattr(processor, name), getattr(processor, f"{name}_id")
        ids = tokenizer(f"a{token}{token}b", add_special_tokens=False)["input_ids"]
        if ids.count(token_id) != 2:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: {name} {token!r} is not found inside a text, so pictures have no place "
                "there. Look at its entry in added_tokens, or download the checkpoint again."
            )


def check_text_length(folder: Path, tokenizer: Any) -> None:
    """The tokenizer's longest text must be a number of tokens; 1e30, as transformers writes it, means no limit.

    Raises:
        ValueError: no whole number, or below 1.
    """
    length = tokenizer.model_max_length
    is_number = isinstance(length, (int, float)) and not isinstance(length, bool)
    if not is_number or length < 1 or (isinstance(length, float) and not length.is_integer()):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {length!r}, expected a whole number of tokens. "
            "Repair it, or download the checkpoint again."
        )


def check_generation_values(folder: Path, settings: Any) -> None:
    """The settings of generation_config.json that the commands use.

    Raises:
        ValueError: a temperature below 0 or no number, a token that is no id, or a longest answer that is no
            positive whole number.
    """
    path = folder / "generation_config.json"
    temperature = getattr(settings, "image_temperature", None)
    if temperature is not None and (isinstance(temperature, bool) or not isinstance(temperature, (int, float))):
        raise ValueError(f"{path}: image_temperature is {temperature!r}, expected a number of at least 0. Repair it.")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"{path}: image_temperature is {temperature}, expected a number of at least 0. Repair it.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(settings, name)
        ids = given if isinstance(given, list) and given and name == "eos_token_id" else [given]
        if given is not None and not all(type(token) is int for token in ids):
            raise ValueError(f"{path}: {name} is {given!r}, expected the id of a token. Repair it.")
    length = settings.max_new_tokens
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"{path}: max_new_tokens is {length!r}, expected a whole number of at least 1. Repair it.")


__all__ = [
    "check_generation_values",
    "check_part_settings",
    "check_picture_sizes",
    "check_processor",
    "check_text_length",
    "check_tokens",
]
