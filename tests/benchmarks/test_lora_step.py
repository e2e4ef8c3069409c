"""Claims about `benchmarks.lora_step`: it runs, and counts what it says."""

import random

import pytest
import transformers
from packaging import version

from benchmarks import lora_step as benchmark_step
from benchmarks.material import lora_models as benchmark_models


SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}


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
