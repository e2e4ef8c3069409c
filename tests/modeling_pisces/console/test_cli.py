"""The console command on a tiny random checkpoint: what it prints and writes, exit codes, one line for an error."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from modeling_pisces import load_image
from modeling_pisces.checkpoint.loading import choose_device, load_model
from modeling_pisces.console import commands
from pisces_commands.console import main
from tests.checkpoint_folder import write_checkpoint
from tests.fixtures import make_model, make_processor
from tests.hub_folders import make_pipeline


pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole checkpoint folder, with a decoder that draws 16 x 16 pixels."""
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, color in (("red", (250, 0, 0)), ("green", (0, 250, 0)), ("blue", (0, 0, 250))):
        Image.new("RGB", (20, 20), color).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def broken_picture(tmp_path):
    path = tmp_path / "broken.png"
    path.write_text("no picture")
    return str(path)


def run(capsys, *arguments):
    """Return exit code, standard output and standard error of one command line."""
    capsys.readouterr()  # what building the inputs printed
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_line_error(err, *words):
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pisces: error: "), err
    for word in words:
        assert word in lines[0]


# ---- arguments


@pytest.mark.parametrize("command", [[], ["describe"], ["draw"], ["edit"], ["reconstruct"], ["info"]])
def test_help_is_complete_and_exits_with_0(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    expected = ["--json", "--verbose", "--model"] if command else ["examples:", "exit codes:", "pisces reconstruct"]
    assert all(word in out for word in expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint", "x"], "invalid choice: 'paint'"),
        (["draw"], "the following arguments are required: PROMPT"),
        (["draw", "x", "--num_images", "0"], "argument --num_images: '0': expected a whole number of at least 1"),
        (["draw", "x", "--steps", "many"], "argument --steps: 'many': expected a whole number of at least 1"),
        (["describe", "x", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["info", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_with_2(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert_one_line_error(err, words, "--help")


def test_without_a_checkpoint_the_command_says_how_to_name_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "info")
    assert code == 2
    assert_one_line_error(err, "no folder ./pisces-tiny here", "--model FOLDER")


def test_pisces_tiny_in_the_current_folder_is_the_default(capsys, tmp_path, monkeypatch, checkpoint):
    (tmp_path / "pisces-tiny").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "info")
    assert code == 0 and "9 vectors per image" in out


@pytest.mark.parametrize(
    "command", [["info"], ["describe", "x.png"], ["draw", "x"], ["edit", "x.png", "x"], ["reconstruct", "x.png"]]
)
def test_unusable_checkpoint_is_one_line_and_exits_with_2(capsys, tmp_path, command):
    (tmp_path / "config.json").write_text("{")
    code, _, err = run(capsys, *command, "--model", tmp_path)
    assert code == 2
    assert_one_line_error(err, "config.json: not valid JSON")


def test_a_device_that_is_not_there_is_refused(capsys, checkpoint, pictures, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "describe", pictures / "red.png", "--model", checkpoint, "--device", "cuda")
    assert code == 2
    assert_one_line_error(err, "--device cuda: this machine or this build of torch has none")
    assert choose_device("cpu") == torch.device("cpu")


# ---- info


def test_info_reports_parts_without_loading_weights(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(commands, "load_model", None)
    code, out, err = run(capsys, "info", checkpoint, "--json")
    info = json.loads(out)
    assert (code, err, info["command"]) == (0, "", "info")
    parts = {part["name"]: part["num_parameters"] for part in info["parts"]}
    decoder = make_pipeline()
    assert parts["decoder/unet"] == sum(parameter.numel() for parameter in decoder.unet.parameters())
    assert parts["decoder/vae"] == sum(parameter.numel() for parameter in decoder.vae.parameters())
    assert info["decoder"] == {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    assert info["generation"]["gen_head_type"] == "flow"


# ---- describe


def expected_answer(checkpoint, picture, question, max_new_tokens=6):
    """The same by hand: chat template, greedy generate, decode."""
    model, processor = load_model(checkpoint, device="cpu")
    content = [{"type": "image", "image": load_image(picture)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_describe_answers_every_question_about_every_picture(capsys, checkpoint, pictures):
    options = ["--question", "How many?", "--question", "What color?", "--max_new_tokens", 6, "--json"]
    code, out, err = run(capsys, "describe", pictures, "--model", checkpoint, "--device", "cpu", *options)
    results = json.loads(out)["results"]
    assert (code, err, len(results)) == (0, "", 6)
    for result in results:
        assert result["answer"] == expected_answer(checkpoint, result["image"], result["question"])
    assert [result["image"] for result in results[::2]] == [
        str(pictures / f"{n}.png") for n in ("blue", "green", "red")
    ]


def test_describe_prints_one_line_per_answer(capsys, checkpoint, pictures):
    code, out, err = run(capsys, "describe", pictures / "red.png", "--model", checkpoint, "--max_new_tokens", 4)
    assert (code, err) == (0, "")
    assert out.startswith(f"{pictures / 'red.png'}: Describe the picture. -> ") and out.count("\n") == 1


def test_one_broken_picture_does_not_stop_the_others(capsys, checkpoint, pictures, broken_picture):
    arguments = [
        "describe",
        broken_picture,
        pictures / "red.png",
        "--model",
        checkpoint,
        "--max_new_tokens",
        2,
        "--json",
    ]
    code, out, err = run(capsys, *arguments)
    summary = json.loads(out)
    assert code == 1
    assert_one_line_error(err, broken_picture)
    assert [result["image"] for result in summary["results"]] == [str(pictures / "red.png")]
    assert summary["errors"][0]["image"] == broken_picture


def test_only_broken_pictures_stop_before_the_model_is_loaded(capsys, checkpoint, broken_picture, monkeypatch):
    monkeypatch.setattr(commands, "load_model", None)
    code, _, err = run(capsys, "describe", broken_picture, "--model", checkpoint)
    assert code == 2
    assert_one_line_error(err, broken_picture)
    code, _, err = run(capsys, "describe", broken_picture, "missing.png", "--model", checkpoint)
    assert code == 2
    assert_one_line_error(err, "none of the 2 pictures can be used; the first", broken_picture)


def test_a_folder_without_pictures_is_refused(capsys, checkpoint, tmp_path):
    code, _, err = run(capsys, "describe", tmp_path, "--model", checkpoint)
    assert code == 2
    assert_one_line_error(err, "no pictures in this folder", ".png")


def test_an_empty_question_is_refused(capsys, checkpoint, pictures):
    code, _, err = run(capsys, "describe", pictures, "--question", " ", "--model", checkpoint)
    assert code == 2
    assert_one_line_error(err, "a --question is empty")


def test_a_warning_about_a_picture_is_one_line(capsys, checkpoint, pictures, tmp_path):
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    code, _, err = run(capsys, "describe", tmp_path / "moving.gif", "--model", checkpoint, "--max_new_tokens", 2)
    assert code == 0
    assert err.strip().splitlines() == [f"warning: {tmp_path / 'moving.gif'}: 2 frames; only the first is used."]


def test_weights_that_are_missing_are_refused_not_made_up(capsys, checkpoint, pictures, tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model()
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "multi_modal_projector" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(capsys, "describe", pictures / "red.png", "--model", tmp_path)
    assert code == 2
    assert_one_line_error(err, "1 missing keys in the weights, the first is", "multi_modal_projector")


def test_describe_writes_a_sheet(capsys, checkpoint, pictures, tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    code, _, err = run(capsys, "describe", pictures, "--model", checkpoint, "--max_new_tokens", 2, "--sheet", sheet)
    assert code == 0 and str(sheet) in err
    colors = {color for _, color in load_image(sheet).getcolors(maxcolors=100_000)}
    assert {(250, 0, 0), (0, 250, 0), (0, 0, 250)} <= colors


# ---- draw and reconstruct


def draw(capsys, checkpoint, output, *arguments):
    options = ["--model", checkpoint, "--steps", 2, "--device", "cpu", "--json", "--output", output]
    code, out, err = run(capsys, "draw", *arguments, *options)
    return code, json.loads(out), err


def pixels(path):
    return load_image(path).tobytes()


def test_same_prompt_and_seed_draw_the_same_picture_alone_and_among_others(capsys, checkpoint, tmp_path):
    code, many, _ = draw(capsys, checkpoint, tmp_path / "many", "a star", "two cubes", "--num_images", 2, "--seed", 3)
    assert code == 0, many["errors"]
    assert [(r["prompt"], r["seed"]) for r in many["results"]] == [
        ("a star", 3),
        ("a star", 4),
        ("two cubes", 3),
        ("two cubes", 4),
    ]
    _, alone, _ = draw(capsys, checkpoint, tmp_path / "alone", "two cubes", "--seed", 4)
    assert pixels(alone["results"][0]["path"]) == pixels(many["results"][3]["path"])
    assert len({pixels(result["path"]) for result in many["results"]}) == 4


def test_drawn_files_are_named_after_prompt_and_seed(capsys, checkpoint, tmp_path):
    _, summary, _ = draw(capsys, checkpoint, tmp_path, "A red/../star!", "A red star", "a   red star", "🟥")
    names = [result["path"].removeprefix(f"{tmp_path}/") for result in summary["results"]]
    assert names == ["a_red_star_0.png", "a_red_star_0_2.png", "a_red_star_0_3.png", "picture_0.png"]
    assert load_image(tmp_path / names[0]).size == (16, 16)


def test_one_picture_can_be_given_a_file_name(capsys, checkpoint, tmp_path):
    _, summary, _ = draw(capsys, checkpoint, tmp_path / "deep" / "star.png", "a star")
    assert summary["results"][0]["path"] == str(tmp_path / "deep" / "star.png")
    assert (tmp_path / "deep" / "star.png").is_file()


@pytest.mark.parametrize(
    ("output", "words"),
    [("star.png", "is one file, but there are 2 pictures"), ("taken.txt", "is a file of another kind")],
)
def test_output_that_cannot_hold_the_pictures_is_refused(capsys, checkpoint, tmp_path, output, words):
    (tmp_path / "taken.txt").touch()
    code, _, err = draw(capsys, checkpoint, tmp_path / output, "a star", "a cube")
    assert code == 2
    assert_one_line_error(err, words)


def test_an_empty_prompt_is_refused(capsys, checkpoint, tmp_path):
    code, summary, err = draw(capsys, checkpoint, tmp_path, " ")
    assert code == 2 and "the prompt is empty" in summary["error"]
    assert_one_line_error(err, "the prompt is empty. Say what to draw.")
    code, summary, err = draw(capsys, checkpoint, tmp_path, "", "a star")
    assert code == 1 and len(summary["results"]) == 1
    assert_one_line_error(err, "the prompt is empty")


def test_a_prompt_longer_than_the_context_is_refused(capsys, checkpoint, pictures, tmp_path):
    words = "word " * 10_000
    code, _, err = draw(capsys, checkpoint, tmp_path, words)
    assert code == 2
    assert_one_line_error(err, "more than the tokenizer's model_max_length 2048", "Shorten it")
    code, _, err = run(capsys, "describe", pictures / "red.png", "--question", words, "--model", checkpoint)
    assert code == 2
    assert_one_line_error(err, "model_max_length 2048")


def test_guidance_and_steps_reach_the_pipeline(capsys, checkpoint, tmp_path):
    _, plain, _ = draw(capsys, checkpoint, tmp_path / "plain", "a star")
    _, guided, _ = draw(capsys, checkpoint, tmp_path / "guided", "a star", "--guidance_scale", 9)
    assert pixels(plain["results"][0]["path"]) != pixels(guided["results"][0]["path"])
    code, _, err = draw(capsys, checkpoint, tmp_path / "wrong", "a star", "--guidance_scale", -1)
    assert code == 2
    assert_one_line_error(err, "guidance_scale is -1.0")


def test_drawing_without_a_decoder_is_refused(capsys, tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    code, _, err = run(capsys, "draw", "a star", "--model", tmp_path)
    assert code == 2
    assert_one_line_error(err, "this checkpoint has no decoder", "pisces describe")


def test_reconstruct_writes_one_picture_for_each(capsys, checkpoint, pictures, tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = ["reconstruct", pictures, "--model", checkpoint, "--steps", 2, "--output", tmp_path, "--sheet", sheet]
    code, out, err = run(capsys, *arguments)
    paths = out.split()
    assert (code, err.strip()) == (0, f"contact sheet: {sheet}")
    assert paths == [str(tmp_path / f"{name}_0.png") for name in ("blue", "green", "red")]
    assert len({pixels(path) for path in paths}) == 3
    again = run(capsys, "reconstruct", pictures / "red.png", *arguments[2:6], "--output", tmp_path / "red_again.png")
    assert again[0] == 0 and pixels(tmp_path / "red_again.png") == pixels(tmp_path / "red_0.png")


# ---- failures


def test_unexpected_failure_is_one_line_and_verbose_shows_where(capsys, checkpoint, monkeypatch):
    def fail(folder):
        raise RuntimeError("the roof\nfell in")

    monkeypatch.setattr(commands, "describe_checkpoint", fail)
    code, out, err = run(capsys, "info", checkpoint, "--json")
    assert code == 1 and json.loads(out) == {"command": "info", "error": "RuntimeError: the roof fell in"}
    assert_one_line_error(err, "RuntimeError: the roof fell in")
    code, _, err = run(capsys, "info", checkpoint, "--verbose")
    assert code == 1 and "Traceback" in err and err.strip().endswith("pisces: error: RuntimeError: the roof fell in")


def test_interrupt_exits_with_130(capsys, checkpoint, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "describe_checkpoint", interrupt)
    code, _, err = run(capsys, "info", checkpoint)
    assert code == 130
    assert_one_line_error(err, "interrupted")


def test_the_command_runs_in_a_process_of_its_own(checkpoint):
    command = [sys.executable, "-m", "pisces_commands.console", "describe", "nowhere.png", "--model", checkpoint]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line_error(done.stderr, "nowhere.png")
