"""Claims about `finetune.from_scratch`: what it refuses before any work, and, slowly, that it learns and goes on."""

import json
import random
import shutil

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from finetune import from_scratch
from finetune.parts import trainer
from finetune.scratch import scores
from finetune.scratch.card import write_model_card
from finetune.scratch.plan import SECTIONS, flags_of, read_plan
from finetune.scratch.steps import StepRecords
from modeling_pisces import PiscesPipeline
from modeling_pisces.hub.cards import check_card
from pisces_commands.arguments import UsageError
from pisces_commands.ending import CommandEnd


TRAINED = ("vision", "gen_encoder", "vae", "unet", "pretrain", "detail", "instruct")
TOY = {
    "image_size": 32,
    "heldout_share": 0.02,
    "bf16": False,
    "vision": {"hidden_size": 32, "num_hidden_layers": 1, "max_shift": 0.05},
    "gen_encoder": {"hidden_size": 32, "num_hidden_layers": 1, "output_size": 8},
    "vae": {"vae_channels": [8, 16]},
    "unet": {"unet_channels": [16, 32], "num_sampling_steps": 2, "num_views": 2, "max_shift": 0.05},
    "assemble": {"hidden_size": 64, "num_hidden_layers": 1, "vocabulary_size": 320},
    "pretrain": {},
    "detail": {},
    "instruct": {"pattern": "ugd"},
    "evaluate": {"num_pictures": 4},
}
for name in TRAINED:
    TOY[name] |= {"max_steps": 12, "batch_size": 8, "warmup_steps": 2, "learning_rate": 3e-3, "ema_decay": 0.5}
    TOY[name] |= {"log_steps": 1, "save_steps": 6, "eval_steps": 12}

COLORS = {"teal": (0, 128, 128), "brown": (120, 70, 20), "violet": (140, 40, 200), "lime": (120, 220, 20)}


def write_config(folder, **changes):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**TOY, **changes}))
    return str(path)


def write_patterns(folder, number):
    """Stripes, rings and grids on nothing (transparent), with two captions and a question each: no scene."""
    folder.mkdir()
    rng, rows = random.Random(0), []
    for index in range(number):
        kind, (color, rgb), count = (
            rng.choice(("stripes", "rings")),
            rng.choice(list(COLORS.items())),
            rng.choice((2, 3)),
        )
        picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        pen = ImageDraw.Draw(picture)
        for line in range(count):
            if kind == "stripes":
                pen.rectangle([12 * line, 4, 12 * line + 6, 36], fill=(*rgb, 255))
            else:
                pen.ellipse([2 + 5 * line, 2 + 5 * line, 38 - 5 * line, 38 - 5 * line], outline=(*rgb, 255), width=2)
        picture.save(folder / f"{index}.png")
        for caption in (f"{color} {kind}", f"{count} {kind} in {color} on white"):
            rows.append({"image": f"{index}.png", "caption": caption})
        turns = [{"from": "human", "value": "<image>how many?"}, {"from": "gpt", "value": str(count)}]
        rows.append({"image": f"{index}.png", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---- before any work


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vison": {}}, "unknown key 'vison'; did you mean vision?"),
        ({"image_size": 4}, "image_size: found 4, expected a whole number from 8 to 1024"),
        ({"heldout_share": 0.9}, "heldout_share: found 0.9, expected a number above 0, at most 0.5"),
        ({"bf16": "maybe"}, "bf16: found 'maybe', expected true, false or auto"),
        ({"unet": 3}, "unet: found 3, expected flags, one per line"),
        ({"vae": {"output": "x"}}, "vae: output is filled in by the run itself. Leave it out"),
        ({"unet": {"max_steps": -1}}, "--max_steps -1: expected a number from 1"),
        ({"instruct": {"max_step": 3}}, "instruct: unknown flag 'max_step'; did you mean max_steps?"),
        ({"instruct": {"pattern": "ux"}}, "pattern 'ux': expected letters u"),
        ({"detail": {"schedule": "stairs"}}, "--schedule stairs: expected one of linear, cosine"),
        ({"assemble": {"hidden_size": 100}}, "--hidden_size 100: expected a multiple of 32"),
        ({"assemble": {"hiden_size": 64}}, "assemble: unknown flag 'hiden_size'; did you mean hidden_size?"),
        ({"evaluate": {"num_pictures": 0}}, "--num_pictures 0: expected a number from 1"),
        ({"gen_encoder": {"patch_size": 7}}, "--patch_size 7: pictures of 32 pixels are not whole patches of it"),
        ({"pool_stride": 3}, "--pool_stride 3: expected a divisor of 4, the patches along a side"),
        ({"vae": {"vae_channels": [8, 12]}}, "--vae_channels [8, 12]: expected two or more multiples of 8"),
        ({"image_size": 33, "vision": {"patch_size": 3}, "gen_encoder": {"patch_size": 3}}, "--pool_stride 2"),
        (
            {"image_size": 1000, "vision": {"patch_size": 8}},
            "is 15625 vectors a picture, more than 640. Raise patch_size",
        ),
    ],
)
def test_a_wrong_plan_is_refused_before_any_work(tmp_path, changes, message):
    words = ["--config", write_config(tmp_path, **changes), "--data", "x", "--output", str(tmp_path / "out")]
    with pytest.raises((UsageError, CommandEnd)) as caught:
        from_scratch.main(words)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_a_plan_that_is_not_there_or_names_no_data_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"no such file. Start from finetune/configs/from_scratch_small.yaml"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="--data is missing: name the folder or file of your pictures"):
        from_scratch.main(["--config", write_config(tmp_path), "--output", str(tmp_path / "out")])
    plan = yaml.safe_load(open(write_config(tmp_path)))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({k: v for k, v in plan.items() if k in ("vision", "vae")}))
    with pytest.raises(UsageError, match=r"no stage. Add a section pretrain, detail, instruct"):
        read_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize("name", ["small", "emoji"])
def test_the_plans_of_the_repository_can_be_run(name, tmp_path):
    plan = read_plan(f"finetune/configs/from_scratch_{name}.yaml", data=["x"])
    assert set(plan.sections) <= set(SECTIONS)
    run = from_scratch.FromScratch(plan, tmp_path / "out")
    assert [step for step in run.all_steps() if step in TRAINED] == list(TRAINED)


def test_settings_become_flags():
    assert flags_of({"a": 1, "b": [2, 3], "c": None, "d": False}) == ["--a", "1", "--b", "2", "3", "--d", "False"]


# ---- steps


def test_a_step_is_done_once_and_keeps_what_it_was_begun_with(tmp_path):
    records, done = StepRecords(tmp_path), []
    records.run("unet", {"max_steps": 5, "learning_rate": 0.1}, lambda: done.append(1))
    records.run("unet", {"max_steps": 5, "learning_rate": 0.1}, lambda: done.append(2))
    assert done == [1] and records.is_done("unet")
    records.check("unet", {"max_steps": 5, "learning_rate": 0.1, "save_steps": 7})
    with pytest.raises(
        UsageError, match=r"unet: learning_rate is 0.2, but the step was done with 0.1 in .*Set it back"
    ):
        records.check("unet", {"max_steps": 5, "learning_rate": 0.2})
    with pytest.raises(UsageError, match="unet: max_steps is 9, but the step was done with 5"):
        records.check("unet", {"max_steps": 9, "learning_rate": 0.1})


def test_an_interrupted_step_is_not_done_and_may_become_longer_but_nothing_else(tmp_path):
    records = StepRecords(tmp_path)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.run("vae", {"max_steps": 5, "seed": 0}, stop)
    assert not records.is_done("vae")
    records.check("vae", {"max_steps": 50, "seed": 0})
    with pytest.raises(UsageError, match="vae: seed is 1, but the step was begun with 0"):
        records.check("vae", {"max_steps": 5, "seed": 1})
    records.run("vae", {"max_steps": 5, "seed": 0}, lambda: None)
    assert records.read("vae")["seconds"] >= 0


# ---- scores and card


def test_psnr_of_a_hand_made_pair():
    wanted = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    drawn = wanted + torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]
    assert scores.psnr(drawn, wanted).tolist() == pytest.approx([60.0, 0.0])


def test_ranks_count_nearer_pictures_and_not_the_wanted_one_itself():
    wanted = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    pool = torch.tensor([[0.0, 1.0], [0.0, 2.0], [5.0, 0.0]])
    drawn = torch.tensor([[0.0, 1.4], [4.9, 0.2]])
    # the first is nearest to its own picture; all but none lie between the second and what was wanted
    assert scores.own_ranks(drawn, wanted, pool).tolist() == [1, 2]


def make_scores(first, reconstruction):
    part = {"num_pictures": 8, "reconstruction_psnr": reconstruction, "drawing_psnr": 11.0, "drawing_own_first": first}
    part |= {"drawing_own_in_five": 0.9, "num_answers": 8, "answers_exact": 0.5}
    return {"num_pool": 100, "trained": part, "heldout": part}


def test_the_verdict_names_the_next_thing_to_change():
    assert scores.verdict(make_scores(0.9, 25.0)).endswith("the decoder alone reaches 25.0 dB.")
    assert "Warning: the decoder cannot draw these pictures yet; raise max_steps of vae" in scores.verdict(
        make_scores(0.9, 9)
    )
    assert "Warning: it has not learned to draw by captions; raise max_steps of the last" in scores.verdict(
        make_scores(0.02, 25)
    )


@pytest.mark.parametrize("licence", [None, "apache-2.0"])
def test_the_card_says_what_was_reached_and_asks_for_a_licence(tmp_path, licence):
    facts = {"license": licence, "image_size": 64, "num_trained": 9, "num_heldout": 1, "sources": ["mine"]}
    facts |= {"caption": 'a "red" box', "hardware": "two cores", "commit": None, "verdict": "It draws."}
    facts |= {"steps": {"vae": {"settings": {"max_steps": 7, "batch_size": 8}, "seconds": 60}}}
    path = write_model_card(tmp_path, {**facts, "scores": make_scores(0.75, 20.0)})
    text = path.read_text()
    assert "| vae | 7 | 8 | 60 |" in text and "| answers, exact | 0.5 | 0.5 |" in text and "It draws." in text
    if licence:
        assert check_card(path).data.license == "apache-2.0"
    else:
        assert "No licence is named yet" in text
        with pytest.raises(ValueError, match="the metadata lacks license"):
            check_card(path)


# ---- the whole way


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    return write_patterns(tmp_path_factory.mktemp("patterns") / "data", 600)


def words(folder, patterns, output):
    return ["--config", write_config(folder), "--data", str(patterns / "rows.jsonl"), "--output", str(output)]


def weights_of(output):
    files = sorted((output / "model").rglob("*.safetensors"))
    return {str(path.relative_to(output)): load_file(path) for path in files}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_learns_and_a_run_stopped_in_each_ends_the_same(patterns, tmp_path, capfd, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = from_scratch.main(words(tmp_path, patterns, whole))
    printed = "".join(capfd.readouterr()).lower()
    assert "scene" not in printed and "of 4 trained captions" in printed

    results = {path.parent.name: json.loads(path.read_text()) for path in whole.rglob("results.json")}
    for name in ("vision_tower", "gen_encoder", "vae", "unet", "pretrain", "detail", "instruct"):
        losses = [point["loss"] for point in results[name]["curve"] if "loss" in point]
        assert sum(losses[-4:]) < 0.97 * sum(losses[:4]), name
    assert set(results["whole"]["scores"]["heldout"]) == set(results["whole"]["scores"]["trained"])
    assert (model / "samples.png").is_file() and "scene" not in (model / "README.md").read_text().lower()
    picture = PiscesPipeline.from_pretrained(model)("teal rings", num_inference_steps=2).images[0]
    assert picture.size == (32, 32)

    stopped = set()
    save = trainer.WholeCheckpoints._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.args.output_dir not in stopped:
            stopped.add(self.args.output_dir)
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.WholeCheckpoints, "_save_checkpoint", save_and_stop)
    starts = 0
    while not (parts / "results.json").is_file():
        starts += 1
        try:
            from_scratch.main(words(tmp_path, patterns, parts))
        except KeyboardInterrupt:
            assert starts < 10
    assert len(stopped) == 7 and starts == 8
    one, other = weights_of(whole), weights_of(parts)
    assert one.keys() == other.keys() and len(one) == 3
    for name in one:
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name]), name
    shutil.rmtree(parts / "model")

    start = words(tmp_path, patterns, whole)
    write_config(tmp_path, unet={**TOY["unet"], "learning_rate": 0.1})
    with pytest.raises(UsageError, match=r"unet: learning_rate is 0.1, but the step was done with 0.003"):
        from_scratch.main(start)
    (patterns / "rows.jsonl").write_text((patterns / "rows.jsonl").read_text() + "\n")
    with pytest.raises(UsageError, match=r"data: the files behind .* have changed since .* began with them"):
        from_scratch.main(words(tmp_path, patterns, whole))
