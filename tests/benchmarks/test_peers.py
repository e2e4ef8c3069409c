"""Claims about `benchmarks.peers` and `benchmarks.draw`: contestants do equal work, and ratios are of one round."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import draw, peers
from benchmarks.contestants import models


@pytest.mark.parametrize("name", [name for name in models.CONTESTANTS if name not in ("janus guided", "emu3 guided")])
def test_every_contestant_does_its_work(name):
    models.CONTESTANTS[name](64, 1)()  # each checks what came out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["janus guided", "emu3 guided"])
def test_peers_that_draw_long_do_their_work(name):
    models.CONTESTANTS[name](64, 1)()


def test_ours_and_llava_have_one_language_model_shape_and_the_same_weights_of_it():
    ours = models.make_pisces(128, 2).model.language_model
    text = models.text_settings(128, 2)
    assert {name: getattr(ours.config, name) for name in text} == text
    llama = models.LlamaForCausalLM(ours.config).model
    assert {n: p.shape for n, p in llama.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}


def test_ratios_are_taken_round_by_round_and_a_part_of_the_work_is_reckoned_up():
    rounds = [
        {"ours": {"seconds": 1.0, "mib": 10.0}, "peer": {"seconds": 2.0, "mib": 40.0}},
        {"ours": {"seconds": 3.0, "mib": 20.0}, "peer": {"seconds": 2.0, "mib": 40.0}},
        {"ours": {"seconds": 4.0, "mib": 20.0}, "peer": {"seconds": 4.0, "mib": 40.0}},
    ]
    line = peers.compare(rounds, "ours", "peer", 10.0)
    assert (line["ratio_median"], line["ratio_min"], line["ratio_max"]) == (0.1, 0.05, 0.15)
    assert (line["ours_s"], line["peer_s"], line["memory_ratio"]) == (3.0, 20.0, 0.5)
    assert line["peer_reckoned_from"] == "0.1000 of its tokens"
    assert "peer_reckoned_from" not in peers.compare(rounds, "ours", "peer", 1.0)


def test_every_group_names_contestants_that_exist():
    for ours, others in peers.GROUPS.values():
        assert {*ours, *others} <= set(models.CONTESTANTS)


@pytest.mark.parametrize("shape", ["512", "x8", "500x8", "512x0", "0x8", "-64x8"])
def test_a_shape_that_is_none_ends_in_one_line(monkeypatch, capsys, tmp_path, shape):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--output", str(tmp_path / "r.json"), f"--shapes={shape}"])
    with pytest.raises(SystemExit) as end:
        peers.main()
    assert end.value.code == 2 and "expected" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow  # two processes with all their imports
def test_each_contestant_is_a_process_that_runs_when_told(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "GROUPS", {"text": (("pisces regression",), {"llama 64 tokens": 1.0})})
    monkeypatch.setattr(peers, "decoder_seconds", lambda repeats: {"4": 0.1})
    output = tmp_path / "peers.json"
    monkeypatch.setattr(sys, "argv", ["peers.py", "--output", str(output), "--rounds", "1", "--shapes", "64x1"])
    peers.main()
    written = json.loads(output.read_text(encoding="utf-8"))
    (line,) = written["shapes"]["width 64, 1 layers"]["text"]
    assert line["rounds"] == 1 and line["ours_mib"] > 0 and line["peer_mib"] > 0
    assert written["pisces_tiny_decoder_s_by_steps"] == {"4": 0.1}


# ---- one picture, by batch and beside another version


class Scripted:
    """A drawer of known seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def draw(self, seed, size=1):
        return self.seconds(seed, size)


def test_throughput_is_per_picture_and_compared_within_a_round():
    lines = draw.throughput(Scripted(lambda seed, size: (1 + seed) * (1 + size / 4)), [1, 4], rounds=3)
    assert [line["batch"] for line in lines] == [1, 4]
    assert [line["gain"] for line in lines] == [1.0, 2.5]
    assert lines[1]["per_picture_s"] == 1.0  # the median round


def test_another_version_draws_the_same_prompts_in_turn():
    found = draw.compare(Scripted(lambda seed, size: 1.0), Scripted(lambda seed, size: 2.0 + seed), rounds=1)
    assert found["pairs"] == len(draw.PROMPTS)
    assert (found["ratio_min"], found["ratio_max"]) == (0.2, 0.5)


def test_a_folder_that_is_no_checkout_ends_in_one_line(monkeypatch, capsys, tmp_path):
    flags = ["--model", "pisces-tiny", "--output", str(tmp_path / "r.json"), "--against", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["draw.py", *flags])
    with pytest.raises(SystemExit) as end:
        draw.main()
    assert end.value.code == 2
    assert "no modeling_pisces in it, expected a checkout of this repository" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkout_of_its_own_draws_beside_this_one(monkeypatch, tmp_path):
    for name in ("modeling_pisces", "pisces_commands", "pisces-tiny"):
        shutil.copytree(Path(draw.ROOT) / name, tmp_path / "old" / name)
    output = tmp_path / "r.json"
    flags = ["--model", "pisces-tiny", "--output", str(output), "--against", str(tmp_path / "old"), "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["draw.py", *flags, "--batch_sizes", "1", "4"])
    draw.main()
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["against_older"]["pairs"] == len(draw.PROMPTS)
    assert written["batches"][1]["gain"] > 0
