"""Claims about `evaluation.report.plots`: what is drawn, and that a stale plot is found."""

import json
import sys

import pytest
from PIL import Image

from evaluation.report import pages as report
from evaluation.report import plots


def write(path, curve):
    path.write_text(json.dumps({"recipe": "toy", "curve": curve}), encoding="utf-8")
    return path


def share(value, low=0.0, high=1.0):
    return {"value": value, "n": 10, "low": low, "high": high}


# ---- curves


def test_numbers_become_curves_and_bookkeeping_stays_out(tmp_path):
    points = [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "elapsed_s": 3.0},
        {"step": 2, "loss": 1.0, "text_loss": 0.4},
        {"step": 2, "heldout_mse": 0.5, "train_runtime": "12"},
    ]
    found = plots.read_curves(write(tmp_path / "a.json", points))
    assert found == {
        "text_loss": [(2, 0.4)],
        "heldout_mse": [(2, 0.5)],
    }  # the sum of the losses says less than its parts
    found = plots.read_curves(write(tmp_path / "b.json", points[:1]))
    assert found == {"loss": [(1, 2.0)]}


def test_every_file_gets_a_panel(tmp_path):
    pytest.importorskip("matplotlib")
    files = [write(tmp_path / f"{i}.json", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]) for i in range(5)]
    report.main(["curves", *map(str, files), "--output", str(tmp_path / "out" / "curves.png")])
    five = Image.open(tmp_path / "out" / "curves.png")
    report.main(["curves", str(files[0]), "--output", str(tmp_path / "one.png")])
    assert five.height == 2 * Image.open(tmp_path / "one.png").height


def test_a_file_without_a_curve_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"x\.json has no \"curve\""):
        report.main(["curves", str(write(tmp_path / "x.json", [])), "--output", str(tmp_path / "out.png")])


# ---- scores


def test_both_sides_are_panels_and_a_mean_gets_the_interval_of_a_mean():
    results = {
        "benchmark": "scenes",
        "understanding_question": {"overall": share(0.5), "types": {"color": share(0.4)}},
        "understanding_paraphrase": {"overall": share(0.5), "types": {"color": share(0.4)}},
        "drawing_prompt": {
            "overall": 0.5,
            "categories": dict.fromkeys("abcd", share(0.5, 0.4, 0.7)),
            "attributes": {"shape": share(0.1)},
        },
        "reconstruction": {"strict": share(0.9)},
    }
    panels = plots.score_panels(results)
    assert list(panels) == [
        "questions answered exactly",
        "drawings with everything right",
        "pictures reconstructed right",
    ]
    assert list(panels["questions answered exactly"]) == ["color", "overall"]
    overall = panels["drawings with everything right"]["overall"]
    assert overall == pytest.approx(
        {"value": 0.5, "low": 0.45, "high": 0.6}
    )  # four equal parts: half of their distances
    assert panels["pictures reconstructed right"] == {"strict": share(0.9)}


def test_genevals_categories_are_a_panel_of_their_own():
    results = {"overall": 0.5, "categories": {"colors": share(0.5, 0.4, 0.6)}, "settings": {"seed": 1}}
    panels = plots.score_panels(results)
    assert list(panels) == ["drawings judged right"] and list(panels["drawings judged right"]) == ["colors", "overall"]


def test_a_number_that_is_no_share_is_not_plotted():
    clip_score = {"value": 31.2, "n": 553, "low": 30.9, "high": 31.5}
    assert plots.score_panels({"benchmark": "picture_metrics", "clip_score": clip_score, "cmmd": 0.5}) == {}


def test_a_plot_of_scores_is_current_until_a_number_changes_and_equal_bytes_when_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    named = {"one": {"categories": {"a": share(0.5, 0.4, 0.6)}}, "two": {"categories": {"b": share(0.1, 0, 0.2)}}}
    for name in ("first.png", "second.png"):
        plots.plot_scores(named, tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert plots.is_current(tmp_path / "first.png", named)
    assert not plots.is_current(tmp_path / "missing.png", named)
    assert not plots.is_current(tmp_path / "first.png", {"one": named["one"]})
    named["two"]["categories"]["b"]["low"] = 0.05
    assert not plots.is_current(tmp_path / "first.png", named)


def test_dots_and_intervals_are_drawn_where_the_numbers_say():
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots()
    shares = {"one": {"a": share(0.5, 0.25, 0.75), "b": share(1.0, 0.75, 1.0)}, "two": {"b": share(0.0, 0.0, 0.5)}}
    plots._draw_scores(axis, "title", shares)
    (one, two) = axis.containers
    assert one.lines[0].get_xdata().tolist() == [0.5, 1.0] and two.lines[0].get_xdata().tolist() == [0.0]
    spans = [path[:, 0].tolist() for path in one.lines[2][0].get_segments()]
    assert spans == [[0.25, 0.75], [0.75, 1.0]]
    heights = [*one.lines[0].get_ydata(), *two.lines[0].get_ydata()]
    assert heights == pytest.approx([-0.16, 0.84, 1.16])  # both of category b around its line
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_results_without_an_interval_are_not_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="old and new: no shares with intervals"):
        plots.plot_scores({"old": {"score": 1.0}, "new": {}}, tmp_path / "x.png")


def test_a_missing_matplotlib_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curve = write(tmp_path / "a.json", [{"step": 1, "loss": 1.0}])
    with pytest.raises(SystemExit, match=r"plots need matplotlib .*pip install matplotlib"):
        report.main(["curves", str(curve), "--output", str(tmp_path / "out.png")])
