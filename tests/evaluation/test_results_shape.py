"""Claims about `evaluation.runs.results`: all benchmarks write one shape, and readers say what a file is not."""

import importlib
import inspect
import json
import time

import pytest

from evaluation.runs.results import make_results, read_results


BENCHMARKS = (
    "evaluation.scenes.benchmark",
    "evaluation.understanding.benchmark",
    "evaluation.geneval",
    "evaluation.picture_metrics",
)


def some_results(**more) -> dict:
    return make_results(
        "toy",
        "my-model",
        {"drawing": {"overall": 0.5}},
        {"seed": 3},
        command="python -m toy",
        facts={"commit": "abc", "hardware": "two cores"},
        protocol="Greedy.",
        start=time.monotonic(),
        **more,
    )


def test_a_results_file_says_what_was_measured_with_what_and_how():
    results = some_results(commits_of_drawing=["abc"])
    assert list(results) == ["benchmark", "model", "drawing", "settings", "run"]
    assert results["settings"] == {"seed": 3} and results["drawing"] == {"overall": 0.5}
    assert list(results["run"]) == ["command", "commit", "hardware", "commits_of_drawing", "protocol", "seconds"]
    assert 0 <= results["run"]["seconds"] < 60


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_the_shape_that_contributing_describes(name):
    source = inspect.getsource(importlib.import_module(name))
    for part in ("LineParser(", '"--output"', "keep_settings(", "make_results(", "one_line_ending("):
        assert part in source, f"{name} lacks {part}"
    assert source.index("keep_settings(folder" if "keep_settings(folder" in source else "keep_settings(run") < (
        source.index("= make_results(")
    ), "settings are noted before anything is measured"


@pytest.mark.parametrize(
    ("content", "benchmark", "message"),
    [
        (None, None, r"file\.json: no results file .*Give a JSON file of an evaluation"),
        ("{", "scenes", r"file\.json: no results file .*Write one: python -m evaluation\.scenes"),
        ("[1]", None, r"a list or a single value, expected the object that an evaluation writes"),
        ('{"benchmark": "toy"}', "scenes", r"of the benchmark 'toy', expected one of evaluation\.scenes"),
    ],
)
def test_a_file_that_is_none_is_refused_by_what_it_is(tmp_path, content, benchmark, message):
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_results(tmp_path / "file.json", benchmark)
    assert "\n" not in str(error.value)


def test_what_was_made_is_read_again(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(some_results()))
    assert read_results(tmp_path / "file.json", "toy")["model"] == "my-model"
