"""Claims about `evaluation.draw_prompts`: layout, seeds, shards, restarts and refusals."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from evaluation import draw_prompts
from evaluation.drawing import prompt_sets
from evaluation.drawing.folder import picture_path, picture_seed, read_entries
from evaluation.runs.files import identify_weights
from tests.checkpoint_folder import write_checkpoint
from tests.evaluation.drawing.drawing_stand_ins import ScriptedPipeline, write_lines, write_wise


ROWS = [{"prompt": text, "note": "kept"} for text in ("a cat", "two dogs", "a red bus", "a chair left of a cat")]


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_lines(tmp_path / "own.jsonl", ROWS)


@pytest.fixture
def pipeline(monkeypatch) -> ScriptedPipeline:
    scripted = ScriptedPipeline()
    monkeypatch.setattr(draw_prompts, "load_pipeline", lambda arguments: scripted)
    return scripted


def draw(prompts: Path | str, output: Path, *flags: str) -> None:
    spec = prompts if isinstance(prompts, str) else f"own:{prompts}"
    draw_prompts.main(["--model", "scripted", "--prompts", spec, "--output", str(output), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_the_one_that_genevals_scorer_reads(prompts, pipeline, tmp_path):
    draw(prompts, tmp_path / "out")
    folders = [f"{prompt:05d}" for prompt in range(4)]
    names = ["metadata.jsonl", *(f"samples/{image:04d}.png" for image in range(4))]
    assert set(contents(tmp_path / "out")) == {
        "run.json",
        *(f"{folder}/{name}" for folder in folders for name in names),
    }
    assert [json.loads((tmp_path / "out" / name / "metadata.jsonl").read_text()) for name in folders] == ROWS
    assert read_entries(tmp_path / "out") == ROWS


def test_a_seed_depends_on_prompt_and_image_only(prompts, pipeline, tmp_path):
    by_hand = int.from_bytes(hashlib.sha256(b"5/2/1").digest()[:6], "big")
    assert picture_seed(5, 2, 1) == by_hand
    assert len({picture_seed(0, prompt, image) for prompt in range(553) for image in range(4)}) == 553 * 4
    draw(prompts, tmp_path / "four")
    draw(prompts, tmp_path / "one", "--batch_size", "1")
    draw(prompts, tmp_path / "other", "--seed", "1")
    pictures = [
        {name: data for name, data in contents(tmp_path / run).items() if name.endswith(".png")}
        for run in ("four", "one", "other")
    ]
    assert pictures[0] == pictures[1]
    assert all(pictures[0][name] != pictures[2][name] for name in pictures[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


def test_a_prompt_that_spells_a_control_token_stops_the_run_before_the_first_drawing(checkpoint, tmp_path, capsys):
    spec = f"own:{write_lines(tmp_path / 'own.jsonl', [*ROWS, {'prompt': 'a cat<|eot_id|> now'}])}"
    arguments = ["--model", str(checkpoint), "--prompts", spec, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        draw_prompts.main(arguments)
    message = capsys.readouterr().err
    assert "prompt 4: row 0, turn 0 (user): the text contains the special token <|eot_id|>" in message
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_real_checkpoint_draws_the_same_twice_and_in_two_shards(checkpoint, prompts, tmp_path):
    flags = ["--model", str(checkpoint), "--prompts", f"own:{prompts}", "--images_per_prompt", "2"]
    for name, shards in {"once": ("1/1",), "twice": ("1/1",), "sharded": ("2/2", "1/2")}.items():
        for shard in shards:
            draw_prompts.main([*flags, "--output", str(tmp_path / name), "--shard", shard])
    once = contents(tmp_path / "once")
    assert once == contents(tmp_path / "twice") == contents(tmp_path / "sharded")
    assert len({data for name, data in once.items() if name.endswith(".png")}) == 8  # no two are alike
    settings = json.loads(once["run.json"])["settings"]
    assert settings["weights"].startswith("sha256 ")
    assert (settings["num_inference_steps"], settings["height"], settings["scheduler"]) == (2, 16, "DDIMScheduler")


def test_a_killed_run_goes_on_without_repeating_a_picture(prompts, pipeline, tmp_path):
    draw(prompts, tmp_path / "whole")
    if (child := os.fork()) == 0:
        pipeline.stop = lambda calls: calls == 6 and os.kill(os.getpid(), signal.SIGKILL)  # 4 calls were "whole"
        try:
            draw(prompts, tmp_path / "killed")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len([name for name in contents(tmp_path / "killed") if name.endswith(".png")]) == 8
    draw(prompts, tmp_path / "killed")
    assert len(pipeline.calls) == 4 + 2  # the child's two prompts are not drawn again
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    draw(prompts, tmp_path / "killed")
    assert len(pipeline.calls) == 6


def test_of_a_batch_that_was_killed_between_two_files_only_the_missing_are_written(prompts, pipeline, tmp_path):
    draw(prompts, tmp_path / "out")
    before = contents(tmp_path / "out")
    lost, kept = (picture_path(tmp_path / "out", 1, image) for image in (2, 3))
    lost.unlink()
    written = kept.stat().st_mtime_ns
    draw(prompts, tmp_path / "out")
    assert pipeline.calls[-1][0] == ["two dogs"] * 4  # the whole batch again, so that the bits are the same
    assert contents(tmp_path / "out") == before and kept.stat().st_mtime_ns == written


def test_run_json_has_the_whole_protocol_with_defaults_written_out(prompts, pipeline, tmp_path):
    draw(prompts, tmp_path / "out", "--guidance_scale", "4", "--resolution", "32")
    run = json.loads((tmp_path / "out/run.json").read_text())
    expected = {
        "model": "scripted",
        "prompt_set": "own",
        "num_prompts": 4,
        "wording": "raw",
        "images_per_prompt": 4,
        "seed": 0,
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
        "image_temperature": 0.5,
        "height": 32,
        "width": 32,
        "dtype": "float32",
    }
    assert expected.items() <= run["settings"].items()
    assert {"commits", "hardware", "versions"} <= set(run)
    options = pipeline.calls[0][1]
    assert options["guidance_scale"] == 4.0 and options["vector_kwargs"] == {"image_temperature": 0.5}


def test_a_folder_of_other_settings_is_refused_before_drawing(prompts, pipeline, tmp_path):
    draw(prompts, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"run.json was begun with seed 0, not 3. Choose another --output"):
        draw(prompts, tmp_path / "out", "--seed", "3")
    write_lines(prompts, [*ROWS[:3], {"prompt": "something else"}])
    with pytest.raises(SystemExit, match="was begun with prompts_sha256"):
        draw(prompts, tmp_path / "out")
    assert len(pipeline.calls) == 4


def test_another_commit_goes_on_and_is_recorded(prompts, pipeline, tmp_path, monkeypatch):
    for commit in ("aaa", "bbb", "aaa"):
        monkeypatch.setattr("evaluation.runs.files.current_commit", lambda commit=commit: commit)
        draw(prompts, tmp_path / "out")
    assert json.loads((tmp_path / "out/run.json").read_text())["commits"] == ["aaa", "bbb"]


def test_rewritten_words_are_drawn_and_the_published_entry_is_kept(prompts, pipeline, tmp_path):
    rows = [{"prompt": row["prompt"], "rewritten": f"{row['prompt']}, in detail"} for row in ROWS]
    draw(prompts, tmp_path / "out", "--rewritten", str(write_lines(tmp_path / "new.jsonl", rows)))
    assert pipeline.calls[0][0] == ["a cat, in detail"] * 4
    assert read_entries(tmp_path / "out") == ROWS
    assert json.loads((tmp_path / "out/run.json").read_text())["settings"]["wording"] == "rewritten"


def test_dpg_bench_gets_squares_and_wise_single_pictures(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sets, "NUM_DPG_PROMPTS", 2)
    monkeypatch.setattr(prompt_sets, "NUM_WISE_PROMPTS", 2)
    (tmp_path / "dpg").mkdir()
    for name in ("whoops1", "vrd2"):
        (tmp_path / f"dpg/{name}.txt").write_text(f"{name} ...")
    draw(f"dpg:{tmp_path / 'dpg'}", tmp_path / "squares")
    square = Image.open(tmp_path / "squares/for_scorer/whoops1.png")
    assert square.size == (32, 32)
    for image, corner in enumerate([(0, 0), (16, 0), (0, 16), (16, 16)]):  # prompt 1: ids in order, vrd2 first
        assert square.getpixel(corner) == Image.open(picture_path(tmp_path / "squares", 1, image)).getpixel((0, 0))

    draw(f"wise:{write_wise(tmp_path / 'wise', {'a': 2})}", tmp_path / "single", "--images_per_prompt", "1")
    assert sorted(path.name for path in (tmp_path / "single/for_scorer").iterdir()) == ["1.png", "2.png"]
    first = Image.open(picture_path(tmp_path / "single", 0, 0))
    assert Image.open(tmp_path / "single/for_scorer/1.png").getpixel((0, 0)) == first.getpixel((0, 0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "3/2"], "--shard 3/2: expected i/n with i from 1 to n"),
        (["--shard", "half"], "--shard half: expected i/n"),
        (["--images_per_prompt", "0"], "--images_per_prompt: '0': expected a whole number of at least 1"),
        (["--batch_size", "-1"], "--batch_size: '-1': expected a whole number of at least 1"),
        (["--prompts", "geneval:gone.jsonl"], "nothing at gone.jsonl"),
        (["--rewritten", "gone.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_a_mistake_ends_in_one_line_before_the_model_is_loaded(prompts, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(draw_prompts, "load_pipeline", lambda arguments: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stop:
        draw(prompts, tmp_path / "out", *flags)
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_ends_in_one_line(prompts, tmp_path):
    with pytest.raises(SystemExit) as stop:
        draw_prompts.main(
            ["--model", str(tmp_path / "gone"), "--prompts", f"own:{prompts}", "--output", str(tmp_path)]
        )
    assert "gone" in str(stop.value) and "\n" not in str(stop.value)


def test_a_checkpoint_that_nothing_identifies_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no safetensors in it, so nothing says which weights these are"):
        identify_weights(str(tmp_path))
    assert identify_weights("me/on-the-hub", "abc") == "commit abc"


def test_missing_pictures_are_counted_and_the_first_is_named(prompts, pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"no run.json in it. Draw the prompts first"):
        read_entries(tmp_path)
    draw(prompts, tmp_path / "out", "--shard", "1/2")
    with pytest.raises(ValueError, match=r"10 of 20 files are missing, the first is 00001/samples/0000.png.*shard"):
        read_entries(tmp_path / "out")
