"""The judge learns real pictures and nothing else, and goes on where it was stopped with the same result."""

import json

import pytest
import torch
from PIL import Image

from examples.emoji import judge, make_data
from examples.emoji.contact_sheet import read_truth
from examples.emoji.judge_network import (
    Judge,
    augment,
    load_judge,
    read_pictures,
    shift_and_scale,
    to_image,
    to_tensor,
)
from pisces_commands.ending import CommandEnd
from tests.examples.emoji_packages import write_packages


NAMES = (
    "anchor",
    "apple",
    "red heart",
    "blue heart",
    "green heart",
    "woman pilot",
    "woman cook",
    "three o clock",
    "four thirty",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data folders of two vendors, 19 pictures each."""
    folder = tmp_path_factory.mktemp("emoji")
    made = []
    for vendor in ("google", "twitter"):
        source = write_packages(folder / f"packages-{vendor}", vendor, only=NAMES)
        flags = [
            "--source",
            str(source),
            "--vendor",
            vendor,
            "--unseen_concepts",
            "0",
            "--output",
            str(folder / vendor),
        ]
        make_data.main(flags)
        made.append(folder / vendor)
    return made


def train(folders, output, *flags):
    data = [str(folder) for folder in folders]
    judge.main(["--data", *data, "--output", str(output), "--epochs", "30", "--batch_size", "13", *flags])
    return output


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    return train(folders, tmp_path_factory.mktemp("judge") / "judge")


def test_it_names_tells_tones_colors_and_vendors_of_changed_pictures(trained):
    facts = json.loads((trained / "judge.json").read_text())
    assert facts["accuracy"]["name"] > 0.6 and facts["accuracy"]["name_top5"] > 0.9  # 9 names, so chance is 0.11
    assert facts["accuracy"]["style"] > 0.7  # 90 steps reach 0.82
    assert {"tone", "color"} <= facts["accuracy"].keys()
    assert facts["pictures"] == 38 and facts["seed"] == 0 and facts["command"] and facts["hardware"]


def test_a_loaded_judge_says_name_parts_and_vendor(trained, folders):
    found, _ = load_judge(trained)
    rows = read_truth(folders[0])
    seen = found.judge([Image.open(folders[0] / row["image"]) for row in rows])
    right = [one["names"][0] == row["name"] for one, row in zip(seen, rows, strict=True)]
    assert sum(right) >= len(rows) - 3
    for one in seen:
        assert one["concept"] == found.labels.concepts[found.labels.names.index(one["names"][0])]
        assert len(one["names"]) == 5 and one["tone"] in found.labels.tones and one["color"] in found.labels.colors
        assert one["time"] in ("three o'clock", "four thirty") and one["style"] in ("google", "twitter")


def test_a_heart_of_another_color_is_the_same_concept(folders):
    labels = judge.collect_labels([row for folder in folders for row in read_truth(folder)])
    parts = dict(zip(labels.names, labels.concepts, strict=True))
    assert parts["red heart"] == parts["blue heart"] == "heart" and parts["anchor"] == "anchor"
    assert parts["three o'clock"] == "clock"
    assert labels.tones[0] == "yellow" and set(labels.colors) == {"red", "blue", "green"}


def test_pictures_of_every_split_are_learned(folders):
    rows = [row for folder in folders for row in read_truth(folder)]
    assert {row["split"] for row in rows} == {"train", "heldout"}
    assert set(judge.collect_labels(rows).names) == {row["name"] for row in rows}


def test_a_stopped_run_goes_on_to_the_same_weights(folders, tmp_path, monkeypatch):
    train(folders, tmp_path / "whole", "--epochs", "6")
    saved = torch.save
    count = 0

    def stop_after_three(state, path):
        nonlocal count
        saved(state, path)
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(judge.torch, "save", stop_after_three)
    with pytest.raises(CommandEnd) as end:
        train(folders, tmp_path / "judge", "--epochs", "6")
    assert end.value.code == 130 and "goes on from the last epoch" in str(end.value)
    monkeypatch.undo()
    with pytest.raises(CommandEnd, match=r"was begun with epochs=6 .* not epochs=6 .*seed=1"):
        train(folders, tmp_path / "judge", "--epochs", "6", "--seed", "1")
    train(folders, tmp_path / "judge", "--epochs", "6")
    assert (tmp_path / "judge" / "judge.safetensors").read_bytes() == (
        tmp_path / "whole" / "judge.safetensors"
    ).read_bytes()
    assert not (tmp_path / "judge_unfinished").exists()


def test_changes_keep_white_white_and_never_mirror(folders):
    pictures = read_pictures(folders[0], read_truth(folders[0]))
    generator = torch.Generator().manual_seed(0)
    moved = shift_and_scale(pictures, generator)
    assert moved.shape == pictures.shape and torch.allclose(moved[:, :, 0, -1], torch.ones(len(moved), 3), atol=1e-5)
    assert torch.allclose(shift_and_scale(pictures, generator, strength=0), pictures, atol=1e-4)
    left = torch.ones(1, 3, 64, 64)
    left[..., :20] = 0  # dark on the left
    for _ in range(20):
        shown = shift_and_scale(left, generator)[0, 0]
        assert shown[:, :20].mean() < shown[:, -20:].mean()
    assert augment(pictures, generator).min() >= 0 and augment(pictures, generator).max() <= 1


def test_tones_stay_apart_under_every_change_of_light():
    medium, dark = torch.full((200, 3, 64, 64), 0.55), torch.full((200, 3, 64, 64), 0.4)
    changed = [
        augment(tone, torch.Generator().manual_seed(1))[:, :, 28:36, 28:36].mean((1, 2, 3)) for tone in (medium, dark)
    ]
    assert changed[0].min() > changed[1].max()


def test_a_picture_comes_back_from_a_tensor():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    assert to_image(to_tensor(image)).tobytes() == image.tobytes()
    assert to_tensor(image.resize((96, 96))).shape == (3, 64, 64)


# ---- mistakes


def test_mistakes_are_named(folders, trained, tmp_path):
    with pytest.raises(CommandEnd, match="no truth/pictures") as end:
        train([tmp_path], tmp_path / "judge")
    assert end.value.code == 2
    with pytest.raises(CommandEnd, match="there is a judge already"):
        train(folders, trained)
    with pytest.raises(ValueError, match=r"no judge\.json in it. Train one with"):
        load_judge(tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "judge.json").write_bytes((trained / "judge.json").read_bytes())
    with pytest.raises(ValueError, match="not a whole judge"):
        load_judge(tmp_path / "half")
    (tmp_path / "half" / "judge.safetensors").write_bytes((trained / "judge.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole judge"):
        load_judge(tmp_path / "half")


def test_a_question_that_a_picture_has_no_answer_to_costs_nothing(folders):
    labels = judge.collect_labels([row for folder in folders for row in read_truth(folder)])
    network = Judge(labels).eval()
    logits = network(torch.rand(2, 3, 64, 64))
    targets = {head: torch.tensor([0, 1]) for head in ("name", "style")}
    silent = {**targets, **{head: torch.full((2,), -100) for head in ("tone", "color")}}
    asked = {**targets, **{head: torch.tensor([0, 1]) for head in ("tone", "color")}}
    assert torch.isfinite(judge.loss_of(logits, silent)) and judge.loss_of(logits, asked) > judge.loss_of(
        logits, silent
    )
