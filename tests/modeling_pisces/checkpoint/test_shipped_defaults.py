"""Every default that pisces-tiny ships is in force after loading, through each door, and stays so after use.

Doors: the Auto classes, `PiscesPipeline`, the console, and remote code in a process without the package.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from modeling_pisces import PiscesForConditionalGeneration
from pisces_commands.console import main
from tests.shipped_defaults import draws_at, in_force, look, shipped, write_text


pytest.importorskip("diffusers")

from modeling_pisces.checkpoint.loading import load_pipeline
from modeling_pisces.pipeline_pisces import PiscesPipeline


ROOT = Path(__file__).parents[3]
TINY = ROOT / "pisces-tiny"
PROMPT = "two blue stars"


def assert_in_force(found: dict) -> None:
    expected = shipped(TINY)
    for part, settings in found.items():
        if isinstance(settings, dict):
            for name, value in settings.items():
                assert value == expected[part][name], (part, name)
        assert settings == expected[part], part


def assert_look(results: dict) -> None:
    assert_in_force(results["first"])
    assert results["draws"] == [True, False]  # at 0.3 and not at 1.0
    assert_in_force(results["again"])
    assert results["draws_again"]


def test_the_folder_ships_what_these_tests_are_about():
    settings = shipped(TINY)
    assert settings["generation"]["image_temperature"] == 0.3 and settings["generation"]["max_new_tokens"] == 64
    assert {"bos_token_id", "eos_token_id", "pad_token_id"} <= set(settings["generation"])
    assert settings["pipeline"] == {
        "default_guidance_scale": 1.0,
        "default_negative": "zeros",
        "default_num_inference_steps": 6,
    }
    assert settings["scheduler"]["prediction_type"] == "v_prediction"
    assert "_from_model_config" not in settings["generation"]


@pytest.mark.parametrize(
    "model_class", [AutoModelForMultimodalLM, AutoModelForImageTextToText, PiscesForConditionalGeneration]
)
def test_auto_classes_and_our_own_load_every_default(model_class):
    model, processor = model_class.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    results = look(TINY, model, processor, None)
    assert set(results["first"]) == {"generation", "processor", "tokenizer", "chat_template"}
    assert_look(results)


def test_a_text_written_without_options_ends_where_the_checkpoint_says():
    model, processor = AutoModelForMultimodalLM.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    never_ends = {"suppress_tokens": [model.generation_config.eos_token_id]}
    assert write_text(model, processor, **never_ends).shape[1] == 64
    assert write_text(model, processor, **never_ends, max_new_tokens=70).shape[1] == 70
    assert write_text(model, processor).shape[1] < 64 and write_text(model, processor)[0, -1] == 5


@pytest.fixture(scope="module")
def pipe() -> PiscesPipeline:
    pipe = PiscesPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_explicitly(pipe, seed: int) -> Image.Image:
    """What every default of the folder means, said in arguments."""
    return pipe(
        PROMPT,
        negative_prompt=None,
        guidance_scale=1.0,
        num_inference_steps=6,
        vector_kwargs={"image_temperature": 0.3},
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def test_the_pipeline_loads_every_default_and_draws_with_it(pipe):
    assert_look(look(TINY, pipe.vision_language_model, pipe.processor, pipe))
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(5)).images[0]
    assert plain.tobytes() == draw_explicitly(pipe, seed=5).tobytes()
    warm = pipe(PROMPT, generator=torch.Generator().manual_seed(5), vector_kwargs={"image_temperature": 1.0})
    assert plain.tobytes() != warm.images[0].tobytes()


def test_the_pipeline_of_the_console_holds_every_default():
    loaded = load_pipeline(TINY, device="cpu")
    assert_in_force(in_force(TINY, loaded.vision_language_model, loaded.processor, loaded))


def test_the_console_draws_with_every_default(pipe, tmp_path, capsys):
    output = tmp_path / "star.png"
    command = ["draw", PROMPT, "--seed", "5", "--model", str(TINY), "--device", "cpu", "--output", str(output)]
    assert main(command) == 0, capsys.readouterr().err
    with Image.open(output) as found:
        assert found.tobytes() == draw_explicitly(pipe, seed=5).tobytes()


@pytest.mark.parametrize(
    ("own", "options", "expected"), [(64, [], 64), (64, ["--max_new_tokens", "9"], 9), (None, [], 128)]
)
def test_the_console_answers_no_longer_than_the_option_or_the_checkpoint_says(
    own, options, expected, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(TINY, tmp_path / "copy", ignore=shutil.ignore_patterns("unet", "vae"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": own}))
    lengths = []
    generate = PiscesForConditionalGeneration.generate

    def note_length(self, *args, **kwargs):
        given = kwargs.get("max_new_tokens")
        lengths.append(self.generation_config.max_new_tokens if given is None else given)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(PiscesForConditionalGeneration, "generate", note_length)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    command = ["describe", str(tmp_path / "white.png"), "--model", str(folder), "--device", "cpu", *options]
    assert main(command) == 0, capsys.readouterr().err
    assert lengths == [expected]


def test_remote_code_loads_every_default_where_the_package_is_absent(tmp_path):
    from modeling_pisces.hub.export import export_to_folder

    folder = export_to_folder(TINY, None, tmp_path / "export")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    env = kept | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    env["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    child = ROOT / "tests" / "shipped_defaults.py"
    command = [sys.executable, "-I", str(child), str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.pop("module").startswith("transformers_modules.")
    assert results.pop("pipeline_draws_at")
    assert_look(results)
    # and the exported folder ships what the source ships
    exported = shipped(folder)
    assert exported == shipped(TINY)


def test_drawing_a_batch_between_texts_keeps_the_default():
    model, processor = AutoModelForMultimodalLM.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    for options in ({"max_new_tokens": 3}, {"do_sample": True, "temperature": 1.3}, {"num_beams": 2}):
        write_text(model, processor, **options)
        assert draws_at(model, processor, 0.3), options
        draws_at(model, processor, 0.7)
    assert_in_force(in_force(TINY, model))
