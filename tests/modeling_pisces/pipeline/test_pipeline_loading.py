"""The pipeline and the language model in one folder: saved, loaded, from a Hub cache, and as remote code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fixtures import make_model, make_processor


pytest.importorskip("diffusers")

from modeling_pisces.pipeline_pisces import PiscesPipeline
from tests.modeling_pisces.pipeline.pipeline_fixtures import draw, make_full_pipeline, make_pipeline, seeds, vectors


CODE = Path(__file__).parents[3] / "modeling_pisces"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder of both layouts: the model at the root, the decoder in its own folders."""
    folder = tmp_path_factory.mktemp("checkpoint")
    pipe = make_full_pipeline()
    pipe.vision_language_model.save_pretrained(folder)
    pipe.processor.save_pretrained(folder)
    pipe.save_pretrained(folder)
    return folder


# Weights come back bit for bit, but memory-mapped at other alignments than fresh tensors, and then matrix products may
# round differently: 1.7e-6 measured in the vectors, 0 once the loaded model is copied.
CLOSE = {"atol": 1e-5, "rtol": 0}


def load(folder, **kwargs) -> PiscesPipeline:
    pipe = PiscesPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_index_names_the_decoder_only(checkpoint):
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["vision_language_model"] == index["processor"] == [None, None]
    assert index["default_num_inference_steps"] == 2
    assert {path.name for path in checkpoint.iterdir() if path.is_dir()} == {"unet", "vae", "scheduler"}
    pipe = make_full_pipeline()
    pipe.save_pretrained(checkpoint.parent / "other")
    assert pipe.vision_language_model is not None  # saving leaves the pipeline whole


def test_loading_a_folder_attaches_its_model_and_keeps_every_bit(checkpoint):
    pipe = load(checkpoint)
    expected = draw(make_full_pipeline(), ["a", "two dogs"], generator=seeds(0, 1))
    torch.testing.assert_close(draw(pipe, ["a", "two dogs"], generator=seeds(0, 1)), expected, **CLOSE)
    for name in ("unet", "vae", "vision_language_model"):
        saved, loaded = (getattr(one, name).state_dict() for one in (make_full_pipeline(), pipe))
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert not pipe.vision_language_model.training


def test_loading_can_leave_the_model_out_and_fetch_it_later(checkpoint):
    pipe = load(checkpoint, load_language_model=False)
    assert pipe.vision_language_model is None and pipe.processor is None
    pipe.load_language_model()
    expected = draw(make_full_pipeline(), "a", generator=seeds(0))
    torch.testing.assert_close(draw(pipe, "a", generator=seeds(0)), expected, **CLOSE)


def test_passed_model_and_processor_are_kept(checkpoint):
    model, processor = make_model(seed=5), make_processor()
    pipe = load(checkpoint, vision_language_model=model)
    assert pipe.vision_language_model is model and pipe.processor is not None
    pipe = load(checkpoint, vision_language_model=model, processor=processor)
    assert pipe.vision_language_model is model and pipe.processor is processor
    assert load(checkpoint, vision_language_model=None, processor=None).vision_language_model is None


def test_loading_dtype_reaches_decoder_and_model(checkpoint):
    pipe = load(checkpoint, torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.vision_language_model.dtype == torch.bfloat16
    assert draw(pipe, "a").isfinite().all()
    pipe = load(checkpoint, torch_dtype={"vision_language_model": torch.bfloat16, "default": torch.float32})
    assert pipe.unet.dtype == torch.float32 and pipe.vision_language_model.dtype == torch.bfloat16
    assert draw(pipe, "a").isfinite().all()


def test_pixel_space_pipeline_is_saved_and_loaded(tmp_path):
    pipe = make_pipeline(vae=None, unet={"in_channels": 3, "out_channels": 3})
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.vae is None and again.vision_language_model is None
    assert torch.equal(*(draw(one, image_vectors=vectors(), generator=seeds(0)) for one in (pipe, again)))


def test_from_pipe_shares_the_parts_and_loads_nothing(checkpoint):
    pipe = load(checkpoint, load_language_model=False)
    again = PiscesPipeline.from_pipe(pipe, default_guidance_scale=1.0)
    assert again.unet is pipe.unet and again.vision_language_model is None
    assert again.config.default_guidance_scale == 1.0 and again.config.default_num_inference_steps == 2


def test_model_that_does_not_fit_the_decoder_is_refused_before_its_weights_are_read(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "wrong")
    (folder / "model.safetensors").write_bytes(b"")
    make_pipeline(unet={"cross_attention_dim": 7}).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"wrong has vectors of width 12 but the decoder's U-Net reads width 7"):
        load(folder)


def test_folder_without_a_pisces_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"no Pisces model there \(a config.json with model_type 'pisces'\)"):
        make_pipeline().load_language_model(tmp_path)


def export(checkpoint: Path, folder: Path) -> Path:
    """What the export helper adds for remote code: the files of the package and their names in the two indices."""
    shutil.copytree(checkpoint, folder)
    for path in CODE.glob("*_pisces*.py"):
        shutil.copy(path, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline_pisces", "PiscesPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_pisces.PiscesConfig",
        "AutoModelForMultimodalLM": "modeling_pisces.PiscesForConditionalGeneration",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["auto_map"] = {"AutoProcessor": "processing_pisces.PiscesProcessor"}
        (folder / name).write_text(json.dumps(settings))
    return folder


def hub_cache(folder: Path, cache_dir: Path) -> None:
    """Lay a folder out as the cache of the Hub would hold `org/pisces-tiny`."""
    repository = cache_dir / "models--org--pisces-tiny"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


REMOTE = """
import sys, torch
from diffusers import DiffusionPipeline
source, options = sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:])
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **options)
assert "modeling_pisces" not in sys.modules and type(pipe).__module__.startswith("diffusers_modules")
pipe.set_progress_bar_config(disable=True)
images = pipe("a", generator=[torch.Generator().manual_seed(0)], output_type="pt").images
print("sum", images.double().sum().item())
again = type(pipe)(**pipe.components)
assert again.config.default_num_inference_steps == 2, again.config
pipe.save_pretrained("saved")
saved = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
saved.set_progress_bar_config(disable=True)
images = saved("a", generator=[torch.Generator().manual_seed(0)], output_type="pt").images
print("again", images.double().sum().item())
saved.scheduler = type(saved.scheduler).from_config(saved.scheduler.config, prediction_type="sample")
try:
    saved("a")
except ValueError as error:
    print("refused", error)
assert saved.get_list_adapters() == {}
decoder = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, load_language_model=False, **options)
print("model", decoder.vision_language_model)
"""


@pytest.mark.parametrize("place", ["folder", pytest.param("hub cache", marks=pytest.mark.slow)])
def test_remote_code_draws_the_same_in_a_process_without_the_package(checkpoint, tmp_path, place):
    folder = export(checkpoint, tmp_path / "exported")
    arguments = [str(folder)]
    if place == "hub cache":
        hub_cache(folder, tmp_path / "cache")
        arguments = ["org/pisces-tiny", f"cache_dir={tmp_path / 'cache'}"]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path),
    }
    env.pop("PYTHONPATH", None)
    # -I leaves out the working directory; REMOTE checks that an installed copy of the package was not used either
    result = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    printed = dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)
    expected = draw(make_full_pipeline(), "a", generator=seeds(0)).double().sum().item()
    assert float(printed["sum"]) == pytest.approx(expected, abs=1e-4)
    assert float(printed["again"]) == pytest.approx(expected, abs=1e-4)
    assert "this U-Net was trained to predict 'epsilon'" in printed["refused"]
    assert printed["model"] == "None"


def test_exported_folder_and_hub_id_load_here_without_trusting_code(checkpoint, tmp_path):
    folder = export(checkpoint, tmp_path / "exported")
    expected = draw(make_full_pipeline(), "a", generator=seeds(0))
    torch.testing.assert_close(draw(load(folder), "a", generator=seeds(0)), expected, **CLOSE)
    hub_cache(folder, tmp_path / "cache")
    pipe = load("org/pisces-tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    torch.testing.assert_close(draw(pipe, "a", generator=seeds(0)), expected, **CLOSE)


def test_saving_writes_language_model_and_processor_too_and_nothing_twice(tmp_path):
    pipe = make_full_pipeline(gen_head_type="flow")
    with torch.no_grad():  # as a merged adapter would
        for weight in pipe.vision_language_model.model.gen_head.parameters():
            weight.add_(0.1)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(*(draw(one, "a", generator=seeds(0)) for one in (pipe, again)), **CLOSE)
    weights = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert weights == [
        "model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    again.save_pretrained(tmp_path)  # over itself, from files that are mapped into memory
    torch.testing.assert_close(
        draw(load(tmp_path), "a", generator=seeds(0)), draw(pipe, "a", generator=seeds(0)), **CLOSE
    )


def test_saving_can_leave_the_language_model_out(tmp_path):
    make_full_pipeline().save_pretrained(tmp_path, save_language_model=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "scheduler", "unet", "vae"]


def test_saving_in_shards_reaches_both_layouts(tmp_path):
    make_full_pipeline().save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    expected = draw(make_full_pipeline(), "a", generator=seeds(0))
    torch.testing.assert_close(draw(load(tmp_path), "a", generator=seeds(0)), expected, **CLOSE)


def test_pushing_uploads_the_whole_folder(tmp_path, monkeypatch):
    from diffusers.pipelines import pipeline_utils

    uploaded = {}

    class Repository:
        repo_id = "org/name"

    def upload(self, folder, repo_id, **kwargs):
        uploaded[repo_id] = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    monkeypatch.setattr(pipeline_utils, "create_repo", lambda *args, **kwargs: Repository)
    monkeypatch.setattr(pipeline_utils, "load_or_create_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(pipeline_utils, "populate_model_card", lambda card: card)
    monkeypatch.setattr(PiscesPipeline, "_upload_folder", upload)
    make_full_pipeline().save_pretrained(tmp_path / "name", push_to_hub=True)
    files = uploaded["org/name"]
    assert {"model.safetensors", "config.json", "model_index.json", "processor_config.json", "README.md"} <= files
    assert "unet/diffusion_pytorch_model.safetensors" in files


def test_parts_that_could_not_be_read_again_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = make_full_pipeline()
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    pipe.vision_language_model = peft.get_peft_model(pipe.vision_language_model, config)
    with pytest.raises(ValueError, match=r"vision_language_model carries the adapter default, .* merge it"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: this is a file. Give a folder to save the pipeline in"):
        make_pipeline().save_pretrained(tmp_path / "file")
