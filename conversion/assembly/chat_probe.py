"""Reads off a language model's own chat template how it writes turns, by rendering conversations of known contents.

`chat_formats` calls `read_own_format`, fills its own template with what was found, and checks it with
`differing_probe`: a format may be said to be the model's own only where every probe renders equal, character for
character.
"""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError


@dataclass(frozen=True)
class ChatFormat:
    """The texts between contents. ROLE in `user_header` stands for the role of a message that is not the assistant's.

    Args:
        start: opens a conversation without a system turn: begin token, and what the model is told by default.
        system_start: opens a conversation with one, up to the system's text.
        system_header: the same without what only stands at the very start, for a system turn further down.
        system_end: follows the system's text.
        user_header, user_end: around what the user says.
        assistant_header: what a prompt ends in, so that the assistant answers.
        lead: stands between it and an answer's first word, in every turn; the model writes it, so it is in the mask.
        final_lead: the same in the last turn (an empty block of thoughts, with Qwen3).
        end: closes an answer and is in the mask: an end token, and what stands before it.
        end_token: ends generation.
        after: follows it.
        folds: a system's text stands inside the user turn after it, which then has no header of its own.
        trims_user, trims_answer, trims_system: contents of these roles lose the space around them.
    """

    start: str
    system_start: str
    system_header: str
    system_end: str
    user_header: str
    user_end: str
    assistant_header: str
    end: str
    end_token: str
    after: str
    lead: str = ""
    final_lead: str = ""
    folds: bool = False
    trims_user: bool = False
    trims_answer: bool = False
    trims_system: bool = False


class UnreadableFormat(ValueError):
    """A template whose turns cannot be told from each other; says why."""


SYSTEM, USER, ANSWER, SECOND, AGAIN = "Be brief 7.", "Where is it 7?", "Over there 7.", "And now 7?", "Still there 7."


def _turns(*contents: str) -> list[dict[str, str]]:
    """A conversation; a system turn where the first content is the system's."""
    roles = ["user", "assistant"] * len(contents)
    roles = ["system", *roles] if contents[0] == SYSTEM else roles
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


PROBES = {
    "a question": _turns(USER),
    "an answer": _turns(USER, ANSWER),
    "two rounds": _turns(USER, ANSWER, SECOND),
    "two rounds and a final answer": _turns(USER, ANSWER, SECOND, AGAIN),
    "spaces around the contents": _turns(f"\n\n\n  {USER}  \n\n\n", f"\n\n\n  {ANSWER}  \n\n\n"),
}
SYSTEM_PROBES = {
    "a system turn": _turns(SYSTEM, USER),
    "a system turn and an answer": _turns(SYSTEM, USER, ANSWER),
    "a system turn, two rounds and a final answer": _turns(SYSTEM, USER, ANSWER, SECOND, AGAIN),
}


def render(
    tokenizer: Any, messages: list[dict[str, str]], template: str | None = None, prompt: bool = False
) -> str | None:
    """Text of a conversation; without a template in the tokenizer's own, None where that has none or refuses."""
    if template is None and not tokenizer.chat_template:
        return None
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, ValueError, KeyError):  # templates refuse roles and orders as they like
        return None


def differing_probe(tokenizer: Any, template: str) -> str | None:
    """The first probe that a template renders otherwise than the tokenizer's own, in words; None: all are equal.

    What the model's own template refuses (many know no system turn) is no difference.
    """
    for name, messages in {**PROBES, **SYSTEM_PROBES}.items():
        for prompt in (False, True) if messages[-1]["role"] == "user" else (False,):
            own = render(tokenizer, messages, prompt=prompt)
            if own is not None and own != render(tokenizer, messages, template, prompt):
                return name + (", as a prompt" if prompt else "")
    return None


def read_own_format(tokenizer: Any) -> ChatFormat:
    """The format of a tokenizer's own template.

    Raises:
        UnreadableFormat: it does not write turns one after the other, or has no token that ends an answer.
    """
    start_user, user_end = _around(_own(tokenizer, _turns(USER)), USER)
    between_prompt = _around(_own(tokenizer, _turns(USER), prompt=True), USER)[1]
    answered = _around(_own(tokenizer, _turns(USER, ANSWER)), USER, ANSWER)
    rounds = _around(_own(tokenizer, _turns(USER, ANSWER, SECOND)), USER, ANSWER, SECOND)
    assistant_header = _rest(between_prompt, user_end, "a prompt begins otherwise than a question")
    final_lead = _rest(answered[1], between_prompt, "an answer does not follow what a prompt ends in")
    lead = _rest(rounds[1], between_prompt, "an earlier answer does not follow what a prompt ends in")
    end, end_token, after = _split_end(tokenizer, answered[2])
    user_header = _rest(rounds[2], answered[2], "an earlier answer ends otherwise than the last one")
    if not start_user.endswith(user_header):
        raise UnreadableFormat("the first question begins otherwise than later ones")
    start = start_user[: len(start_user) - len(user_header)]
    bos = tokenizer.bos_token or ""
    begin = bos if bos and start.startswith(bos) else ""
    system = render(tokenizer, _turns(SYSTEM, USER))
    if system is None or SYSTEM not in system:  # our own way of handing the text over: in front of the first question
        parts = {
            "system_start": start + user_header,
            "system_header": user_header,
            "system_end": "\n\n",
            "folds": True,
        }
    else:
        system_start, middle, _ = _around(system, SYSTEM, USER)
        folds = not (user_header and middle.endswith(user_header))
        system_header = system_start.removeprefix(begin)
        system_end = middle if folds else middle[: len(middle) - len(user_header)]
        parts = {
            "system_start": system_start,
            "system_header": system_header,
            "system_end": system_end,
            "folds": folds,
        }
    if user_header.count("user") == 1 and user_header.replace("user", "system") == parts["system_header"]:
        user_header = user_header.replace("user", "ROLE")  # such formats write any role in its place
    return ChatFormat(
        start=start,
        user_header=user_header,
        user_end=user_end,
        assistant_header=assistant_header,
        lead=lead,
        final_lead=final_lead,
        end=end,
        end_token=end_token,
        after=after,
        trims_user=_trims(tokenizer, USER, _turns(spaced(USER))),
        trims_answer=_trims(tokenizer, ANSWER, _turns(USER, spaced(ANSWER))),
        trims_system=_trims(tokenizer, SYSTEM, [{"role": "system", "content": spaced(SYSTEM)}, *_turns(USER)]),
        **parts,  # type: ignore[arg-type]
    )


def spaced(content: str) -> str:
    """A content in more space than any format has around one."""
    return f"\n\n\n  {content}  \n\n\n"


def _trims(tokenizer: Any, content: str, messages: list[dict[str, str]]) -> bool:
    text = render(tokenizer, messages)
    return text is not None and content in text and spaced(content) not in text


def _own(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> str:
    text = render(tokenizer, messages, prompt=prompt)
    if text is None:
        raise UnreadableFormat(f"it refuses a conversation of {len(messages)} turns")
    return text


def _around(text: str, *contents: str) -> list[str]:
    """What stands before, between and after contents, each of which occurs once and in this order."""
    pieces, rest = [], text
    for content in contents:
        if rest.count(content) != 1:
            raise UnreadableFormat(f"it writes a content {rest.count(content)} times")
        before, rest = rest.split(content)
        pieces.append(before)
    return [*pieces, rest]


def _rest(text: str, start: str, problem: str) -> str:
    if not text.startswith(start):
        raise UnreadableFormat(problem)
    return text[len(start) :]


def _split_end(tokenizer: Any, closing: str) -> tuple[str, str, str]:
    """What closes an answer: up to its end token, that token, and what follows."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    found = re.match(rf"\s*({'|'.join(map(re.escape, added))})", closing) if added else None
    if found is None:
        raise UnreadableFormat(f"no token of the tokenizer ends an answer (it is followed by {closing[:20]!r})")
    return closing[: found.end()], found[1], closing[found.end() :]


__all__ = ["ChatFormat", "UnreadableFormat", "differing_probe", "read_own_format", "render"]
