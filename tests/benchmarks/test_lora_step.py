"""Claims about `benchmarks.lora_gpu` and `benchmarks.lora_step`: they run, and count what they say."""

import json
import random
import sys

import pytest
import torch
import transformers
from packaging import version
from transformers import LlamaConfig

from benchmarks import lora_gpu as benchmark_gpu
from benchmarks import lora_models as benchmark_models
from benchmarks import lora_step as benchmark_step


SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_gpu.py", *flags])
    benchmark_gpu.main()


def test_the_gpu_script_runs_at_toy_size_and_its_losses_fall(monkeypatch, tmp_path):
    output = tmp_path / "results.json"
    run(monkeypatch, "--preset", "tiny", "--device", "cpu", "--steps", "3", "--output", str(output))
    results = json.loads(output.read_text(encoding="utf-8"))
    settings = results["settings"]
    expected = benchmark_gpu.settings_of(benchmark_gpu.PRESETS["tiny"], "cpu")
    assert [line["packed"] for line in settings] == [setting.packed for setting in expected]
    for line in settings:
        assert line["last_loss"] < line["first_loss"]
        assert line["tokens_per_s"] == pytest.approx(line["num_tokens"] / line["step_s"], rel=1e-2)
        assert line["mfu"] is None and line["peak_memory_gib"] > 0
    assert results["versions"]["torch"] == torch.__version__ and results["command"].endswith(str(output))


def test_the_large_preset_without_a_gpu_ends_in_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--preset", "8b", "--device", "cpu", "--output", str(tmp_path / "results.json"))
    assert end.value.code == 2
    assert "--preset 8b needs a GPU, and there is none. Use --preset tiny" in capsys.readouterr().err.splitlines()[-1]


def test_the_utilisation_of_the_public_mark_is_what_it_says(monkeypatch):
    """NVIDIA's 12,473 tokens/s of Llama-3-8B on one H100 are 402 TFLOP/s, 0.41 of its peak."""
    text = LlamaConfig(**benchmark_gpu.PRESETS["8b"].text)
    assert benchmark_gpu.num_parameters(text) == 8_030_261_248 - 65 * 4096  # Llama-3.1-8B without its norms
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = benchmark_gpu.utilisation(benchmark_gpu.num_parameters(text), 12473, "cuda")
    assert found == pytest.approx(402 / 989, abs=0.003)
    assert benchmark_gpu.utilisation(1, 1.0, "cpu") is None


def test_a_packed_batch_holds_more_samples_than_a_padded_one_of_its_size():
    config = benchmark_gpu.make_config(benchmark_gpu.PRESETS["tiny"])
    padded, packed = (benchmark_gpu.make_batch(config, 2048, p, torch.float32, "cpu") for p in (False, True))
    assert packed["num_samples"] > padded["num_samples"]
    for made in (padded, packed):
        assert made["batch"]["input_ids"].numel() <= 2048
    assert packed["batch"]["input_ids"].numel() == packed["num_tokens"]
    assert int(padded["batch"]["attention_mask"].sum()) == padded["num_tokens"]


def test_quantized_layers_are_nf4_and_train_an_adapter():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    preset = benchmark_gpu.PRESETS["tiny"]
    model = benchmark_gpu.make_adapted(preset, "cpu", quantized=True)
    layers = model.get_base_model().model.language_model.layers
    assert type(layers[0].mlp.up_proj.base_layer) is bitsandbytes.nn.Linear4bit
    setting = benchmark_gpu.Setting(512, quantized=True)
    numbers = benchmark_gpu.measure(model, setting, preset, "cpu", steps=3)
    assert numbers["last_loss"] < numbers["first_loss"]


@pytest.fixture
def small(monkeypatch):
    """The step benchmark at the size of a test."""
    for name, value in {"WIDTH": 64, "LAYERS": 1, "BATCH_SIZE": 2}.items():
        monkeypatch.setattr(benchmark_step, name, value)
    for name in ("VISION", "SMALL_VISION"):
        monkeypatch.setattr(benchmark_step, name, SMALL)
    for name in ("GEN_VISION", "SMALL_GEN_VISION"):
        monkeypatch.setattr(benchmark_step, name, SMALL | {"output_size": 16})


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.18"),
    reason="TRL's stock recipe on pictures needs transformers 5.18",
)
def test_the_step_benchmark_trains_both_sides_on_the_same_loss(small, tmp_path):
    measured = benchmark_step.measure_understanding(str(tmp_path), pairs=1)  # asserts that the losses are equal
    assert measured["as_it_runs_here"]["pairs"] == 1


def test_the_step_benchmark_packs_and_caches(small, tmp_path):
    packing = benchmark_step.measure_packing(str(tmp_path), pairs=1, num_rows=8, capacity=512)
    assert packing["unfilled"] < packing["padding"]
    for attention in ("packed_sdpa", "sdpa"):
        line = packing[attention]
        assert line["speedup_median"] == pytest.approx(1 / line["ratio_median"], rel=1e-2)
    assert benchmark_step.measure_precompute(str(tmp_path), pairs=1)["speedup_median"] > 0


def test_rows_for_trl_are_the_same_rows():
    row = benchmark_models.question_row(random.Random(0), num_turns=2)
    (stock,) = benchmark_step.with_opened_pictures([row])
    assert len(stock["images"]) == 1 and stock["images"][0].mode == "RGB"
    assert stock["messages"][0]["content"][0] == {"type": "image"}
    assert stock["messages"][0]["content"][1:] == row["messages"][0]["content"][1:]
    assert stock["messages"][1:] == row["messages"][1:]
