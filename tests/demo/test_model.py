"""The model behind the page: answers and drawings that grow, stop and repeat, on a random checkpoint and pisces-tiny."""

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pisces_demo.examples import PROMPTS, QUESTIONS, example_pictures
from pisces_demo.model import DemoModel
from tests.checkpoint_folder import write_checkpoint
from tests.fixtures import make_model, make_processor


pytest.importorskip("diffusers")
TINY = Path(__file__).parents[2] / "pisces-tiny"
STEPS, GUIDANCE = 2, 1


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return DemoModel.load(str(write_checkpoint(tmp_path_factory.mktemp("random") / "random")))


@pytest.fixture(scope="module")
def tiny():
    if not TINY.is_dir():
        pytest.skip("pisces-tiny is not in this checkout")
    return DemoModel.load(str(TINY))


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (20, 20), (250, 0, 0)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def star(tmp_path):
    example_pictures()["star_and_circle"].save(tmp_path / "star.png")
    return str(tmp_path / "star.png")


def draw(model, prompt="a box", count=1, seed=0):
    return [picture.tobytes() for picture, _ in list(model.draw(prompt, count, seed, STEPS, GUIDANCE))[-1].pictures]


def is_free(model):
    if model.lock.acquire(timeout=20):
        model.lock.release()
        return True
    return False


# ---- drawing


def test_the_same_seed_draws_the_same_picture_alone_and_among_others(random_model):
    many = draw(random_model, count=3, seed=5)
    assert len(set(many)) == 3
    assert many == [draw(random_model, seed=seed)[0] for seed in (5, 6, 7)]


def test_what_the_page_draws_is_what_the_pipeline_draws(random_model):
    import torch

    generator = torch.Generator("cpu").manual_seed(7)
    wanted = random_model.pipeline(["a box"], generator=[generator], num_inference_steps=2, guidance_scale=1).images[0]
    assert draw(random_model, seed=7) == [wanted.tobytes()]


def test_pictures_come_one_after_the_other_and_each_step_is_told(random_model):
    told = list(random_model.draw("a box", 2, 3, STEPS, GUIDANCE))
    assert [len(drawn.pictures) for drawn in told] == sorted(len(drawn.pictures) for drawn in told)
    statuses = [drawn.status for drawn in told]
    assert "picture 1 of 2, seed 3: step 1 of 2" in statuses and "picture 2 of 2, seed 4: step 2 of 2" in statuses
    assert statuses[-1].startswith("2 pictures, seeds 3 to 4, in ")
    assert [caption for _, caption in told[-1].pictures] == ["seed 3", "seed 4"]
    assert len(told[0].pictures) == 0  # what was told first has not grown since


def test_a_drawing_that_is_left_ends_at_its_next_step_and_keeps_what_is_finished(random_model):
    steps = []
    drawing = random_model.draw("a box", 8, 0, 50, GUIDANCE)
    for drawn in drawing:
        steps.append(drawn.status)
        if "picture 1 of 8, seed 0: step 2 of 50" in drawn.status:
            drawing.close()
            break
    assert is_free(random_model)
    assert draw(random_model, seed=0) == draw(random_model, seed=0)  # and the model works as before


def test_two_users_at_once_get_their_own_pictures(random_model):
    alone = {seed: draw(random_model, count=2, seed=seed) for seed in (1, 10)}
    together = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: draw(random_model, count=2, seed=seed)}))
        for seed in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


BAD_DRAWINGS = {
    "The prompt is empty. Say what to draw.": {"prompt": " "},
    "The number of pictures is 99: expected a whole number from 1 to 8.": {"count": 99},
    "The seed is -1: expected a whole number from 0 to 4294967295.": {"seed": -1},
    "The seed is 4294967296: expected a whole number from 0 to 4294967295.": {"seed": 2**32 - 1, "count": 2},
    "The number of steps is 0: expected a whole number from 1 to 200.": {"steps": 0},
    "The guidance is 0.5: expected a number from 1 to 30.": {"guidance": 0.5},
}


@pytest.mark.parametrize("says", BAD_DRAWINGS)
def test_a_drawing_that_cannot_be_is_refused_before_the_model_is_asked_for(random_model, says):
    values = {"prompt": "a box", "count": 1, "seed": 0, "steps": 2, "guidance": 1} | BAD_DRAWINGS[says]
    with random_model.lock, pytest.raises(ValueError) as refused:  # waiting for the lock would hang
        list(random_model.draw(**values))
    assert str(refused.value) == says


def test_text_that_spells_a_control_token_is_refused_in_words_for_a_user(random_model, photo):
    token = random_model.processor.gen_start_token
    for work in (
        random_model.draw(f"a {token}", 1, 0, 2, 1),
        random_model.edit(photo, token, 0, 0, 2, 1),
        random_model.answer([], f"what is {token}?", [], 4, 0),
    ):
        with pytest.raises(ValueError, match=r"which the model reads as a command\. Write it differently\.$"):
            list(work)


# ---- editing


def test_an_edit_gives_both_pictures_in_one_size_and_depends_on_its_seed(random_model, photo):
    *_, drawn = random_model.edit(photo, "make it blue", 3, 0, STEPS, GUIDANCE)
    (before, _), (after, _) = drawn.pictures
    assert before.size == after.size == (16, 16) and before.getpixel((8, 8)) == (250, 0, 0)
    results = [
        list(random_model.edit(photo, "make it blue", s, 0, STEPS, GUIDANCE))[-1].pictures[1][0] for s in (3, 4)
    ]
    assert results[0].tobytes() == after.tobytes() != results[1].tobytes()


def test_strength_starts_from_the_picture(random_model, photo):
    plain, strong = (
        list(random_model.edit(photo, "make it blue", 0, strength, 4, GUIDANCE))[-1].pictures[1][0].tobytes()
        for strength in (0, 0.5)
    )
    assert plain != strong


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"path": None}, "There is no picture. Drop one into the field, or click an example."),
        ({"instruction": ""}, "The instruction is empty. Say what to change."),
        ({"strength": 2}, "The strength is 2: expected a number from 0 to 1."),
        ({"strength": None}, "The strength is empty: expected a number from 0 to 1."),
    ],
)
def test_an_edit_that_cannot_be_is_refused(random_model, photo, values, says):
    given = {"path": photo, "instruction": "make it blue", "seed": 0, "strength": 0, "steps": 2, "guidance": 1}
    with random_model.lock, pytest.raises(ValueError) as refused:
        list(random_model.edit(**(given | values)))
    assert str(refused.value) == says


# ---- chat


def texts(history):
    return [[part.text for part in message.parts] for message in history]


def test_the_question_is_shown_at_once_and_the_answer_grows_to_what_the_model_says(tiny, star):
    told = list(tiny.answer([], "Describe the picture.", [star], 64, 0))
    assert texts(told[0]) == [[None, "Describe the picture."]]
    answers = [history[-1].parts[0].text for history in told[1:]]
    assert all(later.startswith(earlier) for earlier, later in pairwise(answers))
    from modeling_pisces.console.commands import answer_question

    direct = answer_question(
        tiny.model, tiny.processor, example_pictures()["star_and_circle"], "Describe the picture."
    )
    assert answers[-1] == direct == "a blue star in the top left and a red circle in the bottom right"


def test_a_request_for_a_picture_is_answered_with_one_that_its_seed_decides(tiny):
    finals = [list(tiny.answer([], "draw a red circle", [], 64, seed))[-1] for seed in (0, 0, 1)]
    pictures = [next(part.picture for part in final[-1].parts if part.picture) for final in finals]
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()
    red, green, blue = pictures[0].getpixel((32, 32))
    assert red > 150 and green < 90 and blue < 90


def test_the_chat_draws_what_the_other_tab_draws(tiny):
    *_, history = tiny.answer([], "draw a red circle", [], 64, 3)
    *_, drawn = tiny.draw("draw a red circle", 1, 3, tiny.default_steps, tiny.default_guidance)
    ours, theirs = (
        np.asarray(picture).astype(int) for picture in (history[-1].parts[0].picture, drawn.pictures[0][0])
    )
    assert abs(ours - theirs).max() <= 2  # the prompt's last token comes in a step of its own: other rounding


def test_a_mark_stands_for_the_picture_while_it_is_drawn(tiny):
    told = list(tiny.answer([], "draw a red circle", [], 64, 0))
    first = told[1][-1].parts[0]
    assert first.text is None and first.picture is None and told[-1][-1].parts[0].picture is not None


def test_the_conversation_goes_on_about_a_drawn_picture(tiny):
    *_, history = tiny.answer([], "draw a red circle", [], 64, 0)
    *_, history = tiny.answer(history, "what shape is it?", [], 64, 0)
    assert [message.role for message in history] == ["user", "assistant"] * 2
    assert history[-1].parts[0].text == "circle"


def test_without_memory_only_the_question_is_read(tiny):
    *_, history = tiny.answer([], "draw a red circle", [], 64, 0)
    with_memory = list(tiny.answer(history, "what shape is it?", [], 64, 0))[-1]
    without = list(tiny.answer(history, "what shape is it?", [], 64, 0, remembers=False))[-1]
    alone = list(tiny.answer([], "what shape is it?", [], 64, 0))[-1]
    assert texts(without[-1:]) == texts(alone[-1:])
    assert len(with_memory) == len(without) == 4  # shown all the same


def test_an_answer_that_is_left_stops_and_the_model_goes_on(tiny, star):
    answer = tiny.answer([], "Describe the picture.", [star], 64, 0)
    for _ in range(3):
        history = next(answer)
    answer.close()
    assert is_free(tiny)
    cut = history[-1].parts[0].text
    *_, again = tiny.answer(history, "How many objects are there?", [star], 64, 0, remembers=False)
    assert cut == "a blue" and again[-1].parts[0].text == "two"


def test_a_conversation_too_long_for_the_model_is_refused_and_left_as_it_was(tiny, star):
    history = list(tiny.answer([], "How many objects are there?", [star], 64, 0))[-1] * 20
    told = []
    with pytest.raises(ValueError, match=r"1024"):
        for state in tiny.answer(history, "How many objects are there?", [star], 64, 0):
            told.append(state)
    assert texts(told[-1]) == texts(history)  # the question is gone again
    assert is_free(tiny)


@pytest.mark.parametrize("length", [0, None, 10**6, 1.5])
def test_a_length_out_of_range_is_refused(random_model, length):
    with pytest.raises(ValueError, match=r"^The longest answer is .* from 1 to 2048\.$"):
        list(random_model.answer([], "hello", [], length, 0))


def test_the_examples_of_the_page_are_inside_the_world_of_pisces_tiny(tiny, tmp_path):
    assert tiny.unknown(*PROMPTS, *QUESTIONS) == []
    found = []
    for question, (name, picture) in zip(QUESTIONS, example_pictures().items(), strict=True):
        picture.save(tmp_path / f"{name}.png")
        *_, history = tiny.answer([], question, [str(tmp_path / f"{name}.png")], 64, 0)
        found.append(history[-1].parts[0].text)
    assert found == ["a blue star in the top left and a red circle in the bottom right", "two", "triangle"]


def test_words_that_a_small_checkpoint_never_saw_are_named(tiny, random_model):
    assert tiny.unknown("a red giraffe and a giraffe") == ["giraffe"]
    assert random_model.unknown("a red giraffe") == []  # it has no list


# ---- checkpoints and adapters


def test_a_checkpoint_without_a_decoder_answers_and_says_that_it_cannot_draw(tmp_path, photo):
    make_model().save_pretrained(tmp_path / "words")
    make_processor().save_pretrained(tmp_path / "words")
    model = DemoModel.load(str(tmp_path / "words"))
    assert not model.can_draw
    *_, history = model.answer([], "what is it?", [photo], 4, 0)
    assert history[-1].role == "assistant" and history[-1].parts[0].text is not None
    for work in (model.draw("a box", 1, 0, 2, 1), model.edit(photo, "make it blue", 0, 0, 2, 1)):
        with pytest.raises(
            ValueError, match=r"^words has no decoder, so it cannot draw\. Start the page with another --model\.$"
        ):
            list(work)


def test_the_page_says_which_checkpoint_it_shows(random_model):
    assert random_model.title().startswith("random, 0.") and random_model.title().endswith(" parameters, on cpu")


def test_there_is_nothing_to_compare_without_an_adapter(random_model):
    with pytest.raises(
        ValueError, match=r"^There is no adapter to compare\. Start the page with --adapter FOLDER_OR_ID\.$"
    ):
        list(random_model.compare("a box", 1, 0, 2, 1))


@pytest.fixture(scope="module")
def adapted(random_model, tmp_path_factory):
    pytest.importorskip("peft")
    from tests.modeling_pisces.console.test_adapter_flag import save_model_adapter

    folder = save_model_adapter(random_model.folder, tmp_path_factory.mktemp("adapter") / "mine")
    return DemoModel.load(str(random_model.folder), [str(folder)])


def test_an_adapter_is_compared_with_its_base_on_the_same_seeds(random_model, adapted):
    *_, drawn = adapted.compare("a box", 2, 3, STEPS, GUIDANCE)
    without = [picture.tobytes() for picture, _ in drawn.pictures]
    with_adapter = [picture.tobytes() for picture, _ in drawn.others]
    assert without == draw(random_model, count=2, seed=3) != with_adapter
    assert with_adapter == draw(adapted, count=2, seed=3)  # on again, and the same as in the other tab
    assert [c for _, c in drawn.pictures] == [c for _, c in drawn.others] == ["seed 3", "seed 4"]
    assert adapted.title().endswith("; adapter: mine")


def test_a_comparison_that_is_left_while_the_adapter_is_off_switches_it_on_again(adapted):
    before = draw(adapted, seed=3)
    comparing = adapted.compare("a box", 4, 3, 50, GUIDANCE)
    for drawn in comparing:
        if "without the adapter, seed 3: step 2 of 50" in drawn.status:
            comparing.close()
            break
    assert is_free(adapted)
    assert draw(adapted, seed=3) == before


def test_another_user_never_sees_the_switch_of_a_comparison(adapted):
    wanted = draw(adapted, seed=9)
    comparing = adapted.compare("a box", 2, 3, 8, GUIDANCE)
    next(comparing)  # it has begun, with the adapter off
    seen = []
    other = threading.Thread(target=lambda: seen.append(draw(adapted, seed=9)))
    other.start()
    list(comparing)
    other.join(60)
    assert seen == [wanted]
