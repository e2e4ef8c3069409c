"""The plug-in's half of the understanding path, on a tiny model and without the harness."""

import json
import types
from pathlib import Path

import pytest
import torch

from evaluation.lmms_eval_plugin.pisces_lmms_eval import answers as answers_module
from evaluation.lmms_eval_plugin.pisces_lmms_eval.answers import (
    DEFAULT_MAX_NEW_TOKENS,
    Answerer,
    Question,
    batch_questions,
    cut_at_stops,
    generation_options,
    hash_question,
    samples,
)
from modeling_pisces.console.commands import answer_question
from tests.evaluation.understanding.understanding_stand_ins import picture
from tests.fixtures import make_model, make_processor


SHORT = {"max_new_tokens": 4, "do_sample": False, "temperature": 0}


def ask(number: int, num_pictures: int = 1, settings: dict | None = None, text: str | None = None) -> Question:
    text = text or f"question {number}" + " and more" * (number % 3)
    content = [{"type": "image", "image": picture(number + i)} for i in range(num_pictures)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return Question(f"toy test {number}", text, settings or SHORT, lambda: messages)


@pytest.fixture
def loaded():
    return make_model(), make_processor()


class Counting:
    """A model that counts the rows it is asked, and is killed after some of its calls."""

    def __init__(self, model, num_calls: int | None = None):
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.rows: list[int] = []
        self.options: list[dict] = []
        self.num_calls = num_calls

    def generate(self, **inputs):
        if len(self.rows) == self.num_calls:
            raise KeyboardInterrupt
        self.rows.append(len(inputs["input_ids"]))
        self.options.append({name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)})
        return self.model.generate(**inputs)


def test_a_batch_of_different_lengths_and_numbers_of_pictures_answers_like_one_question_at_a_time(loaded):
    model, processor = loaded
    questions = [ask(number, num_pictures) for number, num_pictures in enumerate((1, 2, 0, 3, 1))]
    alone = Answerer(lambda: loaded, batch_size=1).answer(questions)
    assert Answerer(lambda: loaded, batch_size=5).answer(questions) == alone
    assert len(set(alone)) > 1
    one_picture = answer_question(model, processor, picture(0), questions[0].text, max_new_tokens=4)
    assert alone[0] == one_picture


def test_batches_hold_one_kind_of_settings_longest_first_and_sampled_questions_alone():
    other = {"max_new_tokens": 9}
    sampled = {"temperature": 1.0}
    questions = [ask(0, text="a"), ask(1, text="bbb"), ask(2, settings=other), ask(3, text="cc")]
    questions += [ask(4, settings=sampled), ask(5, settings=sampled)]
    batches = batch_questions(questions, 2)
    assert sorted(batches) == sorted([[1, 3], [0], [2], [5], [4]])


def test_a_task_decides_length_and_sampling(loaded):
    model = Counting(loaded[0])
    sampled = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 3,
        "image_aspect_ratio": "original",
    }
    Answerer(lambda: (model, loaded[1])).answer([ask(0), ask(1, settings=sampled)])
    options = sorted(model.options, key=lambda item: item["max_new_tokens"])
    assert options[0] == {"max_new_tokens": 3, "do_sample": True, "num_beams": 1, "temperature": 0.7, "top_p": 0.9}
    assert options[1] == {"max_new_tokens": 4, "do_sample": False, "num_beams": 1}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.2, "do_sample": False}, False),  # MM-Vet's own
        ({"temperature": 0.2}, True),
        ({"do_sample": True}, True),
        ({"temperature": None}, False),
    ],
)
def test_sampling_is_what_the_task_says(settings, expected):
    assert samples(settings) is expected
    assert generation_options(settings)["do_sample"] is expected


def test_answers_end_at_the_tasks_stop_words_but_not_at_the_one_the_harness_adds():
    assert cut_at_stops("yes ASSISTANT: no", {"until": ["ASSISTANT:"]}) == "yes"
    assert cut_at_stops("yes.no", {"until": "."}) == "yes"
    assert cut_at_stops("first\n\nsecond", {"until": ["\n\n"]}) == "first\n\nsecond"
    assert cut_at_stops(" yes ", {}) == "yes"


def test_a_task_without_a_length_gets_the_usual_one_within_the_context(loaded, monkeypatch):
    model, processor = Counting(loaded[0]), loaded[1]
    monkeypatch.setattr(answers_module, "DEFAULT_MAX_NEW_TOKENS", 6)
    Answerer(lambda: (model, processor)).answer([ask(0, settings={"until": ["x"]})])
    num_prompt_tokens = processor.apply_chat_template(
        ask(0).read(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"].shape[1]
    processor.tokenizer.model_max_length = num_prompt_tokens + 2
    Answerer(lambda: (model, processor)).answer([ask(0, settings={"until": ["x"]})])
    assert [options["max_new_tokens"] for options in model.options] == [6, 2]
    assert DEFAULT_MAX_NEW_TOKENS == 1024


def test_a_prompt_that_fills_the_context_is_refused_by_name(loaded):
    loaded[1].tokenizer.model_max_length = 20
    with pytest.raises(ValueError, match=r"toy test 7: .*20"):
        Answerer(lambda: loaded).answer([ask(7)])


def test_a_batch_size_below_one_is_refused(loaded):
    with pytest.raises(ValueError, match="batch_size 0: expected a number from 1"):
        Answerer(lambda: loaded, batch_size=0)


# ---- keeping answers


def test_a_killed_run_goes_on_without_repeating_a_finished_question(loaded, tmp_path):
    questions = [ask(number) for number in range(7)]
    whole = Answerer(lambda: loaded, batch_size=2).answer(questions)

    killed = Counting(loaded[0], num_calls=2)
    with pytest.raises(KeyboardInterrupt):
        Answerer(lambda: (killed, loaded[1]), 2, tmp_path).answer(questions)
    (path,) = tmp_path.iterdir()
    assert len(path.read_text().splitlines()) == 4
    path.write_text(path.read_text() + '{"question": "half a li')  # killed while it wrote

    again = Counting(loaded[0])
    assert Answerer(lambda: (again, loaded[1]), 2, tmp_path).answer(questions) == whole
    assert sum(again.rows) == 3
    assert all(json.loads(line)["answer"] is not None for line in path.read_text().splitlines())


def test_a_batch_of_which_one_answer_was_kept_is_asked_again_in_full(loaded, tmp_path):
    questions = [ask(number) for number in range(4)]
    Answerer(lambda: loaded, 2, tmp_path).answer(questions)
    (path,) = tmp_path.iterdir()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    again = Counting(loaded[0])
    Answerer(lambda: (again, loaded[1]), 2, tmp_path).answer(questions)
    assert again.rows == [2]


def test_two_shards_leave_the_same_answers_as_one_process_and_the_last_run_asks_nothing(loaded, tmp_path):
    questions = [ask(number, 1 + number % 2) for number in range(9)]
    whole = Answerer(lambda: loaded, 2, tmp_path / "one").answer(questions)
    counts = []
    for number in (1, 2):
        model = Counting(loaded[0])
        Answerer(lambda model=model: (model, loaded[1]), 2, tmp_path / "two", (number, 2)).answer(questions)
        counts.append(sum(model.rows))
    assert sorted(counts) == [4, 5]

    def load():
        raise AssertionError("every answer is there, so nothing has to be loaded")

    assert Answerer(load, 2, tmp_path / "two").answer(questions) == whole
    read = lambda name: sorted(line for path in (tmp_path / name).iterdir() for line in path.open())  # noqa: E731
    assert read("one") == read("two")


def test_words_pixels_and_settings_tell_questions_apart():
    def key(question: Question) -> str:
        return hash_question(question.read(), question.settings)

    first = key(ask(0))
    assert key(ask(0)) == first
    others = [
        ask(1, text="question 0"),
        ask(0, text="question zero"),
        ask(0, 2),
        ask(0, settings={"max_new_tokens": 5}),
    ]
    assert first not in {key(question) for question in others}


def test_the_same_question_sampled_twice_has_two_answers_that_a_restart_gives_again(loaded, tmp_path):
    sampled = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 8}
    questions = [ask(0, settings=sampled), ask(0, settings=sampled)]
    first = Answerer(lambda: loaded, 2, tmp_path).answer(questions)
    assert first[0] != first[1]
    assert Answerer(lambda: loaded, 2).answer(questions) == first


# ---- lmms-eval's side of the plug-in, with a stand-in for its base class


@pytest.fixture
def harness_model(monkeypatch):
    """The module of lmms-eval's class, imported on a base class that has only what ours touches."""
    import importlib
    import sys

    class Base:
        def __init__(self):
            self.task_dict = {}

        def clean(self):
            self.is_clean = True

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base
    name = "evaluation.lmms_eval_plugin.pisces_lmms_eval.harness_model"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from tests.evaluation.understanding.understanding_stand_ins import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def request(doc_id: int, part: dict | None = None):
    def to_messages(doc):
        return [
            {"role": "user", "content": [part or {"type": "image", "url": doc}, {"type": "text", "text": "what?"}]}
        ]

    return types.SimpleNamespace(args=("what?", to_messages, SHORT, doc_id, "toy", "test"), task_name="toy")


def test_requests_of_the_harness_become_questions_and_come_back_in_order(harness_model, checkpoint, tmp_path):
    model = harness_model.Pisces(str(checkpoint), batch_size="2", device="cpu", answers=str(tmp_path / "kept"))
    model.task_dict["toy"] = {"test": [picture(number) for number in range(3)]}
    found = model.generate_until([request(2), request(0), request(1)])
    direct = make_model(), make_processor()
    assert found == [answer_question(*direct, picture(number), "what?", 4) for number in (2, 0, 1)]
    model.clean()
    assert model.is_clean and model.answerer.loaded is None


def test_a_shard_keeps_its_answers_and_ends_without_a_score(harness_model, checkpoint, tmp_path):
    model = harness_model.Pisces(str(checkpoint), device="cpu", answers=str(tmp_path), shard="2/2")
    model.task_dict["toy"] = {"test": [picture(number) for number in range(2)]}
    with pytest.raises(SystemExit) as ended:
        model.generate_until([request(0), request(1)])
    assert ended.value.code == 0
    assert len((tmp_path / "answers_2_of_2.jsonl").read_text().splitlines()) == 1


def test_what_the_plug_in_does_not_do_is_said_by_task(harness_model, checkpoint, monkeypatch):
    model = harness_model.Pisces(str(checkpoint), device="cpu")
    with pytest.raises(NotImplementedError, match="toy compares likelihoods, and pisces answers in words"):
        model.loglikelihood([request(0)])
    with pytest.raises(NotImplementedError, match="toy asks in several rounds"):
        model.generate_until_multi_round([request(0)])
    model.task_dict["toy"] = {"test": [None]}
    with pytest.raises(ValueError, match="toy test 0: it shows a video, and Pisces sees pictures only"):
        model.generate_until([request(0, {"type": "video", "url": "a.mp4"})])
    with pytest.raises(ValueError, match="batch_size 'auto': expected a number"):
        harness_model.Pisces(str(checkpoint), batch_size="auto")
    with pytest.raises(ValueError, match="shard=1/2 without answers=FOLDER"):
        harness_model.Pisces(str(checkpoint), shard="1/2")
    with pytest.raises(ValueError, match="shard=3/2: expected i/n"):
        harness_model.Pisces(str(checkpoint), answers="kept", shard="3/2")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        harness_model.Pisces("nowhere")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="does not run under torchrun"):
        harness_model.Pisces(str(checkpoint))
