"""Claims about `evaluation.report.compare`."""

import json
from pathlib import Path

import pytest

from evaluation.report import compare, plots
from evaluation.report import pages as report
from evaluation.report.compare import Measured
from evaluation.runs.summaries import drawing_summary, summarize
from pisces_commands.measurement import wilson_interval


def share(successes: int, total: int) -> Measured:
    return Measured(successes / total, *wilson_interval(successes, total))


def write(path: Path, **results) -> Path:
    path.write_text(json.dumps({"benchmark": "toy", "model": path.stem} | results), encoding="utf-8")
    return path


def outcomes(**right: int) -> dict[str, list[bool]]:
    """Of 100 each."""
    return {name: [index < number for index in range(100)] for name, number in right.items()}


def test_the_interval_of_a_difference_is_newcombes():
    # his first example, table II, method 10: 56 of 70 against 48 of 80 differ by 0.2 (0.0524 to 0.3339)
    change = compare.difference(share(48, 80), share(56, 70))
    assert change == (pytest.approx(0.2), pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_the_mean_of_tasks_is_narrower_than_a_task_by_the_root_of_their_number():
    task = {"value": 0.5, "low": 0.4, "high": 0.7}
    assert compare.mean_of_tasks(0.5, {"a": task}) == pytest.approx((0.5, 0.4, 0.7))
    assert compare.mean_of_tasks(0.5, dict.fromkeys("abcd", task)) == pytest.approx((0.5, 0.45, 0.6))


def test_only_a_clear_difference_is_marked(tmp_path):
    before = write(tmp_path / "old.json", **drawing_summary(outcomes(colors=80, counting=50, position=40)))
    after = write(tmp_path / "new.json", **drawing_summary(outcomes(colors=60, counting=45, position=70)))
    page, worse = compare.compare((before, after))
    assert worse == ["categories / colors"]  # 80 -> 60 of 100; 50 -> 45 is within the noise
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert lines["categories / colors"].endswith("| **worse** |")
    assert lines["categories / counting"].endswith("|  |")
    assert lines["categories / position"].endswith("| better |")
    assert lines["overall"].startswith("| overall | 0.5667 (0.5") and lines["overall"].endswith("|  |")
    assert "Clearly worse: 1 of the 4 numbers that have an interval, of 4 in all." in page


def test_swapping_the_files_swaps_the_marks(tmp_path):
    files = [write(tmp_path / f"{n}.json", task=summarize(outcomes(a=n))) for n in (30, 70)]
    assert compare.compare((files[0], files[1]))[1] == []
    assert compare.compare((files[1], files[0]))[1] == ["task / a"]


def test_a_loss_is_better_when_it_is_lower(tmp_path):
    low, high = (
        write(tmp_path / f"{name}.json", image_mse={"value": value, "low": value - 0.1, "high": value + 0.1})
        for name, value in (("low", 1.0), ("high", 2.0))
    )
    assert compare.compare((low, high))[1] == ["image_mse"]
    assert compare.compare((high, low))[1] == []


def test_a_number_without_an_interval_is_shown_and_not_judged(tmp_path):
    before, after = write(tmp_path / "a.json", score=0.9), write(tmp_path / "b.json", score=0.1)
    page, worse = compare.compare((before, after))
    assert worse == [] and "| score | 0.9 | 0.1 | -0.8 | no interval |" in page
    assert "Clearly worse: 0 of the 0 numbers that have an interval, of 1 in all." in page


def test_settings_and_curves_are_not_results(tmp_path):
    extra = {"settings": {"seed": 3}, "run": {"seconds": 5}, "curve": [{"step": 1}], "ok": True, "score": 1.0}
    files = write(tmp_path / "a.json", **extra), write(tmp_path / "b.json", **extra | {"new": 2})
    page, _ = compare.compare(files)
    assert [line for line in page.splitlines() if line.startswith("| ")][2:] == [
        "| score | 1 | 1 | +0 | no interval |"
    ]
    assert "In one of the files only: new." in page


def test_a_difference_of_protocol_is_said_first(tmp_path):
    files = [write(tmp_path / f"{name}.json", score=1, run={"protocol": f"{name} steps"}) for name in ("20", "50")]
    page, _ = compare.compare((files[0], files[1]))
    assert "**The protocols differ**" in page and "- before: 20 steps\n- after: 50 steps" in page
    assert "protocols differ" not in compare.compare((files[0], files[0]))[0]


def test_the_results_of_pisces_tiny_are_compared_with_themselves(tmp_path):
    path = Path(__file__).parents[3] / "results/pisces-tiny.json"
    if not path.is_file():
        pytest.skip("results/pisces-tiny.json is not here")
    page, worse = compare.compare((path, path))
    assert worse == [] and "drawing_prompt / categories / color_attr" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "other.json: no results file"),
        ("{", "other.json: no results file"),
        ("[1]", "a list or a single value"),
        ('{"benchmark": "else", "score": 1}', "of the benchmark 'toy' and .* of 'else'. Compare two files of one"),
        ('{"benchmark": "toy", "other": 1}', "have no number in common"),
    ],
)
def test_files_that_cannot_be_compared_end_in_one_line(tmp_path, content, message):
    first, other = write(tmp_path / "first.json", score=1.0), tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(SystemExit, match=message) as stop:
        report.main(["compare", str(first), str(other), "--output", str(tmp_path / "page.md")])
    assert "\n" not in str(stop.value) and not (tmp_path / "page.md").exists()


def test_the_command_writes_the_page_and_names_what_got_worse(tmp_path, capsys):
    before, after = (write(tmp_path / f"{n}.json", task=summarize(outcomes(a=n))) for n in (90, 10))
    report.main(["compare", str(before), str(after), "--output", str(tmp_path / "pages/page.md")])
    assert (tmp_path / "pages/page.md").read_text().startswith("# toy: two checkpoints")
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["page.md"]  # "task" is no group that is drawn
    assert capsys.readouterr().out.endswith("1 clearly worse\n  task / a\n")


def test_scores_of_both_checkpoints_are_plotted_beside_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    files = [write(tmp_path / f"{n}.json", drawing_prompt=drawing_summary(outcomes(colors=n))) for n in (30, 70)]
    report.main(["compare", *map(str, files), "--output", str(tmp_path / "page.md")])
    assert "![scores with intervals](page.png)" in (tmp_path / "page.md").read_text()
    named = {
        f"{word}: {path.stem}": json.loads(path.read_text())
        for word, path in zip(("before", "after"), files, strict=True)
    }
    assert plots.is_current(tmp_path / "page.png", named)
