"""Control tokens that a user typed: finding them in a finished prompt, and reading them as the plain text they are.

A tokenizer cannot tell the `<|end|>` that a chat template wrote from one that stands in somebody's question. So every
string that goes into a template is also rendered with its dangerous characters exchanged for stand-ins that no token
contains: where both renderings have the same control tokens, all of them are the template's. That one comparison
covers tokens put together from two parts, from a role, or with the template's own text. `processing_pisces` calls it.
"""

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models
from transformers.tokenization_utils_base import BatchEncoding

from .conversations_pisces import as_dict
from .image_loading_pisces import one_line


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


# Reading hidden text as plain text


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
