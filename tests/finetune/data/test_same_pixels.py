"""Claims about pictures of unusual kinds: every reader of a path makes the same pixels of it, alpha on white."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.check_data import check_source, open_source
from finetune.data.load import load_data
from finetune.data.spec import DataSpec
from finetune.parts.captioned import load_pictures
from modeling_pisces import PiscesProcessor
from modeling_pisces.console.pictures import first_usable
from tests.finetune.data.data_files import write_jsonl
from tests.fixtures import make_processor


ROOT = Path(__file__).parents[3]


def transparent(path):
    """Red behind an alpha of 0 on the left, opaque green on the right."""
    picture = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    picture.paste((0, 200, 0, 255), (10, 0, 20, 20))
    picture.save(path)


def palette(path):
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([0, 0, 0, 10, 20, 250])
    picture.paste(0, (0, 0, 5, 20))
    picture.info["transparency"] = 0
    picture.save(path, transparency=0)


def sixteen_bit(path):
    Image.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)).save(path)


def turned(path):
    picture = Image.new("RGB", (20, 10), (0, 0, 255))
    picture.paste((255, 255, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)


@pytest.mark.parametrize("write", [transparent, palette, sixteen_bit, turned])
def test_every_reader_makes_the_same_pixels(write, tmp_path):
    path = tmp_path / "a.png"
    write(path)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.png", "caption": "a"}])
    recipe = load_data(str(rows))[0]["messages"][1]["content"][0]["image"]
    spec = DataSpec(str(rows))
    report = check_source(spec, open_source(spec)[0], num_samples=1)
    described = first_usable([str(path)])(str(path))
    pixels = [np.asarray(picture) for picture in (recipe, report.samples[0], described)]
    assert all(np.array_equal(pixels[0], other) for other in pixels) and pixels[0].shape[2] == 3
    processor = make_processor()
    for name, key in (("images", "pixel_values"), ("gen_images", "gen_pixel_values")):  # evaluations hand over paths
        words = {"text": processor.image_token} if name == "images" else {}
        by_path, opened = (
            processor(**words, **{name: [picture]}, return_tensors="pt")[key] for picture in (str(path), recipe)
        )
        assert torch.equal(by_path, opened)


@pytest.mark.parametrize("kept_as", ["file", "bytes"])
@pytest.mark.parametrize("write", [transparent, palette, sixteen_bit, turned])
def test_the_parts_of_a_model_learn_from_the_pixels_that_its_processor_will_show(write, kept_as, tmp_path):
    path = tmp_path / "a.png"
    write(path)
    if kept_as == "file":
        data = write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.png", "caption": "a"}])
    else:
        data = tmp_path / "rows.parquet"
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"image": [{"bytes": path.read_bytes(), "path": "a.png"}], "caption": ["a"]})
        pytest.importorskip("pyarrow.parquet").write_table(table, data)
    processor = PiscesProcessor.from_pretrained(
        ROOT / "pisces-tiny"
    )  # to a square, as `finetune.parts assemble` makes it
    side = processor.gen_image_processor.size["height"]
    (learned,) = load_pictures(str(data), side, folder=tmp_path / "prepared").pictures
    pixels = [
        processor(gen_images=[picture], return_tensors="pt")["gen_pixel_values"]
        for picture in (str(path), Image.fromarray(learned.permute(1, 2, 0).numpy()))
    ]
    assert torch.equal(*pixels)
    upright = first_usable([str(path)])(str(path)).resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(upright), learned.permute(1, 2, 0).numpy())


def test_what_is_transparent_is_white_and_what_is_turned_stands_upright(tmp_path):
    transparent(tmp_path / "a.png")
    turned(tmp_path / "b.png")
    load = first_usable([str(tmp_path / "a.png")])
    assert load(str(tmp_path / "a.png")).getpixel((2, 2)) == (255, 255, 255)
    upright = load(str(tmp_path / "b.png"))
    assert upright.size == (10, 20) and upright.getpixel((9, 0)) == (255, 255, 0)
