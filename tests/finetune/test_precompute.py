"""Claims about `finetune.precompute` and `picture_cache`: training from the cache is training from pixels."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from finetune import precompute
from finetune.data import picture_cache
from finetune.data.collator import PiscesDataCollator
from finetune.data.load import load_data
from finetune.data.packing import PackedRows, PackingCollator, token_lengths
from finetune.data.picture_cache import (
    KINDS,
    CachedPictureCollator,
    PictureCache,
    UnopenedRows,
    open_cache,
    picture_key,
)
from finetune.precompute import pictures_of
from tests.fixtures import make_model, make_processor


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, and rows of both sides over eight pictures of which two are equal."""
    folder = tmp_path_factory.mktemp("precompute")
    make_model().save_pretrained(folder / "checkpoint")
    make_processor().save_pretrained(folder / "checkpoint")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / f"{number}.png")
    (folder / "data" / "4.png").write_bytes((folder / "data" / "1.png").read_bytes())
    rows = []
    for number in range(8):
        image = {"type": "image", "image": f"{number}.png"}
        text = {"type": "text", "text": "red " * (number + 1)}
        shown = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": [text]}]
        drawn = [{"role": "user", "content": [text]}, {"role": "assistant", "content": [image]}]
        edited = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": [text, image]}]
        rows.append({"messages": [shown, drawn, edited][number % 3]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "rows.jsonl").write_text(lines, encoding="utf-8")
    return folder


def run_precompute(folder: Path, output: Path, *flags: str) -> PictureCache:
    data = ["--data", str(folder / "data" / "rows.jsonl"), "--output", str(output)]
    precompute.main(["--checkpoint", str(folder / "checkpoint"), *data, *flags])
    return PictureCache(output)


@pytest.fixture(scope="module")
def cache(folder) -> PictureCache:
    return run_precompute(folder, folder / "cache", "--kinds", *KINDS, "--shard_size", "2", "--batch_size", "2")


def losses_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model.train()(**batch)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"text_loss": out.text_loss.detach(), "image_loss": out.image_loss.detach(), **gradients}


# ---- the same losses


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1], KINDS[1:]], ids=["both", "image_features", "gen_vectors"])
def test_losses_and_gradients_from_the_cache_equal_those_from_pixels(folder, cache, kinds):
    model, processor = make_model(), make_processor()
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    rows = load_data(str(folder / "data" / "rows.jsonl"))
    plain = PiscesDataCollator(processor)
    expected_batch = plain([rows[index] for index in range(8)])
    cached = CachedPictureCollator(plain, cache, kinds)
    batch = cached([UnopenedRows(rows)[index] for index in range(8)])
    assert ("image_features" in batch, "pixel_values" in batch) == (
        "image_features" in kinds,
        "image_features" not in kinds,
    )
    assert ("gen_image_vectors" in batch, "gen_pixel_values" in batch) == (
        "gen_vectors" in kinds,
        "gen_vectors" not in kinds,
    )
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], expected_batch[name])
    expected, found = losses_and_gradients(model, expected_batch), losses_and_gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1.0)
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=1e-6, msg=name)


def test_packs_are_made_from_the_cache_without_opening_a_picture(folder, cache, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a picture was opened")

    model, processor = make_model(), make_processor()
    rows = UnopenedRows(load_data(str(folder / "data" / "rows.jsonl")))
    plain = PiscesDataCollator(processor)([rows[index] for index in range(8)])
    expected = losses_and_gradients(model, plain)
    monkeypatch.setattr(Image, "open", refuse)
    packs = PackedRows(rows, token_lengths(rows, processor), capacity=512)
    loader = DataLoader(packs, collate_fn=PackingCollator(CachedPictureCollator(PiscesDataCollator(processor), cache)))
    (batch,) = loader
    assert batch["input_ids"].shape[0] == 1
    found = losses_and_gradients(model, batch)
    for name in ("text_loss", "image_loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_the_cache_reads_in_dataloader_workers(folder, cache):
    rows = UnopenedRows(load_data(str(folder / "data" / "rows.jsonl")))
    collator = CachedPictureCollator(PiscesDataCollator(make_processor()), cache)
    cache.get("gen_vectors", rows[1]["messages"][1]["content"][0]["image"])  # a shard is open in this process
    batches = list(DataLoader(rows, batch_size=4, num_workers=1, collate_fn=collator))
    expected = [collator([rows[i] for i in range(start, start + 4)]) for start in (0, 4)]
    for batch, wanted in zip(batches, expected, strict=True):
        assert torch.equal(batch["gen_image_vectors"], wanted["gen_image_vectors"])
    again = pickle.loads(pickle.dumps(cache))
    assert again.count("gen_vectors") == cache.count("gen_vectors")


# ---- what is on disk


def test_values_are_what_the_towers_say_in_the_dtype_asked_for(folder, cache, tmp_path):
    model, processor, path = make_model(), make_processor(), folder / "data" / "1.png"
    with Image.open(path) as image:
        pixels = processor.gen_image_processor([image.convert("RGB")], return_tensors="pt")["pixel_values"]
    expected = model.encode_gen_images(pixels)[0]
    torch.testing.assert_close(cache.get("gen_vectors", path), expected, rtol=0, atol=1e-6)
    half = run_precompute(folder, tmp_path / "half", "--dtype", "bfloat16")
    assert torch.equal(half.get("gen_vectors", str(path)), cache.get("gen_vectors", path).bfloat16())
    assert half.index["gen_vectors"]["dtype"] == "bfloat16" and half.index["gen_vectors"]["shape"] == [4, 12]


def test_each_different_picture_is_encoded_once_and_shards_have_their_size(cache):
    assert cache.count("gen_vectors") == 4  # drawn: 1, 2, 4 (which equals 1), 5, 7
    assert cache.count("image_features") == 5  # shown: 0, 2, 3, 5, 6
    sizes = [len(load_file(path)["keys"]) for path in sorted(cache.folder.glob("gen_vectors-*"))]
    assert sizes == [2, 2]


def test_a_second_run_adds_only_what_is_new(folder, tmp_path, capsys):
    run_precompute(folder, tmp_path / "cache")
    run_precompute(folder, tmp_path / "cache")
    assert capsys.readouterr().out.splitlines() == [
        f"gen_vectors: 4 added, 4 in {tmp_path / 'cache'}",
        f"gen_vectors: 0 added, 4 in {tmp_path / 'cache'}",
    ]


def test_a_picture_has_one_key_wherever_it_lies_and_another_when_it_changes(tmp_path):
    path, copy = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (4, 4), "red").save(path)
    copy.write_bytes(path.read_bytes())
    key = picture_key(path)
    assert key == picture_key(str(copy)) == picture_key(path.read_bytes()) and len(key) == 32
    Image.new("RGB", (4, 4), "blue").save(path)
    os.utime(path, ns=(1, 1))
    assert picture_key(path) != key
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    assert picture_key(red) == picture_key(red.copy()) != picture_key(blue)
    assert picture_key(np.asarray(red)) != picture_key(np.asarray(blue))


def test_a_killed_run_goes_on_where_it_stopped(folder, tmp_path):
    """Killed without warning after its first shards, it encodes only what is missing, to the same values."""
    script = (
        "import sys, time; from finetune import precompute; from finetune.data import picture_cache\n"
        "add = picture_cache.PictureCache.add\n"
        "def slow(self, *args): add(self, *args); print('shard', flush=True); time.sleep(60)\n"
        "picture_cache.PictureCache.add = slow; precompute.main(sys.argv[1:])"
    )
    output = tmp_path / "cache"
    flags = ["--checkpoint", str(folder / "checkpoint"), "--data", str(folder / "data" / "rows.jsonl")]
    flags += ["--output", str(output), "--shard_size", "2"]
    child = subprocess.Popen([sys.executable, "-c", script, *flags], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout.readline() == "shard\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    first = (output / "gen_vectors-00000.safetensors").stat()
    assert PictureCache(output).count("gen_vectors") == 2
    (output / "gen_vectors-00001.safetensors.part").write_bytes(b"half a shard")
    done = run_precompute(folder, output, "--shard_size", "2")
    assert done.count("gen_vectors") == 4
    assert (output / "gen_vectors-00000.safetensors").stat().st_mtime_ns == first.st_mtime_ns


# ---- what does not fit is refused by name


def test_another_tower_or_size_is_refused_by_name(folder, cache):
    model, processor = make_model(), make_processor()
    open_cache(cache.folder, model, processor, KINDS)
    half = make_model().to(torch.bfloat16)
    open_cache(cache.folder, half, processor, KINDS)  # the same checkpoint in another dtype
    changed = make_model()
    with torch.no_grad():
        changed.model.gen_vision_tower.get_parameter("embeddings.position_embedding")[0, 0] += 0.1
    with pytest.raises(ValueError, match="gen_vectors were made with tower_weights = "):
        open_cache(cache.folder, changed, processor, KINDS)
    open_cache(cache.folder, changed, processor, ("image_features",))
    with pytest.raises(ValueError, match=r"gen_vectors were made with gen_pool_stride = 2, but this checkpoint has 4"):
        open_cache(cache.folder, make_model(gen_pool_stride=4), processor, KINDS)
    with pytest.raises(ValueError, match=r"image_features were made with image_processor\.size = .*12.*24"):
        open_cache(cache.folder, model, make_processor(image_size=24), KINDS)


def test_a_run_with_another_checkpoint_or_dtype_does_not_mix(folder, cache, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "other")
    make_processor().save_pretrained(tmp_path / "other")
    data = ["--data", str(folder / "data" / "rows.jsonl"), "--output", str(cache.folder)]
    with pytest.raises(ValueError, match=r"were made with tower_weights .* Precompute them again into another folder"):
        precompute.main(["--checkpoint", str(tmp_path / "other"), *data])
    with pytest.raises(ValueError, match="gen_vectors are float32, asked for were float16"):
        precompute.main(["--checkpoint", str(folder / "checkpoint"), *data, "--dtype", "float16"])


def test_what_a_cache_lacks_is_named(folder, tmp_path, cache):
    Image.new("RGB", (4, 4)).save(tmp_path / "new.png")
    with pytest.raises(ValueError, match=r"new\.png has no gen_vectors in .* \(4 pictures\)\. Run `python -m"):
        cache.get("gen_vectors", tmp_path / "new.png")
    only = run_precompute(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds no image_features\. Write them with"):
        open_cache(only.folder, make_model(), make_processor(), KINDS)
    with pytest.raises(ValueError, match="gen_vectors need a generation tower"):
        open_cache(only.folder, make_model(gen_vision_config=None), make_processor(), ("gen_vectors",))


def test_pictures_that_cannot_be_keyed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"http://a\.b/c\.png: pictures behind URLs are not cached"):
        picture_key("http://a.b/c.png")
    with pytest.raises(ValueError, match=r"gone\.png: cannot be read \(No such file"):
        picture_key(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="picture of type int"):
        picture_key(3)
    with pytest.raises(ValueError, match="a stream opens its pictures as they come"):
        UnopenedRows(iter([]))


def test_a_damaged_shard_or_index_is_named(folder, tmp_path):
    run_precompute(folder, tmp_path / "cache")
    index = tmp_path / "cache" / "cache.json"
    index.write_text(index.read_text(encoding="utf-8").replace('"version": 1', '"version": 9'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"cache\.json: written in format 9, this version reads 1"):
        PictureCache(tmp_path / "cache").index  # noqa: B018
    shard = tmp_path / "cache" / "gen_vectors-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"gen_vectors-00000\.safetensors: not a whole shard .* Delete the file"):
        PictureCache(tmp_path / "cache")


def test_a_full_disk_leaves_what_was_there(folder, tmp_path, monkeypatch):
    cache = run_precompute(folder, tmp_path / "cache")

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture_cache, "save_file", full)
    with pytest.raises(
        OSError, match=r"gen_vectors-00001\.safetensors: cannot be written .*No space left.*it resumes"
    ):
        cache.add("gen_vectors", [bytes(32)], torch.zeros(1, 4, 12))
    assert sorted(path.name for path in cache.folder.iterdir()) == ["cache.json", "gen_vectors-00000.safetensors"]


def test_wrong_flags_end_in_one_line(folder, tmp_path):
    flags = ["--checkpoint", "x", "--data", "y", "--output", str(tmp_path)]
    for wrong, message in (
        (["--kinds", "vectors"], "--kinds vectors: expected image_features or gen_vectors"),
        (["--dtype", "int8"], "--dtype int8: expected one of auto, float32"),
        (["--batch_size", "0"], "--batch_size 0, --shard_size 2048: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            precompute.main([*flags, *wrong])
    command = [sys.executable, "-m", "finetune.precompute", *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: y: no such file or folder")
    assert "Traceback" not in result.stderr


def test_pictures_are_told_apart_by_who_shows_them(folder):
    rows = UnopenedRows(load_data(str(folder / "data" / "rows.jsonl")))
    names = {kind: [Path(source).name for source in pictures_of(rows, kind)] for kind in KINDS}
    assert names == {
        "image_features": ["0.png", "2.png", "3.png", "5.png", "6.png"],
        "gen_vectors": ["1.png", "2.png", "4.png", "5.png", "7.png"],
    }
