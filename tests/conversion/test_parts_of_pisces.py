"""Claims about towers and decoders taken out of a Pisces checkpoint, and about licenses that a user states."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

from conversion.assemble import AssembleArguments, assemble, main
from conversion.assembly.parts import open_part
from conversion.export import export
from conversion.verify import verify
from tests.conversion.part_fixtures import change_json, write_language_model, write_siglip
from tests.fixtures import make_model, make_processor


TINY = Path(__file__).parents[2] / "pisces-tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_language_model(folder / "llama", "llama", "chatml", license=None)
    return AssembleArguments(str(folder / "llama"), str(TINY), gen_vision_tower=str(TINY), decoder=str(TINY))


@pytest.fixture(scope="module")
def assembled(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "pisces"
    assemble(run, output)
    return output


def test_both_towers_and_their_pictures_are_those_of_the_checkpoint(assembled):
    model, origin = (AutoModelForMultimodalLM.from_pretrained(folder).eval() for folder in (assembled, TINY))
    picture = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.encode_gen_images(picture), origin.encode_gen_images(picture))
    towers = [whole.model.vision_tower(picture).last_hidden_state for whole in (model, origin)]
    assert torch.equal(*towers)
    ours, theirs = (AutoProcessor.from_pretrained(folder) for folder in (assembled, TINY))
    for name in ("image_processor", "gen_image_processor"):
        assert getattr(ours, name).to_dict() == getattr(theirs, name).to_dict()


def test_its_pooling_comes_along_unless_another_is_asked_for(assembled, run, tmp_path):
    config = json.loads((assembled / "config.json").read_text())
    assert config["gen_pool_stride"] == 2  # of pisces-tiny; a part of its own has 4
    assemble(replace(run, gen_pool_stride=4, decoder=None), tmp_path / "other")
    assert json.loads((tmp_path / "other/config.json").read_text())["gen_pool_stride"] == 4


def test_the_decoder_draws_what_is_assembled(assembled):
    from modeling_pisces import PiscesPipeline

    pipe = PiscesPipeline.from_pretrained(assembled)
    assert pipe(["a cup"], num_inference_steps=1).images[0].size == (64, 64)


def test_verify_compares_with_the_checkpoint_that_a_tower_was_taken_from(assembled):
    rows = verify(assembled, dict.fromkeys(("vision_tower", "gen_vision_tower", "decoder"), str(TINY)))
    assert {row.verdict for row in rows if row.part != "language_model"} == {"ok"}
    assert all(row.difference == 0 for row in rows if row.part.endswith("tower"))


def test_provenance_says_what_it_was_taken_out_of(assembled):
    parts = json.loads((assembled / "provenance.json").read_text())["parts"]
    assert parts["gen_vision_tower"]["taken_out_of"] == "pisces" and parts["gen_vision_tower"]["name"] == "pisces-tiny"


def test_a_checkpoint_without_a_generation_tower_has_none_to_give(tmp_path):
    make_model(gen_vision_config=None).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gen_vision_tower .*: is a Pisces without a generation tower"):
        open_part(str(tmp_path), role="gen_vision_tower")
    change_json(tmp_path / "config.json", quantization_config={"quant_method": "x"})
    with pytest.raises(ValueError, match=r"vision_tower .*: config.json: found quantization_config"):
        open_part(str(tmp_path), role="vision_tower")


def test_a_stated_license_reaches_provenance_and_card(run, tmp_path, monkeypatch):
    licenses = {"language_model": "apache-2.0", "decoder": "mit"}
    assemble(replace(run, licenses=licenses), tmp_path / "pisces")
    content = json.loads((tmp_path / "pisces/provenance.json").read_text())
    assert content["parts"]["language_model"]["license"] == "apache-2.0"
    assert content["tensors"]["model.language_model.norm.weight"]["license"] == "apache-2.0"
    assert content["parts"]["decoder"]["license"] == "mit"
    # the fresh process that export starts; tests/conversion/test_export.py waits for it
    monkeypatch.setattr("conversion.export.load_elsewhere", lambda folder: {"text": [1]})
    export(tmp_path / "pisces", tmp_path / "hub")
    card = (tmp_path / "hub/README.md").read_text()
    assert "apache-2.0" in card and "mit" in card


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apache-2.0", "--license apache-2.0: expected PART=ID with a part of language_model"),
        ("lm=mit", "--license lm=mit: expected PART=ID"),
        ("decoder= ", "--license decoder= : expected PART=ID"),
        ("decoder=mit", "--license decoder=mit: expected a part that is given here"),
    ],
)
def test_a_license_without_its_part_is_refused(text, message, tmp_path):
    write_language_model(tmp_path / "llama")
    write_siglip(tmp_path / "siglip")
    flags = ["--language_model", str(tmp_path / "llama"), "--vision_tower", str(tmp_path / "siglip")]
    with pytest.raises(ValueError, match=message):
        main([*flags, "--license", text, "--output", str(tmp_path / "pisces")])
