"""The evaluation of emoji gives a perfect model full marks, counts each kind of mistake where it belongs, and resumes."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from examples.emoji import evaluate, make_data
from examples.emoji.contact_sheet import read_truth
from examples.emoji.judge import collect_labels
from examples.emoji.judge_network import Judge
from examples.emoji.kept import Kept
from examples.emoji.scores import mean, normalize_answer, psnr, share, ssim
from modeling_pisces.image_loading_pisces import load_image
from pisces_commands.ending import CommandEnd
from tests.examples.emoji_packages import write_packages


class KnowsAll:
    """A judge that has every picture of the data before it and finds the one that it is shown."""

    def __init__(self, data):
        self.rows = [row for folder in data for row in read_truth(folder)]
        self.labels = collect_labels(self.rows)
        images = [load_image(folder / row["image"]).tobytes() for folder in data for row in read_truth(folder)]
        self.by_bytes = dict(zip(images, self.rows, strict=True))

    def find(self, image):
        return self.by_bytes[image.tobytes()]

    def judge(self, images):
        found = [self.find(image) for image in images]
        return [
            {"names": [row["name"], "x"], "concept": row["concept"], "style": row["vendor"]}
            | {kind: row["attribute"] if row["attribute_kind"] == kind else None for kind in ("tone", "color", "time")}
            for row in found
        ]


class StandIn:
    """A pipeline that draws what `picture_of` says for a title, reconstructs exactly, and answers by `answer_of`."""

    config = SimpleNamespace(default_num_inference_steps=20, default_guidance_scale=1.0)

    def __init__(self, knows, picture_of, answer_of):
        self.knows, self.picture_of, self.answer_of = knows, picture_of, answer_of
        self.vision_language_model = SimpleNamespace(device="cpu", generate=self.generate)
        self.processor = SimpleNamespace(apply_chat_template=self.template, batch_decode=self.decode)
        self.num_drawn = 0

    def __call__(self, titles, generator, **options):
        self.num_drawn += len(titles)
        return SimpleNamespace(images=[self.picture_of(title) for title in titles])

    def reconstruct(self, images, generator, **options):
        return SimpleNamespace(images=images)

    def template(self, conversations, **options):
        assert options["padding_side"] == "left"
        self.asked = [(turns[0]["content"][0]["image"], turns[0]["content"][1]["text"]) for turns in conversations]
        inputs = {"input_ids": torch.zeros(len(conversations), 3, dtype=torch.long)}
        return type("Inputs", (dict,), {"to": lambda self, device: self})(inputs)

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, torch.arange(len(input_ids))[:, None]], dim=1)

    def decode(self, tokens, **options):
        assert tokens.shape[1] == 1  # the prompt is cut off
        return [self.answer_of(self.knows.find(image), question) for image, question in self.asked]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    for vendor in ("google", "twitter"):
        source = write_packages(folder / f"packages-{vendor}", vendor)
        flags = [
            "--source",
            str(source),
            "--vendor",
            vendor,
            "--unseen_concepts",
            "5",
            "--output",
            str(folder / vendor),
        ]
        make_data.main(flags)
    return folder


@pytest.fixture
def knows(data):
    return KnowsAll([data / "google", data / "twitter"])


def perfect_answer(row, question):
    return next(q["answer"] for q in row["questions"] if q["question"] == question).upper() + "."


def run(data, knows, tmp_path, monkeypatch, picture_of=None, answer_of=perfect_answer, **changes):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "judge").mkdir(exist_ok=True)
    (tmp_path / "judge" / "judge.safetensors").write_bytes(b"weights")
    rows = {row["title"]: data / "google" / row["image"] for row in read_truth(data / "google")}
    pipeline = StandIn(knows, picture_of or (lambda title: load_image(rows[title])), answer_of)
    monkeypatch.setattr(evaluate, "CHANGE", 0.0)  # so that the picture is found again
    monkeypatch.setattr(evaluate, "load_pipeline", lambda options: pipeline)
    monkeypatch.setattr(evaluate, "load_judge", lambda folder: (knows, {"accuracy": {"name": 1.0}}))
    flags = {
        "model": tmp_path / "model",
        "data": data / "google",
        "other": data / "twitter",
        "judge": tmp_path / "judge",
    }
    flags |= {"output": tmp_path / "results.json", "num_pictures": 20, "batch_size": 7, **changes}
    evaluate.main([word for name, value in flags.items() if value for word in (f"--{name}", str(value))])
    return json.loads((tmp_path / "results.json").read_text()), pipeline


def test_a_perfect_model_has_full_marks_everywhere(data, knows, tmp_path, monkeypatch):
    found, pipeline = run(data, knows, tmp_path, monkeypatch)
    assert [found["drawing_trained"][name]["value"] for name in ("top1", "top5")] == [1, 1]
    assert {name: part["value"] for name, part in found["drawing_heldout"]["style"].items()} == {
        "google": 1,
        "twitter": 0,
    }
    heldout = [row for row in read_truth(data / "google") if row["split"] == "heldout"]
    for part in ("concept", "attribute", "both"):
        assert found["drawing_heldout"][part]["all"] == {
            "value": 1.0,
            "n": len(heldout),
            "low": pytest.approx(0.8, abs=0.03),
            "high": 1.0,
        }
        assert {"job x tone", "color", "time"} <= found["drawing_heldout"][part].keys()
        assert found["drawing_heldout_at_most"]["real"][part]["all"]["value"] == 1
    for part in ("trained", "heldout", "transfer"):
        assert found["answers"][part]["all"]["value"] == 1 and found["answers"][part]["all"]["n"] > 20
    assert found["answers"]["heldout"]["tone"]["n"] + found["answers"]["heldout"]["color"]["n"] + found["answers"][
        "heldout"
    ]["time"]["n"] == len(heldout)
    assert {part: numbers["psnr"]["value"] for part, numbers in found["reconstruction"].items()} == dict.fromkeys(
        ("trained", "heldout", "unseen"), 100
    )
    assert found["reconstruction"]["unseen"]["ssim"]["value"] == pytest.approx(1)
    assert "20 steps, guidance 1.0" in found["run"]["protocol"] and found["judge"]["accuracy"]["name"] == 1
    assert pipeline.num_drawn == 20 + len(heldout)
    assert Image.open(tmp_path / "results_drawings.png").width > 500 and (tmp_path / "results_answers.json").is_file()
    assert not (tmp_path / "results_unfinished").exists()


def test_the_right_person_in_another_tone_is_concept_without_attribute(data, knows, tmp_path, monkeypatch):
    rows = read_truth(data / "google")

    def other_attribute(title):
        wanted = next(row for row in rows if row["title"] == title)
        same = [r for r in rows if r["concept"] == wanted["concept"] and r["attribute"] != wanted["attribute"]]
        return load_image(data / "google" / (same or [wanted])[0]["image"])

    found = run(data, knows, tmp_path, monkeypatch, other_attribute)[0]["drawing_heldout"]
    assert [found[part]["all"]["value"] for part in ("concept", "attribute", "both")] == [1, 0, 0]


def test_something_else_in_the_right_color_is_attribute_without_concept(data, knows, tmp_path, monkeypatch):
    rows = read_truth(data / "google")

    def other_concept(title):
        wanted = next(row for row in rows if row["title"] == title)
        same = [r for r in rows if r["concept"] != wanted["concept"] and r["attribute"] == wanted["attribute"]]
        return load_image(data / "google" / (same or [wanted])[0]["image"])

    found = run(data, knows, tmp_path, monkeypatch, other_concept)[0]["drawing_heldout"]
    for kind in ("job x tone", "color"):
        assert [found[part][kind]["value"] for part in ("concept", "attribute", "both")] == [0, 1, 0]


def test_another_vendors_drawing_is_another_style(data, knows, tmp_path, monkeypatch):
    rows = {row["title"]: data / "twitter" / row["image"] for row in read_truth(data / "twitter")}
    found = run(data, knows, tmp_path, monkeypatch, lambda title: load_image(rows[title]))[0]
    assert (
        found["drawing_trained"]["style"]["twitter"]["value"] == 1 and found["drawing_trained"]["top1"]["value"] == 1
    )


def test_wrong_answers_count_under_their_type(data, knows, tmp_path, monkeypatch):
    def no_tones(row, question):
        return "purple" if "skin tone" in question else perfect_answer(row, question)

    found = run(data, knows, tmp_path, monkeypatch, answer_of=no_tones)[0]["answers"]["heldout"]
    assert found["tone"]["value"] == 0 and found["name"]["value"] == 1 and 0 < found["all"]["value"] < 1


def test_without_another_vendor_there_is_no_transfer(data, knows, tmp_path, monkeypatch):
    assert "transfer" not in run(data, knows, tmp_path, monkeypatch, other=None)[0]["answers"]


def test_a_stopped_run_goes_on_and_draws_nothing_twice(data, knows, tmp_path, monkeypatch):
    whole, pipeline = run(data, knows, tmp_path, monkeypatch)
    rows = {row["title"]: data / "google" / row["image"] for row in read_truth(data / "google")}
    count = 0

    def stop_at_18(title):
        nonlocal count
        count += 1
        if count == 18:
            raise KeyboardInterrupt
        return load_image(rows[title])

    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(CommandEnd) as end:
        run(data, knows, again, monkeypatch, stop_at_18)
    assert end.value.code == 130 and not (again / "results.json").exists()
    with pytest.raises(CommandEnd, match=r"was begun with seed 0, not 1\. Remove it"):
        run(data, knows, again, monkeypatch, seed=1)
    found, rest = run(data, knows, again, monkeypatch)
    assert rest.num_drawn == pipeline.num_drawn - 14  # two batches of seven were whole
    assert {k: v for k, v in found.items() if k not in ("run", "model")} == {
        k: v for k, v in whole.items() if k not in ("run", "model")
    }


def test_trained_pictures_are_changed_before_they_are_asked_about_and_always_alike(data):
    path = data / "google" / read_truth(data / "google")[0]["image"]
    shown, again, other = (evaluate._shown(path, True, seed) for seed in (0, 0, 1))
    assert shown.tobytes() == again.tobytes() != other.tobytes() and shown.size == (64, 64)
    assert evaluate._shown(path, False, 0).tobytes() == load_image(path).tobytes() != shown.tobytes()


def test_a_judge_of_other_names_is_refused_before_a_model_is_loaded(data, knows, tmp_path, monkeypatch):
    rows = [row for row in knows.rows if row["name"] != "anchor"]
    knows.labels = collect_labels(rows)
    with pytest.raises(
        CommandEnd, match=r"does not know 1 names of .*google, such as 'anchor'\. Train it on this data"
    ):
        run(data, knows, tmp_path, monkeypatch)


# ---- a real checkpoint


def test_the_shipped_checkpoint_is_scored_from_end_to_end(data, tmp_path):
    """What it draws is no emoji; that every call fits a real pipeline is the claim."""
    labels = collect_labels([row for vendor in ("google", "twitter") for row in read_truth(data / vendor)])
    torch.manual_seed(0)
    (tmp_path / "judge").mkdir()
    Judge(labels).write_into(tmp_path / "judge", {"accuracy": {}})
    flags = f"--model pisces-tiny --judge {tmp_path / 'judge'} --data {data / 'google'} --output {tmp_path / 'r.json'}"
    evaluate.main([*flags.split(), "--num_pictures", "2", "--steps", "2", "--batch_size", "2"])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["drawing_trained"]["top1"]["n"] == 2 and found["answers"]["trained"]["all"]["n"] >= 6
    assert 3 < found["reconstruction"]["trained"]["psnr"]["value"] < 30
    assert "2 steps" in found["run"]["protocol"]


# ---- scores


def test_psnr_and_ssim_are_the_textbooks():
    wanted = torch.full((3, 16, 16), 0.5)
    assert psnr(wanted + 0.1, wanted) == pytest.approx(20.0, abs=1e-4)  # 10 log10(1 / 0.01)
    assert psnr(wanted, wanted) == 100
    # flat pictures: only brightness counts, (2ab + c) / (a^2 + b^2 + c) with c = 0.01 ** 2
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)
    assert ssim(wanted + 0.1, wanted) == pytest.approx(expected, abs=1e-4)
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ssim(noise, noise) == pytest.approx(1.0, abs=1e-5) and ssim(1 - noise, noise) < 0


def test_shares_have_wilsons_interval_and_answers_are_compared_as_words():
    assert share([True, True, False, True]) == {"value": 0.75, "n": 4, "low": 0.3006, "high": 0.9544}
    assert share([]) == {"value": 0.0, "n": 0, "low": 0.0, "high": 1.0}
    assert mean([1.0, 3.0]) == {"value": 2.0, "n": 2, "low": 0.04, "high": 3.96}
    assert normalize_answer("  Half past\n Two. ") == "half past two"


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    kept = Kept(tmp_path / "kept", {"seed": 0})
    assert [row["n"] for _, row in kept.run("part", [1, 2, 3], 2, lambda chunk: [{"n": n} for n in chunk])] == [
        1,
        2,
        3,
    ]
    path = tmp_path / "kept" / "part.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    worked = []

    def work(chunk):
        worked.extend(chunk)
        return [{"n": n} for n in chunk]

    assert [row["n"] for _, row in Kept(tmp_path / "kept", {"seed": 0}).run("part", [1, 2, 3], 2, work)] == [1, 2, 3]
    assert worked == [3]
