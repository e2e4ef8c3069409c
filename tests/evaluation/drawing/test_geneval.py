"""Claims about `evaluation.geneval` and its rules, on boxes worked out by hand and on scenes of known content."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import geneval
from evaluation.drawing.folder import picture_path
from evaluation.drawing.geneval_rules import Found, Thresholds, judge, keep_confident, overlap, relations_of
from evaluation.scenes.detector import detect_objects, load_silhouettes
from finetune.scenes.layout import RELATIONS, Scene, group_cells, make_scene, pair_cells
from finetune.scenes.prompts import prompts_for_evaluation
from finetune.scenes.render import render_scene, write_silhouettes
from tests.evaluation.drawing.drawing_stand_ins import write_lines


USUAL = Thresholds()
BLANK = Image.new("RGB", (100, 100))


def found(name: str, score: float = 1.0, x: float = 50, y: float = 50, side: float = 10) -> Found:
    return Found(name, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def verdict(objects: list[Found], tag: str, include: list[dict], exclude: list[dict] | None = None, colors=()):
    entry = {"tag": tag, "include": include} | ({"exclude": exclude} if exclude else {})
    return judge(BLANK, objects, entry, lambda image, chosen: list(colors)[: len(chosen)], USUAL)


# ---- rules -----------------------------------------------------------------------------------------------------


def test_an_object_counts_above_a_confidence_that_is_higher_for_counting():
    objects = [found("cow", 0.95), found("cow", 0.9), found("cow", 0.31), found("cow", 0.3)]
    assert [item.score for item in keep_confident(objects[::-1], "two_object", USUAL)["cow"]] == [0.95, 0.9, 0.31]
    assert [item.score for item in keep_confident(objects, "counting", USUAL)["cow"]] == [0.95]


def test_only_the_sixteen_most_confident_of_a_class_count():
    objects = [found("cow", 0.5 + n / 100) for n in range(20)] + [found("cat", 0.4)]
    kept = keep_confident(objects, "counting", Thresholds(counting_score=0.3))
    assert [len(kept["cow"]), kept["cow"][-1].score, len(kept["cat"])] == [16, 0.54, 1]


def test_boxes_of_one_object_are_joined_only_where_a_limit_is_set():
    twice = [found("cow", 0.9), found("cow", 0.8, x=51), found("cow", 0.7, x=80)]
    assert overlap(twice[0].box, twice[1].box) == pytest.approx(110 / (121 + 121 - 110))  # last pixels included
    assert overlap(twice[0].box, twice[2].box) == 0
    assert len(keep_confident(twice, "colors", USUAL)["cow"]) == 3
    kept = keep_confident(twice, "colors", Thresholds(max_overlap=0.5))["cow"]
    assert [item.score for item in kept] == [0.9, 0.7]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (20, 50, {"left of"}),
        (80, 50, {"right of"}),
        (50, 20, {"above"}),
        (50, 80, {"below"}),
        (20, 20, {"left of", "above"}),
        (51.9, 50, set()),  # nearer than a tenth of both sides, 2 pixels
        (50, 50, set()),
        (80, 60, {"right of"}),  # 8 of 31.6 pixels downwards are less than half
        (52.5, 50, set()),  # 0.5 of 2.5 pixels go beyond the two: less than half of the distance
    ],
)
def test_a_relation_is_more_than_half_of_the_distance_beyond_a_tenth_of_both_sizes(x, y, expected):
    assert relations_of(found("a", x=x, y=y).box, found("b").box, 0.1) == expected


def test_counting_wants_the_number_and_no_more():
    include, exclude = [{"class": "cow", "count": 2}], [{"class": "cow", "count": 3}]
    cows = [found("cow", x=x) for x in (10, 50, 90)]
    assert verdict(cows[:2], "counting", include, exclude) == (True, "")
    assert verdict(cows[:1], "counting", include, exclude) == (False, "expected 2 cow, found 1")
    assert verdict(cows, "counting", include, exclude) == (False, "expected fewer than 3 cow, found 3")
    assert verdict(cows, "two_object", include).correct  # more of what was asked for is allowed elsewhere


def test_the_most_confident_object_has_to_have_the_colour():
    include = [{"class": "cow", "count": 1, "color": "red"}]
    cows = [found("cow", 0.9), found("cow", 0.8)]
    assert verdict(cows, "colors", include, colors=["red", "blue"]).correct
    wrong = verdict(cows, "colors", include, colors=["blue", "red"])
    assert wrong == (False, "expected 1 red cow, found blue")


def test_a_position_needs_its_target_and_the_right_side():
    include = [{"class": "cat", "count": 1}, {"class": "cow", "count": 1, "position": ["left of", 0]}]
    assert verdict([found("cow", x=20), found("cat")], "position", include).correct
    assert verdict([found("cow", x=80), found("cat")], "position", include).reason == (
        "expected cow left of cat, found right of"
    )
    assert verdict([found("cow")], "position", include).reason == (
        "expected 1 cat, found 0; nothing for the cow to be left of"
    )


# ---- scenes of known content -----------------------------------------------------------------------------------


def scene_of(include: list[dict], rng: random.Random, relation: str | None = None, extra: int = 0) -> Scene:
    """A scene with what an entry asks for, and `extra` more (or fewer) of the last object."""
    looks = [(item["class"], item.get("color", "blue")) for item in include for _ in range(item["count"])]
    looks = looks + [looks[-1]] * extra if extra >= 0 else looks[:extra]
    if relation:  # include has the target first
        cells = pair_cells("row" if relation in ("left of", "right of") else "column", None)
        cells = cells[::-1] if relation in ("left of", "above") else cells
    else:
        cells = group_cells(len(looks), None) if len(looks) < 5 else [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]
    return make_scene(rng, [(*look, "small") for look in looks], cells)


def right_and_wrong(entry: dict, rng: random.Random, number: int) -> tuple[Scene, Scene]:
    """A scene that is what the entry asks for, and one with the mistake that its task is about."""
    include, tag = entry["include"], entry["tag"]
    relation = include[1]["position"][0] if tag == "position" else None
    right = scene_of(include, rng, relation)
    if tag == "counting":
        return right, scene_of(include, rng, extra=1 if number % 2 else -1)
    if tag == "position":
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
        return right, scene_of(include, rng, opposite)
    if tag == "two_object":
        return right, scene_of(include[:1], rng)
    if tag == "color_attr":  # the right colours at the wrong objects
        swapped = [item | {"color": other["color"]} for item, other in zip(include, include[::-1], strict=True)]
        return right, scene_of(swapped, rng)
    other = {"color": "red" if include[0].get("color") != "red" else "blue"} if tag == "colors" else {"class": "cross"}
    return right, scene_of([include[0] | other], rng)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> tuple[Path, dict[bytes, Scene]]:
    """Six prompts of each task with two rendered pictures each, the first right and the second wrong; and the truth."""
    folder, rng, truth = tmp_path_factory.mktemp("drawings") / "drawings", random.Random(1), {}
    rows = [row for row in prompts_for_evaluation("heldout", 0, 32) if row["tag"] != "color_attr" or _two_colors(row)]
    rows = [row for row in rows if row["tag"] != "single_object" or row["include"][0]["class"] != "cross"]
    entries = [row for tag in sorted({row["tag"] for row in rows}) for row in [r for r in rows if r["tag"] == tag][:6]]
    for index, entry in enumerate(entries):
        if entry["tag"] == "counting":
            entry["exclude"] = [{"class": entry["include"][0]["class"], "count": entry["include"][0]["count"] + 1}]
        for image, scene in enumerate(right_and_wrong(entry, rng, index)):
            picture = render_scene(scene)
            path = picture_path(folder, index, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            truth[picture.tobytes()] = scene
        write_lines(folder / f"{index:05d}/metadata.jsonl", [entry])
    settings = {"prompt_set": "own", "num_prompts": 36, "images_per_prompt": 2, "model": "scenes", "wording": "raw"}
    settings |= {"width": 64, "height": 64, "num_inference_steps": 0, "guidance_scale": 1.0, "seed": 1}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "commits": ["abc"]}))
    return folder, truth


def _two_colors(row: dict) -> bool:
    return row["include"][0]["color"] != row["include"][1]["color"]


class Looker:
    """A detector and colour classifier in one, from the truth of the scenes or from their pixels."""

    def __init__(self, truth: dict[bytes, Scene], silhouettes=None):
        self.truth, self.silhouettes, self.looked, self.last = truth, silhouettes, 0, None

    def objects(self, image: Image.Image) -> list:
        if self.silhouettes:
            return detect_objects(image, self.silhouettes).objects
        return self.truth[image.tobytes()].objects

    def detect(self, image: Image.Image) -> list[Found]:
        if self.looked == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.looked += 1
        return [found(item.shape, 0.99, item.x, item.y, 2 * item.radius) for item in self.objects(image)]

    def name_colors(self, image: Image.Image, chosen: list[Found]) -> list[str]:
        by_place = {found("", 1, item.x, item.y, 2 * item.radius).box: item.color for item in self.objects(image)}
        return [by_place[item.box] for item in chosen]


@pytest.fixture
def looker(drawings, monkeypatch) -> Looker:
    looker = Looker(drawings[1])
    names = {"detector": "truth", "color_model": "truth"}
    monkeypatch.setattr(geneval, "load_models", lambda *_: (looker.detect, looker.name_colors, names))
    return looker


def score(drawings, output: Path, *flags: str) -> dict | None:
    geneval.main(["--drawings", str(drawings[0]), "--output", str(output), *flags])
    return json.loads(output.read_text()) if output.is_file() else None


def without_time(results: dict) -> dict:
    run = {name: value for name, value in results["run"].items() if name not in ("seconds", "command")}
    return results | {"run": run}


@pytest.mark.parametrize("eyes", ["truth", "pixels"])
def test_every_verdict_on_scenes_of_known_content_is_right(drawings, looker, tmp_path, eyes):
    if eyes == "pixels":
        write_silhouettes(tmp_path)
        looker.silhouettes = load_silhouettes(tmp_path)
    results = score(drawings, tmp_path / "out.json")
    verdicts = geneval.read_verdicts(tmp_path / "out_verdicts")
    disagreements = [row for (_, image), row in verdicts.items() if row["correct"] != (image == 0)]
    assert disagreements == [] and len(verdicts) == 72
    half = {"value": 0.5, "n": 12, "low": 0.2538, "high": 0.7462}  # 6 of 12, Wilson
    tasks = ("color_attr", "colors", "counting", "position", "single_object", "two_object")
    assert results["categories"] == dict.fromkeys(tasks, half)
    assert results["overall"] == 0.5 and results["benchmark"] == "geneval-variant-own"


def test_the_results_file_says_how_it_came_about(drawings, looker, tmp_path):
    results = score(drawings, tmp_path / "out.json", "--threshold", "0.2")
    assert results["settings"]["thresholds"] == {
        "score": 0.2,
        "counting_score": 0.9,
        "max_objects": 16,
        "max_overlap": 1.0,
        "position": 0.1,
    }
    assert results["settings"]["drawings"]["num_prompts"] == 36
    protocol = results["run"]["protocol"]
    for words in ("variant of GenEval", "our own 36 prompts (raw)", "64 x 64", "guidance 1.0", "Objects: truth"):
        assert words in protocol
    assert {"commit", "commits_of_drawing", "hardware", "versions"} <= set(results["run"])
    command = f"python -m evaluation.geneval --drawings {drawings[0]} --output {tmp_path / 'out.json'} --threshold 0.2"
    assert results["run"]["command"] == command


def test_twice_and_in_two_shards_the_results_are_the_same(drawings, looker, tmp_path, capsys):
    once = score(drawings, tmp_path / "once.json")
    assert without_time(score(drawings, tmp_path / "once.json")) == without_time(once)
    assert looker.looked == 72  # the second time nothing was looked at
    assert score(drawings, tmp_path / "sharded.json", "--shard", "2/2") is None
    assert "36 of 72 pictures are judged" in capsys.readouterr().out
    assert without_time(score(drawings, tmp_path / "sharded.json", "--shard", "1/2")) == without_time(once)


def test_a_killed_run_goes_on_where_it_stopped(drawings, looker, tmp_path):
    whole = score(drawings, tmp_path / "whole.json")
    if (child := os.fork()) == 0:
        looker.last = 72 + 30
        try:
            score(drawings, tmp_path / "killed.json")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    lines = tmp_path / "killed_verdicts/1_of_1.jsonl"
    assert len(lines.read_text().splitlines()) == 30 and not (tmp_path / "killed.json").exists()
    lines.write_bytes(lines.read_bytes()[:-10])  # the kill came in the middle of a line
    looker.looked = 0
    assert without_time(score(drawings, tmp_path / "killed.json")) == without_time(whole)
    assert looker.looked == 72 - 29


def test_other_settings_do_not_mix_into_one_results_file(drawings, looker, tmp_path):
    score(drawings, tmp_path / "out.json", "--shard", "1/2")
    with pytest.raises(SystemExit, match=r"was begun with thresholds .*Choose another --output"):
        score(drawings, tmp_path / "out.json", "--shard", "2/2", "--max_overlap", "0.5")


def spoil(folder: Path, change) -> Path:
    entry = folder / "00003/metadata.jsonl"
    row = json.loads(entry.read_text())
    change(row)
    return write_lines(entry, [row])


def test_what_is_missing_or_unreadable_ends_in_one_line_and_no_score(drawings, looker, tmp_path):
    folder = shutil.copytree(drawings[0], tmp_path / "drawings")

    def refused(message: str) -> None:
        with pytest.raises(SystemExit, match=message) as stop:
            score((folder,), tmp_path / "out.json")
        assert "\n" not in str(stop.value) and not (tmp_path / "out.json").exists() and looker.looked == 0

    spoil(folder, lambda row: row.pop("tag"))
    refused("prompt 3: the tag is None")
    picture_path(folder, 35, 1).unlink()
    refused(r"1 of 108 files are missing, the first is 00035/samples/0001.png")
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"num_prompts": 35, "prompt_set": "geneval"}
    (folder / "run.json").write_text(json.dumps(run))
    refused("its metadata is not GenEval's")
    (folder / "run.json").unlink()
    refused("Draw the prompts first")


def test_a_threshold_that_no_score_can_pass_is_refused(drawings, looker, tmp_path):
    with pytest.raises(SystemExit, match=r"--threshold: '30': expected a number from 0 to 1"):
        score(drawings, tmp_path / "out.json", "--threshold", "30")


def test_every_relation_is_among_the_scenes(drawings):
    entries = [json.loads(path.read_text()) for path in sorted(drawings[0].glob("*/metadata.jsonl"))]
    relations = {entry["include"][1]["position"][0] for entry in entries if entry["tag"] == "position"}
    assert relations <= set(RELATIONS) and len(relations) >= 3
    assert np.unique([entry["tag"] for entry in entries]).size == 6
