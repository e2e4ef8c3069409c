"""Claims about `evaluation.curves`."""

import json

import pytest
from PIL import Image

from evaluation import curves


def write(path, curve):
    path.write_text(json.dumps({"recipe": "toy", "curve": curve}), encoding="utf-8")
    return path


def test_numbers_become_curves_and_bookkeeping_stays_out(tmp_path):
    points = [
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "elapsed_s": 3.0},
        {"step": 2, "loss": 1.0, "text_loss": 0.4},
        {"step": 2, "heldout_mse": 0.5, "train_runtime": "12"},
    ]
    found = curves.read_curves(write(tmp_path / "a.json", points))
    assert found == {
        "text_loss": [(2, 0.4)],
        "heldout_mse": [(2, 0.5)],
    }  # the sum of the losses says less than its parts
    found = curves.read_curves(write(tmp_path / "b.json", points[:1]))
    assert found == {"loss": [(1, 2.0)]}


def test_every_file_gets_a_panel(tmp_path):
    pytest.importorskip("matplotlib")
    files = [write(tmp_path / f"{i}.json", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]) for i in range(5)]
    curves.main([*map(str, files), "--output", str(tmp_path / "out" / "curves.png")])
    five = Image.open(tmp_path / "out" / "curves.png")
    curves.main([str(files[0]), "--output", str(tmp_path / "one.png")])
    assert five.height == 2 * Image.open(tmp_path / "one.png").height


def test_a_file_without_a_curve_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"x\.json has no \"curve\""):
        curves.main([str(write(tmp_path / "x.json", [])), "--output", str(tmp_path / "out.png")])
