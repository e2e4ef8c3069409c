"""Claims about what the decoder can draw of somebody's pictures, and where that is shown before a run."""

import json
import math

import pytest
import torch
from PIL import Image

from finetune import check_data, lora_generation
from finetune.guard import ceiling
from finetune.guard.ceiling import Ceiling, ceiling_sections, ceiling_sentences, describe_ceiling, drawn_pictures, psnr
from modeling_pisces.checkpoint.loading import load_pipeline
from tests.checkpoint_folder import write_checkpoint
from tests.finetune.data.data_files import write_captions
from tests.finetune.lora_fixtures import make_picture, make_row


pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_psnr_is_that_of_pixels_from_0_to_1():
    black, grey = (Image.new("RGB", (4, 4), (value,) * 3) for value in (0, 51))
    assert psnr(black, grey) == pytest.approx(-10 * math.log10(0.2**2))
    assert psnr(black, black) == 99.0


def test_the_ceiling_is_what_the_pipeline_reconstructs(checkpoint):
    pipeline = load_pipeline(checkpoint)
    pictures = [make_picture(seed) for seed in range(3)]
    found = ceiling.find_ceiling(pipeline, pictures, batch_size=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = pipeline.reconstruct(pictures[:2], generator=generators).images
    assert [item.best.tobytes() for item in found[:2]] == [picture.tobytes() for picture in expected]
    assert all(item.psnr == psnr(item.picture, item.best) and -1 <= item.similarity <= 1.0001 for item in found)
    assert ceiling.similarity(pipeline, pictures, pictures) == pytest.approx([1, 1, 1])


def test_a_poor_ceiling_says_what_to_train_first():
    picture = Image.new("RGB", (4, 4))
    good, poor = ([Ceiling(picture, picture, value, s) for value in (10, 30, 20)] for s in (0.95, 0.7))
    assert describe_ceiling(good) == {
        "num_pictures": 3,
        "psnr": {"least": 10.0, "median": 20.0, "most": 30.0},
        "similarity": {"least": 0.95, "median": 0.95, "most": 0.95},
        "is_poor": False,
    }
    assert ceiling_sentences(describe_ceiling(good)) == [
        "3 of your pictures encoded and decoded: PSNR 20.0 dB (10.0 to 30.0), similarity 0.95 (0.95 to 0.95)"
    ]
    (_, advice) = ceiling_sentences(describe_ceiling(poor))
    assert (
        advice.startswith("poor: this decoder cannot draw such pictures")
        and "Train the decoder on them first" in advice
    )


def test_both_pictures_stand_side_by_side():
    picture = Image.new("RGB", (4, 4))
    (section,) = ceiling_sections([Ceiling(picture, picture, 12.3, 0.91)] * 2, "mine")
    assert section.title == "mine: your pictures, and what the decoder can draw of them"
    assert [tile.caption for tile in section.tiles[:2]] == [
        "1: yours",
        "1: what the decoder can draw\n12.3 dB, similarity 0.91",
    ]
    assert ceiling_sections([]) == []


def test_drawn_pictures_are_found_in_rows_packs_and_pairs():
    draw, see, edit = (make_row(kind, 1) for kind in ("draw", "understand", "edit"))
    pair = {"prompt": draw["messages"][:1], "chosen": draw["messages"][1:], "rejected": edit["messages"][1:]}
    wanted = draw["messages"][1]["content"][0]["image"].tobytes()
    assert [p.tobytes() for p in drawn_pictures([see, draw, {"rows": [draw, see]}, pair])] == [wanted] * 3
    assert len(drawn_pictures([draw] * 20)) == 10 and drawn_pictures([see]) == []


def test_check_data_shows_what_the_decoder_makes_of_ten_pictures(checkpoint, tmp_path, capsys):
    path = write_captions(tmp_path / "data", 12)
    plain, sheet = tmp_path / "plain.png", tmp_path / "sheet.png"
    flags = ["--data", str(path), "--checkpoint", str(checkpoint)]
    assert check_data.main([*flags, "--sheet", str(plain), "--reconstructions", "0"]) == 0
    assert "decoder" not in capsys.readouterr().out
    assert check_data.main([*flags, "--sheet", str(sheet)]) == 0
    output = capsys.readouterr().out
    assert "  decoder   10 of your pictures encoded and decoded: PSNR " in output
    assert "            poor: this decoder cannot draw such pictures" in output  # a random one
    assert Image.open(sheet).height > Image.open(plain).height
    assert check_data.main([*flags, "--json", "--reconstructions", "3"]) == 0
    numbers = json.loads(capsys.readouterr().out)["sources"][0]["decoder"]
    assert numbers["num_pictures"] == 3 and numbers["is_poor"] is True


def test_rows_that_draw_nothing_load_no_decoder(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_data, "load_pipeline", lambda folder: pytest.fail("loaded"))
    path = write_captions(tmp_path / "data", 3)
    assert check_data.main(["--data", f"{{path: {path}, side: understanding}}", "--checkpoint", str(checkpoint)]) == 0
    assert "decoder" not in capsys.readouterr().out


def test_a_decoder_that_cannot_be_loaded_is_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    def fail(folder):
        raise ValueError("the decoder cannot be loaded (x).")

    monkeypatch.setattr(check_data, "load_pipeline", fail)
    path = write_captions(tmp_path / "data", 3)
    assert check_data.main(["--data", str(path), "--checkpoint", str(checkpoint)]) == 2
    errors = capsys.readouterr().err
    assert "the decoder cannot be loaded (x). --reconstructions 0 leaves the decoder out" in errors
    assert errors.count("\n") == 1


def test_the_dry_run_of_a_drawing_recipe_shows_it_too(checkpoint, tmp_path, capsys):
    path = write_captions(tmp_path / "data", 3)
    lora_generation.main(
        [
            *("--model_name_or_path", str(checkpoint), "--data", str(path), "--output_dir", str(tmp_path / "out")),
            *("--dry_run", "True", "--use_cpu", "True"),
        ]
    )
    output = capsys.readouterr().out
    assert "decoder   3 of your pictures encoded and decoded: PSNR " in output
    assert "nothing was trained and nothing was written" in output and not (tmp_path / "out").exists()
