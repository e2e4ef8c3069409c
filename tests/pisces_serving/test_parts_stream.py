"""Text goes out early, and never more than may go out: stop strings, half characters, pictures in between."""

import torch

from pisces_serving.answers import PartsStream
from pisces_serving.routes.chat import _unsaid


START, END = 500, 501
decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")  # one byte per token  # noqa: E731


def stream(*tokens, stops=(), picture_ids=None):
    said: list[str] = []
    made = PartsStream(decode, stops, said.append, picture_ids)
    made.put(torch.tensor([[7, 7, 7]]))  # the prompt
    for token in tokens:
        made.put(torch.tensor([token]))
    return said, made


def test_each_token_is_said_at_once_but_half_a_character_waits():
    said, made = stream(*"aé".encode())
    assert said == ["a", "é"] and made.close() == ["aé"]
    said, made = stream(*"aé".encode()[:-1])
    assert said == ["a"]
    assert made.close() == ["a\ufffd"] and said == ["a", "\ufffd"], "what never became whole is shown at the end"


def test_what_may_become_a_stop_string_waits_until_it_cannot():
    said, made = stream(*b"one STO", stops=("STOP",))
    assert "".join(said) == "one "
    made.put(torch.tensor([ord("X")]))
    assert "".join(said) == "one STOX" and not made.is_stopped
    said, made = stream(*b"one STOP two", stops=("two", "STOP"))
    assert "".join(said) == "one " and made.is_stopped and made.close() == ["one "]


def test_the_end_that_looked_like_a_stop_string_is_said_when_nothing_follows():
    said, made = stream(*b"one STO", stops=("STOP",))
    assert made.close() == ["one STO"] and "".join(said) == "one STO"


def test_the_earliest_of_several_stop_strings_counts():
    _, made = stream(*b"abcd", stops=("cd", "b"))
    assert made.close() == ["a"]


def test_parts_stand_in_reading_order_and_text_behind_a_picture_waits():
    said, made = stream(*b"so", START, END, *b"and", START, END, picture_ids=(START, END))
    assert said == ["s", "o"]
    assert made.close() == ["so", None, "and", None]


def test_a_picture_at_the_beginning_has_no_empty_text_before_it():
    said, made = stream(START, END, *b"x", picture_ids=(START, END))
    assert made.close() == [None, "x"] and said == []


def test_what_was_not_streamed_is_the_rest_of_the_first_text_and_everything_behind_it():
    assert _unsaid(["abc", None, "d"], "ab") == ["c", None, "d"]
    assert _unsaid(["abc"], "abc") == []
    assert _unsaid([None, "d"], "") == [None, "d"]
    assert _unsaid([], "") == []
