"""Claims about `benchmarks.gpu`: it runs at toy size, in its order, and counts what it says."""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import gpu
from benchmarks.floors.devices import Device
from benchmarks.gpu_parts import drawing, lora


def run(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    gpu.main()


def test_the_script_runs_at_toy_size_in_the_order_of_value(monkeypatch, tmp_path):
    output = tmp_path / "results.json"
    flags = ("--preset", "tiny", "--device", "cpu", "--steps", "3", "--repeats", "1", "--output", str(output))
    run(monkeypatch, *flags)
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["is_complete"] and results["command"].endswith(str(output))
    assert results["versions"]["torch"] == torch.__version__
    started = [line["at_s"] for name in ("vectors", "picture", "lora") for line in results[name]]
    assert started == sorted(started)
    assert [line["case"] for line in results["vectors"]] == [name for name, *_ in drawing.CASES]
    assert [line["case"].split(",")[1] for line in results["picture"]] == [" 25 steps", " 50 steps", " 8 steps"]
    expected = lora.settings_of(lora.PRESETS["tiny"], "cpu")
    assert [line["packed"] for line in results["lora"]] == [setting.packed for setting in expected]
    for line in results["lora"]:
        assert line["last_loss"] < line["first_loss"]
        assert line["tokens_per_s"] == pytest.approx(line["num_tokens"] / line["step_s"], rel=1e-2)
        assert line["mfu"] is None and line["peak_memory_gib"] > 0


def test_what_was_measured_is_kept_when_the_time_is_over(monkeypatch, tmp_path):
    output = tmp_path / "results.json"
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    lines = iter([{"case": "first"}, {"case": "second"}, {"case": "third"}])
    monkeypatch.setattr(gpu, "measure_all", lambda *_: {"vectors": lambda: lines, "lora": lambda: lines})
    flags = ("--preset", "tiny", "--device", "cpu", "--budget_s", "150", "--output", str(output))
    run(monkeypatch, *flags)
    results = json.loads(output.read_text(encoding="utf-8"))
    assert [line["case"] for line in results["vectors"]] == ["first", "second"] and results["lora"] == []
    assert not results["is_complete"]


def test_vectors_stand_beside_the_floor_of_a_known_device(monkeypatch):
    monkeypatch.setattr(drawing, "known_device", lambda device: Device("toy", 1e9, 1e7, 0.0, "made up"))
    preset = lora.PRESETS["tiny"]
    lines = {line["case"]: line for line in drawing.measure_vectors(preset, "cpu", repeats=1)}
    for line in lines.values():
        assert line["over_floor"] == pytest.approx(line["seconds"] / line["floor_s"], rel=0.02)
    assert lines["batch 32"]["per_picture_s"] == pytest.approx(lines["batch 32"]["seconds"] / 32, abs=1e-3)


@pytest.mark.parametrize(
    ("board", "found"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA GeForce RTX 3090", None),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Made Up 1", None),
    ],
)
def test_a_board_is_known_by_its_name(monkeypatch, board, found):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: board)
    sheet = drawing.known_device("cuda")
    assert (sheet and sheet.name) == found
    assert drawing.known_device("cpu") is None


def test_the_large_preset_without_a_gpu_ends_in_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--preset", "8b", "--device", "cpu", "--output", str(tmp_path / "results.json"))
    assert end.value.code == 2
    assert "--preset 8b needs a GPU, and there is none. Use --preset tiny" in capsys.readouterr().err.splitlines()[-1]


def test_the_utilisation_of_the_public_mark_is_what_it_says(monkeypatch):
    """NVIDIA's 12,473 tokens/s of Llama-3-8B on one H100 are 402 TFLOP/s, 0.41 of its peak."""
    text = LlamaConfig(**lora.PRESETS["8b"].text)
    assert lora.num_parameters(text) == 8_030_261_248 - 65 * 4096  # Llama-3.1-8B without its norms
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = lora.utilisation(lora.num_parameters(text), 12473, "cuda")
    assert found == pytest.approx(402 / 989, abs=0.003)
    assert lora.utilisation(1, 1.0, "cpu") is None


def test_a_packed_batch_holds_more_samples_than_a_padded_one_of_its_size():
    config = lora.make_config(lora.PRESETS["tiny"])
    padded, packed = (lora.make_batch(config, 2048, p, torch.float32, "cpu") for p in (False, True))
    assert packed["num_samples"] > padded["num_samples"]
    for made in (padded, packed):
        assert made["batch"]["input_ids"].numel() <= 2048
    assert packed["batch"]["input_ids"].numel() == packed["num_tokens"]
    assert int(padded["batch"]["attention_mask"].sum()) == padded["num_tokens"]


def test_quantized_layers_are_nf4_and_train_an_adapter():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    preset = lora.PRESETS["tiny"]
    model = lora.make_adapted(preset, "cpu", quantized=True)
    layers = model.get_base_model().model.language_model.layers
    assert type(layers[0].mlp.up_proj.base_layer) is bitsandbytes.nn.Linear4bit
    setting = lora.Setting(512, quantized=True)
    numbers = lora.measure(model, setting, preset, "cpu", steps=3)
    assert numbers["last_loss"] < numbers["first_loss"]
