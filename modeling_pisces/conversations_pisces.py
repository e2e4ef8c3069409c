"""Conversations as `PiscesProcessor.apply_chat_template` reads them, before any of them is tokenized.

Here: the default chat template, one form for all ways to write a message, the images of each turn, and the arithmetic
of assistant masks. Plain data in, plain data out: no tokenizer, no pixels. Control tokens that a user typed are judged
in `control_tokens_pisces`, with the tokenizer.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from .image_loading_pisces import decode_base64, one_line


# Llama-3.1's headers. The markers {% generation %} enclose what the model itself writes, for assistant masks.
_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {%- if message['content'] is string %}
                {{- message['content'] }}
            {%- else %}
                {%- for part in message['content'] %}
                    {{- 'GEN_IMAGE_TOKEN' if part['type'] == 'image' else part['text'] }}
                {%- endfor %}
            {%- endif %}
            {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] %}
                {{- 'IMAGE_TOKEN' if part['type'] == 'image' else part['text'] }}
            {%- endfor %}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")


def default_chat_template(image_token: str, gen_image_token: str) -> str:
    """Llama-3.1's chat form; one placeholder per image, of the kind that the turn's role calls for."""
    # written into the text, not passed as variables: a server that renders the template alone has no such variables
    return _TEMPLATE.replace("GEN_IMAGE_TOKEN", gen_image_token).replace("IMAGE_TOKEN", image_token)


def normalize_conversations(conversation: Any) -> tuple[list[list[dict]], bool]:
    """Copy one conversation or a batch of them into one form; the caller's objects stay as they are.

    A message or part may be a dict, a dataclass or a pydantic model (as clients of model servers return them), and a
    conversation an object with such `messages`. Keys whose value is None are dropped (tables fill missing keys with
    None), OpenAI's `image_url` parts become `image` parts, and an image part keeps its picture under the key
    "image"; one that came as an address keeps that as "url" too.

    Returns:
        The conversations, and whether a batch was given.

    Raises:
        ValueError: naming row and turn, for anything that is not a list of messages with a role and known parts.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(
            f"a conversation is a non-empty list of messages, not {one_line(repr(conversation), 80)}. "
            'Write [{"role": "user", "content": "..."}].'
        )
    is_batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    rows: list[Any] = [getattr(row, "messages", row) for row in conversation] if is_batched else [conversation]
    for index, row in enumerate(rows):
        if not isinstance(row, (list, tuple)) or not row:
            raise ValueError(
                f"row {index}: a conversation is a non-empty list of messages, not {one_line(repr(row), 80)}. Leave "
                'the row out, or write [{"role": "user", "content": "..."}].'
            )
    return [[_message(m, f"row {r}, turn {t}") for t, m in enumerate(row)] for r, row in enumerate(rows)], is_batched


def as_dict(value: Any) -> Any:
    """A dataclass or pydantic model as a dict of its fields, whose values stay what they are; other things as is."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.model_dump() if callable(getattr(value, "model_dump", None)) else value


def _message(message: Any, where: str) -> dict:
    message = as_dict(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: a message is a dict with a role and a content, not {one_line(repr(message), 80)}.")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        content = [_part(part, where) for part in content]
    elif not isinstance(content, str):
        raise ValueError(f"{where}: content is {type(content).__name__}, expected a string or a list of parts.")
    _check_unicode([message["role"], content] if isinstance(content, str) else [message["role"], *content], where)
    return {**message, "content": content}


def _check_unicode(values: list, where: str) -> None:
    for value in values:
        if find_surrogate(text := value if isinstance(value, str) else value.get("text", "")) is not None:
            raise ValueError(
                f"{where}: {text!r:.80} holds half of a character (a lone surrogate), which no tokenizer reads. "
                'Decode the text again, or drop it with text.encode("utf-8", "ignore").decode().'
            )


def find_surrogate(text: str) -> int | None:
    """Place of the first lone surrogate, half of a character that bad decoding left; None in proper text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _part(part: Any, where: str) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    part = as_dict(part)
    part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return part
    if part.get("type") not in ("image", "image_url"):
        raise ValueError(
            f"{where}: part {one_line(repr(part), 80)} is neither text nor image. "
            'Write {"type": "text", "text": ...} or {"type": "image", "image": ...}.'
        )
    sources = [key for key in _IMAGE_KEYS if key in part]
    if len(sources) + ("image_vectors" in part) > 1:
        raise ValueError(f"{where}: one image part has several sources {sources}. Keep one of them.")
    if "image_vectors" in part or not sources:
        return {key: part[key] for key in ("type", "image_vectors") if key in part} | {"type": "image"}
    source = as_dict(part[sources[0]])
    if isinstance(source, dict) and "url" in source:  # OpenAI's {"image_url": {"url": ...}}
        source = source["url"]
    if sources == ["base64"] and not str(source).startswith("data:"):
        source = decode_base64(str(source), f"{where}, base64 image")
    address = {"url": source} if sources[0] in ("url", "image_url") else {}  # some templates write it into the prompt
    return {"type": "image", "image": source, **address}


def collect_images(conversations: list[list[dict]]) -> dict[str, list[list]]:
    """The pictures of each row: shown by the user, drawn by the assistant, and drawn but kept as vectors.

    Returns:
        Three lists of rows, "images", "gen_images" and "gen_image_vectors". An image part without a source adds
        nothing: its picture is passed beside the conversation.

    Raises:
        ValueError: vectors in a turn that the assistant did not write.
    """
    found: dict[str, list[list]] = {"images": [], "gen_images": [], "gen_image_vectors": []}
    for row, conversation in enumerate(conversations):
        for values in found.values():
            values.append([])
        for turn, message in enumerate(conversation):
            is_drawn = message["role"] == "assistant"
            for part in message["content"] if isinstance(message["content"], list) else []:
                if "image_vectors" in part and not is_drawn:
                    raise ValueError(
                        f"row {row}, turn {turn} ({message['role']}): image_vectors belong to assistant turns. "
                        "Show the user's picture as pixels."
                    )
                if "image_vectors" in part:
                    found["gen_image_vectors"][-1].append(part["image_vectors"])
                elif "image" in part:
                    found["gen_images" if is_drawn else "images"][-1].append(part["image"])
    return found


def assistant_mask(
    token_offsets: list[tuple[int, int]], replacements: list[dict], spans: list[tuple[int, int]]
) -> list[int]:
    """1 for every token that lies in what the assistant wrote, 0 elsewhere.

    Args:
        token_offsets: (start, end) of each token in the text with expanded placeholders.
        replacements: what `get_text_with_replacements` reports for this row.
        spans: (start, end) of each generation block in the text *before* expansion.
    """
    ends = [r["span"][1] for r in replacements]
    gained = [0] + [r["new_span"][1] - r["span"][1] for r in replacements]
    moved = [tuple(char + gained[bisect_right(ends, char)] for char in span) for span in spans]
    # padding and added special tokens have no width, so they overlap nothing
    return [int(any(start < last and end > first for first, last in moved)) for start, end in token_offsets]
