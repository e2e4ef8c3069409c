"""Verifiable rewards for text answers, and the way to bring one's own: `module:function`.

A built-in reward compares the words of one answer with those of the row's reference answer and returns 0 or 1; all of
them read numbers, capitals, spaces and a final full stop as a person would. `finetune.grpo` takes their names, or
functions of a user, with the signature of TRL's rewards. `load_function` also finds the scorers of `best_of_n`.
"""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any


# "10" to "12" are the last that English writes as words of their own before the teens
NUMBER_WORDS = dict(
    zip("zero one two three four five six seven eight nine ten eleven twelve".split(), range(13), strict=True)
)
_NUMBER = re.compile(rf"(?<![\w.])-?\d+(?:,\d{{3}})*(?:\.\d+)?(?!\w)|\b(?:{'|'.join(NUMBER_WORDS)})\b")


def normalize(text: str) -> str:
    """Lower case, single spaces, without quotes around it and full stops at its end."""
    return " ".join(text.lower().split()).strip("\"'").rstrip(".!").strip()


def exact_match(answer: str, reference: str) -> float:
    """1 where both say the same words."""
    return float(normalize(answer) == normalize(reference))


def number(answer: str, reference: str) -> float:
    """1 where the last number of both is the same; digits ("1,200", "-3.5") or words up to twelve.

    The last one, because an answer may count aloud; listing all numbers is worth no more than guessing one.
    """
    found, wanted = _last_number(answer), _last_number(reference)
    if wanted is None:
        raise ValueError(f'reward "number": the reference answer {reference!r} has no number. Choose another reward.')
    return float(found is not None and math.isclose(found, wanted, rel_tol=1e-9))


def yes_no(answer: str, reference: str) -> float:
    """1 where the answer says yes or no, not both, and the right one."""
    wanted = _yes_or_no(reference)
    if wanted is None:
        raise ValueError(
            f'reward "yes_no": the reference answer {reference!r} says neither yes nor no. Choose another reward.'
        )
    return float(_yes_or_no(answer) == wanted)


def contains(answer: str, reference: str) -> float:
    """1 where the reference stands in the answer as whole words."""
    return float(re.search(rf"(?<!\w){re.escape(normalize(reference))}(?!\w)", normalize(answer)) is not None)


REWARDS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "number": number,
    "yes_no": yes_no,
    "contains": contains,
}


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.lower())
    if not found:
        return None
    return float(NUMBER_WORDS.get(found[-1], found[-1].replace(",", "")))


def _yes_or_no(text: str) -> str | None:
    said = set(re.findall(r"\b(?:yes|no)\b", text.lower()))
    return said.pop() if len(said) == 1 else None


def load_reward(name: str) -> Callable[..., list[float]]:
    """A reward in TRL's form, `f(prompts, completions, **columns) -> one number per completion`.

    Args:
        name: of a built-in reward, or `module:function` for one in TRL's form: the words of completion i are
            `completions[i][0]["content"]`, and every other key of a row arrives as a list under its own name,
            the words of the reference answer as `answer`.

    Raises:
        ValueError: neither a built-in reward nor a function that can be imported.
    """
    if ":" in name:
        return load_function(name, "--rewards")
    if name not in REWARDS:
        raise ValueError(f"--rewards {name}: expected one of {', '.join(REWARDS)}, or module:function.")
    score = REWARDS[name]

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **columns: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [score(text, reference) for text, reference in zip(texts, answer, strict=True)]

    reward.__name__ = name  # TRL logs it under this name
    return reward


def load_function(path: str, flag: str) -> Callable[..., Any]:
    """Import `module:function`; modules in the working directory are found too.

    Args:
        flag: where the user wrote it, for the message.

    Raises:
        ValueError: not of that form, no such module (or one that cannot be imported), no such function.
    """
    module_name, separator, function_name = path.partition(":")
    if not (separator and module_name and function_name) or "/" in path or module_name.endswith(".py"):
        raise ValueError(f"{flag} {path}: expected module:function, as in my_scores:count_stars for my_scores.py.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{flag} {path}: the module {module_name} cannot be imported ({error}). Run the command in the folder "
            "that has it, or set PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(f"{flag} {path}: {module_name} has no function {function_name}, only {', '.join(known[:8])}.")
    return function


def check_scores(scores: Any, expected: int, name: str) -> list[float]:
    """The numbers that a user's function returned, as floats.

    Raises:
        ValueError: not one finite number for each of `expected` things.
    """
    values: Sequence[Any] = list(scores) if hasattr(scores, "__iter__") else [scores]
    if len(values) != expected:
        raise ValueError(f"{name} returned {len(values)} scores for {expected} pictures. Return one number for each.")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} returned {values!r:.80}: {error}. Return one number for each picture.") from error
    if wrong := [value for value in numbers if not math.isfinite(value)]:
        raise ValueError(f"{name} returned {wrong[0]}. Return a finite number for each picture; higher is better.")
    return numbers
