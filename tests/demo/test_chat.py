"""A conversation as the page keeps it: what the model reads of it, and how an answer grows."""

import pytest
import torch
from PIL import Image

from pisces_demo.chat import Message, Part, PartStreamer, answered, ask, messages_for_model


class Letters:
    """A tokenizer of letters; 90 and above are special, 80 and 81 are two halves of one character."""

    def decode(self, token_ids, skip_special_tokens):
        assert skip_special_tokens
        data = b"".join({80: b"\xc3", 81: b"\xa9"}.get(i, bytes([97 + i])) for i in token_ids if i < 90)
        return data.decode(errors="replace")


def stream(*steps, gen_start_id=90, gen_end_id=91):
    said = []
    streamer = PartStreamer(Letters(), gen_start_id, gen_end_id, said.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for step in steps:
        streamer.put(torch.tensor([step]))
    streamer.end()
    return [["picture" if part.text is None else part.text for part in parts] for parts in said]


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (6, 6), (250, 0, 0)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_an_answer_grows_token_by_token_and_the_prompt_is_no_part_of_it():
    assert stream(0, 1, 2) == [["a"], ["ab"], ["abc"]]


def test_a_picture_in_an_answer_is_a_mark_between_the_texts():
    assert stream(0, 90, 91, 1, 2)[-1] == ["a", "picture", "bc"]
    assert stream(90, 91, 90, 91)[-1] == ["picture", "picture"]
    assert stream(90)[-1] == ["picture"]  # as soon as it begins


def test_half_a_character_is_not_shown():
    assert stream(0, 80, 81) == [["a"], ["a"], ["aé"]]


def test_special_tokens_are_not_shown_and_a_model_without_drawing_has_no_marks():
    assert stream(0, 95)[-1] == ["a"]
    assert stream(0, 90, gen_start_id=None, gen_end_id=None)[-1] == ["a"]


def test_what_was_said_is_a_copy_that_does_not_grow_afterwards():
    said = []
    streamer = PartStreamer(Letters(), 90, 91, said.append)
    for token in (5, 0, 1):
        streamer.put(torch.tensor([token]))
    assert [part.text for part in said[0]] == ["a"]


def test_pictures_stand_before_the_text_of_a_question(photo):
    (message,) = ask([], " what is it? ", [photo])
    assert message.role == "user"
    assert [part.text for part in message.parts] == [None, "what is it?"]
    assert message.parts[0].picture.getpixel((0, 0)) == (250, 0, 0)


def test_a_picture_without_words_is_to_be_described(photo):
    assert ask([], None, [photo])[-1].parts[-1].text == "Describe the picture."
    assert ask([], "  ", [photo, photo])[-1].parts[-1].text == "Describe the pictures."


@pytest.mark.parametrize(("text", "files"), [("", []), (None, None), ("   ", [])])
def test_an_empty_message_is_refused(text, files):
    with pytest.raises(ValueError, match=r"^The message is empty\. Write a question, or what to draw\.$"):
        ask([], text, files)


def test_too_many_pictures_are_refused_before_any_is_opened():
    with pytest.raises(ValueError, match=r"^9 pictures in one message, the limit is 8\. Send fewer\.$"):
        ask([], "what are they?", ["nowhere.png"] * 9)


def test_the_model_reads_drawn_pictures_as_vectors_and_shown_ones_as_pixels():
    vectors, picture = torch.zeros(2, 3), Image.new("RGB", (2, 2))
    history = [
        Message("user", [Part(picture=picture), Part("draw it")]),
        Message("assistant", [Part("here:"), Part(picture=picture, vectors=vectors), Part(""), Part()]),
    ]
    shown, drawn = messages_for_model(history)
    assert shown["content"] == [{"type": "image", "image": picture}, {"type": "text", "text": "draw it"}]
    assert [part["type"] for part in drawn["content"]] == ["text", "image"]  # no empty text, no unfinished picture
    assert drawn["content"][1]["image_vectors"] is vectors


def test_a_question_that_was_stopped_before_its_answer_makes_room_for_the_next():
    first = [Message("user", [Part("one")]), Message("assistant", [Part("1")])]
    stopped = [*first, Message("user", [Part("two")])]
    begun = [*stopped, Message("assistant", [Part()])]  # a picture that never was
    assert answered(stopped) == answered(begun) == first
    roles = [message.role for message in ask(begun, "three", [])]
    assert roles == ["user", "assistant", "user"]


def test_asking_leaves_the_conversation_before_it_as_it_was():
    history = [Message("user", [Part("one")])]
    ask(history, "two", [])
    assert len(history) == 1
