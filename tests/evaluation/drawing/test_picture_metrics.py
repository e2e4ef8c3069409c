"""Claims about `evaluation.picture_metrics` and `evaluation.drawing.clip`: formulas by hand, a tiny CLIP end to end."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import draw_prompts, picture_metrics
from evaluation.drawing import clip as clip_vectors
from evaluation.picture_metrics import clip_scores, cmmd, mean_over_prompts
from tests.evaluation.drawing.drawing_stand_ins import ScriptedPipeline, write_lines
from tests.evaluation.drawing.tiny_clip import write_clip
from tests.fixtures import make_model


PROMPTS = ["a star", "two hearts", "a red star " + "on a table " * 8]  # the last has more letters than this CLIP reads


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three prompts with two pictures each in `drawings`, four pictures in `photos`, a random CLIP in `clip`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw_prompts, "load_pipeline", lambda arguments: ScriptedPipeline())
    write_lines(tmp_path / "mine.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    options = "--model toy --prompts own:mine.jsonl --output drawings --images_per_prompt 2".split()
    draw_prompts.main(options)
    (tmp_path / "clip").mkdir()
    write_clip(tmp_path / "clip")
    (tmp_path / "photos/deeper").mkdir(parents=True)
    for index, name in enumerate(("a.jpg", "b.PNG", "deeper/c.webp", "d.png")):
        Image.effect_noise((30 + index, 40), 90).convert("RGB").save(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("no picture")
    return tmp_path


def measure(*more: str) -> dict:
    picture_metrics.main(["--drawings", "drawings", "--clip", "clip", "--output", "results/x.json", *more])
    return json.loads(Path("results/x.json").read_text(encoding="utf-8"))


def unit(*angles: float) -> torch.Tensor:
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])


# ---- the formulas


def test_a_clip_score_is_a_hundred_times_the_cosine_and_not_below_zero():
    texts = unit(0.0, 0.0, 0.0, 0.0)
    scores = clip_scores(unit(0.0, math.pi / 3, math.pi / 2, math.pi), texts)
    assert scores == pytest.approx([100, 50, 0, 0], abs=1e-4)


def test_the_interval_of_a_clip_score_counts_prompts_and_not_pictures():
    # prompts of mean 2 and 6: standard deviation sqrt(8), of their mean 2
    found = mean_over_prompts([1.0, 3.0, 5.0, 7.0], images_per_prompt=2)
    assert found == {"value": 4.0, "n": 2, "low": pytest.approx(4 - 3.92), "high": pytest.approx(4 + 3.92)}
    assert mean_over_prompts([1.0, 3.0], images_per_prompt=2) == {"value": 2.0, "n": 1, "low": None, "high": None}


def test_the_distance_of_two_sets_in_clips_space_is_the_papers():
    # one vector each, at right angles: squared distance 2, kernel exp(-2 / 200)
    assert cmmd(unit(0.0), unit(math.pi / 2)) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)), rel=1e-9)
    same = unit(0.1, 0.2, 2.0)
    assert cmmd(same, same.flip(0)) == pytest.approx(0.0, abs=1e-9)


def test_the_distance_equals_a_plain_loop_whatever_the_block(monkeypatch):
    torch.manual_seed(0)
    drawn, real = (torch.nn.functional.normalize(torch.randn(number, 5), dim=1) for number in (7, 4))

    def kernel(left, right):
        pairs = [math.exp(-float((a - b).square().sum()) / 200) for a in left.double() for b in right.double()]
        return sum(pairs) / len(pairs)

    expected = 1000 * (kernel(drawn, drawn) + kernel(real, real) - 2 * kernel(drawn, real))
    assert expected > 0.1 and cmmd(drawn, real) == pytest.approx(expected, rel=1e-6)
    by_block = picture_metrics._mean_kernel(drawn.double(), real.double(), rows=3)
    assert by_block == pytest.approx(kernel(drawn, real), rel=1e-6)


# ---- the command


def test_the_score_of_a_folder_is_that_of_each_picture_with_its_own_prompt(folder):
    results = measure("--reference", "photos")
    clip = clip_vectors.ClipVectors("clip")
    clip.model.requires_grad_(False)
    means = []
    for index, prompt in enumerate(PROMPTS):
        text = clip.processor(text=[prompt], truncation=True, max_length=64, return_tensors="pt")
        wanted = clip.model.get_text_features(**text).pooler_output
        scores = []
        for image in range(2):
            picture = Image.open(folder / f"drawings/{index:05d}/samples/{image:04d}.png")
            seen = clip.model.get_image_features(**clip.processor(images=picture, return_tensors="pt")).pooler_output
            scores.append(100 * max(float(torch.cosine_similarity(wanted, seen)), 0.0))
        means.append(sum(scores) / 2)
    assert results["clip_score"]["value"] == pytest.approx(sum(means) / 3, abs=1e-3)
    assert results["clip_score"]["n"] == 3
    drawn = clip.embed_pictures(sorted(folder.glob("drawings/*/samples/*.png")))
    real = clip.embed_pictures([folder / "photos" / name for name in ("a.jpg", "b.PNG", "d.png", "deeper/c.webp")])
    assert results["cmmd"] == pytest.approx(cmmd(drawn, real), abs=1e-3)


def test_a_results_file_says_how_it_was_made_and_never_calls_a_distance_of_clip_fid(folder):
    results = measure("--reference", "photos")
    assert "fid" not in results and results["benchmark"] == "picture_metrics" and results["model"] == "toy"
    drawn = results["settings"]["drawings"]
    assert (drawn["wording"], drawn["seed"], drawn["num_inference_steps"], drawn["guidance_scale"]) == (
        "raw",
        0,
        7,
        2.5,
    )
    assert results["settings"]["clip"].startswith("clip, sha256 ")
    reference = results["settings"]["reference"]
    assert (reference["folder"], reference["pictures"], len(reference["sha256"])) == ("photos", 4, 16)
    protocol = results["run"]["protocol"]
    assert "drawn from raw words" in protocol and "16 x 16 pixels, 7 steps, guidance 2.5" in protocol
    assert "Of 1 prompts only the first 64 tokens count." in protocol and "FID" not in protocol
    assert results["run"]["command"].startswith("python -m evaluation.picture_metrics --drawings drawings --reference")
    assert results["run"]["commits_of_drawing"] and {"commit", "hardware", "versions"} <= set(results["run"])


def test_the_same_command_twice_gives_the_same_file_but_for_the_time(folder):
    files = []
    for _ in range(2):
        files.append(measure("--reference", "photos"))
        files[-1]["run"].pop("seconds")
    assert files[0] == files[1]


def test_a_killed_run_goes_on_without_repeating_finished_blocks(folder, monkeypatch):
    whole = measure()["clip_score"]
    for path in (folder / "results/x_vectors").glob("*.safetensors"):
        path.unlink()
    monkeypatch.setattr(clip_vectors, "BLOCK", 2)
    embedded, embed = [], clip_vectors.ClipVectors.embed_pictures

    def embed_until(self, paths):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append([path.parents[1].name for path in paths])
        return embed(self, paths)

    monkeypatch.setattr(clip_vectors.ClipVectors, "embed_pictures", embed_until)
    with pytest.raises(SystemExit, match="interrupted"):
        measure()
    embedded[:] = [None]  # the third block is left
    assert measure()["clip_score"] == whole and embedded[1:] == [["00002", "00002"]]


# ---- FID


class CountingMetric:
    """Stands in for torchmetrics' FID: the difference of the mean brightness."""

    def __init__(self):
        self.seen: dict[bool, list] = {True: [], False: []}

    def to(self, device):
        return self

    def update(self, pixels, real):
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[:2] == (1, 3)
        self.seen[real].append(pixels.float().mean())

    def compute(self):
        return abs(torch.stack(self.seen[True]).mean() - torch.stack(self.seen[False]).mean())


def test_fid_is_fed_every_picture_on_its_side(folder, monkeypatch):
    metric = CountingMetric()
    monkeypatch.setattr(picture_metrics, "load_fid", lambda: metric)
    monkeypatch.setattr(picture_metrics, "version", lambda name: "9.9")
    results = measure("--reference", "photos", "--fid")
    assert (len(metric.seen[True]), len(metric.seen[False])) == (4, 6)
    assert results["fid"] == pytest.approx(float(metric.compute()), abs=1e-3)
    assert results["settings"]["fid"] == {"torchmetrics": "9.9", "torch-fidelity": "9.9"}
    assert "FID: InceptionV3, 2048 numbers, torchmetrics 9.9, torch-fidelity 9.9" in results["run"]["protocol"]


def test_fid_by_torchmetrics_is_the_frechet_distance_of_the_features(folder):
    """With a feature extractor of three numbers in the place of InceptionV3."""
    fid = pytest.importorskip("torchmetrics.image.fid", reason="needs torchmetrics", exc_type=ImportError)
    from scipy.linalg import sqrtm

    class Means(torch.nn.Module):
        num_features = 3

        def forward(self, pixels):
            return pixels.float().mean(dim=(2, 3))

    drawn = sorted(folder.glob("drawings/*/samples/*.png"))
    real = picture_metrics.find_pictures(folder / "photos")
    features = [np.array([np.array(Image.open(p)).reshape(-1, 3).mean(0) for p in paths]) for paths in (drawn, real)]
    (one, two), (first, second) = [f.mean(0) for f in features], [np.cov(f, rowvar=False) for f in features]
    expected = ((one - two) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    metric = fid.FrechetInceptionDistance(feature=Means(), input_img_size=(3, 16, 16))
    assert picture_metrics.measure_fid(metric, drawn, real) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("missing", ["torchmetrics", "torchmetrics.image.fid"])
def test_a_missing_torchmetrics_is_named_before_any_vector_is_made(folder, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        SystemExit, match=r"--fid: .*torchmetrics.*\(pip install torchmetrics torch-fidelity\)"
    ) as stop:
        measure("--reference", "photos", "--fid")
    assert "\n" not in str(stop.value) and not (folder / "results").exists()


# ---- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fid"], r"needs pictures to measure it to. Give --reference FOLDER"),
        (["--reference", "clip"], r"--reference clip: no pictures in it. Expected a folder with \.png"),
        (["--reference", "one", "--fid"], r"6 drawings and 1 reference pictures, expected 2 of each"),
        (["--drawings", "photos"], r"photos: no run.json in it. Draw the prompts first"),
        (["--clip", "pisces"], r"--clip pisces: a pisces, expected a CLIP with both towers"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_line_and_no_file(folder, more, message):
    (folder / "one").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "one/a.png")
    make_model().config.save_pretrained(folder / "pisces")
    with pytest.raises(SystemExit, match=message) as stop:
        measure(*more)
    assert "\n" not in str(stop.value) and not (folder / "results").exists()


def test_a_missing_picture_is_no_score(folder):
    (folder / "drawings/00001/samples/0001.png").unlink()
    with pytest.raises(SystemExit, match=r"1 of 9 files are missing, the first is 00001/samples/0001.png"):
        measure()


def test_vectors_of_another_clip_are_not_mixed_in(folder):
    measure()
    torch.manual_seed(1)
    model = clip_vectors.ClipVectors("clip").model
    torch.nn.init.normal_(model.visual_projection.weight)
    model.save_pretrained("clip")
    with pytest.raises(SystemExit, match=r"x_vectors/run.json was begun with clip .* Choose another --output"):
        measure()
