"""Claims about the guard's third side, plain text, and about rehearsal, which keeps it."""

import json
import logging
import re

import pytest
import torch
import yaml

from finetune import lora_generation, lora_joint, lora_understanding
from finetune.data.load import load_data
from finetune.guard import guard as guard_module
from finetune.guard.guard import TwoSidedGuard, guard_table
from finetune.guard.metrics import holds_answer, right_texts
from finetune.guard.rows import PLAIN_TEXT, GuardArguments, load_guard_rows
from finetune.training import rehearsal as rehearsal_module
from finetune.training.recipe import check_sides, load_rows
from finetune.training.rehearsal import PROMPTS, Rehearsal, prepare_rehearsal
from tests.finetune.lora_fixtures import make_adapted, make_rows, make_trainer, save_checkpoint, save_rows
from tests.fixtures import make_model, make_processor


RECIPES = {"understanding": lora_understanding, "generation": lora_generation, "joint": lora_joint}


@pytest.mark.parametrize(
    ("said", "expected", "is_right"),
    [
        ("The capital of France is Paris.", "Paris", True),
        ("It is Parisian.", "Paris", False),
        ("There are seven days.", "7|seven", True),
        ("There are 17 days.", "7|seven", False),
        ("the sun", "SUN", False),
        ("SUN", "SUN", True),
        ("h2o", "H2O", True),
        ("5", "5.", True),
        ("", "yes", False),
    ],
)
def test_an_answer_is_right_when_it_holds_the_expected_word(said, expected, is_right):
    assert holds_answer(said, expected) is is_right


def test_the_set_of_ours_is_plain_text_and_shares_no_question_with_rehearsal():
    rows = list(load_data(str(PLAIN_TEXT)).iter_rows())
    kinds = {row["id"].split("-")[0] for row in rows}
    questions = {row["messages"][0]["content"][0]["text"].lower() for row in rows}
    prompts = {line.strip().lower() for line in PROMPTS.read_text(encoding="utf-8").splitlines()}
    assert kinds == {"fact", "arithmetic", "instruction"} and len(questions) == len(rows) >= 50
    assert len(prompts) >= 60 and not questions & prompts


def test_text_is_watched_unless_it_is_turned_off(tmp_path):
    assert len(load_guard_rows(GuardArguments(), ["generation"], draws=True)["text"]) >= 50
    own = save_rows(tmp_path, make_rows("tut"))
    rows = load_guard_rows(GuardArguments(guard_text=[str(own)]), ["generation"], draws=True)["text"]
    assert [row["id"] for row in rows] == ["text-0", "text-2"]
    assert "text" not in load_guard_rows(GuardArguments(guard_text=["off"]), ["generation"], draws=True)


def test_a_file_without_plain_text_is_refused(tmp_path):
    pictures = save_rows(tmp_path, make_rows("ud"))
    with pytest.raises(ValueError, match=r"--guard_text .*: none of its rows has a text without pictures"):
        load_guard_rows(GuardArguments(guard_text=[str(pictures)]), ["generation"], draws=True)


def watched_run(folder, monkeypatch, answers, **settings):
    """A run whose model answers as told: `answers[n]` are the rows that are right at the n-th look."""
    looks = iter(answers)
    monkeypatch.setattr(guard_module, "right_texts", lambda model, processor, rows, size: next(looks))
    trainer = make_trainer(make_adapted(), make_rows("dd"), folder, max_steps=2, **settings)
    guard = TwoSidedGuard(trainer, {"text": make_rows("tttt")}, ["generation"], every=1)
    trainer.add_callback(guard)
    trainer.train()
    return trainer, guard


def test_what_was_right_and_is_not_any_more_is_counted_and_warned_of(tmp_path, monkeypatch, caplog):
    looks = [[True, True, True, False], [True, True, True, True], [True, False, False, True]]
    with caplog.at_level(logging.WARNING):
        _, guard = watched_run(tmp_path, monkeypatch, looks)
    assert [point["text"]["right"] for point in guard.points] == [0.75, 1.0, 0.5]
    assert [point["text"]["kept"] for point in guard.points] == [1.0, 1.0, pytest.approx(1 / 3)]
    warning = next(record.message for record in caplog.records if "kept 1 -> 0.3333" in record.message)
    assert "text, what the language model knew without pictures, got worse" in warning and "--rehearse" in warning
    record = json.loads((tmp_path / "guard.json").read_text())
    assert record["points"][0]["text_right"] == ["text-0", "text-1", "text-2"]
    assert "| text (not trained) | kept | 1 | 0.3333 | worse |" in guard_table(guard.record())


def test_a_model_that_answers_nothing_has_no_text_to_lose(tmp_path, monkeypatch, capsys):
    _, guard = watched_run(tmp_path, monkeypatch, [[False] * 4])
    assert guard.points == [] and not (tmp_path / "guard.json").exists()
    assert "0 of 4 plain-text questions are answered right before training, too few" in capsys.readouterr().out


def test_answers_are_the_model_s_own_greedy_words():
    model, processor, rows = make_model(), make_processor(), make_rows("tt")
    asked = [row["messages"][0]["content"][0]["text"] for row in rows]
    prompt = processor.apply_chat_template([[row["messages"][0]] for row in rows], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt",
                                           processor_kwargs={"padding": True})  # fmt: skip
    with torch.no_grad():
        found = right_texts(model, processor, rows)
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    said = processor.batch_decode(output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == [holds_answer(text, word) for text, word in zip(said, asked, strict=True)]


# ---- rehearsal ----


@pytest.fixture
def spoken(monkeypatch):
    """Every model ends its answers with the same words."""

    def answer(model, processor, rows, *args):
        return ["I know."] * (len(rows) - 1) + [None]

    monkeypatch.setattr(rehearsal_module, "answer_texts", answer)


def test_rehearsal_is_for_checkpoints_with_new_tokens(spoken, tmp_path):
    assert prepare_rehearsal(None, tmp_path / "no", make_model(), make_processor()) is None
    assert prepare_rehearsal(0.0, tmp_path / "no", make_model(new_token_ids=[264]), make_processor()) is None
    assert not (tmp_path / "no").exists()
    found = prepare_rehearsal(None, tmp_path, make_model(new_token_ids=[264]), make_processor())
    assert found == Rehearsal(tmp_path / "rehearsal.jsonl", 0.2)
    lines = [json.loads(line) for line in found.path.read_text().splitlines()]
    prompts = [line for line in PROMPTS.read_text().splitlines() if line]
    assert len(lines) == len(prompts) - 1, "an answer that was cut off teaches to stop in the middle"
    assert lines[0]["messages"][0]["content"][0]["text"] == prompts[0]
    assert lines[0]["messages"][1]["content"][0]["text"] == "I know."


def test_a_resumed_run_rehearses_the_answers_from_before_its_first_step(spoken, tmp_path):
    (tmp_path / "rehearsal.jsonl").write_text(json.dumps(make_rows("t")[0]) + "\n")
    before = (tmp_path / "rehearsal.jsonl").read_text()
    prepare_rehearsal(0.5, tmp_path, make_model(), make_processor())
    assert (tmp_path / "rehearsal.jsonl").read_text() == before


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_its_share_of_the_rows_is_as_asked_and_no_recipe_refuses_it(share, spoken, tmp_path):
    data = save_rows(tmp_path / "data", make_rows("d" * 40))
    rehearsal = prepare_rehearsal(share, tmp_path, make_model(), make_processor())
    rows = load_rows([str(data)], make_processor(), make_model(), max_length=None, rehearsal=rehearsal)
    assert set(rows.sides) == {"generation", "rehearsal"}
    assert rows.sides["rehearsal"] / len(rows.dataset) == pytest.approx(share, abs=0.02)
    check_sides(rows, {"generation"}, "")
    first = [rows.dataset[index]["id"].split("-")[0] for index in range(20)]
    assert first.count("rehearsal") == pytest.approx(20 * share, abs=1), "spread evenly"


def test_several_sources_keep_their_weights_beside_it(spoken, tmp_path):
    sources = [{"path": str(save_rows(tmp_path / kind, make_rows(kind * 8))), "weight": weight}
               for kind, weight in (("u", 1), ("d", 3))]  # fmt: skip
    rehearsal = prepare_rehearsal(0.2, tmp_path, make_model(), make_processor())
    rows = load_rows(sources, make_processor(), make_model(), max_length=None, rehearsal=rehearsal)
    count = len(rows.dataset)
    assert rows.sides["generation"] / count == pytest.approx(0.6, abs=0.02)
    assert rows.sides["understanding"] / count == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_rehearses_and_watches_text(name, spoken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard_module, "right_texts", lambda model, processor, rows, size: [True] * len(rows))
    start = save_checkpoint(tmp_path / "start", new_token_ids=[262, 263, 264, 265])
    data = save_rows(tmp_path / "data", make_rows({"understanding": "uu", "generation": "dd", "joint": "ud"}[name]))
    flags = ["--model_name_or_path", str(start), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    trainer = RECIPES[name].main([*flags, "--max_steps", "1", "--use_cpu", "True", "--disable_tqdm", "True"])
    printed = capsys.readouterr().out
    assert "rehearsal: 20% of the rows" in printed
    assert re.search(r"text \(not trained\) +right +1 +1\n +kept +1 +1\n", printed)
    assert any("rehearsal" in str(row["id"]) for row in trainer.train_dataset.iter_rows())
    assert re.search(r"\d+ rehearsal", yaml.safe_load((tmp_path / "out/run.yaml").read_text())["data"])


def test_a_share_of_all_rows_is_refused(tmp_path):
    flags = ["--model_name_or_path", "x", "--data", "y", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    with pytest.raises(ValueError, match=r"--rehearse 1: expected a number from 0 and below 1"):
        lora_joint.main([*flags, "--rehearse", "1"])
