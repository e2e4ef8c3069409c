"""Checks of a loaded model and processor that no library makes: settings of a wrong kind that load and fail later.

`modeling_pisces/checkpoint/loading.py` calls them once per checkpoint; each refusal names the file that holds the
setting.
"""

from pathlib import Path
from typing import Any

from PIL import Image


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
            shape = tuple(
                image_processor(images=Image.new("RGB", (side, side)), return_tensors="pt").pixel_values.shape
            )
        except Exception as error:  # whatever PIL, numpy and transformers say of a setting that they cannot use
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: {name} cannot prepare a picture ({reason}). Repair it.") from error
        if shape != (1, 3, side, side):
            raise ValueError(
                f"{path}: {name} makes pictures of shape {shape[1:]}, but {tower} in "
                f"config.json takes {(3, side, side)}. Give the checkpoint its own image processor."
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


__all__ = ["check_generation_values", "check_picture_sizes", "check_text_length"]
