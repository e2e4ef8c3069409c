"""A checkpoint becomes a folder for the Hub that loads without this package, says its licenses, and can be pushed."""

import json
import shutil
import time

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file


pytest.importorskip("diffusers")

from conversion import export as module
from conversion.export import build_card, common_license, export, load_elsewhere, main
from tests.checkpoint_folder import write_checkpoint
from tests.conversion.part_fixtures import change_json
from tests.fixtures import make_model, make_processor
from tests.hub_folders import CARD
from tests.hub_server import HubServer


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO_ID = "someone/pisces-random"
PARTS = {
    "language_model": {"name": "meta-llama/Llama", "revision": "a" * 40, "license": "llama3.1"},
    "vision_tower": {"name": "siglip", "revision": None, "license": "apache-2.0"},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "pisces")


@pytest.fixture
def checkpoint(stored, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(stored, tmp_path / "pisces")


@pytest.fixture
def no_child(monkeypatch):
    """Leave out the fresh process where a test is about something else; it takes seconds."""
    monkeypatch.setattr(module, "load_elsewhere", lambda folder: {"text": [1]})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of this machine that huggingface_hub talks to instead of the real one; waiting between retries is cut."""
    sleep = time.sleep
    with HubServer() as server:
        server.redirect(monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield server


def write_parts(checkpoint, parts=PARTS):
    (checkpoint / "provenance.json").write_text(json.dumps({"parts": parts, "tensors": {}}))


# ---- the folder


def test_the_folder_loads_draws_and_answers_in_a_process_without_the_package(checkpoint, tmp_path, capsys):
    export(checkpoint, tmp_path / "export", max_shard_size="40KB")
    out = capsys.readouterr().out
    assert "loaded without this package in a fresh process: text (1, 13, 320), drawing (1, 3, 16, 16)" in out
    found = {}
    for path in (tmp_path / "export").glob("model-*.safetensors"):
        found |= load_file(path)
    expected = load_file(checkpoint / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "export" / "pipeline_pisces.py").is_file()
    assert not list(tmp_path.glob(".export*"))


def test_a_model_that_only_understands_is_exported_too(tmp_path):
    make_model(gen_vision_config=None).save_pretrained(tmp_path / "pisces")
    processor = make_processor()
    processor.num_gen_image_tokens = 0
    processor.save_pretrained(tmp_path / "pisces")
    export(tmp_path / "pisces", tmp_path / "export")
    assert not (tmp_path / "export" / "pipeline_pisces.py").exists()


def test_a_folder_that_does_not_load_elsewhere_never_appears(checkpoint, tmp_path, monkeypatch):
    write = module.export_to_folder

    def write_broken(source, processor, folder, **options):
        write(source, processor, folder, **options)
        path = folder / "modeling_pisces.py"
        path.write_text(path.read_text() + "\nraise RuntimeError('not on this machine')\n")

    monkeypatch.setattr(module, "export_to_folder", write_broken)
    with pytest.raises(ValueError, match=r"does not load in a process without this package .*not on this machine"):
        export(checkpoint, tmp_path / "export")
    assert not (tmp_path / "export").exists() and not list(tmp_path.glob(".export*"))


def test_weights_that_are_not_finite_are_found(checkpoint):
    from safetensors.torch import save_file

    from modeling_pisces.hub.export import export_to_folder

    state = load_file(checkpoint / "model.safetensors")
    state["model.language_model.norm.weight"][3] = float("nan")
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    folder = export_to_folder(checkpoint, None, checkpoint.with_name("export"))
    with pytest.raises(ValueError, match="text: holds values that are not finite"):
        load_elsewhere(folder)


# ---- the card


def test_the_card_names_every_part_with_its_license(checkpoint, tmp_path, no_child):
    write_parts(checkpoint)
    (checkpoint / "README.md").write_text(CARD)
    export(checkpoint, tmp_path / "export")
    text = (tmp_path / "export" / "README.md").read_text()
    assert f"| language_model | meta-llama/Llama | {'a' * 40} | llama3.1 |" in text
    assert "| vision_tower | siglip | local | apache-2.0 |" in text
    assert "# A random model for tests" in text
    assert (tmp_path / "export" / "provenance.json").read_bytes() == (checkpoint / "provenance.json").read_bytes()
    # exporting the export again gives the same card, not a second table
    assert build_card(tmp_path / "export", None, None) == text


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [(["mit", "mit"], "mit"), (["mit", "llama3.1"], "other"), (["mit", None], None), ([], None)],
)
def test_the_license_of_the_whole_follows_from_the_parts(licenses, expected, checkpoint):
    parts = {f"part_{index}": {"name": "x", "license": license} for index, license in enumerate(licenses)}
    assert common_license(parts) == expected
    write_parts(checkpoint, parts)
    card = ModelCard(build_card(checkpoint, None, None))
    assert card.data.license == expected
    assert card.data.get("license_name") == ("several-parts" if expected == "other" else None)


def test_the_authors_license_wins_over_the_parts_and_the_flag_over_both(checkpoint):
    write_parts(checkpoint)
    (checkpoint / "README.md").write_text(CARD)
    assert ModelCard(build_card(checkpoint, None, None)).data.license == "apache-2.0"
    assert ModelCard(build_card(checkpoint, None, "mit")).data.license == "mit"


def test_a_card_that_was_given_must_be_there_and_complete(checkpoint, tmp_path, no_child):
    with pytest.raises(ValueError, match=r"missing\.md: not found"):
        export(checkpoint, tmp_path / "export", card=tmp_path / "missing.md")
    (tmp_path / "card.md").write_text("# no metadata\n")
    with pytest.raises(ValueError, match="starts without a metadata block"):
        export(checkpoint, tmp_path / "export", card=tmp_path / "card.md")
    assert not (tmp_path / "export").exists()


# ---- the push


@pytest.mark.parametrize(("flags", "is_private"), [([], True), (["--private"], True), (["--public"], False)])
def test_a_push_is_one_commit_and_private_unless_asked_otherwise(
    flags, is_private, checkpoint, tmp_path, no_child, hub, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "none")
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "export"), "--license", "mit"]
    main([*arguments, "--push", REPO_ID, *flags])
    repo = hub.repos[REPO_ID]
    commits = repo.branches["main"]
    assert repo.private is is_private
    written = {
        path.relative_to(tmp_path / "export").as_posix(): path.read_bytes()
        for path in (tmp_path / "export").rglob("*")
        if path.is_file()
    }
    assert commits[-1].files.items() >= written.items()
    assert "in one commit" in capsys.readouterr().out


def test_nothing_is_sent_for_a_bad_name_or_a_card_without_license(checkpoint, tmp_path, no_child, hub):
    with pytest.raises(ValueError, match="the name has a dot"):
        export(checkpoint, tmp_path / "export", push="someone/pisces-1.0")
    with pytest.raises(ValueError, match="the metadata lacks license"):
        export(checkpoint, tmp_path / "export", push=REPO_ID)
    assert hub.requests == [] and not (tmp_path / "export").exists()


def test_a_failed_push_leaves_the_folder_for_the_next_try(checkpoint, tmp_path, no_child, hub):
    hub.failures["commit"] = 500
    with pytest.raises(ConnectionError, match="not pushed to someone/pisces-random"):
        export(checkpoint, tmp_path / "export", license="mit", push=REPO_ID, token="none")
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_a_taken_output_and_a_wrong_checkpoint_are_refused_first(checkpoint, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="taken: exists already"):
        export(checkpoint, tmp_path / "taken")
    change_json(checkpoint / "config.json", model_type="llava")
    with pytest.raises(ValueError, match="model_type is 'llava', expected 'pisces'"):
        export(checkpoint, tmp_path / "export")
