"""What networks add: agreement, aesthetics, questions and captions, by pisces-tiny and by a random CLIP."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor

from curation.caption import main as caption
from curation.dedup import main as dedup
from curation.filter import main as filter_
from curation.scan import main as scan
from curation.shards.index import Index
from modeling_pisces import load_image
from tests.curation.curation_fixtures import write_config
from tests.evaluation.drawing.tiny_clip import write_clip


EXAMPLES = "examples"  # rendered scenes of pisces-tiny, with their captions
TINY = "pisces-tiny"


@pytest.fixture
def scenes(tmp_path):
    """Eight scenes with the captions of the next scene for two of them."""
    rows = [json.loads(line) for line in open(f"{EXAMPLES}/scenes.jsonl", encoding="utf-8")][:8]
    words = [row["captions"][-1] for row in rows]
    words[2], words[5] = words[5], words[2]
    folder = tmp_path / "scenes"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, (row, text) in enumerate(zip(rows, words, strict=True)):
        load_image(f"{EXAMPLES}/{row['image']}").save(folder / row["image"])
        lines.append({"id": str(number), "file_name": row["image"], "caption": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert scan(["--data", str(folder), "--index", str(tmp_path / "index"), "--processes", "1"]) == 0
    return ["--index", str(tmp_path / "index")]


def column(tmp_path, name):
    return {row["id"]: row.get(name) for row in Index(tmp_path / "index").iter_rows()}


def rules(tmp_path):
    return {id: rule for id, rule in column(tmp_path, "rule").items() if rule}


def filtered(tmp_path, index, **groups):
    config = write_config(tmp_path / "c.yaml", **groups)
    return filter_([*index, "--config", str(config), "--processes", "1"])


def test_the_lowest_agreement_is_that_of_the_captions_that_were_swapped(tmp_path, scenes):
    assert filtered(tmp_path, scenes, agreement={"model": TINY, "drop_lowest": 0.25}) == 0
    assert rules(tmp_path) == {"2": "agreement", "5": "agreement"}
    scores = column(tmp_path, "agreement")
    assert max(scores["2"], scores["5"]) < min(score for id, score in scores.items() if id not in "25")


def test_another_threshold_asks_the_model_nothing_again(tmp_path, scenes, monkeypatch):
    assert filtered(tmp_path, scenes, agreement={"model": TINY, "min": -1000}) == 0 and not rules(tmp_path)
    monkeypatch.setattr("curation.models.scoring.agreements", None)
    assert filtered(tmp_path, scenes, agreement={"model": TINY, "min": 1000}) == 0
    assert set(rules(tmp_path).values()) == {"agreement"}


def test_questions_drop_what_is_answered_with_yes_and_name_the_question(tmp_path, scenes):
    """The first example has two circles and no star."""
    ask = ["is there a star?", "is there a circle?"]
    assert filtered(tmp_path, scenes, questions={"model": TINY, "ask": ask, "max_yes": 0.5}) == 0
    dropped = rules(tmp_path)
    rows = [json.loads(line) for line in open(f"{EXAMPLES}/scenes.jsonl", encoding="utf-8")][:8]
    wanted = {
        str(number)
        for number, row in enumerate(rows)
        if any(item["shape"] in ("star", "circle") for item in row["truth"]["objects"])
    }
    assert set(dropped) == wanted and column(tmp_path, "asked")["0"] == "is there a circle?"


def test_captions_of_our_own_model_agree_more_than_swapped_ones(tmp_path, scenes, capsys):
    flags = ["--styles", "detailed", "--model", TINY, "--agreement", TINY, "--processes", "1"]
    assert caption([*scenes, *flags]) == 0
    before, after = column(tmp_path, "agreement_before"), column(tmp_path, "agreement_detailed")
    assert all(after[id] > before[id] for id in "25")
    texts = column(tmp_path, "caption_detailed")
    assert "cyan circle" in texts["0"] and "purple circle" in texts["0"]
    settings = json.loads(column(tmp_path, "caption_settings")["0"])
    assert settings["detailed"] == "describe the picture in detail." and settings["temperature"] == 0
    assert column(tmp_path, "captioner")["0"].startswith("pisces-tiny ")


def test_agreement_of_a_clip_is_the_cosine_that_transformers_gives(tmp_path, scenes):
    write_clip(tmp_path / "clip")
    model, processor = CLIPModel.from_pretrained(tmp_path / "clip"), CLIPProcessor.from_pretrained(tmp_path / "clip")
    assert filtered(tmp_path, scenes, agreement={"model": str(tmp_path / "clip"), "min": -1}) == 0
    texts, found = column(tmp_path, "text"), column(tmp_path, "agreement")
    for id in "05":
        picture = load_image(f"{EXAMPLES}/images/00000{id}.png")
        inputs = processor(text=[texts[id]], images=[picture], truncation=True, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        assert found[id] == pytest.approx(float(outputs.text_embeds[0] @ outputs.image_embeds[0]), abs=2e-4)


def test_an_aesthetics_head_rates_the_vectors_of_its_clip(tmp_path, scenes):
    write_clip(tmp_path / "clip")
    head = {
        "layers.0.weight": torch.eye(8),
        "layers.2.weight": torch.full((1, 8), 2.0),
        "layers.2.bias": torch.ones(1),
    }
    save_file(head, tmp_path / "head.safetensors")
    rule = {"model": str(tmp_path / "clip"), "head": str(tmp_path / "head.safetensors"), "drop_lowest": 0.5}
    assert filtered(tmp_path, scenes, aesthetics=rule) == 0
    scores = column(tmp_path, "aesthetics")
    assert sorted(rules(tmp_path)) == sorted(sorted(scores, key=scores.get)[:4])
    assert len(set(scores.values())) == 8


def test_vectors_of_a_model_drop_what_it_cannot_tell_apart(tmp_path, scenes):
    write_clip(tmp_path / "clip")
    assert dedup([*scenes, "--model", str(tmp_path / "clip"), "--cosine", "0.5"]) == 0
    found = rules(tmp_path)
    assert found and set(found.values()) == {"copy_model"}
    assert all(float(column(tmp_path, "detail")[id].split()[1]) >= 0.5 for id in found)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"agreement": {"min": 0}}, "agreement: no model. Name a Pisces checkpoint, a CLIP or a SigLIP"),
        ({"agreement": {"model": "nowhere", "min": 0}}, "nowhere: no model there"),
        ({"aesthetics": {"model": TINY, "min": 0}}, "aesthetics: no head"),
        (
            {"aesthetics": {"model": TINY, "head": "h", "min": 0}},
            "aesthetics: pisces-tiny is a pisces; a head is made for vectors of a CLIP or SigLIP",
        ),
        ({"questions": {"model": TINY, "max_yes": 0.5}}, "questions: nothing is asked"),
    ],
)
def test_a_model_that_cannot_judge_is_one_line(tmp_path, scenes, capsys, groups, message):
    assert filtered(tmp_path, scenes, **groups) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_head_for_other_vectors_is_one_line(tmp_path, scenes, capsys):
    write_clip(tmp_path / "clip")
    save_file({"weight": torch.ones(1, 768)}, tmp_path / "head.safetensors")
    rule = {"model": str(tmp_path / "clip"), "head": str(tmp_path / "head.safetensors"), "min": 0}
    assert filtered(tmp_path, scenes, aesthetics=rule) == 2
    assert "a head for 768 numbers, the model gives 8" in capsys.readouterr().err
