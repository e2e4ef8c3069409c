"""Turns of other formats to messages: who speaks, what is said, and whether it is learned.

ShareGPT and LLaVA (`from`, `value`), the Cauldron (`user`, `assistant`), TRL's prompt and completion, Alpaca's
instruction. `records` picks the shape of a record and calls these; pictures are put in their places afterwards.
"""

from collections import Counter
from typing import Any

from finetune.data.schema import OTHER_ROLES, DataError, show


Messages = list[dict[str, Any]]

# What turns say about the loss: OpenAI's weight, axolotl's train, ms-swift's loss
LOSS_KEYS = ("train", "loss", "weight")
TURN_KEYS = {"from", "value", "role", "content", *LOSS_KEYS}
# What a turn says beside its content, and no Pisces learns
MEANINGFUL_KEYS = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "audio",
    "train_detail",
)  # fmt: skip


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def exchange(asked: list[dict], answered: list[dict]) -> Messages:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def from_conversations(turns: Any, unused: Counter) -> Messages:
    """LLaVA's `{"from": "human" | "gpt", "value": ...}`; ShareGPT files with "role" and "content" are read too.

    Words of the assistant before anybody asked are left out, as in LLaVA's and FastChat's own training.

    Raises:
        DataError: naming the turn.
    """
    if not isinstance(turns, (list, tuple)):
        raise DataError(f"conversations: found {show(turns)}, expected a list of turns")
    messages = []
    for index, turn in enumerate(turns):
        field = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise DataError(f'{field}: found {show(turn)}, expected {{"from": ..., "value": ...}}')
        text = turn.get("value", turn.get("content"))
        check_keys(turn, field, unused)
        role = turn.get("from", turn.get("role"))
        if role not in (*OTHER_ROLES, *OTHER_ROLES.values(), "system"):
            raise DataError(f"{field}.from: found {show(role)}, expected system, human or gpt")
        if not isinstance(text, str):
            raise DataError(f"{field}.value: found {show(text)}, expected a text")
        message = {"role": OTHER_ROLES.get(role, role), "content": text}
        messages.append(message | {key: turn[key] for key in LOSS_KEYS if turn.get(key) is not None})
    return _without_opening(messages, unused)


def _without_opening(messages: Messages, unused: Counter) -> Messages:
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
    opening = [message for message in messages[:first] if message["role"] == "assistant"]
    if not opening or any("<image" in message["content"] for message in opening):
        return messages
    if not any(message["role"] == "assistant" for message in messages[first:]):
        return messages
    unused["what the assistant says before anybody asks"] += 1
    return [message for message in messages if not any(message is spoken for spoken in opening)]


def from_texts(texts: Any, unused: Counter) -> Messages:
    """The Cauldron's `{"user": ..., "assistant": ..., "source": ...}`, one after the other.

    Raises:
        DataError: naming the exchange.
    """
    if not isinstance(texts, (list, tuple)):
        raise DataError(f"texts: found {show(texts)}, expected a list of exchanges")
    messages: Messages = []
    for index, both in enumerate(texts):
        if not isinstance(both, dict) or not all(isinstance(both.get(role), str) for role in ("user", "assistant")):
            raise DataError(f'texts[{index}]: found {show(both)}, expected {{"user": ..., "assistant": ...}}')
        unused.update(f"texts[].{key}" for key in both if key not in ("user", "assistant") and both[key])
        messages += exchange([text_part(both["user"])], [text_part(both["assistant"])])
    return messages


def from_completion(prompt: Any, completion: Any) -> Messages:
    """TRL's prompt and completion, each a text or a list of messages; only the completion is learned.

    Raises:
        DataError: naming the field.
    """
    asked = _messages_of(prompt, "prompt", "user")
    answered = _messages_of(completion, "completion", "assistant")
    return [m | {"train": False} if m.get("role") == "assistant" else m for m in asked] + answered


def _messages_of(value: Any, name: str, role: str) -> Messages:
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if isinstance(value, (list, tuple)) and value and all(isinstance(message, dict) for message in value):
        return list(value)
    raise DataError(f"{name}: found {show(value)}, expected a text or a list of messages")


def check_keys(turn: dict[str, Any], field: str, unused: Counter) -> None:
    """Refuse what carries meaning in a turn and is not read; count the rest.

    Raises:
        DataError: naming the key.
    """
    for key, value in turn.items():
        if key in TURN_KEYS or value in (None, "", [], {}):
            continue
        if key in MEANINGFUL_KEYS:
            raise DataError(
                f"{field}.{key}: found {show(value)}, which is not read and changes what the turn means; expected "
                "words or pictures in the content. Write it there, or leave the row out"
            )
        unused[f"{field.split('[')[0]}[].{key}"] += 1


def with_system(messages: Messages, system: Any) -> Messages:
    """A record's own system text as the first turn.

    Raises:
        DataError: it is no text, or the turns have another one.
    """
    if not isinstance(system, str):
        raise DataError(f"system: found {show(system)}, expected a text")
    if not system.strip():
        return messages
    if messages and messages[0].get("role") == "system":
        if messages[0].get("content") in (system, [text_part(system)]):
            return messages
        raise DataError("system: found beside a system turn with other words, expected one of both")
    return [{"role": "system", "content": system}, *messages]
