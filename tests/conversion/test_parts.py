"""Opening parts: what is taken, what is refused, and how it is said."""

import pytest
import torch
from safetensors.torch import load_file

from conversion.assembly.parts import open_part
from tests.conversion.part_fixtures import (
    change_json,
    write_clip,
    write_decoder,
    write_gen_tower,
    write_language_model,
    write_siglip,
)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_language_model_is_opened_with_config_places_and_license(tmp_path):
    part = open_part(str(write_language_model(tmp_path / "llama")))
    assert (part.config.model_type, part.license, part.revision) == ("llama", "llama3.1", None)
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    assert part.tensors.keys() == stored.keys()
    assert torch.equal(part.tensors["model.norm.weight"].load(), stored["model.norm.weight"])


@pytest.mark.parametrize("write", [write_siglip, write_clip])
def test_a_pair_gives_the_config_of_its_vision_half(write, tmp_path):
    part = open_part(str(write(tmp_path / "pair")), role="vision_tower")
    assert part.config.model_type.endswith("_vision_model")
    assert part.config.image_size == 12


def test_a_decoder_is_opened_with_the_keys_of_both_networks(tmp_path):
    part = open_part(str(write_decoder(tmp_path / "decoder")), role="decoder")
    assert {key.split(".")[0] for key in part.tensors} == {"unet", "vae"}
    assert part.config["_class_name"] == "PiscesPipeline"
    assert part.license == "openrail++"


def test_raw_opens_anything_with_its_config_as_it_is(tmp_path):
    folder = write_gen_tower(tmp_path / "gen")
    change_json(folder / "config.json", model_type="something-else")
    assert open_part(str(folder), role="raw").config["model_type"] == "something-else"


@pytest.mark.parametrize(
    ("write", "role", "message"),
    [
        (write_siglip, "language_model", "found model_type 'siglip', expected a decoder-only language model"),
        (write_language_model, "vision_tower", "found model_type 'llama', expected a vision tower"),
        (write_language_model, "gen_vision_tower", "found model_type 'llama', expected a vision tower"),
        (write_siglip, "decoder", "found config.json, a transformers model, expected a diffusers folder"),
        (write_decoder, "language_model", "config.json: not found"),
    ],
)
def test_a_part_in_the_wrong_role_is_refused(write, role, message, tmp_path):
    folder = write(tmp_path / "part")
    with pytest.raises(ValueError, match=message) as error:
        open_part(str(folder), role=role)
    assert str(error.value).startswith(f"{role} {folder}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "found the encoder-only 'bert'"),
        ({"model_type": "bart"}, "found the encoder-decoder 'bart'"),
        ({"model_type": "gemma3"}, "found the multimodal model 'gemma3'.*Give its text-only sibling"),
        ({"model_type": "gemma2"}, "found final_logit_softcapping 30.0, expected a model that leaves the logits"),
        ({"model_type": "not-a-model"}, "model_type 'not-a-model' is not known to the installed transformers"),
        ({"quantization_config": {"bits": 4}}, "found quantization_config, expected full-precision weights"),
        ({"hidden_size": "wide"}, "config.json: .*hidden_size"),
    ],
)
def test_a_model_that_cannot_be_the_language_model_is_refused(changes, message, tmp_path):
    folder = write_language_model(tmp_path / "part")
    change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        open_part(str(folder))
    assert str(error.value).startswith(f"language_model {folder}: config.json: ")
    assert "\n" not in str(error.value)


def test_a_tower_without_one_image_size_is_refused(tmp_path):
    folder = write_siglip(tmp_path / "tower", with_text=False)
    change_json(folder / "config.json", model_type="siglip2_vision_model", image_size=None)  # NaFlex
    with pytest.raises(ValueError, match=r"vision_tower .*'siglip2_vision_model' has image_size"):
        open_part(str(folder), role="vision_tower")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12]])
def test_a_hub_id_needs_a_whole_commit(revision):
    with pytest.raises(ValueError, match=rf"owner/name: revision is {revision!r}, expected the 40 hexadecimal digits"):
        open_part("owner/name", revision)


def test_a_hub_id_that_the_hub_does_not_give_is_one_line():
    with pytest.raises(ValueError, match=f"owner/name at {COMMIT}: the Hub did not give it") as error:
        open_part("owner/name", COMMIT)
    assert "\n" not in str(error.value)


def test_a_local_folder_has_no_revision_unless_it_lies_in_the_hub_s_cache(tmp_path):
    folder = write_gen_tower(tmp_path / "models--owner--name" / "snapshots" / COMMIT)
    assert open_part(str(folder), role="gen_vision_tower").revision == COMMIT
    with pytest.raises(ValueError, match=r"a revision \(main\) is given for a local folder. Leave it out"):
        open_part(str(folder), "main", role="gen_vision_tower")


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"weights\.bin: this is a file\. Give a local folder"):
        open_part(str(tmp_path / "weights.bin"))
    with pytest.raises(ValueError, match=r"nowhere: no such folder\. Give a local folder"):
        open_part("nowhere")


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role 'tokenizer': expected one of language_model, vision_tower"):
        open_part("owner/name", role="tokenizer")


def as_pickle(folder, value=None):
    stored = load_file(folder / "model.safetensors")
    torch.save(stored if value is None else value, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return stored


def test_a_pickle_is_read_only_on_request_and_converted_once(tmp_path, capsys):
    folder = write_language_model(tmp_path / "old")
    stored = as_pickle(folder)
    with pytest.raises(ValueError, match=r"found pytorch_model.bin, expected model.safetensors.*--allow_pickle"):
        open_part(str(folder))
    for _ in range(2):
        part = open_part(str(folder), allow_pickle=True)
        assert part.tensors.keys() == stored.keys()
        assert all(torch.equal(part.tensors[key].load(), tensor) for key, tensor in stored.items())
    said = capsys.readouterr().err
    assert said.count("pytorch_model.bin with torch.load(weights_only=True)") == 1


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = write_language_model(tmp_path / "evil")
    as_pickle(folder, {"weight": print})
    with pytest.raises(ValueError, match=r"pytorch_model.bin: .*weights_only"):
        open_part(str(folder), allow_pickle=True)


def test_a_pickle_that_is_no_flat_dictionary_of_tensors_is_refused(tmp_path):
    folder = write_language_model(tmp_path / "nested")
    as_pickle(folder, {"state_dict": {"weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"pytorch_model.bin: holds a dict, expected a flat dictionary of tensors"):
        open_part(str(folder), allow_pickle=True)


@pytest.mark.parametrize(
    "name", ["./here/nothing", "../nothing/there", "~/nothing/at/all", "/no/such/folder", "a/b/c"]
)
def test_what_can_only_be_a_path_is_never_asked_for_a_commit(name):
    with pytest.raises(ValueError, match="no such folder") as error:
        open_part(name)
    assert "commit" not in str(error.value) and "revision is" not in str(error.value)


def test_two_words_under_a_folder_that_is_here_are_a_path(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"runs/mine: no such folder"):
        open_part("runs/mine", role="vision_tower")
    with pytest.raises(ValueError, match=rf"runs/mine at {COMMIT}: the Hub did not give it"):
        open_part("runs/mine", COMMIT, role="vision_tower")  # with a commit it is a Hub id


def test_a_missing_gguf_file_is_no_hub_id():
    with pytest.raises(ValueError, match=r"language_model owner/model\.gguf: no such file\."):
        open_part("owner/model.gguf")
    with pytest.raises(ValueError, match=r"vision_tower model\.gguf: a GGUF file holds a language model"):
        open_part("model.gguf", role="vision_tower")


def test_a_gguf_file_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install gguf"):
        open_part(str(tmp_path / "model.gguf"))
