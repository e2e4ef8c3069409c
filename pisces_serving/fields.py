"""Reads the fields of a request one by one, judges each, and refuses by name whatever is left over.

A parameter that this server does not follow is an error and never ignored in silence; the ones that mean nothing here
(`user`, `metadata`), and values that ask for what happens anyway (`n=1`), are taken. `docs/serve.md` lists them.
"""

import math
from collections.abc import Iterable
from typing import Any

from .errors import ApiError, shown


LARGEST_SEED = 2**32 - 1  # what the commands of `pisces` take
NO_MEANING = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata")

# field -> the values that ask for nothing, and why others are refused
NOT_DONE: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "chat": {
        "n": ((1,), "one answer per request; send several requests with seeds of their own"),
        "logprobs": ((False,), "no log probabilities are returned"),
        "top_logprobs": ((0,), "no log probabilities are returned"),
        "frequency_penalty": ((0,), "the penalty is not applied"),
        "presence_penalty": ((0,), "the penalty is not applied"),
        "logit_bias": (({},), "tokens are not biased"),
        "response_format": (({"type": "text"},), "answers are not forced into a format"),
        "tools": (([],), "this model calls no tools"),
        "tool_choice": (("none", "auto"), "this model calls no tools"),
        "parallel_tool_calls": ((True, False), ""),
        "functions": (([],), "this model calls no functions"),
        "function_call": (("none", "auto"), "this model calls no functions"),
        "audio": ((), "this model does not speak"),
        "prediction": ((), "predicted outputs are not used"),
        "reasoning_effort": (("none",), "this model has no reasoning to set"),
        "verbosity": (("medium",), "the length of answers is max_tokens"),
        "web_search_options": ((), "this server searches nothing"),
        "store": ((False,), "nothing is stored"),
        "service_tier": (("auto", "default"), "there is one tier"),
        "moderation": (("auto",), "nothing is moderated"),
    },
    "images": {
        "quality": (("auto", "standard"), "quality is num_inference_steps"),
        "style": ((), "style belongs into the prompt"),
        "background": (("auto", "opaque"), "pictures have no transparency"),
        "moderation": (("auto",), "nothing is moderated"),
        "output_format": (("png",), "pictures are PNG"),
        "output_compression": ((100,), "PNG keeps every pixel"),
        "partial_images": ((0,), "no unfinished pictures are sent"),
        "stream": ((False,), "pictures are sent when they are finished"),
        "input_fidelity": ((), "use strength to keep more of the picture"),
        "mask": ((), "the model changes the whole picture as the prompt says; say in words what shall stay"),
    },
    "embeddings": {},
}


class Fields:
    """The fields of one request; reading one takes it out, `finish` refuses the rest.

    Args:
        given: name -> value; null means the default, as for OpenAI.
        endpoint: whose refusals hold: "chat", "images" or "embeddings".
        is_form: values are texts of a form.
    """

    def __init__(self, given: dict[str, Any], endpoint: str, is_form: bool = False):
        self.given = {name: value for name, value in given.items() if value is not None}
        self.endpoint, self.is_form = endpoint, is_form

    def take(self, name: str) -> Any:
        return self.given.pop(name, None)

    def whole(self, name: str, least: int, most: int, flag: str = "") -> int | None:
        """A whole number; `flag` names the limit that `most` comes from."""
        value = self._number(self.take(name))
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value:
            raise ApiError(f"{name} is {shown(value)}; expected a whole number of at least {least}.", param=name)
        if value > most:
            limit = f", this server's {flag}" if flag else ""
            raise ApiError(f"{name} is {shown(value)}; expected at most {most}{limit}.", param=name)
        return value

    def seed(self) -> int | None:
        return self.whole("seed", 0, LARGEST_SEED)

    def number(self, name: str, least: float, most: float, above: bool = False) -> float | None:
        """A finite number from `least` to `most`; with `above` more than `least`."""
        value = self._number(self.take(name))
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not least <= value <= most or (above and value == least):
            low = f"above {least:g}" if above else f"from {least:g}"
            raise ApiError(f"{name} is {shown(value)}; expected a number {low} to {most:g}.", param=name)
        return float(value)

    def text(self, name: str, required: bool = False) -> str | None:
        value = self.take(name)
        if value is None and not required:
            return None
        if required and (value is None or (isinstance(value, str) and not value.strip())):
            raise ApiError(f"{name} is {'missing' if value is None else 'empty'}. Say what is wanted.", param=name)
        return check_text(name, value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if self.is_form and isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if value is not None and not isinstance(value, bool):
            raise ApiError(f"{name} is {shown(value)}; expected true or false.", param=name)
        return bool(value)

    def choice(self, name: str, choices: Iterable[str]) -> str | None:
        value, choices = self.take(name), tuple(choices)
        if value is not None and value not in choices:
            raise ApiError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}.", param=name)
        return value

    def finish(self) -> None:
        """Refuse what nobody has read."""
        for name, value in self.given.items():
            if name in NO_MEANING:
                continue
            if name not in NOT_DONE[self.endpoint]:
                raise ApiError(
                    f"{shown(name)} is no parameter that this server knows here. Leave it out.",
                    param=name[:100],
                    code="unknown_parameter",
                )
            harmless, reason = NOT_DONE[self.endpoint][name]
            if self.is_form and isinstance(value, str):
                harmless = tuple(str(item).lower() if isinstance(item, (bool, int)) else item for item in harmless)
            # 1 == True in Python, and n=true is no one
            if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in harmless):
                raise ApiError(
                    f"{name} is not supported: {reason or 'it means nothing here'}. Leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )

    def _number(self, value: Any) -> Any:
        if not self.is_form or not isinstance(value, str) or len(value) > 30:
            return value
        for read in (int, float):
            try:
                return read(value)
            except ValueError:
                continue
        return value


def check_text(name: str, value: Any) -> str:
    """A text that a tokenizer can read: JSON can spell halves of characters, which UTF-8 has no bytes for."""
    if not isinstance(value, str):
        raise ApiError(f"{name} is {shown(value)}; expected a text.", param=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(f"{name} holds half a character (a lone surrogate). Send whole Unicode.", param=name) from None
    return value


def read_size(value: str | None, most_pixels: int) -> tuple[int | None, int | None]:
    """ "WIDTHxHEIGHT" as (height, width); (None, None), the decoder's own size, for nothing and "auto"."""
    if value is None or value == "auto":
        return None, None
    width, times, height = value.partition("x") if isinstance(value, str) else ("", "", "")
    is_right = times and all(side.isascii() and side.isdigit() and 0 < len(side) <= 5 for side in (width, height))
    if not is_right or int(width) * int(height) == 0:
        raise ApiError(f'size is {shown(value)}; expected "auto" or WIDTHxHEIGHT, as "512x512".', param="size")
    if int(width) * int(height) > most_pixels:
        raise ApiError(
            f"size is {shown(value)}; expected at most {most_pixels} pixels, this server's --max_draw_pixels.",
            param="size",
        )
    return int(height), int(width)


__all__ = ["LARGEST_SEED", "NOT_DONE", "NO_MEANING", "Fields", "check_text", "read_size"]
