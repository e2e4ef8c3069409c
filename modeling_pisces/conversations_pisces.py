"""Everything between a user's messages and the tokenizer: plain data in, plain data out, no pixels.

Four things in the order of their use. Messages: the default chat template, one form for all ways to write a message,
the images of each turn, and the arithmetic of assistant masks. Lists and counts: pictures may come alone, as a flat
list, as one list per row or as a batched array; these forms are brought together, and what does not fit is refused
before a picture is opened. Control tokens that a user typed, found in a finished prompt. And the tokenizer's stand-in
that reads them as the plain text they are. `processing_pisces` calls all of it.

A tokenizer cannot tell the `<|end|>` that a chat template wrote from one that stands in somebody's question. So every
string that goes into a template is also rendered with its dangerous characters exchanged for stand-ins that no token
contains: where both renderings have the same control tokens, all of them are the template's. That one comparison
covers tokens put together from two parts, from a role, or with the template's own text.
"""

import contextlib
import dataclasses
import functools
import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models
from transformers.tokenization_utils_base import BatchEncoding
from transformers.utils.generic import TensorType

from .image_loading_pisces import BOTH, DEFAULT_MAX_PIXELS, UNDERSTANDING, decode_base64, one_line


# ---- messages -------------------------------------------------------------------------------------------------------

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
        raise ValueError(
            f"{where}: a message is a dict with a role and a content, not {one_line(repr(message), 80)}. Write "
            '{"role": "user", "content": "..."}.'
        )
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
    if (shown_as := part.get("as", UNDERSTANDING)) not in (UNDERSTANDING, BOTH):
        raise ValueError(
            f'{where}: a picture is shown as {one_line(repr(shown_as), 40)}, expected "{UNDERSTANDING}" (the default) '
            f'or "{BOTH}".'
        )
    sources = [key for key in _IMAGE_KEYS if key in part]
    if shown_as == BOTH:
        return _shown_as_both(part, sources, where)
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


def _shown_as_both(part: dict, sources: list[str], where: str) -> dict:
    """A picture for both paths; its vectors may stand beside it, so that the generation tower need not run."""
    if len(sources) != 1:
        raise ValueError(f'{where}: a picture shown as "{BOTH}" needs one source, found {sources}.')
    shown = _part({key: value for key, value in part.items() if key not in ("as", "image_vectors")}, where)
    return shown | {key: part[key] for key in ("as", "image_vectors") if key in part}


def add_vectors_beside(
    prompt: str, spans: list[tuple[int, int]], conversation: list[dict], tokens: tuple[str, str], where: str
) -> tuple[str, list[tuple[int, int]]]:
    """Write a placeholder for generation vectors behind that of each picture that is shown as "both".

    It is done in the finished prompt, because a chat template knows one placeholder for each picture of the user.

    Args:
        prompt: one row, as the template wrote it.
        spans: (start, end) of what the assistant wrote in it.
        conversation: of that row, from `normalize_conversations`.
        tokens: placeholder of a picture to understand, and of one as vectors.
        where: the row, for errors.

    Returns:
        the prompt, and the spans moved with it.

    Raises:
        ValueError: the template writes another number of placeholders than pictures are shown.
    """
    image_token, gen_image_token = tokens
    parts = [
        part
        for message in conversation
        if message["role"] != "assistant" and isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    places = [match.end() for match in re.finditer(re.escape(image_token), prompt)]
    if len(places) != len(parts):
        raise ValueError(
            f"{where}: the template wrote {len(places)} {image_token} for {len(parts)} pictures, so that none of them "
            f'can be shown as "{BOTH}". Leave "as" out, or take a template with one placeholder for each picture.'
        )
    ends = [place for place, part in zip(places, parts, strict=True) if part.get("as") == BOTH]
    pieces = [prompt[start:end] for start, end in zip([0, *ends], [*ends, len(prompt)], strict=True)]
    moved = [tuple(at + len(gen_image_token) * bisect_right(ends, at) for at in span) for span in spans]
    return gen_image_token.join(pieces), moved  # type: ignore[return-value]


def shows_both(conversation: list[dict]) -> bool:
    """Whether some picture of a conversation is shown as "both"."""
    shown = (message["content"] for message in conversation if message["role"] != "assistant")
    contents = (content for content in shown if isinstance(content, list))
    return any(part.get("as") == BOTH for content in contents for part in content)


def collect_images(conversations: list[list[dict]]) -> dict[str, list[list]]:
    """The pictures of each row: shown by the user, drawn by the assistant, and drawn but kept as vectors.

    A picture that is shown as "both" counts as shown and, for its vectors, as drawn.

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
                if part.get("as") == BOTH:
                    if is_drawn:
                        raise ValueError(
                            f'row {row}, turn {turn}: the assistant\'s pictures are drawn, not shown as "{BOTH}". '
                            'Leave "as" out.'
                        )
                    found["images"][-1].append(part["image"])
                    kind = "gen_image_vectors" if "image_vectors" in part else "gen_images"
                    found[kind][-1].append(part.get("image_vectors", part["image"]))
                    continue
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


# ---- lists of pictures, counts of placeholders, settings of a call --------------------------------------------------

PICTURE_NDIM = 3  # (H, W, C) or (C, H, W)
VECTORS_NDIM = 2  # (M, Dg), one drawn picture as vectors


def flatten(items: Any, ndim: int = PICTURE_NDIM) -> list:
    """One item, a list, a list per row or an array of one dimension more, as a flat list in reading order."""
    if items is None:
        return []
    if isinstance(items, (list, tuple)):
        return [flat for item in items for flat in flatten(item, ndim)]
    return list(items) if getattr(items, "ndim", 0) == ndim + 1 else [items]


def check_counts(texts: list[str], token: str, items: Any, name: str, ndim: int = PICTURE_NDIM) -> None:
    """Each row must have as many placeholders as pictures; totals that happen to agree are not enough.

    Raises:
        ValueError: naming the row, both counts and the next step. It contains the sentence that transformers' own
            processors use, because trainers and its test suite look for it.
    """
    placeholders = [text.count(token) for text in texts]
    given_counts = _count_per_row(items, placeholders, name, ndim)
    for row, (found, given) in enumerate(zip(placeholders, given_counts, strict=True)):
        if found != given:
            raise ValueError(
                f"row {row}: found {found} {token} tokens but {given} {name}; the number of {token} tokens in the "
                f"prompts should be the same as the number of {name}. Write one {token} per item, and pass {name} as "
                "one list per row."
            )


def _count_per_row(items: Any, placeholders: list[int], name: str, ndim: int) -> list[int]:
    if isinstance(items, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in items):
        if len(items) != len(placeholders):
            raise ValueError(
                f"found {len(items)} lists of {name} but {len(placeholders)} rows of text; the number of placeholder "
                f"tokens in the prompts should be the same as the number of {name}, row by row. Pass one list per "
                "row, an empty one for a row without any."
            )
        return [len(flatten(row, ndim)) for row in items]
    left, given = len(flatten(items, ndim)), []
    for wanted in placeholders[:-1]:  # a flat list is dealt out in reading order; the last row gets the rest
        given.append(min(wanted, left))
        left -= given[-1]
    return [*given, left]


def expand_placeholders(text: str, pattern: re.Pattern, expansions: dict[str, Iterator[str]]) -> tuple[str, list]:
    """Replace each match by the next expansion of its kind.

    Args:
        text: one row.
        pattern: with one named group per kind of placeholder.
        expansions: iterator of replacement texts, by the name of the group.

    Returns:
        The longer text, and for each replacement its type, its span in `text`, its new_span, and both texts: the form
        that `ProcessorMixin.get_text_with_replacements` promises to assistant masks and servers.
    """
    pieces: list[str] = []
    reports: list[dict] = []
    last = length = 0
    for match in pattern.finditer(text):
        kind = str(match.lastgroup)
        replacement = next(expansions[kind])
        new_start = length + match.start() - last
        new_span = (new_start, new_start + len(replacement))
        report = {"type": kind, "span": match.span(), "new_span": new_span}
        reports.append({**report, "text": match.group(), "replacement": replacement})
        pieces += [text[last : match.start()], replacement]
        last, length = match.end(), new_span[1]
    return "".join(pieces) + text[last:], reports


def call_setting(kwargs: dict, name: str) -> Any:
    """A setting of one call, given flat or inside `text_kwargs` or `common_kwargs`; None if absent."""
    places = (kwargs, kwargs.get("text_kwargs") or {}, kwargs.get("common_kwargs") or {})
    return next((place[name] for place in places if place.get(name) is not None), None)


_FRAMEWORKS = tuple(kind.value for kind in TensorType)


def check_settings(kwargs: dict) -> None:
    """Refuse settings of one call that have the wrong form or that only `apply_chat_template` can follow."""
    for name, value in kwargs.items():
        if name.endswith("_kwargs") and value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} is a {type(value).__name__}, expected a dict of settings: {name}={{...}}.")
    length = call_setting(kwargs, "max_length")
    if length is not None and (not isinstance(length, int) or length < 1):
        raise ValueError(f"max_length={one_line(repr(length), 40)}: expected a whole number from 1.")
    framework = call_setting(kwargs, "return_tensors")
    if framework is not None and (not isinstance(framework, str) or framework not in _FRAMEWORKS):
        raise ValueError(f"return_tensors={one_line(repr(framework), 40)}: expected one of {', '.join(_FRAMEWORKS)}.")
    if call_setting(kwargs, "sanitize_control_tokens"):
        raise ValueError(
            "sanitize_control_tokens belongs to apply_chat_template: a finished prompt does not say which of its "
            "control tokens a user typed. Pass messages there, or ask find_control_tokens about each text."
        )


def check_shapes(pictures: list, image_processor: Any, name: str) -> None:
    """Refuse a strip that resizing to a shortest edge would make larger than any picture that is read.

    Raises:
        ValueError: naming the picture's number in reading order.
    """
    size: Any = getattr(image_processor, "size", None)
    edge = size.get("shortest_edge") if hasattr(size, "get") else None
    if not edge or size.get("longest_edge"):
        return
    for index, picture in enumerate(pictures):
        if edge * edge * max(picture.size) // min(picture.size) > DEFAULT_MAX_PIXELS:
            raise ValueError(
                f"{name} {index}: {picture.width} x {picture.height} pixels, too thin to be resized to a short side "
                f"of {edge}. Cut out the part that matters."
            )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What tokenizer and image processors say of settings that they cannot use, as one ValueError in one line."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, ValueError) and str(error).isprintable():
            raise
        raise ValueError(f"a setting of this call cannot be used: {one_line(error, 300)}") from error


@contextlib.contextmanager
def readable_ids() -> Iterator[None]:
    """What a tokenizer says of things that are no ids, as one ValueError in one line."""
    try:
        yield
    except (TypeError, OverflowError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"no token ids that can be read as text ({one_line(error, 120)}): expected whole numbers from 0, in rows "
            "for several texts. Replace -100, which labels hold, by pad_token_id first."
        ) from error


# ---- control tokens that a user typed -------------------------------------------------------------------------------

# Roles that templates of all families know; others count as text unless the template names them
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_PICTURE_TOKENS = ("image_token", "gen_image_token", "gen_start_token", "gen_end_token")  # names of `PiscesProcessor`
_STAND_INS = 0xF0000  # two planes of private characters, where no text has anything to say


class ChatInputs(NamedTuple):
    """Everything of a chat that a template may write: messages per row, and what all rows share."""

    conversations: list[list[dict]]
    tools: list | None
    documents: list | None
    variables: dict[str, Any]


def find_control_tokens(tokenizer: Any, template: str, own: Iterable[str]) -> dict[str, int]:
    """The added tokens that text must not spell, with their ids.

    All special tokens, `own`, and added tokens that the template writes or that look like a control token. Added white
    space and words are text; so are tags such as Gemma's `<table>` or Qwen's `<think>` where the template does not
    write them. `tokenizer.chat_control_tokens` (transformers 5.23), if set, decides about tokens that are not special.
    """
    listed, own = getattr(tokenizer, "chat_control_tokens", None), set(own)
    found = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if listed is not None:
            is_control = text in listed
        else:
            is_word = re.fullmatch(r"\s*\w*\s*", text)
            is_tag = re.fullmatch(r"\s*</?\w+>\s*", text)
            is_control = not is_word and (not is_tag or text in template)
        if token.special or text in own or is_control:
            found[text] = index
    return found


class TypedTokens:
    """Judges the prompts of one call.

    Args:
        tokenizer: of the processor.
        template: Jinja.
        own: the picture tokens of the processor.
    """

    def __init__(self, tokenizer: Any, template: str, own: Iterable[str]):
        self.tokenizer, self.template, self.own = tokenizer, template, tuple(own)
        self.tokens = find_control_tokens(tokenizer, template, self.own)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer = None if backend is None else backend.normalizer
        added = tokenizer.added_tokens_decoder.values()
        is_normalized = any(token.normalized for token in added if token.content in self.tokens)
        if self._normalizer is not None and is_normalized:
            pattern = r"\S"  # any character may become part of a token
        else:
            starts = "".join(re.escape(char) for char in sorted({token[0] for token in self.tokens}))
            pattern = f"[{starts}\U000f0000-\U0010ffff]"  # the stand-ins too, so that showing undoes hiding exactly
        self._pattern = re.compile(pattern)
        self._endings = _endings(template, tuple(self.tokens))
        self._stand_ins: dict[str, str] = {}

    @functools.cached_property
    def scanner(self) -> Tokenizer:
        """Finds added tokens exactly as the tokenizer does, and reads nothing else."""
        scanner = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        if self._normalizer is not None:
            scanner.normalizer = self._normalizer
        scanner.add_tokens([token for _, token in sorted(self.tokenizer.added_tokens_decoder.items())])
        return scanner

    def find(self, prompt: str) -> list[tuple[str, tuple[int, int]]]:
        """The control tokens of a text in reading order, with the characters that each one takes."""
        encoding = self.scanner.encode(prompt, add_special_tokens=False)
        return [
            (token, span)
            for index, span in zip(encoding.ids, encoding.offsets, strict=True)
            if (token := self.scanner.id_to_token(index)) in self.tokens
        ]

    # Hiding and showing

    def hide(self, inputs: ChatInputs, only: tuple[int, int] | str | None = None) -> ChatInputs:
        """A copy whose strings can form no control token; what cannot anyway stays the same.

        Args:
            only: hide no more than one message (row, turn), or "tools", "documents" or one variable.
        """
        # a caller hands the template the tokens by their own names; nobody's text comes that way
        names = {*self.tokenizer.special_tokens_map}
        names |= {name for name in _PICTURE_TOKENS if inputs.variables.get(name) in self.own}
        rows = [
            [self._message(m) if only in (None, (r, t)) else m for t, m in enumerate(row)]
            for r, row in enumerate(inputs.conversations)
        ]
        variables = {
            name: value if name in names or only not in (None, name) else self._value(value)
            for name, value in inputs.variables.items()
        }
        tools = self._value(inputs.tools) if only in (None, "tools") else inputs.tools
        documents = self._value(inputs.documents) if only in (None, "documents") else inputs.documents
        return ChatInputs(rows, tools, documents, variables)

    def show(self, text: str) -> str:
        """The text that was hidden."""
        return text.translate({ord(hidden): char for char, hidden in self._stand_ins.items()})

    def _stand_in(self, char: str) -> str:
        return self._stand_ins.setdefault(char, chr(_STAND_INS + len(self._stand_ins)))

    def _text(self, text: str) -> str:
        hidden = self._pattern.sub(lambda match: self._stand_in(match[0]), text)
        start = len(text) - len(text.lstrip())
        head = text.strip()
        if head and any(end.startswith(head) or head.startswith(end) for end in self._endings):
            hidden = hidden[:start] + self._stand_in(text[start]) + hidden[start + 1 :]
        return hidden

    def _name(self, text: str) -> str:
        return text if re.fullmatch(r"[\w.-]*", text) else self._text(text)

    def _value(self, value: Any) -> Any:
        value = as_dict(value)
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {
                self._name(key) if isinstance(key, str) else key: self._name(item)
                if key == "type" and isinstance(item, str)
                else self._value(item)
                for key, item in value.items()
            }
        return [self._value(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _message(self, message: dict) -> dict:
        role, content = message["role"], message["content"]
        hidden = {key: value for key, value in message.items() if key not in ("role", "content")}
        if re.search(rf"(['\"]){re.escape(role)}\1", self.template):
            role = self._name(role)  # the template asks for it, so another name would change what it writes
        elif role not in _ROLES:
            role = "".join(map(self._stand_in, role))
        is_text = isinstance(content, str)
        return {
            **self._value(hidden),
            "role": role,
            "content": self._text(content) if is_text else [self._part(part) for part in content],
        }

    def _part(self, part: dict) -> dict:
        pictures = {key: value for key, value in part.items() if key in ("image", "image_vectors")}
        return {**self._value({key: value for key, value in part.items() if key not in pictures}), **pictures}

    # Judging

    def refuse(self, inputs: ChatInputs, prompts: list[str], render: Callable[[ChatInputs], list[str]]) -> None:
        """Refuse a chat some of whose control tokens the template did not write.

        Args:
            prompts: what `render` made of `inputs`.
            render: one prompt per row.

        Raises:
            ValueError: naming row, turn and token.
        """
        hidden = self.hide(inputs)
        shared = hidden[1:] != inputs[1:]
        for row, (conversation, prompt) in enumerate(zip(inputs.conversations, prompts, strict=True)):
            if not shared and hidden.conversations[row] == conversation:
                continue
            found = [token for token, _ in self.find(prompt)]
            honest = self._found_when_hidden(inputs, row, None, render)
            if found == honest:
                continue
            places: list = [
                *((row, turn) for turn in range(len(conversation))),
                "tools",
                "documents",
                *inputs.variables,
            ]
            place = next((p for p in places if self._found_when_hidden(inputs, row, p, render) != found), None)
            raise self._refusal(inputs, row, place, _first_difference(found, honest))

    def _found_when_hidden(self, inputs: ChatInputs, row: int, place: Any, render: Callable) -> list[str]:
        one = ChatInputs([inputs.conversations[row]], *inputs[1:])
        place = (0, place[1]) if isinstance(place, tuple) else place
        try:
            (prompt,) = render(self.hide(one, place))
        except ValueError as error:
            raise ValueError(
                f"row {row}: what a user typed cannot be told from what the template writes, because the template "
                "looks into the text itself. Rewrite the text, or take a template without such a rule."
            ) from error
        return [token for token, _ in self.find(prompt)]

    def _refusal(self, inputs: ChatInputs, row: int, place: Any, token: str) -> ValueError:
        where = f"row {row}"
        if isinstance(place, tuple):
            where += f", turn {place[1]} ({one_line(inputs.conversations[row][place[1]]['role'], 40)})"
        elif place is not None:
            where += f", {place}"
        is_picture = token in self.own
        reason = (
            'Give images as {"type": "image", ...} parts, and' if is_picture else "Only the chat template writes it:"
        )
        return ValueError(
            f"{where}: the text contains the special token {token}. {reason} remove or rewrite the token in the text, "
            "or pass sanitize_control_tokens=True to have it read as plain text."
        )


def _first_difference(found: list[str], honest: list[str]) -> str:
    for left, right in zip(found, honest, strict=False):
        if left != right:
            return left
    longer = found if len(found) > len(honest) else honest
    return longer[min(len(found), len(honest))]


@functools.lru_cache(maxsize=16)
def _endings(template: str, tokens: tuple[str, ...]) -> tuple[str, ...]:
    """How a text would have to begin to complete a token that a literal of the template begins (Phi-4-mini's '<|')."""
    found: set[str] = set()
    for match in re.finditer(r"['\"]|\{\{|\{%", template):
        literal = template[max(0, match.start() - 80) : match.start()]
        for start in range(len(literal)):
            begun = literal[start:]
            found.update(token[len(begun) :] for token in tokens if token.startswith(begun) and token != begun)
    return tuple(found)


# ---- hidden text read as plain text ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _plain_tokenizer(
    tokenizer: Any, control: tuple[str, ...], num_tokens: int
) -> tuple[Tokenizer, str, dict[int, int]]:
    """A copy of the tokenizer for which control tokens are text.

    Returns:
        The copy, a token to put before a text that follows a control token, and ids of the copy that differ.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    secret = secrets.token_hex(16)  # the tokens keep their places in the vocabulary under names that nobody can type
    for token in settings["added_tokens"]:
        if token["content"] in control:
            plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
            token |= {"content": f"{secret}-{token['id']}", **plain}
    settings |= {"truncation": None, "padding": None, "post_processor": None}
    copy = Tokenizer.from_str(json.dumps(settings))
    kept = {token["content"]: token["id"] for token in settings["added_tokens"] if secret not in token["content"]}
    moved = {int(copy.token_to_id(content) or 0): index for content, index in kept.items()}
    anchor = next(token["content"] for token in settings["added_tokens"] if secret in token["content"])
    return copy, anchor, moved


class PlainTextTokenizer:
    """Stands in for the tokenizer during one call of a processor: hidden text is encoded as the text it hides.

    Ids, masks and offsets are those of the tokenizer, except that the control tokens of hidden text are read like any
    other words. Everything but calling is the tokenizer's.

    Raises:
        ValueError: a tokenizer without a `tokenizers` backend.
    """

    _IGNORED = ("is_split_into_words", "return_token_type_ids", "verbose", "stride", "split_special_tokens")

    def __init__(self, typed: TypedTokens):
        self._typed, self._tokenizer = typed, typed.tokenizer
        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            raise ValueError("sanitize_control_tokens needs a fast tokenizer (of the tokenizers library).")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(
        self,
        text: list[str],
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_offsets_mapping: bool = False,
        return_tensors: Any = None,
        **kwargs,
    ) -> BatchEncoding:
        pad = {key: kwargs.pop(key, None) for key in ("pad_to_multiple_of", "padding_side", "return_attention_mask")}
        if unknown := [key for key, value in kwargs.items() if value and key not in self._IGNORED]:
            raise ValueError(f"{unknown[0]} does not go together with sanitize_control_tokens=True. Leave it out.")
        rows = [self._encode(row, index, add_special_tokens) for index, row in enumerate(text)]
        if truncation and truncation != "do_not_truncate":
            length = max_length or self._tokenizer.model_max_length
            keep = slice(-length, None) if self._tokenizer.truncation_side == "left" else slice(length)
            rows = [(ids[keep], offsets[keep]) for ids, offsets in rows]
        outputs = self._tokenizer.pad(
            {"input_ids": [ids for ids, _ in rows]}, padding=padding, max_length=max_length, **pad
        )
        if return_offsets_mapping:
            is_left = (pad["padding_side"] or self._tokenizer.padding_side) == "left"
            outputs["offset_mapping"] = [
                blank + offsets if is_left else offsets + blank
                for ids, (_, offsets) in zip(outputs["input_ids"], rows, strict=True)
                for blank in [[(0, 0)] * (len(ids) - len(offsets))]
            ]
        return BatchEncoding(dict(outputs), tensor_type=return_tensors)

    def _encode(self, text: str, row: int, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        control = self._typed.tokens
        control_ids = set(control.values())
        before, after = self._added_around() if add_special_tokens else ([], [])
        ids, offsets, last = list(before), [(0, 0)] * len(before), 0
        for token, (start, end) in [*self._typed.find(text), (None, (len(text), len(text)))]:
            found_ids, found_offsets = self._encode_plain(text[last:start], last)
            if made := control_ids & set(found_ids):
                names = [name for name, index in control.items() if index in made]
                raise ValueError(f"row {row}: this tokenizer makes {names[0]} of plain text. Rewrite the text.")
            ids, offsets, last = ids + found_ids, offsets + found_offsets, end
            if token is not None:
                ids.append(control[token])
                offsets.append((start, end))
        return ids + after, offsets + [(0, 0)] * len(after)

    def _encode_plain(self, hidden: str, place: int) -> tuple[list[int], list[tuple[int, int]]]:
        if not hidden:
            return [], []
        plain, anchor, moved = _plain_tokenizer(self._tokenizer, tuple(self._typed.tokens), len(self._tokenizer))
        lead = anchor if place else ""  # after a token, some tokenizers put no space before a text
        encoding = plain.encode(lead + self._typed.show(hidden), add_special_tokens=False)
        skip = bool(lead)
        ids = [moved.get(index, index) for index in encoding.ids[skip:]]
        shift = place - len(lead)
        return ids, [(start + shift, end + shift) for start, end in encoding.offsets[skip:]]

    def _added_around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and after a text."""
        inner = self._tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
        outer = self._tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
        return outer[:start], outer[start + len(inner) :]
