"""Writes one answer of a chat: text piece by piece, stop strings, and pictures where the model draws them itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .errors import ApiError
from .pictures import decode


@dataclass
class Chat:
    """What a chat request asks for.

    Args:
        messages: of the chat template; pictures as they came in.
        temperature: 0 takes the likeliest token each time.
        stops: the answer ends before the first of these.
        draws: the model may draw pictures between its words.
    """

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    draws: bool = False


@dataclass
class Answer:
    """Parts in reading order: texts and pictures."""

    parts: list[Any] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    finish_reason: str = "stop"


class PartsStream:
    """A streamer for `generate` that turns tokens into parts: texts, and None for each picture.

    Text goes out as soon as it cannot change any more: not while a character is incomplete, and not while it may be
    the beginning of a stop string. Behind a picture everything waits, because the picture's vectors come last.

    Args:
        decode_ids: list of ids -> text.
        stops: stop strings.
        say: called with each piece of text before the first picture.
        picture_ids: (start, end) tokens around a picture, or None.
    """

    def __init__(
        self,
        decode_ids: Callable[[list[int]], str],
        stops: tuple[str, ...],
        say: Callable[[str], Any],
        picture_ids: tuple[int, int] | None,
    ):
        self.decode_ids, self.stops, self.say = decode_ids, stops, say
        self.picture_ids = picture_ids or (None, None)
        self.parts: list[str | None] = []
        self.ids: list[int] = []  # of the text that is being written
        self.num_said = 0  # characters of it
        self.has_prompt = self.is_stopped = False

    def put(self, tokens: torch.Tensor) -> None:
        if not self.has_prompt:  # generate hands over the prompt first
            self.has_prompt = True
            return
        for token in tokens.flatten().tolist():
            if token == self.picture_ids[0]:
                self._close_text()
                self.parts.append(None)
            elif token != self.picture_ids[1] and not self.is_stopped:
                self.ids.append(token)
                self._advance()

    def end(self) -> None:
        """`generate` calls this also when it fails; the last text is closed by `close`."""

    def close(self) -> list[str | None]:
        """All parts, when nothing comes any more."""
        self._close_text()
        return self.parts

    def _advance(self) -> None:
        text = self.decode_ids(self.ids)
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._say(text[: min(found)])
        elif not text.endswith("\ufffd"):
            self._say(text[: len(text) - self._num_doubtful(text)])

    def _num_doubtful(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)

    def _say(self, text: str) -> None:
        if len(text) > self.num_said and None not in self.parts:
            self.say(text[self.num_said :])
            self.num_said = len(text)

    def _close_text(self) -> None:
        text = self.decode_ids(self.ids) if self.ids else ""
        text = text[: min([place for stop in self.stops if (place := text.find(stop)) >= 0], default=len(text))]
        self._say(text)
        if text:
            self.parts.append(text)
        self.ids, self.num_said = [], 0


class Halt(StoppingCriteria):
    """Ends every row as soon as `is_over()`."""

    def __init__(self, is_over: Callable[[], bool]):
        self.is_over = is_over

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.is_over(), dtype=torch.bool, device=input_ids.device)


def write_answer(
    model: Any,
    processor: Any,
    chat: Chat,
    say: Callable[[str], Any],
    is_gone: Callable[[], bool],
    draw: Callable[[torch.Tensor, int], list[Any]] | None,
    max_pixels: int,
    max_prompt_tokens: int,
    default_tokens: int,
) -> Answer:
    """Answer one chat with the model.

    Args:
        say: gets the text before the first picture, piece by piece.
        is_gone: whether nobody listens any more.
        draw: (J, M, Dg) vectors and a seed -> J pictures; None where there is no decoder.

    Raises:
        ApiError: the prompt is too long.
        ValueError: a picture or a message that the processor refuses.
    """
    inputs = _inputs(model, processor, chat, max_pixels)
    num_prompt = inputs["input_ids"].shape[1]
    max_new_tokens = _room(model, processor, chat, num_prompt, max_prompt_tokens, default_tokens)
    config = model.config
    ends = (config.gen_start_token_id, config.gen_end_token_id) if chat.draws else None
    tokenizer = processor.tokenizer
    stream = PartsStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), chat.stops, say, ends)
    options: dict[str, Any] = {"do_sample": False}
    if chat.temperature > 0:
        options = {"do_sample": True, "temperature": chat.temperature, "top_p": chat.top_p, "top_k": 0}
    if chat.draws:
        options |= {"generation_mode": "interleaved"}
        if model.model.gen_head.is_stochastic:
            options["generator"] = torch.Generator("cpu").manual_seed(chat.seed)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(chat.seed)  # the one source of sampled tokens
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=stream,
            stopping_criteria=StoppingCriteriaList([Halt(lambda: stream.is_stopped or is_gone())]),
            **options,
        )
    sequence = output.sequences[0] if chat.draws else output[0]
    num_new = len(sequence) - num_prompt
    is_cut = not stream.is_stopped and num_new >= max_new_tokens and int(sequence[-1]) not in _end_ids(model)
    parts: list[Any] = list(stream.close())
    if None in parts and draw is not None:
        pictures = iter(draw(output.image_vectors, chat.seed))
        parts = [next(pictures) if part is None else part for part in parts]
    return Answer(parts, num_prompt, num_new, "length" if is_cut else "stop")


def _inputs(model: Any, processor: Any, chat: Chat, max_pixels: int) -> Any:
    messages = [
        {**message, "content": [_decoded(part, max_pixels) for part in message["content"]]}
        for message in chat.messages
    ]
    try:
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device, dtype=model.dtype)
    except ValueError:
        raise
    except Exception as error:  # a template may refuse an order of roles, in jinja's own error
        if type(error).__module__.startswith("jinja2"):
            raise ApiError(f"the checkpoint's chat template refuses these messages ({error}).") from error
        raise


def _decoded(part: dict[str, Any], max_pixels: int) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": "image", "image": decode(part["image"], max_pixels)}


def _room(model: Any, processor: Any, chat: Chat, num_prompt: int, max_prompt_tokens: int, default_tokens: int) -> int:
    """How many tokens the answer may have."""
    context = processor.tokenizer.model_max_length
    if num_prompt > max_prompt_tokens or num_prompt >= context:
        raise ApiError(
            f"the messages are {num_prompt} tokens; expected at most {min(max_prompt_tokens, context - 1)}. Shorten "
            "them or send fewer pictures.",
            code="context_length_exceeded",
            param="messages",
        )
    if chat.max_tokens is None:
        own = model.generation_config.max_new_tokens or default_tokens
        wanted = own + (model.config.num_gen_image_tokens + 2 if chat.draws else 0)  # and room for a picture
        return min(wanted, context - num_prompt)
    if num_prompt + chat.max_tokens > context:
        raise ApiError(
            f"the messages are {num_prompt} tokens and max_tokens is {chat.max_tokens}; together expected at most "
            f"{context}, the model's context.",
            code="context_length_exceeded",
            param="max_tokens",
        )
    return chat.max_tokens


def _end_ids(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


__all__ = ["Answer", "Chat", "Halt", "PartsStream", "write_answer"]
