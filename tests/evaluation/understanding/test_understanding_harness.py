"""The whole understanding path through the real lmms-eval: known scores, twice, killed, and in two processes.

Needs a Python with lmms-eval and the plug-in, as `make lmms-eval` sets up, named by PISCES_LMMS_EVAL_PYTHON.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from evaluation.understanding import benchmark as understanding
from evaluation.understanding import harness as understanding_harness
from tests.evaluation.understanding.understanding_stand_ins import (
    TASKS,
    install_scripted_model,
    save_checkpoint,
    write_data,
    write_parquet,
)


PYTHON = os.environ.get(understanding.HARNESS_VARIABLE, "")
NAMES = "pope,mme,mmmu_val"


def has_harness() -> bool:
    """Whether the Python that the variable names can import lmms-eval."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lmms_eval') is None)"
    return Path(PYTHON).is_file() and subprocess.run([PYTHON, "-c", code]).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not has_harness(), reason=f"{understanding.HARNESS_VARIABLE} names no Python that can import lmms_eval"
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint and local data sets, and beside them the script of answers of known score."""
    folder = tmp_path_factory.mktemp("understanding")
    save_checkpoint(folder / "tiny")
    (folder / "script.json").write_text(json.dumps(write_data(folder / "data")))
    return folder


def run(place: Path, name: str, *flags: str) -> dict:
    words = ["--model", str(place / "tiny"), "--data", str(place / "data"), "--limit", "8", "--device", "cpu"]
    understanding.main([*words, "--tasks", NAMES, "--output", str(place / name / "results.json"), *flags])
    return json.loads((place / name / "results.json").read_text())


def comparable(results: dict) -> dict:
    """A results file without what the time, the name of the output and a commit in the meantime decide."""
    for name in ("seconds", "command", "commit", "commits_of_answers"):
        results["run"].pop(name)
    return results


def test_scripted_answers_get_exactly_their_known_scores(place, monkeypatch):
    script = json.loads((place / "script.json").read_text())
    for name, value in install_scripted_model(place / "plugin", script).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(understanding_harness, "PLUGIN_MODEL", "scripted")
    results = run(place, "scripted", "--batch_size", "3")
    assert results["tasks"]["pope"]["metrics"] == {
        "pope_accuracy": 5 / 8,
        "pope_precision": 3 / 5,
        "pope_recall": 3 / 4,
        "pope_f1_score": 2 * (3 / 5 * 3 / 4) / (3 / 5 + 3 / 4),
        "pope_yes_ratio": 0.5,  # of the truths, whatever was answered
    }
    assert results["tasks"]["mme"]["metrics"] == {"mme_perception_score": 125.0, "mme_cognition_score": 200.0}
    assert results["tasks"]["mmmu_val"]["metrics"] == {"mmmu_acc": 5 / 8}


def test_twice_and_killed_and_in_two_processes_the_results_are_the_same(place):
    first = run(place, "first", "--batch_size", "3")
    assert {name: item["n"] for name, item in first["tasks"].items()} == dict.fromkeys(NAMES.split(","), 8)
    second = run(place, "second", "--batch_size", "3", "--num_processes", "2")
    assert comparable(second) == comparable(first)

    (answers,) = (place / "first/results_answers/answers").iterdir()
    lines = answers.read_text().splitlines(keepends=True)
    assert len(lines) == 24
    answers.write_text("".join(lines[:10]) + '{"question": "half a li')  # as a killed run leaves it
    again = run(place, "first", "--batch_size", "3")
    assert comparable(again) == first
    kept = answers.read_text().splitlines(keepends=True)
    assert kept[:10] == lines[:10] and len(kept) <= 24 + 2  # of the batch it was killed in, up to two are asked again
    halves = (place / "second/results_answers/answers").iterdir()
    assert sorted(line for path in halves for line in path.open()) == sorted(lines)


def test_a_data_set_of_another_form_ends_in_one_line_without_a_score(place, tmp_path):
    path = tmp_path / "data" / TASKS["pope"].dataset / "data/test-00000-of-00001.parquet"
    write_parquet(path, [{"question": "is it?", "image_source": "none"}])
    with pytest.raises(SystemExit) as error:
        run(place, "broken", "--tasks", "pope", "--data", str(tmp_path / "data"))
    assert str(error.value).startswith("lmms-eval gave no results: KeyError: ") and "\n" not in str(error.value)
    assert not (place / "broken/results.json").exists()
