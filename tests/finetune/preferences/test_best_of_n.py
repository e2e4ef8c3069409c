"""Claims about best of n and rejection sampling: what is kept, that nothing is drawn twice, and what stops them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from finetune import best_of_n, lora_generation, rejection_sampling
from finetune.data.load import load_data
from finetune.data.schema import side_of
from finetune.preferences.candidates import picture_seed, read_prompts
from finetune.preferences.pairs import load_pairs
from tests.checkpoint_folder import write_checkpoint
from tests.fixtures import make_model, make_processor


SCORER = '''
import json
import numpy as np

calls = []

def redness(images, prompt):
    """The mean of the red channel, minus what the prompt asks for; remembers what it was asked."""
    calls.append(prompt)
    return [float(np.asarray(image)[..., 0].mean()) - prompt.get("minus", 0.0) for image in images]

def same(images, prompt):
    return [1.0] * len(images)

def too_few(images, prompt):
    return [1.0]

def dies(images, prompt):
    if prompt["prompt"] == "a blue square":
        raise KeyboardInterrupt
    return redness(images, prompt)
'''


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def scorer(tmp_path, monkeypatch) -> str:
    """The name of a module with scorers; fresh in every test."""
    name = f"scores_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture
def draw(start, scorer, tmp_path):
    """Run the command on three prompts; returns its folder."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\ntwo stars\n", encoding="utf-8")

    def run(*flags: str, output: str = "out", function: str = "redness", source: Path = prompts) -> Path:
        given = ["--checkpoint", str(start), "--prompts", str(source), "--scorer", f"{scorer}:{function}"]
        given += ["--output", str(tmp_path / output), "--n", "3", "--device", "cpu", *flags]
        return best_of_n.main(given)

    return run


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def red(path: Path) -> float:
    return float(np.asarray(Image.open(path))[..., 0].mean())


def test_the_best_picture_of_each_prompt_is_kept_with_all_scores(draw, start, capsys):
    folder = draw()
    rows = rows_of(folder)
    assert [row["prompt"] for row in rows] == ["a red circle", "a blue square", "two stars"]
    assert [row["id"] for row in rows] == ["1", "3", "4"]  # lines of the file
    for row in rows:
        assert len(set(row["scores"])) == 3 and row["score"] == max(row["scores"])
        assert red(folder / row["file_name"]) == pytest.approx(row["score"])
    assert "3 prompts, mean score" in capsys.readouterr().out
    settings = yaml.safe_load((folder / "run.yaml").read_text())["settings"]
    assert settings["n"] == 3 and settings["checkpoint"] == str(start)


def test_a_kept_picture_can_be_drawn_again_from_its_seed(draw, start):
    from modeling_pisces import PiscesPipeline

    folder = draw()
    row = rows_of(folder)[1]
    pipe = PiscesPipeline.from_pretrained(start)
    again = pipe(row["prompt"], generator=torch.Generator().manual_seed(row["seed"])).images[0]
    found = np.asarray(Image.open(folder / row["file_name"])).astype(int)
    assert np.abs(found - np.asarray(again)).max() <= 1  # alone or in a batch: rounding of sums
    assert row["seed"] == picture_seed(0, "3", row["scores"].index(row["score"]))


def test_the_folder_is_training_data_for_drawing(draw):
    rows = load_data(str(draw()))
    assert len(rows) == 3 and {side_of(row) for row in rows.iter_rows()} == {"generation"}
    assert rows[2]["messages"][0]["content"] == [{"type": "text", "text": "two stars"}]


def test_pictures_do_not_depend_on_the_batch(draw):
    folders = [draw("--batch_size", size, output=f"out{size}") for size in ("1", "4", "9")]
    scores = [[row["scores"] for row in rows_of(folder)] for folder in folders]
    assert np.allclose(scores[0], scores[1], atol=0.5) and np.allclose(scores[0], scores[2], atol=0.5)
    assert np.ptp(scores[0]) > 5  # while pictures do differ


def test_an_interrupted_run_goes_on_and_draws_nothing_twice(draw, scorer, monkeypatch, tmp_path):
    whole = draw("--batch_size", "3", output="whole")
    with pytest.raises(KeyboardInterrupt):
        draw("--batch_size", "3", output="out", function="dies")
    assert len(rows_of(tmp_path / "out")) == 1
    with (tmp_path / "out/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "images/0000')  # killed while writing
    record = tmp_path / "out/run.yaml"
    record.write_text(record.read_text().replace(":dies", ":redness"))
    drawn = []
    original = best_of_n.draw
    monkeypatch.setattr(
        best_of_n, "draw", lambda pipe, prompts, options: drawn.extend(prompts) or original(pipe, prompts, options)
    )
    folder = draw("--batch_size", "3", output="out")
    assert [prompt["prompt"] for prompt in drawn] == ["a blue square", "two stars"]
    assert rows_of(folder) == rows_of(whole)
    monkeypatch.setattr(best_of_n, "load_pipeline", lambda *args: pytest.fail("nothing is left to draw"))
    assert rows_of(draw("--batch_size", "3", output="out")) == rows_of(whole)


def test_other_settings_for_the_same_folder_are_refused(draw, tmp_path):
    draw()
    with pytest.raises(ValueError, match=r"out was made with --seed 0, not 5. Choose another --output"):
        draw("--seed", "5")
    (tmp_path / "prompts.txt").write_text("a green heart\n")
    with pytest.raises(ValueError, match="prompt 1 was 'a red circle' and is 'a green heart' now"):
        draw()


def test_a_scorer_gets_the_whole_line_of_its_prompt(draw, scorer, tmp_path):
    import importlib

    source = tmp_path / "prompts.jsonl"
    source.write_text('{"id": 7, "prompt": "a star", "minus": 1000.0}\n')
    (row,) = rows_of(draw(source=source))
    assert row["id"] == "7" and row["score"] < -700
    assert importlib.import_module(scorer).calls == [{"id": "7", "prompt": "a star", "minus": 1000.0}]


def test_pairs_are_training_data_for_dpo(draw, tmp_path):
    folder = draw("--pairs", "True")
    rows = load_pairs([str(folder / "pairs.jsonl")], make_processor(), make_model(), None)
    assert rows.sides == {"draw": 3}
    for row, record in zip(
        rows_of(folder), map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()), strict=True
    ):
        assert red(folder / record["chosen_image"]) == pytest.approx(max(row["scores"]))
        assert red(folder / record["rejected_image"]) == pytest.approx(min(row["scores"]))
    folder = draw("--pairs", "True", output="equal", function="same")
    assert (folder / "pairs.jsonl").read_text() == "" and not (folder / "rejected").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n", "0"], "--n 0: expected at least 1"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--n", "1", "--pairs", "True"], "--pairs True needs --n of at least 2"),
    ],
)
def test_numbers_out_of_range_are_refused(flags, message, draw):
    with pytest.raises(ValueError, match=message):
        draw(*flags)


def test_a_scorer_that_returns_too_few_scores_is_named(draw):
    with pytest.raises(ValueError, match=r":too_few returned 1 scores for 3 pictures. Return one number for each"):
        draw(function="too_few")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.jsonl", '{"prompt": "a"\n', 'p.jsonl, line 1: not JSON .*Write {"prompt": "..."} on each line'),
        ("p.jsonl", '{"text": "a"}\n', 'p.jsonl, line 1: found .*expected an object with a text under "prompt"'),
        ("p.jsonl", '{"id": "1", "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "the id '1' is given to 2 prompts"),
        ("p.txt", "\n \n", "no prompts. Write one per line"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"no such file. Write one prompt per line"):
        read_prompts(str(tmp_path / "none.txt"))


# ---- rejection sampling


SFT = "max_steps: 2\nlearning_rate: 1.0e-2\nper_device_train_batch_size: 2\nlogging_steps: 1\nuse_cpu: true\ndisable_tqdm: true\nlora_r: 4\n"


@pytest.fixture
def sample(start, scorer, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "sft.yaml").write_text(SFT)

    def run(*flags: str, threshold: str = "0", name: str = "runs") -> Path:
        given = [
            "--checkpoint",
            str(start),
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "--output",
            str(tmp_path / name),
        ]
        given += [
            "--scorer",
            f"{scorer}:redness",
            "--sft_config",
            str(tmp_path / "sft.yaml"),
            "--n",
            "2",
            "--device",
            "cpu",
        ]
        return rejection_sampling.main([*given, "--threshold", threshold, *flags])

    return run


def test_each_round_draws_with_the_adapter_of_the_last_and_trains_on_all_that_passed(sample, tmp_path):
    output = sample()
    kept = [
        [json.loads(line) for line in (output / f"kept_{number}.jsonl").read_text().splitlines()] for number in (1, 2)
    ]
    assert [row["id"] for row in kept[1]] == ["1-1", "1-2", "2-1", "2-2"] and kept[1][:2] == kept[0]
    assert all((output / row["image"]).is_file() for row in kept[1])
    settings = [yaml.safe_load((output / f"round_{n}/drawings/run.yaml").read_text())["settings"] for n in (1, 2)]
    assert settings[0]["adapter"] is None and settings[1]["adapter"] == str(output / "round_1/adapter")
    assert settings[1]["seed"] == settings[0]["seed"] + 1
    for number, count in ((1, 2), (2, 4)):
        record = yaml.safe_load((output / f"round_{number}/adapter/run.yaml").read_text())
        assert record["recipe"] == "lora_generation" and f"{count} rows ({count} generation)" in record["data"]
    history = yaml.safe_load((output / "rounds.yaml").read_text())
    assert [(point["round"], point["kept"], point["prompts"]) for point in history] == [(1, 2, 2), (2, 2, 2)]
    scores = rows_of(output / "round_1/drawings")
    assert history[0]["mean_score"] == pytest.approx(np.mean([row["scores"] for row in scores]))


def test_only_pictures_that_reach_the_threshold_are_kept(sample):
    output = sample("--rounds", "1")
    best = sorted(row["score"] for row in rows_of(output / "round_1/drawings"))
    assert best[0] < best[1]
    other = sample("--rounds", "1", threshold=str(best[1]), name="other")
    assert len((other / "kept_1.jsonl").read_text().splitlines()) == 1
    with pytest.raises(
        ValueError,
        match=rf"round 1: none of the best pictures of 2 prompts reached --threshold 255.0 \(the best score is {best[1]:.4g}\).*Lower it, raise --n",
    ):
        sample("--rounds", "1", threshold="255", name="nothing")
    with pytest.raises(ValueError, match=r"was made with --threshold 0.0, not 255.0"):
        sample("--rounds", "1", threshold="255")


def test_a_finished_round_is_not_repeated(sample, monkeypatch):
    output = sample("--rounds", "1")
    before = (output / "round_1/adapter/adapter_model.safetensors").read_bytes()
    trained = []
    original = lora_generation.main
    monkeypatch.setattr(lora_generation, "main", lambda flags: trained.append(flags) or original(flags))
    sample("--rounds", "2")
    assert len(trained) == 1 and str(output / "round_2/adapter") in trained[0]
    assert (output / "round_1/adapter/adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--pairs", "True"], "--adapter and --pairs are for finetune.best_of_n"),
        (["--sft_config", "none.yaml"], "--sft_config none.yaml: no such file"),
    ],
)
def test_rounds_that_cannot_start_are_refused(flags, message, sample):
    with pytest.raises(ValueError, match=message):
        sample(*flags)
