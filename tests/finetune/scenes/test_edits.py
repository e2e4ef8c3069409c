"""Scene edits: exactly what was asked changes, and it can be told from the rows."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from finetune.data import load_data
from finetune.scenes.edit_kinds import (
    HELD_OUT_EDITS,
    KINDS,
    NEW_KINDS,
    SINGLE,
    is_allowed,
    is_held_out_edit,
    looks,
    make_edit,
    sample_edits,
    touched_cells,
)
from finetune.scenes.edits import main, make_row, training_row, write_edits
from finetune.scenes.layout import Scene, is_held_out
from finetune.scenes.render import render_scene
from modeling_pisces import load_image
from tests.finetune.scenes.test_scenes import scene_of


NUM = 25 * len(KINDS)


def rows(split: str = "train", num: int = NUM) -> list[dict]:
    return [make_row(index, 0, split)[0] for index in range(num)]


def pairs(split: str = "train"):
    """(row, truth before, turn) of every instruction."""
    for row in rows(split):
        before = row["truth"]
        for turn in row["turns"]:
            yield row, before, turn
            before = turn["truth"]


def by_cell(truth: dict) -> dict[tuple[int, int], dict]:
    return {(item["row"], item["col"]): item for item in truth["objects"]}


def test_everything_that_is_not_asked_for_stays_to_the_last_digit():
    for _, before, turn in pairs():
        one, other = by_cell(before), by_cell(turn["truth"])
        asked = {tuple(place) for place in turn["changed"] + turn["gone"]}
        assert {place: item for place, item in one.items() if place not in asked} == {
            place: item for place, item in other.items() if place not in asked
        }
        assert turn["background"] or before["background_rgb"] == turn["truth"]["background_rgb"]
        for place in map(tuple, turn["changed"]):
            assert one.get(place) != other[place]
        assert all(tuple(place) in one and tuple(place) not in other for place in turn["gone"])


def expected_after(before: dict, ops: list[dict]) -> tuple[dict, str]:
    """The ops run on the words of a scene: what a program that reads them comes to."""
    words, background = looks(Scene.from_truth(before)), before["background"]
    for op in ops:
        place, to = tuple(op.get("cell", ())), tuple(op.get("to", ()))
        if op["op"] == "set":
            shape, color, size = words[place]
            words[place] = (op.get("shape", shape), op.get("color", color), op.get("size", size))
        elif op["op"] == "add":
            words[place] = (op["shape"], op["color"], op["size"])
        elif op["op"] == "remove":
            del words[place]
        elif op["op"] == "move":
            words[to] = words.pop(place)
        elif op["op"] == "swap":
            words[place], words[to] = words[to], words[place]
        else:
            background = op["background"]
    return words, background


def test_the_ops_give_the_target():
    for _, before, turn in pairs("heldout"):
        target = Scene.from_truth(turn["truth"])
        assert expected_after(before, turn["ops"]) == (looks(target), target.background)


def test_objects_keep_their_distance_after_every_edit():
    for _, _, turn in pairs():
        scene = Scene.from_truth(turn["truth"])
        assert is_allowed(scene, {tuple(place) for place in turn["changed"]})
        for item in scene.objects:
            assert item.radius <= min(item.x, item.y, 64 - item.x, 64 - item.y)


def test_an_edit_that_would_touch_a_neighbour_is_not_made():
    scene = scene_of("large red star @ top", "small blue circle @ top left")
    for seed in range(30):
        edit = make_edit(scene, random.Random(seed), "resize")
        assert (
            edit is None
            or ("red" not in edit.wordings[0] and "circle" not in edit.wordings[0])
            or (looks(edit.target)[0, 0][2] == "small")
        )


def test_training_never_shows_or_names_what_is_held_out_and_heldout_always_does():
    for row in rows("train"):
        scenes = [row["truth"], *(turn["truth"] for turn in row["turns"])]
        assert not any(is_held_out(Scene.from_truth(truth)) for truth in scenes)
        for kind, color in HELD_OUT_EDITS:
            words = [turn["plain"] for turn in row["turns"] if row["kind"] == kind]
            assert not any(f"{color} " in f"{text} ".split("the ", 1)[-1].rsplit(" ", 2)[-2] for text in words)
            assert all(op.get("color") != color for turn in row["turns"] for op in turn["ops"] if op["op"] == kind)
    for index in range(NUM):
        scene, edits = sample_edits(random.Random(index), KINDS[index % len(KINDS)], "heldout")
        assert is_held_out(scene) or any(map(is_held_out_edit, edits))


def test_all_kinds_come_equally_often_and_each_does_what_it_is_called():
    found = rows()
    assert {kind: sum(row["kind"] == kind for row in found) for kind in KINDS} == dict.fromkeys(KINDS, 25)
    for row in found:
        ops = [op["op"] for turn in row["turns"] for op in turn["ops"]]
        expected = {"recolor": ["set"], "reshape": ["set"], "resize": ["set"], "nothing": [], "impossible": []}
        if row["kind"] in ("two", "chained"):
            assert len(ops) == 2 and len(row["turns"]) == (2 if row["kind"] == "chained" else 1)
        else:
            assert ops == expected.get(row["kind"], [row["kind"]])
    unchanged = [row for row in found if row["kind"] in ("nothing", "impossible")]
    assert all(by_cell(row["truth"]) == by_cell(row["turns"][0]["truth"]) for row in unchanged)


def test_an_instruction_means_one_object():
    scene = scene_of("large red star @ top left", "large red star @ top right", "small blue star @ bottom")
    for seed in range(40):
        edit = make_edit(scene, random.Random(seed), "remove")
        name = edit.wordings[0].removeprefix("remove the ")
        gone = touched_cells(scene, edit.target)
        names = {(0, 0): ["object in the top left"], (0, 2): ["object in the top right"]}
        names[2, 1] = ["blue object", "blue star", "object at the bottom"]
        assert name in names[gone.pop()]


def test_a_training_row_is_read_as_a_conversation(tmp_path):
    folder = write_edits(tmp_path / "edits", num_edits=len(KINDS), seed=3)
    read = load_data(folder / "rows.jsonl")
    assert len(read) == len(KINDS)
    kinds = [json.loads(line) for line in (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    chained = next(row for row in kinds if row["kind"] == "chained")
    parts = [part["type"] for turn in training_row(chained)["messages"] for part in turn["content"]]
    assert parts == ["image", "text", "image", "text", "image"]
    for row in kinds:
        one = np.asarray(load_image(folder / row["image"])).astype(int)
        other = np.asarray(load_image(folder / row["turns"][0]["image"])).astype(int)
        assert (np.abs(one - other).max() > 60) == (row["kind"] not in ("nothing", "impossible"))


def test_a_row_depends_on_its_index_alone_and_a_full_folder_is_refused(tmp_path):
    folder = write_edits(tmp_path / "edits", num_edits=3, seed=1, split="heldout")
    lines = (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2]) == json.loads(json.dumps(make_row(2, 1, "heldout")[0]))
    with pytest.raises(SystemExit, match=r"edits is not empty\. Choose another --output"):
        main(["--output", str(folder), "--num_edits", "3"])
    with pytest.raises(ValueError, match="kind 'paint', split 'train': expected one of"):
        sample_edits(random.Random(0), "paint")
    assert set(SINGLE) < set(KINDS)


# ---- kinds that pisces-tiny was never shown


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_new_kinds_do_what_their_words_say_and_come_only_when_asked_for(split):
    assert not set(NEW_KINDS) & set(KINDS)
    for index in range(60):
        row, (before, after) = make_row(index, 0, split, tuple(NEW_KINDS))
        assert row["kind"] == tuple(NEW_KINDS)[index % 2] and row["turns"][0]["changed"]
        words = expected_after(row["truth"], row["turns"][0]["ops"])
        assert words == (looks(after), after.background) and before.background_rgb == after.background_rgb
        if row["kind"] == "mirror":
            assert {(r, 2 - c): look for (r, c), look in looks(before).items()} == looks(after)
            flipped = render_scene(before).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            far = np.abs(np.asarray(flipped, dtype=int) - np.asarray(render_scene(after), dtype=int))
            assert far.mean() < 3.0  # half a pixel along the outlines; another scene is 20 away
        else:
            (color,) = {item.color for item in after.objects}
            assert color in row["turns"][0]["instruction"] and len(after.objects) > 1


def test_the_command_writes_the_kinds_that_are_named(tmp_path):
    main(["--output", str(tmp_path / "new"), "--num_edits", "4", "--kinds", "mirror"])
    rows = [json.loads(line) for line in (tmp_path / "new/edits.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"mirror"} and len(rows) == 4
    assert json.loads((tmp_path / "new/settings.json").read_text())["kinds"] == ["mirror"]
    with pytest.raises(ValueError, match=r"kind 'turn': expected one of recolor, .*, mirror, everything"):
        write_edits(tmp_path / "other", 4, kinds=["turn"])
