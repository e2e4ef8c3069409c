"""`pisces edit` on a tiny random checkpoint: turns, files, and what it refuses before a model is loaded."""

import json
import shutil

import pytest
from PIL import Image

from modeling_pisces import load_image
from modeling_pisces.console import commands
from modeling_pisces.console.known_words import write_known_words
from tests.checkpoint_folder import write_checkpoint
from tests.modeling_pisces.console.test_cli import assert_one_line_error, pixels, run


pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (20, 20), (250, 0, 0)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def edit(capsys, checkpoint, *arguments):
    code, out, err = run(capsys, "edit", *arguments, "--model", checkpoint, "--steps", 2, "--json")
    return code, json.loads(out), err


def test_one_edit_writes_the_named_file_and_depends_on_picture_instruction_and_seed(
    capsys, checkpoint, photo, tmp_path
):
    output = tmp_path / "edited.png"
    code, out, err = run(
        capsys, "edit", photo, "make it blue", "--output", output, "--model", checkpoint, "--steps", 2
    )
    assert (code, out.strip(), err) == (0, str(output), "")
    first = pixels(output)
    other = tmp_path / "other.png"
    Image.effect_mandelbrot((20, 20), (-2, -1, 1, 1), 20).convert("RGB").save(other)
    for changed in ([other, "make it blue"], [photo, "a very long instruction"], [photo, "make it blue", "--seed", 1]):
        _, summary, _ = edit(capsys, checkpoint, *changed, "--output", tmp_path / "again.png")
        assert pixels(summary["results"][0]["path"]) != first
    edit(capsys, checkpoint, photo, "make it blue", "--output", tmp_path / "again.png")
    assert pixels(tmp_path / "again.png") == first


def test_turns_go_on_from_the_picture_before_as_separate_commands_would(capsys, checkpoint, photo, tmp_path):
    turns = ["--then", "a star", "--then", "make it blue"]
    sheet = tmp_path / "sheet.png"
    _, summary, _ = edit(
        capsys, checkpoint, photo, "make it blue", *turns, "--output", tmp_path / "all", "--sheet", sheet
    )
    names = ["photo_1_make_it_blue_0.png", "photo_2_a_star_0.png", "photo_3_make_it_blue_0.png"]
    assert [row["path"] for row in summary["results"]] == [str(tmp_path / "all" / name) for name in names]
    assert [(row["turn"], row["instruction"]) for row in summary["results"]][1] == (2, "a star")
    assert load_image(sheet).width > 100
    edit(capsys, checkpoint, tmp_path / "all" / names[0], "a star", "--output", tmp_path / "second.png")
    assert pixels(tmp_path / "second.png") == pixels(tmp_path / "all" / names[1])
    _, last, _ = edit(capsys, checkpoint, photo, "make it blue", *turns, "--output", tmp_path / "last.png")
    assert [row["turn"] for row in last["results"]] == [3]
    assert pixels(tmp_path / "last.png") == pixels(tmp_path / "all" / names[2])


def test_strength_and_guidance_reach_the_pipeline(capsys, checkpoint, photo, tmp_path):
    drawn = set()
    for options in ([], ["--strength", 0.5], ["--guidance_scale", 9]):
        code, summary, _ = edit(capsys, checkpoint, photo, "a", *options, "--output", tmp_path / "out.png")
        assert code == 0, summary
        drawn.add(pixels(tmp_path / "out.png"))
    assert len(drawn) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{photo}", " "], "the instruction of turn 1 is empty. Say what to change."),
        (["{photo}", "a", "--then", ""], "the instruction of turn 2 is empty"),
        (["{photo}", "a", "--strength", "0"], "--strength is 0; expected a number above 0 and at most 1"),
        (["{photo}", "a", "--strength", "1.5"], "--strength is 1.5; expected a number above 0"),
        (["{photo}", "a", "--strength", "much"], "argument --strength: 'much'"),
        (["{photo}"], "the following arguments are required: INSTRUCTION"),
        (["nowhere.png", "a"], "nowhere.png: no such file"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_the_model_is_loaded(
    capsys, checkpoint, photo, monkeypatch, arguments, words
):
    monkeypatch.setattr(commands, "load_pipeline", lambda *args: pytest.fail("loaded"))
    arguments = [word.format(photo=photo) for word in arguments]
    code, _, err = run(capsys, "edit", *arguments, "--model", checkpoint)
    assert code == 2
    assert_one_line_error(err, words)


def test_strength_needs_the_vae_of_the_checkpoint(capsys, checkpoint, photo, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    index["vae"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    code, _, err = edit(capsys, copy, photo, "a", "--strength", 0.5, "--output", tmp_path / "out.png")
    assert code == 2 and not (tmp_path / "out.png").exists()
    assert_one_line_error(err, "--strength starts from the picture's latents", "has no vae/. Leave it out.")


def test_a_turn_that_fails_ends_the_turns_and_keeps_what_was_drawn(capsys, checkpoint, photo, tmp_path):
    turns = ["--then", "word " * 10_000, "--then", "a star"]
    code, summary, err = edit(capsys, checkpoint, photo, "make it blue", *turns, "--output", tmp_path / "all")
    assert code == 1 and [row["turn"] for row in summary["results"]] == [1] and len(summary["errors"]) == 1
    assert_one_line_error(err, "model_max_length")


def test_words_that_the_checkpoint_never_read_are_named(capsys, checkpoint, photo, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    write_known_words(copy, ["make the circle red"])
    code, _, err = edit(capsys, copy, photo, "make the circle lime", "--output", tmp_path / "out.png")
    assert code == 0 and "knows none of: lime" in err
