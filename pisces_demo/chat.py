"""A conversation as the page keeps it: messages of text and pictures, for the model and for the eye.

`pisces_demo/model.py` writes answers into it, `pisces_demo/page.py` shows it. Nothing here runs a model.
"""

# M generated vectors per image, Dg width of a generated vector
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .checks import MAX_PICTURES, check_text, open_upload


@dataclass
class Part:
    """A piece of text, or a picture; a picture that is still being drawn has neither pixels nor vectors.

    Args:
        text: None for a picture.
        picture: what is shown.
        vectors: (M, Dg) of a drawn picture: what the model reads of it when the conversation goes on.
    """

    text: str | None = None
    picture: Image.Image | None = None
    vectors: Tensor | None = None


@dataclass
class Message:
    """A turn of the conversation; `role` is "user" or "assistant"."""

    role: str
    parts: list[Part] = field(default_factory=list)


def ask(history: Sequence[Message], text: Any, files: Sequence[Any] | None) -> list[Message]:
    """The conversation with a new question at its end.

    A question that was stopped before there was an answer is left out: the next one takes its place.

    Args:
        files: paths of uploaded pictures; they stand before the text, as in the rows that training uses.

    Raises:
        ValueError: neither text nor pictures, too many pictures, or one that cannot be read.
    """
    files = list(files or [])
    if len(files) > MAX_PICTURES:
        raise ValueError(f"{len(files)} pictures in one message, the limit is {MAX_PICTURES}. Send fewer.")
    parts = [Part(picture=open_upload(path)) for path in files]
    if not files or (isinstance(text, str) and text.strip()):
        parts.append(Part(text=check_text(text, "message", "Write a question, or what to draw.")))
    else:
        parts.append(Part(text="Describe the picture." if len(files) == 1 else "Describe the pictures."))
    return [*answered(history), Message("user", parts)]


def answered(history: Sequence[Message]) -> list[Message]:
    """The conversation without a question at its end that has no answer."""
    history = list(history)
    while history and (history[-1].role == "user" or not _readable(history[-1])):
        history.pop()
    return history


def messages_for_model(history: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation in the form that `apply_chat_template` reads; drawn pictures go back as their vectors."""
    return [{"role": message.role, "content": _readable(message)} for message in history]


def _readable(message: Message) -> list[dict[str, Any]]:
    content = []
    for part in message.parts:
        if part.vectors is not None:
            content.append({"type": "image", "image_vectors": part.vectors})
        elif part.picture is not None:
            content.append({"type": "image", "image": part.picture})
        elif part.text:
            content.append({"type": "text", "text": part.text})
    return content


class PartStreamer:
    """A streamer for `generate` that keeps an answer as parts: text as far as it is written, a mark for each picture.

    Args:
        tokenizer: turns token ids into text.
        gen_start_id, gen_end_id: a drawn picture reaches a streamer as these two; None: nothing is drawn.
        say: called after each token with the parts so far.
    """

    def __init__(self, tokenizer: Any, gen_start_id: int | None, gen_end_id: int | None, say: Any):
        self.tokenizer, self.say = tokenizer, say
        self.gen_start_id, self.gen_end_id = gen_start_id, gen_end_id
        self.parts: list[Part] = []
        self.token_ids: list[int] = []  # of the text that is being written
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token after the other."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token_id in torch.as_tensor(value).flatten().tolist():
            self._add(token_id)
        self.say([Part(part.text) for part in self.parts])

    def _add(self, token_id: int) -> None:
        if token_id == self.gen_end_id:
            return
        if token_id == self.gen_start_id:
            self.parts.append(Part())
            self.token_ids = []
            return
        if not self.token_ids:
            self.parts.append(Part(""))
        self.token_ids.append(token_id)
        # all of it again: a word or a character may be made of several tokens
        text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        self.parts[-1].text = text.removesuffix("\ufffd")

    def end(self) -> None:
        """Nothing is held back, so nothing is left to say."""
