"""Claims about `benchmarks.roofline`: counts equal closed forms and the real thing, floors follow the formula."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.floors import checking
from benchmarks.floors.counting import Counter, count, use_counted_attention, weight_bytes
from benchmarks.floors.devices import DEVICES, Device
from benchmarks.floors.models import add_lora, full_size, make_model, small_size
from benchmarks.floors.training import NF4_BYTES, MetaStep, Row, Rows, fill
from benchmarks.floors.work import Phase, Task, decoder, layer_bytes, run_language_model, vae, vectors


WIDTH, LAYERS = 128, 2


@pytest.fixture(scope="module")
def model():
    return make_model(small_size(WIDTH, LAYERS), torch.float32)


@pytest.fixture(scope="module")
def large():
    return make_model(full_size(), torch.bfloat16)


def layers_of(model):
    """Weights of the matrices of the layers."""
    return sum(p.numel() for name, p in model.model.language_model.layers.named_parameters() if p.ndim == 2)


def assert_flop(found, expected, num_tokens):
    """Exactly, but for the angles of the positions, which older transformers compute by a product: 64 a token."""
    assert found - expected in (0, 64 * num_tokens)


# ---- FLOP


def test_a_forward_pass_is_2_n_t_and_half_a_square_of_attention(model):
    use_counted_attention(model.model.language_model)
    found = count(lambda: run_language_model(model, 3, 50, keeps=False)).flop
    assert_flop(found, 3 * (2 * layers_of(model) * 50 + LAYERS * 4 * WIDTH * 50 * 51 // 2), 150)


def test_packed_samples_attend_to_themselves_only(model):
    use_counted_attention(model.model.language_model, (20, 30))
    found = count(lambda: run_language_model(model, 1, 50, keeps=False)).flop
    pairs = 20 * 21 // 2 + 30 * 31 // 2
    assert_flop(found, 2 * layers_of(model) * 50 + LAYERS * 4 * WIDTH * pairs, 50)


def test_a_step_attends_to_the_whole_cache(model):
    use_counted_attention(model.model.language_model)
    found = count(lambda: run_language_model(model, 2, 1, past=40)).flop
    assert_flop(found, 2 * (2 * layers_of(model) + LAYERS * 4 * WIDTH * 41), 2)


def test_the_counted_operator_equals_torch_s_count_of_a_real_model_but_for_the_masked_half(model):
    real = make_model(small_size(WIDTH, LAYERS), torch.float32, "cpu")
    real.set_attn_implementation("eager")  # written out, so that torch's counter sees both products
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        real.model.language_model(inputs_embeds=torch.randn(1, 50, WIDTH), use_cache=False)
    use_counted_attention(model.model.language_model)
    ours = count(lambda: run_language_model(model, 1, 50, keeps=False)).flop
    assert counter.get_total_flops() - ours == LAYERS * 4 * WIDTH * (50 * 50 - 50 * 51 // 2)


def test_a_lora_step_costs_4_n_and_not_6_n():
    """Frozen weights get no gradient: forward 2 N, gradients of activations 2 N, and the adapter's own 6 a token."""
    config = small_size(WIDTH, LAYERS)
    step, rows = MetaStep(config, 4, torch.float32), Rows((Row(60, labels=20),), packed=False)
    base = {name: p for name, p in step.model.model.language_model.layers.named_parameters() if p.ndim == 2}
    frozen = sum(p.numel() for name, p in base.items() if "lora_" not in name)
    adapter = step.num_trained
    head = step.model.lm_head.weight.numel()
    pairs = 60 * 61 // 2
    expected = 4 * frozen * 60 + 6 * adapter * 60 + 4 * head * 20 + LAYERS * 14 * WIDTH * pairs
    # the first layer's inputs need no gradient: q, k, v of it lose one product of weights and one of their lora_A
    first = [p.numel() for name, p in base.items() if name.startswith("0.self_attn.") and name[12] in "qkv"]
    lost = 2 * 60 * sum(first[i] for i in range(len(first))) - 2 * 60 * sum(
        p.numel() for name, p in base.items() if name.startswith("0.self_attn.") and name[12] in "qkv" and "_B" in name
    )
    assert_flop(step.count(rows).flop, expected - lost, 60)
    assert step.count(rows).flop < 0.75 * 6 * (frozen * 60 + head * 20)


def test_the_full_size_counts_what_is_known_of_its_parts(large):
    """Llama-3.1-8B has 8.03 B parameters, SDXL's guided step 13.48 TFLOP and its VAE 10.47 at 1024 px."""
    language_model = weight_bytes(large.model.language_model, large.lm_head) / 2
    assert language_model == 8_030_261_248
    assert layer_bytes(large) / 2 == 8_030_261_248 - 2 * 128256 * 4096
    step = decoder(1, 1792, 64, torch.bfloat16)
    assert step.flop / 1e12 == pytest.approx(13.48, abs=0.01)
    assert step.bytes / 2e9 == pytest.approx(2.53, abs=0.01)  # parameters in thousands of millions
    assert vae(torch.bfloat16).flop / 1e12 == pytest.approx(10.47, abs=0.01)


def test_64_vectors_are_bound_by_reading_the_layers_and_guidance_costs_a_batch_row(large):
    """63 steps and a prompt read 13.96 GB each: 0.19 s at 4.8 TB/s, with the head and the projector."""
    one, guided = vectors(large), vectors(large, guided=True)
    device = DEVICES[0]
    assert all(phase.bytes / device.bandwidth > phase.flop / device.flops for phase in one.phases)
    assert one.floor(device) == pytest.approx(64 * 13.96e9 / 4.8e12, rel=0.02)
    assert guided.flop == pytest.approx(2 * one.flop, rel=0.01) and guided.bytes < 1.01 * one.bytes


def test_a_flow_head_of_16_steps_reads_its_weights_16_times(model):
    flow = make_model(small_size(WIDTH, LAYERS, gen_head_type="flow"), torch.float32)
    few, many = vectors(flow, flow_steps=1), vectors(flow, flow_steps=16)
    assert many.bytes - few.bytes == 64 * 15 * weight_bytes(flow.model.gen_head)
    assert many.flop > few.flop


# ---- floors


def test_a_floor_takes_the_slower_of_arithmetic_and_memory_phase_by_phase():
    device = Device("toy", flops=10.0, bandwidth=5.0, memory=0.0, source="made up")
    arithmetic, memory = Phase("a", flop=100, bytes=1, times=2), Phase("b", flop=1, bytes=20)
    assert Task("both", (arithmetic, memory)).floor(device) == 2 * 10 + 4
    assert Task("both", (arithmetic, memory)).flop == 201


def test_every_device_names_its_data_sheet():
    for device in DEVICES:
        assert (
            f"{device.bandwidth / 1e12:g} TB/s" in device.source
            or f"{device.bandwidth / 1e9:,g} GB/s" in device.source
        )
        assert f"{device.memory / 1e9:g} GB" in device.source
        printed = float(device.source.split(": ")[1].split(" TFLOPS")[0].replace(",", ""))
        assert device.flops == pytest.approx(printed * 1e12 / (2 if "sparsity" in device.source else 1), rel=1e-3)


# ---- memory


def test_the_tracker_follows_storages_and_not_views():
    with Counter() as tracker:
        first = torch.empty(100, device="meta")  # 400 bytes
        view = first.view(10, 10)
        second = first + 1
        del first
        assert tracker.current == 800  # the view holds it
        del view
        assert tracker.current == 400
        second.add_(1)
    assert tracker.current == 400 and tracker.peak == 800


def test_older_tensors_are_not_counted_again():
    old = torch.empty(1000, device="meta")
    with Counter() as tracker:
        old.mul_(2)
        part = old[:10]
        assert tracker.peak == 0 and part.shape == (10,)


def test_counted_memory_equals_what_autograd_keeps_of_a_known_graph():
    """x -> relu(x W): kept are the output of relu; x and W are older. The gradients of x and W are left at the end."""
    x, w = (torch.empty(64, 64, device="meta", requires_grad=True) for _ in range(2))
    size = 64 * 64 * 4
    forward = count(lambda: torch.relu(x @ w))
    assert forward.peak_bytes == 2 * size and forward.left_bytes == size
    trained = count(lambda: torch.relu(x @ w).sum().backward())
    assert trained.left_bytes == 2 * size


def test_checkpointing_needs_less_and_costs_one_more_forward_pass():
    config, rows = small_size(WIDTH, 6), Rows((Row(200, labels=10),), packed=False)
    plain, checkpointed = (MetaStep(config, 4, torch.float32, on).count(rows) for on in (False, True))
    assert checkpointed.peak_bytes < 0.5 * plain.peak_bytes
    assert 1.3 < checkpointed.flop / plain.flop < 1.55


def test_four_bits_replace_the_layers_and_nothing_else():
    config = small_size(WIDTH, LAYERS)
    step, rows = MetaStep(config, 4, torch.bfloat16), Rows((Row(40, labels=10),), packed=False)
    full, small = step.memory(rows), step.memory(rows, quantized=True)
    layers = sum(p.numel() for n, p in step.model.model.language_model.layers.named_parameters() if "_proj.base" in n)
    largest = 3 * WIDTH * WIDTH
    assert full["weights"] - small["weights"] == pytest.approx(layers * (2 - NF4_BYTES) - 2 * largest)
    assert {name: full[name] for name in ("adapter", "moments", "step")} == {
        name: small[name] for name in ("adapter", "moments", "step")
    }
    assert full["moments"] == 8 * step.num_trained


# ---- rows


def test_rows_fill_the_room_and_packing_fits_more_of_them():
    config = full_size()
    packed, padded = (fill("joint", 8192, on, config) for on in (True, False))
    assert packed.shape == (1, packed.tokens) and packed.tokens <= 8192
    assert padded.shape[0] * padded.shape[1] <= 8192 and len(packed.rows) > len(padded.rows)
    assert {row.drawn for row in packed.rows} == {0, 64} and {row.shown for row in packed.rows} == {0, 729}
    assert len(fill("understanding", 10, True, config).rows) == 1


# ---- the check, and the command


def test_the_check_compares_both_kinds_of_work_on_this_processor(monkeypatch):
    monkeypatch.setattr(checking, "this_processor", lambda: Device("toy", 1e10, 1e10, 0.0, "made up"))
    found = checking.check(sizes=((128, 2),), repeats=1)
    assert [line["work"] for line in found["lines"]] == ["lora", "drawing"]
    for line in found["lines"]:
        assert line["seconds_error"] == pytest.approx(
            line["seconds_computed"] / line["seconds_measured"] - 1, abs=0.05
        )
        assert line["mib_measured"] > 0


@pytest.mark.slow
def test_computed_memory_is_near_the_resident_memory_of_a_real_step():
    """At a size where weights and activations outweigh what a process needs anyway."""
    found = checking.check(sizes=((512, 6),), repeats=1)
    for line in found["lines"]:
        assert abs(line["mib_error"]) <= 0.15, line


def test_the_real_step_and_the_counted_one_train_the_same_parameters():
    config = small_size(WIDTH, LAYERS)
    real = add_lora(make_model(config, torch.float32, "cpu"), checking.RANK)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert trained == MetaStep(config, checking.RANK, torch.float32).num_trained


def test_the_command_writes_lines_that_say_computed(monkeypatch, tmp_path, capsys):
    config = small_size(WIDTH, LAYERS)
    monkeypatch.setattr(roofline, "full_size", lambda head="mlp": small_size(WIDTH, LAYERS, gen_head_type=head))
    monkeypatch.setattr(roofline, "decoder", lambda steps, *_, **__: Task(f"{steps} steps", (Phase("p", 1, 1),)))
    monkeypatch.setattr(roofline, "vae", lambda dtype: Task("vae", (Phase("p", 1, 1),)))
    monkeypatch.setattr(roofline, "MEMORY", ((4, 1024, False, False), (4, 1024, True, True)))
    output = tmp_path / "roofline.json"
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--output", str(output), "--no_check"])
    roofline.main()
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["kind"].startswith("computed") and len(written["recipes"]) == 6 and "check" not in written
    assert set(written["floors"][0]["floor_s"]) == {device.name for device in DEVICES}
    printed = [line for line in capsys.readouterr().out.splitlines() if "TFLOP" in line or "GiB" in line]
    assert printed and all(line.startswith("computed") for line in printed if not line.startswith(" "))
    assert written["recipes"][0]["real_tokens"] == fill("understanding", 8192, True, config).tokens
