"""Claims about `evaluation.scenes --edits`: rendered pictures of known score, scripted answers, a tiny whole run."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.scenes import benchmark as scenes
from evaluation.scenes.detector import detect_objects, load_silhouettes
from evaluation.scenes.edits import (
    answer_edits,
    ask_about_edits,
    change_words,
    edit_summary,
    edits_against,
    paired_difference,
    read_words,
    redraw_pictures,
    score_edit,
    shift_pictures,
    write_words,
)
from finetune.scenes.edit_kinds import KINDS
from finetune.scenes.edits import write_edits
from finetune.scenes.layout import COLORS, SHAPES, Scene
from finetune.scenes.render import render_scene
from finetune.scenes.text import describe_in_detail
from modeling_pisces import load_image


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_edits(tmp_path_factory.mktemp("edits") / "data", num_edits=8 * len(KINDS), seed=4, split="heldout")


@pytest.fixture(scope="module")
def rows(data) -> list[dict]:
    return [json.loads(line) for line in (data / "edits.jsonl").read_text(encoding="utf-8").splitlines()]


def score(data, picture: Image.Image, turn: dict) -> dict[str, bool]:
    return score_edit(detect_objects(picture, load_silhouettes(data)), turn)


def last(row: dict) -> tuple[dict, dict]:
    """The last instruction of a row and the truth before it."""
    before = row["truth"] if len(row["turns"]) == 1 else row["turns"][-2]["truth"]
    return row["turns"][-1], before


def test_the_true_result_of_every_edit_scores_both(data, rows):
    for row in rows:
        turn, _ = last(row)
        assert score(data, load_image(data / turn["image"]), turn) == {"edited": True, "kept": True, "both": True}, row


def test_a_copy_keeps_everything_and_edits_nothing(data, rows):
    for row in rows:
        turn, before = last(row)
        found = score(data, render_scene(Scene.from_truth(before)), turn)
        is_same = row["kind"] in ("nothing", "impossible")
        assert found == {"edited": is_same, "kept": True, "both": is_same}, row


def test_a_blank_picture_keeps_nothing_that_was_there(data, rows):
    for row in rows:
        turn, _ = last(row)
        found = score(data, Image.new("RGB", (64, 64), tuple(turn["truth"]["background_rgb"])), turn)
        has_others = len(turn["truth"]["objects"]) > len(turn["changed"])
        assert not found["both"] and found["kept"] == (not has_others)


def test_damage_beside_the_edit_is_seen(data, rows):
    recolor = next(r for r in rows if r["kind"] == "recolor" and len(r["truth"]["objects"]) > 1)
    turn, _ = last(recolor)
    truth = json.loads(json.dumps(turn["truth"]))
    other = next(item for item in truth["objects"] if [item["row"], item["col"]] not in turn["changed"])
    other["rgb"] = COLORS["red" if other["color"] != "red" else "blue"]
    picture = render_scene(Scene.from_truth(truth))
    assert score(data, picture, turn) == {"edited": True, "kept": False, "both": False}
    for item in truth["objects"]:  # the asked one wrong, the other as it was
        same = next(old for old in turn["truth"]["objects"] if (old["row"], old["col"]) == (item["row"], item["col"]))
        item["rgb"] = same["rgb"]
        if [item["row"], item["col"]] in turn["changed"]:
            item["rgb"] = COLORS["red" if item["color"] != "red" else "blue"]
    assert score(data, render_scene(Scene.from_truth(truth)), turn) == {"edited": False, "kept": True, "both": False}


def test_a_size_is_judged_where_one_was_asked_for(data, rows):
    resize = next(row for row in rows if row["kind"] == "resize")
    turn, _ = last(resize)
    assert turn["sized"] and not next(row for row in rows if row["kind"] == "reshape")["turns"][0]["sized"]


def test_a_new_object_that_nobody_asked_for_is_damage(data, rows):
    background = next(row for row in rows if row["kind"] == "background" and len(row["truth"]["objects"]) == 1)
    turn, _ = last(background)
    truth = json.loads(json.dumps(turn["truth"]))
    item = truth["objects"][0]
    row, col = next((r, c) for r in (0, 2) for c in (0, 2) if abs(r - item["row"]) + abs(c - item["col"]) >= 2)
    truth["objects"].append({**item, "row": row, "col": col, "x": 12.0 + 20 * col, "y": 12.0 + 20 * row})
    assert score(data, render_scene(Scene.from_truth(truth)), turn) == {"edited": True, "kept": False, "both": False}


# ---- describe and draw again


def test_words_are_read_changed_and_written_as_the_truth_says(rows):
    for row in rows:
        source = Scene.from_truth(row["truth"])
        words = read_words(describe_in_detail(source), list(SHAPES), list(COLORS))
        assert write_words(words) == describe_in_detail(source)
        changed = change_words(words, [op for turn in row["turns"] for op in turn["ops"]])
        assert write_words(changed) == describe_in_detail(Scene.from_truth(row["turns"][-1]["truth"])), row["kind"]


def test_ops_about_what_was_not_described_change_nothing():
    words = read_words("a red star at the top", list(SHAPES), list(COLORS))
    assert words == ({(0, 1): ("star", "red", "large")}, "light")
    ops = [{"op": "remove", "cell": [2, 2]}, {"op": "set", "cell": [2, 2], "color": "blue"}]
    ops += [{"op": "move", "cell": [2, 2], "to": [0, 0]}, {"op": "swap", "cell": [0, 1], "to": [2, 2]}]
    assert change_words(words, ops) == words
    assert write_words(({}, "dark")) == "nothing on a dark background"


# ---- the run


def pixels_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).int()


def picture_of(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.to(torch.uint8).numpy())


class TrueProcessor:
    """Pixels are what they are; everything else is the model's."""

    def __init__(self, model: "TrueModel"):
        self.apply_chat_template, self.batch_decode = model.encode, model.decode

    def __call__(self, gen_images, return_tensors):
        return {"gen_pixel_values": torch.stack([pixels_of(picture) for picture in gen_images])}


class TrueModel:
    """Describes by the truth, edits by the truth; a drawn caption is the scene that it says, looked up."""

    def __init__(self, data: Path, rows: list[dict], fails: bool = False):
        self.by_pixels, self.by_caption, self.results, self.calls = {}, {}, {}, 0
        for row in rows:
            before, image = row["truth"], row["image"]
            self.by_pixels[load_image(data / image).tobytes()] = describe_in_detail(Scene.from_truth(before))
            for turn in row["turns"]:
                key = (load_image(data / image).tobytes(), turn["instruction"])
                self.results[key] = load_image(data / turn["image"])
                self.by_caption.setdefault(describe_in_detail(Scene.from_truth(before)), load_image(data / image))
                before, image = turn["truth"], turn["image"]
                self.by_pixels[load_image(data / image).tobytes()] = describe_in_detail(Scene.from_truth(before))
            self.by_caption[describe_in_detail(Scene.from_truth(before))] = load_image(data / image)
        self.vision_language_model = SimpleNamespace(
            device="cpu", generate=self.generate, encode_gen_images=lambda pixels: pixels
        )
        self.processor = TrueProcessor(self)
        self.fails = fails

    def encode(self, conversations, **kwargs):
        self.shown = [
            conversation[0]["content"][0]["image"]
            if len(conversation) == 1
            else picture_of(conversation[1]["content"][0]["image_vectors"])
            for conversation in conversations
        ]
        batch = {"input_ids": torch.zeros(len(conversations), 3, dtype=torch.long)}
        return type("Batch", (dict,), {"to": lambda self, device: self})(batch)

    def generate(self, input_ids, **kwargs):
        return torch.cat([input_ids, torch.arange(len(input_ids)).unsqueeze(1)], dim=1)

    def decode(self, ids, **kwargs):
        return [self.by_pixels[self.shown[i].tobytes()] for i in ids.flatten()]

    def encode_prompt(self, captions, generator, image=None):
        """A caption's vectors are the pixels of the scene that it says, an edit's those of its result."""
        assert len(captions) == len(generator)
        if image is not None:
            pairs = zip(image, captions, strict=True)
            return torch.stack([pixels_of(self.results[picture.tobytes(), text]) for picture, text in pairs])
        return torch.stack([pixels_of(self.by_caption[text]) for text in captions])

    def __call__(self, texts=None, generator=None, image=None, image_vectors=None):
        if image_vectors is not None:
            return SimpleNamespace(images=[picture_of(row) for row in image_vectors])
        assert len(texts) == len(generator)
        self.calls += 1
        if self.fails and self.calls == 3:
            raise KeyboardInterrupt
        if image is None:
            return SimpleNamespace(images=[self.by_caption[text] for text in texts])
        pairs = zip(image, texts, strict=True)
        return SimpleNamespace(images=[self.results[picture.tobytes(), text] for picture, text in pairs])


def test_a_model_that_does_what_is_asked_scores_one_and_chained_edits_go_through_its_own_pictures(data, rows):
    world = json.loads((data / "shapes.json").read_text(encoding="utf-8"))
    outcomes, drawn = answer_edits(TrueModel(data, rows), data, rows, world, load_silhouettes(data), batch_size=16)
    edit, copy, redraw, shift = (edit_summary(outcomes[way]) for way in ("edit", "copy", "redraw", "shift"))
    assert edit["overall"]["value"] == 1.0 and edit["overall"]["n"] == len(rows)
    assert set(edit["kinds"]) == set(KINDS) and set(edit["groups"]) == {"single", "two", "chained", "no_change"}
    assert edit["groups"]["single"]["both"]["n"] == 64 and edit["groups"]["no_change"]["both"]["n"] == 16
    assert copy["groups"]["single"]["both"]["value"] == 0.0 and copy["groups"]["single"]["kept"]["value"] == 1.0
    assert copy["groups"]["no_change"]["both"]["value"] == 1.0
    assert redraw["overall"]["value"] > 0.97  # two scenes of equal words may differ where nothing says so
    assert shift["overall"]["value"] > 0.9
    assert len(drawn) == len(rows) and set(drawn[0][1]) == {"edit", "copy", "redraw", "shift"}
    against = edits_against(outcomes)
    assert against["copy"]["kept"]["value"] == pytest.approx(1 - copy["scores"]["kept"]["value"])
    assert against["copy"]["both"]["low"] > 0.7 and against["redraw"]["both"]["value"] >= 0


def test_the_shift_adds_what_the_words_change_to_the_source(data, rows):
    """Vectors that are pixels: the source, and what differs between two pictures drawn of words."""
    world = json.loads((data / "shapes.json").read_text(encoding="utf-8"))
    unchanged = [row for row in rows if row["kind"] == "nothing"]
    recolored = [row for row in rows if row["kind"] == "recolor"]
    for chosen in (unchanged, recolored):
        sources = [load_image(data / row["image"]) for row in chosen]
        shifted = shift_pictures(TrueModel(data, rows), sources, chosen, world, seed=0)
        wanted = [load_image(data / row["turns"][-1]["image"]) for row in chosen]
        same = [one.tobytes() == other.tobytes() for one, other in zip(shifted, wanted, strict=True)]
        assert sum(same) >= len(same) - 1  # two scenes of equal words may differ where nothing says so


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([True] * 10, [True] * 10, (0.0, 0.0, 0.0)),
        ([True] * 60 + [False] * 40, [True] * 50 + [False] * 50, (0.1, 0.0412, 0.1588)),
        ([True, False] * 50, [False, True] * 50, (0.0, -0.196, 0.196)),
    ],
)
def test_the_interval_of_a_difference_counts_the_rows_where_two_ways_part(one, other, expected):
    found = paired_difference(one, other)
    assert (found["value"], found["low"], found["high"]) == expected and found["n"] == len(one)


def test_a_result_is_described_in_the_next_turn(data, rows):
    world = json.loads((data / "shapes.json").read_text(encoding="utf-8"))
    model = TrueModel(data, rows)
    right = ask_about_edits(model, data, rows, world, batch_size=16)
    assert set(right) == set(KINDS) and all(all(values) for values in right.values())
    for row in rows:  # it says what the source shows: right where nothing is to change
        for turn in row["turns"]:
            model.by_pixels[load_image(data / turn["image"]).tobytes()] = describe_in_detail(
                Scene.from_truth(row["truth"])
            )
    wrong = ask_about_edits(model, data, rows, world, batch_size=16)
    assert not any(wrong["recolor"]) and not any(wrong["background"]) and not any(wrong["move"])


def test_redrawing_hands_over_the_changed_words(data, rows):
    world = json.loads((data / "shapes.json").read_text(encoding="utf-8"))
    sources = [load_image(data / row["image"]) for row in rows[:12]]
    _, captions = redraw_pictures(TrueModel(data, rows), sources, rows[:12], world, seed=0)
    assert captions == [describe_in_detail(Scene.from_truth(row["turns"][-1]["truth"])) for row in rows[:12]]


def flags(data: Path, output: Path) -> list[str]:
    return ["scenes", "--model", "mine", "--data", str(data), "--output", str(output), "--edits", "--num_edits", "24"]


def test_the_command_writes_results_and_a_sheet_and_goes_on_after_a_kill(data, rows, tmp_path, monkeypatch, capsys):
    for name, value in (("find_model", lambda *args: (data, ())), ("identify_weights", lambda folder: "sha")):
        monkeypatch.setattr(scenes, name, value)
    monkeypatch.setattr(scenes, "describe_settings", lambda pipeline: "6 steps")
    monkeypatch.setattr(scenes, "load_pipeline", lambda arguments: TrueModel(data, rows, fails=True))
    monkeypatch.setattr("sys.argv", flags(data, tmp_path / "edits.json"))
    with pytest.raises(SystemExit):
        scenes.main()
    assert not (tmp_path / "edits.json").exists() and (tmp_path / "edits_unfinished" / "batches.jsonl").is_file()
    monkeypatch.setattr(scenes, "load_pipeline", lambda arguments: TrueModel(data, rows))
    scenes.main()
    results = json.loads((tmp_path / "edits.json").read_text(encoding="utf-8"))
    assert results["benchmark"] == "edits" and results["edit"]["overall"]["n"] == 24
    assert set(results["edit"]["kinds"]["recolor"]) == {"edited", "kept", "both"}
    assert results["described"]["overall"]["value"] == 1.0 and results["edit_minus"]["copy"]["both"]["value"] > 0.5
    assert results["settings"]["num_edits"] == 24 and "6 steps" in results["run"]["protocol"]
    assert load_image(tmp_path / "edits_edits.png").width > 500
    assert 'edit {"value": 1.0, "n": 24' in capsys.readouterr().out


def test_a_folder_without_edits_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", flags(tmp_path, tmp_path / "edits.json"))
    message = r"no edits\.jsonl in it. Write one: python -m finetune\.scenes\.edits --split heldout"
    with pytest.raises(SystemExit, match=message):
        scenes.main()
