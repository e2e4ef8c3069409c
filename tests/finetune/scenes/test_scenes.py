"""The scenes of pisces-tiny: what is sampled, drawn, said, asked and written."""

import itertools
import json
import random
import re

import numpy as np
import pytest

from finetune.scenes.layout import (
    COLORS,
    HELD_OUT_PAIRS,
    KINDS,
    PLACES,
    SHAPES,
    Scene,
    group_cells,
    is_held_out,
    is_held_out_relation,
    make_scene,
    pair_cells,
    sample_scene,
)
from finetune.scenes.prompts import CATEGORIES, is_held_out_prompt, prompts_for_evaluation
from finetune.scenes.questions import QUESTION_TYPES, all_questions, questions
from finetune.scenes.render import main, make_row, render_scene, shape_outline, write_scenes
from finetune.scenes.text import caption_prompts, describe, describe_in_detail, find_layouts, reword, short_captions
from pisces_commands.writing import held_output


def sample_many(num_scenes: int, **kwargs) -> list[Scene]:
    rng = random.Random(0)
    return [sample_scene(rng, **kwargs) for _ in range(num_scenes)]


def scene_of(*words: str, background: str = "light") -> Scene:
    """ "large red star @ top left" per object."""
    looks = [item.split(" @ ") for item in words]
    cells = [divmod(PLACES.index(place), 3) for _, place in looks]
    triples = [(shape, color, size) for size, color, shape in (look.split() for look, _ in looks)]
    return make_scene(random.Random(0), triples, cells, background)


# --- the world -------------------------------------------------------------------------------------------------------


def test_training_never_shows_a_held_out_combination_and_heldout_always_does():
    assert not any(is_held_out(scene) for scene in sample_many(1500))
    assert all(is_held_out(scene) for scene in sample_many(300, split="heldout"))


def test_held_out_relations_hold_read_backwards_and_on_diagonals():
    assert is_held_out_relation("cross", "right of", "heart") and is_held_out_relation("heart", "below", "circle")
    assert not is_held_out_relation("cross", "left of", "heart")
    assert is_held_out(scene_of("large red heart @ bottom left", "large red cross @ top right"))


def test_training_still_shows_every_color_shape_kind_and_number():
    scenes = sample_many(600)
    looks = {(item.color, item.shape) for scene in scenes for item in scene.objects}
    assert looks == set(itertools.product(COLORS, SHAPES)) - HELD_OUT_PAIRS
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}


def test_objects_never_touch_and_stay_inside_the_picture():
    for scene in sample_many(1500):
        for item in scene.objects:
            assert item.radius <= min(item.x, item.y, 64 - item.x, 64 - item.y)
        for one, other in itertools.combinations(scene.objects, 2):
            reaches = [0.88 * item.radius if item.shape == "square" else item.radius for item in (one, other)]
            gap = max(abs(one.x - other.x), abs(one.y - other.y)) - sum(reaches)
            # 2 is the least beside each other; on a diagonal the boxes of round shapes may meet, not the shapes
            assert gap >= (2 if one.row == other.row or one.col == other.col else -1), (one, other)


def test_curriculum_limits_the_number_of_objects():
    assert max(len(scene.objects) for scene in sample_many(200, max_objects=2)) == 2
    assert {scene.kind for scene in sample_many(50, max_objects=1)} == {"single"}


def test_canonical_layouts_are_the_documented_ones():
    assert group_cells(2, None) == pair_cells("row", None) == [(1, 0), (1, 2)]
    assert group_cells(3, None) == [(0, 1), (2, 0), (2, 2)]
    assert group_cells(4, None) == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert group_cells(4, "top left") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert group_cells(3, "right") == [(0, 2), (1, 2), (2, 2)]
    assert pair_cells("column", "bottom right") == [(1, 2), (2, 2)]


def test_a_scene_survives_the_round_trip_through_json():
    scene = sample_many(5)[-1]
    assert Scene.from_truth(json.loads(json.dumps(scene.truth()))) == scene


def test_unknown_split_or_impossible_kind_is_refused_by_value():
    with pytest.raises(ValueError, match="split 'test': expected one of"):
        sample_scene(random.Random(0), split="test")
    with pytest.raises(ValueError, match="kind 'list', max_objects 2: expected 1 to 4 objects and a kind of"):
        sample_scene(random.Random(0), kind="list", max_objects=2)


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96, 128])
def test_a_shape_is_drawn_in_its_color_where_the_truth_says(size):
    scene = scene_of("large red square @ top right", "small blue circle @ left")
    pixels = np.asarray(render_scene(scene, size))
    assert pixels.shape == (size, size, 3)
    for item in scene.objects:
        assert tuple(pixels[round(item.y * size / 64), round(item.x * size / 64)]) == item.rgb
    assert tuple(pixels[-1, -1]) == scene.background_rgb


@pytest.mark.parametrize("shape", SHAPES)
def test_the_drawn_box_is_centred_on_the_truth(shape):
    scene = scene_of(f"large blue {shape} @ center")
    coverage = (np.asarray(render_scene(scene, 256)).astype(int) - scene.background_rgb)[..., 0] < -100
    rows, cols = np.nonzero(coverage.any(1))[0], np.nonzero(coverage.any(0))[0]
    item = scene.objects[0]
    assert (cols[0] + cols[-1] + 1) / 8 == pytest.approx(item.x, abs=0.3)  # 256 pixels for 64 units: 8 = 2 * 4
    assert (rows[0] + rows[-1] + 1) / 8 == pytest.approx(item.y, abs=0.3)
    assert max(max(map(abs, point)) for point in shape_outline(shape)) <= 1


def test_edges_are_anti_aliased():
    pixels = np.asarray(render_scene(scene_of("large red circle @ center")))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_a_picture_too_small_for_the_shapes_is_refused():
    with pytest.raises(ValueError, match="size 32: scenes are drawn at 64 pixels or more"):
        render_scene(sample_many(1)[0], size=32)


# --- captions --------------------------------------------------------------------------------------------------------

DESCRIBED = [
    (["large orange star @ center"], "an orange star"),
    (["small red star @ top"], "a small red star at the top"),
    (["large red star @ left", "large blue circle @ right"], "a red star left of a blue circle"),
    (["large red star @ top", "large blue circle @ bottom"], "a red star above a blue circle"),
    (["small red star @ top left", "small blue star @ top"], "a red star left of a blue star in the top left"),
    (["large red star @ left", "large red star @ right"], "two red stars"),
    (
        ["small pink cross @ top", "small pink cross @ bottom left", "small pink cross @ bottom right"],
        "three small pink crosses",
    ),
    # crowded, so small goes without saying
    (
        ["small red cross @ top left", "small red cross @ top", "small red cross @ top right"],
        "three red crosses at the top",
    ),
    (
        ["large red star @ top left", "small blue star @ right"],
        "a red star in the top left and a small blue star on the right",
    ),
]


@pytest.mark.parametrize(("words", "caption"), DESCRIBED)
def test_describe_says_what_the_layout_convention_leaves_open(words, caption):
    assert describe(scene_of(*words)) == caption
    assert describe(scene_of(*words, background="dark")) == caption + " on a dark background"


def test_the_detailed_caption_names_everything_in_reading_order():
    scene = scene_of("small red star @ center", "large orange heart @ bottom left", background="dark")
    assert describe_in_detail(scene) == (
        "a small red star in the center and a large orange heart in the bottom left on a dark background"
    )


def test_every_prompt_form_occurs_in_training_captions():
    captions = {caption for scene in sample_many(1500) for caption in short_captions(scene, random.Random(0))}
    for form in (
        *("a star", "an orange heart", "a heart and a star", "three crosses", "four red stars"),
        *("a star left of a cross", "a star right of a cross", "a star above a cross", "a heart below a cross"),
    ):
        assert form in captions, form
    for pattern in (
        r"a \w+ star and an? \w+ cross",
        r"two \w+ hearts on a dark background",
        r"a \w+ star in the top left",
    ):
        assert any(re.fullmatch(pattern, caption) for caption in captions), pattern


def test_a_bare_caption_means_the_canonical_picture():
    for scene in sample_many(800):
        for caption in short_captions(scene, random.Random(0)):
            if re.fullmatch(r"an? (\w+ )?\w+", caption) and "small" not in caption:
                (item,) = scene.objects
                assert (item.place, item.size, scene.background) == ("center", "large", "light"), caption
            assert ("dark background" in caption) == (scene.background == "dark")


def test_two_pictures_with_the_same_full_caption_have_the_same_words():
    seen: dict[str, list] = {}
    for scene in sample_many(3000):
        words = sorted((item.color, item.shape, item.size, item.row, item.col) for item in scene.objects)
        assert seen.setdefault(describe(scene), words) == words, describe(scene)


def test_each_row_has_its_detailed_caption_last_and_a_plain_one_first():
    for scene in sample_many(100):
        captions = caption_prompts(scene, random.Random(0), rewording=0.0)
        assert captions[-1] == describe_in_detail(scene)
        assert 2 <= len(captions) <= 7 and all(not caption.endswith(".") for caption in captions)


def test_rewording_keeps_shapes_colors_and_place_and_reaches_many_words():
    rng = random.Random(0)
    texts = {reword("a red star in the top left on a dark background", rng) for _ in range(500)}
    assert len(texts) > 200
    for text in map(str.lower, texts):
        assert re.search(r"red star (in|at|on) the (top|upper) left( corner)?", text), text
        assert "dark" in text or "black" in text
    assert {"the red star", "red star", "A red star."} <= {reword("a red star", rng) for _ in range(500)}


def test_rewording_never_reads_one_place_inside_another():
    rng = random.Random(0)
    for text in (reword("a star left of a heart in the top left", rng) for _ in range(300)):
        assert "picture left" not in text and "side of" not in text, text


def test_layouts_with_a_large_object_in_a_crowd_have_no_short_form():
    assert find_layouts(scene_of("large red star @ top left", "small blue star @ top")) == []


# --- questions -------------------------------------------------------------------------------------------------------


def test_answers_agree_with_a_scene_worked_by_hand():
    scene = scene_of("large red star @ left", "small blue circle @ right", background="dark")
    answers: dict[str, set] = {}
    for seed in range(200):
        for item in all_questions(scene, random.Random(seed), split="heldout"):
            answers.setdefault(item.wordings[0], set()).add(item.answer)
    expected = {
        "what color is the star?": "red",
        "what shape is the blue object?": "circle",
        "how many objects are there?": "two",
        "how many stars are there?": "one",
        "how many hearts are there?": "zero",
        "which object is left of the circle?": "red star",
        "which object is left of the star?": "nothing",
        "is the star left of the circle?": "yes",
        "is the star right of the circle?": "no",
        "is the star above the circle?": "no",
        "is there a red star?": "yes",
        "is there a blue star?": "no",
        "is the star red?": "yes",
        "where is the red star?": "left",
        "is the background light or dark?": "dark",
        "is the background light?": "no",
        "is the circle small or large?": "small",
        "describe the picture.": "a red star left of a small blue circle on a dark background",
    }
    assert {question: answers.get(question) for question in expected} == {q: {a} for q, a in expected.items()}
    assert all(len(found) == 1 for found in answers.values()), "a question with two answers"


def test_an_ambiguous_object_is_never_asked_about():
    scene = scene_of("large red star @ left", "large blue star @ right")
    asked = {item.wordings[0] for seed in range(50) for item in all_questions(scene, random.Random(seed))}
    assert "what color is the star?" not in asked and "where is the star?" not in asked
    assert "what color is the object on the left?" in asked


def test_training_asks_nothing_about_held_out_combinations():
    rng = random.Random(0)
    for scene in sample_many(600):
        for row in questions(scene, rng, rewording=0.0):
            for color, shape in HELD_OUT_PAIRS:
                assert f"{color} {shape}" not in row["question"], row
            found = re.fullmatch(
                r"is the (?:\w+ )?(\w+) (left of|right of|above|below) the (?:\w+ )?(\w+)\?", row["question"]
            )
            if found and set(found.group(1, 3)) <= set(SHAPES):
                assert not is_held_out_relation(*found.group(1, 2, 3)), row


def test_yes_and_no_are_balanced():
    rng = random.Random(0)
    rows = [row for scene in sample_many(1000) for row in questions(scene, rng)]
    for kind in ("exist", "compare"):
        answers = [row["answer"] for row in rows if row["type"] == kind]
        assert 0.45 < answers.count("yes") / len(answers) < 0.55, kind


def test_question_rows_keep_within_their_numbers_and_plain_when_asked():
    scene = scene_of("large red star @ left", "small blue circle @ right")
    rows = questions(scene, random.Random(0), rewording=0.0)
    kinds = [row["type"] for row in rows]
    assert set(kinds) == set(QUESTION_TYPES) and all(kinds.count(kind) <= QUESTION_TYPES[kind] for kind in kinds)
    assert all(row["question"][0].islower() and row["question"][-1] in "?." for row in rows)
    assert {row["answer"] for row in rows} >= {"yes", "no"} or len(rows) > 10
    assert any(row["paraphrase"] != row["question"] for row in rows)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_cover_six_categories_and_are_held_out_where_they_can_be():
    rows = prompts_for_evaluation("heldout", seed=0, num_per_category=16)
    assert [row["tag"] for row in rows] == [tag for tag in CATEGORIES for _ in range(16)]
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert row["held_out"] == is_held_out_prompt(row["include"], row["place"])
        if row["tag"] not in ("single_object", "counting"):
            assert row["held_out"], row
    assert {row["held_out"] for row in rows if row["tag"] == "counting"} == {True, False}
    assert not any(row["held_out"] for row in prompts_for_evaluation("train", num_per_category=16))
    assert rows == prompts_for_evaluation("heldout", seed=0, num_per_category=16)


def test_position_prompts_name_the_second_object_as_the_anchor():
    row = next(row for row in prompts_for_evaluation() if row["tag"] == "position")
    anchor, first = row["include"]
    relation, index = first["position"]
    assert index == 0 and re.match(rf"an? {first['class']} {relation} an? {anchor['class']}", row["prompt"])


# --- the data folder -------------------------------------------------------------------------------------------------


def read_all(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_written_in_two_pieces_equals_one_written_at_once(tmp_path):
    write_scenes(tmp_path / "whole", num_scenes=6, seed=3, split="heldout")
    write_scenes(tmp_path / "pieces", num_scenes=4, seed=3, split="heldout")
    rows = tmp_path / "pieces" / "scenes.jsonl"
    rows.write_bytes(rows.read_bytes()[:-50])  # as if the run was killed in the middle of a row
    write_scenes(tmp_path / "pieces", num_scenes=6, seed=3, split="heldout")
    assert read_all(tmp_path / "pieces") == read_all(tmp_path / "whole")
    assert {"settings.json", "shapes.png", "shapes.json", "prompts.jsonl"} <= set(read_all(tmp_path / "whole"))


def test_a_row_holds_what_training_needs(tmp_path):
    write_scenes(tmp_path / "data", num_scenes=3, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "data" / "scenes.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["train-0-000000", "train-0-000001", "train-0-000002"]
    for index, row in enumerate(rows):
        assert set(row) == {"id", "image", "truth", "captions", "questions"}
        assert (tmp_path / "data" / row["image"]).is_file()
        assert row == json.loads(json.dumps(make_row(index, 0, "train")[0]))
        assert {"question", "paraphrase", "answer", "type"} == set(row["questions"][0])


def test_other_seeds_and_splits_give_other_scenes():
    truths = [json.dumps(make_row(0, seed, split)[0]["truth"]) for seed in (0, 1) for split in ("train", "heldout")]
    assert len(set(truths)) == 4


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and has no settings\.json of scenes"):
        write_scenes(tmp_path, num_scenes=1, seed=0)


def test_a_folder_of_other_settings_or_more_scenes_is_refused(tmp_path):
    write_scenes(tmp_path / "data", num_scenes=2, seed=0)
    with pytest.raises(ValueError, match=r"holds scenes of .*'seed': 0.* asked for .*'seed': 1"):
        write_scenes(tmp_path / "data", num_scenes=2, seed=1)
    with pytest.raises(ValueError, match="already holds 2 scenes, asked for 1"):
        write_scenes(tmp_path / "data", num_scenes=1, seed=0)
    with pytest.raises(ValueError, match="num_scenes 0: expected at least 1"):
        write_scenes(tmp_path / "other", num_scenes=0, seed=0)


def test_the_command_writes_a_folder_and_ends_with_the_reason_when_it_cannot(tmp_path):
    main(["--output", str(tmp_path / "data"), "--num_scenes", "2", "--split", "train"])
    assert len((tmp_path / "data" / "scenes.jsonl").read_text().splitlines()) == 2
    with pytest.raises(SystemExit, match="already holds 2 scenes"):
        main(["--output", str(tmp_path / "data"), "--num_scenes", "1"])


def test_a_second_writer_of_the_same_folder_is_refused(tmp_path):
    """Two would write every scene twice; found by `make crash`."""
    with held_output(tmp_path / "data"):
        with pytest.raises(ValueError, match=r"data: another process is writing it just now"):
            write_scenes(tmp_path / "data", num_scenes=1, seed=0)
    assert len((write_scenes(tmp_path / "data", num_scenes=2, seed=0) / "scenes.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
