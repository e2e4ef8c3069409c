"""Exporting a publishable folder, and pushing it: whole, in one commit, or not at all.

The Hub is `tests/hub_server.py`; that an exported folder works without the package is `test_remote_code.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


pytest.importorskip("diffusers")

from huggingface_hub import ModelCard

from modeling_pisces import PiscesForConditionalGeneration, PiscesModel
from modeling_pisces.hub.cards import check_card
from modeling_pisces.hub.checks import check_hub_folder, check_repo_id
from modeling_pisces.hub.export import AUTO_MAP, export_to_folder, push_folder
from tests.fixtures import make_model, make_processor
from tests.hub_folders import CARD, make_pipeline, write_export
from tests.hub_server import local_hub


pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's own call of httpx
REPO_ID = "someone/pisces-random"
ROOT = Path(__file__).parents[3]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def change_json(path: Path, **changes):
    path.write_text(json.dumps(read_json(path) | changes))


@pytest.fixture(scope="module")
def good_export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export") / "pisces-random")


@pytest.fixture
def export(good_export, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(good_export, tmp_path / "export")


# ---- exporting -----------------------------------------------------------------------------------------------------


def test_the_folder_has_both_layouts_and_its_code(good_export):
    files = set(read_files(good_export))
    assert {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "README.md"} <= files
    assert {"chat_template.jinja", "model.safetensors.index.json", "model_index.json"} <= files
    assert {"unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"} <= files
    assert {"modeling_pisces.py", "processing_pisces.py", "configuration_pisces.py", "pipeline_pisces.py"} <= files
    assert not {name for name in files if name.startswith(("hub_", "cli_", "__"))}


def test_the_weights_are_those_of_the_model_bit_for_bit(good_export):
    model = make_model(gen_head_type="flow")
    loaded = PiscesForConditionalGeneration.from_pretrained(good_export)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_auto_map_is_in_the_files_and_not_on_the_users_objects(tmp_path):
    model, processor = make_model(), make_processor()
    folder = export_to_folder(model, processor, tmp_path / "export")
    assert read_json(folder / "config.json")["auto_map"] == AUTO_MAP
    assert not model.config.auto_map and getattr(processor, "auto_map", None) is None
    assert type(model)._auto_class is None and type(processor)._auto_class is None
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py")) and "auto_map" not in read_json(tmp_path / "plain/config.json")


def test_auto_map_names_the_classes_that_the_package_registers():
    import transformers

    from modeling_pisces import PiscesConfig

    for name, reference in AUTO_MAP.items():
        auto_class = getattr(transformers, name)
        if name not in ("AutoConfig", "AutoProcessor"):
            assert auto_class._model_mapping[PiscesConfig].__name__ == reference.split(".")[1]
            assert auto_class._model_mapping[PiscesConfig].__module__ == f"modeling_pisces.{reference.split('.')[0]}"


def test_a_checkpoint_folder_is_exported_with_its_decoder_without_changing_a_tensor(tmp_path):
    mixed = make_model(gen_head_type="flow").to(torch.bfloat16)
    mixed.model.gen_head.float()  # as after a training with fp32 heads; loading and saving would round these
    mixed.save_pretrained(tmp_path / "checkpoint")
    make_processor().save_pretrained(tmp_path / "checkpoint")
    make_pipeline().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint/README.md").write_text(CARD)
    (tmp_path / "checkpoint" / "optimizer.pt").write_bytes(b"left by a training")
    folder = export_to_folder(tmp_path / "checkpoint", None, tmp_path / "export", max_shard_size="20KB")
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    stored = load_file(tmp_path / "checkpoint/model.safetensors")
    assert set(found) == set(stored) and len(list(folder.glob("*.safetensors"))) > 2
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert (folder / "README.md").read_text() == CARD and not (folder / "optimizer.pt").exists()
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes()
    assert check_hub_folder(folder)


def test_nothing_in_the_folder_tells_where_it_was_made(good_export, tmp_path):
    folder = export_to_folder(good_export, None, tmp_path / "again")
    from modeling_pisces.pipeline_pisces import PiscesPipeline

    pipe = PiscesPipeline.from_pretrained(good_export)
    third = export_to_folder(pipe.vision_language_model, pipe.processor, tmp_path / "third", pipeline=pipe, card=CARD)
    for path in [*folder.rglob("*.json"), *third.rglob("*.json")]:
        assert str(good_export.parent) not in path.read_text(), path
        assert "local_files_only" not in path.read_text(), path


def test_an_understanding_only_model_needs_no_decoder(tmp_path):
    model = make_model(gen_vision_config=None)
    processor = make_processor()
    processor = type(processor)(processor.image_processor, None, processor.tokenizer, num_image_tokens=9)
    folder = export_to_folder(model, processor, tmp_path / "export")
    assert not (folder / "model_index.json").exists() and not (folder / "pipeline_pisces.py").exists()
    with pytest.raises(ValueError, match="this model does not draw"):
        export_to_folder(model, processor, tmp_path / "other", pipeline=make_pipeline())


def test_a_failed_export_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, folder, **kwargs):
        raise OSError("disk full")

    pipeline = make_pipeline()
    monkeypatch.setattr(type(pipeline), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_to_folder(make_model(), make_processor(), tmp_path / "export", pipeline=pipeline)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_replaced_only_when_asked_and_other_folders_never(export, tmp_path):
    model, processor = make_model(), make_processor()
    with pytest.raises(ValueError, match=r"export: exists already.*overwrite=True"):
        export_to_folder(model, processor, export)
    export_to_folder(model, processor, export, overwrite=True)
    assert not (export / "model_index.json").exists() and (export / "model.safetensors").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("dear")
    with pytest.raises(ValueError, match="letters: holds something else"):
        export_to_folder(model, processor, tmp_path / "letters", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: this is a file"):
        export_to_folder(model, processor, tmp_path / "file", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "file", "letters"]


def test_an_export_can_replace_the_folder_it_was_made_from(export):
    before = load_file(next(iter(sorted(export.glob("*.safetensors")))))
    export_to_folder(export, None, export, overwrite=True)
    after = load_file(export / "model.safetensors")
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_parts_that_do_not_fit_are_refused_by_name(tmp_path):
    model, processor, output = make_model(), make_processor(), tmp_path / "export"
    with pytest.raises(ValueError, match=r"PiscesModel, expected PiscesForConditionalGeneration.*lm_head"):
        export_to_folder(PiscesModel(model.config), processor, output)
    with pytest.raises(ValueError, match="processor is None"):
        export_to_folder(model, None, output)
    with pytest.raises(ValueError, match="num_image_tokens is 16 but the model's is 9"):
        export_to_folder(model, make_processor(num_image_tokens=16), output)
    with pytest.raises(ValueError, match="pipeline and decoder_folder are both given"):
        export_to_folder(model, processor, output, pipeline=make_pipeline(), decoder_folder=tmp_path)
    wide = make_model(gen_vision_config=make_model().config.gen_vision_config.to_dict() | {"output_size": 14})
    with pytest.raises(ValueError, match="width 14 but the decoder's U-Net reads width 12"):
        export_to_folder(wide, processor, output, pipeline=make_pipeline())
    make_pipeline().save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="width 14 but the decoder's U-Net reads width 12"):
        export_to_folder(wide, processor, output, decoder_folder=tmp_path / "decoder")
    model.peft_config = {"default": None}
    with pytest.raises(ValueError, match=r"carries adapters.*merge_and_unload"):
        export_to_folder(model, processor, output)
    assert not output.exists()


# ---- what may be published -----------------------------------------------------------------------------------------


def test_a_complete_folder_lists_all_its_files(good_export):
    assert {path.as_posix() for path in check_hub_folder(good_export)} == set(read_files(good_export))


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content=b"x"):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def drop_tensor(folder):
    path = sorted(folder.glob("model-*.safetensors"))[3]
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)


def add_tensor(folder):
    path = sorted(folder.glob("model-*.safetensors"))[3]
    save_file(load_file(path) | {"surplus": torch.zeros(1)}, path)


def forget_auto_map(folder):
    change_json(folder / "config.json", auto_map=None)


def forget_pipeline(folder):
    change_json(folder / "model_index.json", _class_name="PiscesPipeline")


BROKEN = {
    "no processor": (remove("processor_config.json"), r"processor_config\.json: not found"),
    "no generation config": (remove("generation_config.json"), r"generation_config\.json: not found"),
    "no card": (remove("README.md"), r"README\.md: not found"),
    "no code": (remove("modeling_pisces.py"), r"modeling_pisces\.py: not found"),
    "no code that code needs": (remove("image_loading_pisces.py"), r"image_loading_pisces\.py: not found"),
    "no pipeline code": (remove("decoder_pisces.py"), r"decoder_pisces\.py: not found"),
    "a shard is missing": (
        remove("model-00002-of-00014.safetensors"),
        r"model-00002-of-00014\.safetensors: not found",
    ),
    "a shard is cut off": (cut("model-00002-of-00014.safetensors"), "the file is cut off"),
    "decoder weights cut off": (cut("unet/diffusion_pytorch_model-00001-of-00013.safetensors"), "the file is cut off"),
    "a tensor is missing": (drop_tensor, r"model-00004-of-00014\.safetensors: lacks .*Export again"),
    "a tensor too many": (add_tensor, r"model-00004-of-00014\.safetensors: holds surplus"),
    "a stray weight file": (write("old.safetensors"), r"old\.safetensors: no index names this file"),
    "a pickle": (write("training_args.bin"), r"training_args\.bin: a pickle"),
    "a pickle in a part": (write("unet/model.pt"), r"model\.pt: a pickle"),
    "a stranger": (write(".env"), r"\.env: this file is no part of a checkpoint"),
    "no auto_map": (forget_auto_map, "has no auto_map"),
    "pipeline without code": (forget_pipeline, r"model_index\.json: _class_name is 'PiscesPipeline'"),
    "card without metadata": (write("README.md", b"# hello"), r"README\.md: starts without a metadata block"),
    "card with broken metadata": (
        write("README.md", b"---\na: [\n---\n"),
        r"README\.md: the metadata block is not valid",
    ),
    "card without license": (
        write("README.md", b"---\nlibrary_name: transformers\n---\n"),
        r"README\.md: the metadata lacks license, pipeline_tag",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_before_anything_is_sent(case, export, hub):
    break_it, message = BROKEN[case]
    break_it(export)
    with pytest.raises(ValueError, match=message):
        push_folder(export, REPO_ID, token="none")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["pisces-1.1", "someone/pisces-v1.0"])
def test_a_dot_in_the_repository_name_is_refused(name):
    with pytest.raises(ValueError, match=r"the name has a dot.*'(someone/)?pisces-(1-1|v1-0)'"):
        check_repo_id(name)
    check_repo_id("my.org/pisces")


def test_an_impossible_repository_name_is_refused():
    with pytest.raises(ValueError, match=r"a b/c.*Give owner/name"):
        check_repo_id("a b/c")


def test_a_card_written_by_the_export_leaves_the_license_to_its_author(tmp_path):
    folder = export_to_folder(make_model(), make_processor(), tmp_path / "export")
    with pytest.raises(ValueError, match=r"the metadata lacks license\. Only you can say"):
        check_card(folder / "README.md")
    with pytest.raises(ValueError, match="starts without a metadata block"):
        export_to_folder(make_model(), make_processor(), tmp_path / "other", card="# hello\n")
    assert not (tmp_path / "other").exists()


# ---- pushing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    with local_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_a_push_is_one_commit_with_every_byte(good_export, hub):
    report = push_folder(good_export, REPO_ID, token="none", commit_message="First")
    (commit,) = hub.commits(REPO_ID)
    files = read_files(good_export)
    assert {name: commit.files[name] for name in files} == files
    assert set(commit.files) - set(files) == {".gitattributes"}
    assert (commit.message, report.commit, report.repo_id) == ("First", commit.oid, REPO_ID)
    assert hub.repos[REPO_ID].private
    assert set(report.files) == set(files) and report.num_bytes == sum(map(len, files.values()))
    assert f"{len(files)} files" in str(report) and REPO_ID in str(report)


@pytest.mark.parametrize("failure", [500, 403, "drop"])
@pytest.mark.parametrize("step", ["preupload", "batch", "upload", "commit"])
def test_an_interrupted_push_publishes_nothing_and_its_repetition_everything(step, failure, good_export, hub):
    hub.failures[step] = failure
    with pytest.raises(
        RuntimeError, match=rf"not pushed to {REPO_ID}: .*Nothing was published; the same call goes on"
    ):
        push_folder(good_export, REPO_ID, token="none")
    assert hub.commits(REPO_ID) == [] and set(hub.files(REPO_ID)) == {".gitattributes"}
    num_received = len(hub.blobs)
    assert (num_received > 0) == (step == "commit")

    del hub.failures[step]
    hub.requests.clear()
    push_folder(good_export, REPO_ID, token="none")
    (commit,) = hub.commits(REPO_ID)
    assert commit.files.items() >= read_files(good_export).items()
    num_uploads = sum(request.startswith("PUT /lfs/") for request in hub.requests)
    assert num_uploads == len(hub.blobs) - num_received  # what had arrived is not sent again


def test_a_hub_that_fails_from_the_start_is_named(good_export, hub):
    hub.failures["create"] = 403
    with pytest.raises(RuntimeError, match=r"not pushed to .*403"):
        push_folder(good_export, REPO_ID, token="none")
    assert hub.repos == {}


def test_pushing_the_same_folder_again_makes_no_commit(good_export, hub):
    first = push_folder(good_export, REPO_ID, token="none")
    again = push_folder(good_export, REPO_ID, token="none")
    assert len(hub.commits(REPO_ID)) == 1 and again.commit == first.commit


def test_a_new_checkpoint_takes_the_old_ones_files_away_in_the_same_commit(export, hub):
    push_folder(export, REPO_ID, token="none")
    hub.repos[REPO_ID].branches["main"][-1].files["notes/figure.png"] = b"of the owner"
    export_to_folder(export, None, export, overwrite=True)
    report = push_folder(export, REPO_ID, token="none")
    assert len(hub.commits(REPO_ID)) == 2 and len(report.removed) == 15  # 14 shards and their index
    assert set(hub.files(REPO_ID)) == {*read_files(export), ".gitattributes", "notes/figure.png"}
    assert "15 earlier files removed" in str(report)


def test_a_push_to_a_branch_or_a_pull_request_leaves_main_alone(good_export, hub):
    push_folder(good_export, REPO_ID, token="none", revision="next", private=False)
    assert len(hub.commits(REPO_ID, "next")) == 1 and hub.commits(REPO_ID) == []
    assert not hub.repos[REPO_ID].private
    report = push_folder(good_export, REPO_ID, token="none", create_pr=True)
    assert hub.commits(REPO_ID) == [] and len(hub.repos[REPO_ID].pull_requests) == 1
    assert "discussions" in report.url
    with pytest.raises(ValueError, match="create_pr and revision='next' exclude each other"):
        push_folder(good_export, REPO_ID, token="none", create_pr=True, revision="next")


def test_somebody_elses_commit_in_between_stops_the_push(good_export, hub, monkeypatch):
    push_folder(good_export, REPO_ID, token="none")
    api = "huggingface_hub.HfApi.list_repo_files"
    history = hub.repos[REPO_ID].branches["main"]

    def list_and_let_somebody_push(self, *args, **kwargs):
        history.append(type(history[-1])("f" * 40, "theirs", {".gitattributes": b""}))
        return [".gitattributes"]

    monkeypatch.setattr(api, list_and_let_somebody_push)
    with pytest.raises(RuntimeError, match=r"412.*has a new commit: look at it before pushing again"):
        push_folder(good_export, REPO_ID, token="none")
    assert hub.files(REPO_ID) == {".gitattributes": b""}


def test_push_to_hub_of_model_and_processor_works(hub):
    model, processor = make_model(gen_head_type="flow"), make_processor()
    model.push_to_hub(REPO_ID, token="none", max_shard_size="20KB")
    processor.push_to_hub(REPO_ID, token="none")
    assert len(hub.commits(REPO_ID)) == 2
    loaded = PiscesForConditionalGeneration.from_pretrained(REPO_ID, token="none")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    found = type(processor).from_pretrained(REPO_ID, token="none")
    assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert found.chat_template == processor.chat_template


# ---- the card of this repository -----------------------------------------------------------------------------------


def test_the_model_card_has_valid_metadata():
    card = check_card(ROOT / "model_card.md")
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag, card.data.language) == ("transformers", "any-to-any", "en")
    assert {"pisces", "diffusers"} <= set(card.data.tags)
    again = ModelCard(str(card))  # what the Hub tools would write
    assert again.data.to_dict() == card.data.to_dict() and again.text.strip() == card.text.strip()


def test_the_model_card_says_what_a_reader_must_know():
    text = (ROOT / "model_card.md").read_text()
    for needed in ("arXiv:2506.10395", "independent", "rendered", "## Intended use", "## Limits", "## Training data"):
        assert needed in text
