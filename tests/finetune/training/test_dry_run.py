"""Claims about the preflight: what it reports, and that it changes nothing."""

import os
from pathlib import Path

import pytest
import torch

from finetune import lora_joint, lora_understanding
from finetune.data.collator import PiscesDataCollator
from finetune.training.dry_run import estimate_memory, iter_items, mark_targets, parameter_table
from tests.finetune.lora_fixtures import ListRows, make_adapted, make_row, make_rows, save_checkpoint, save_rows
from tests.fixtures import make_processor


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def report(start: Path, tmp_path: Path, capsys, kinds: str, *flags: str, recipe=lora_joint) -> str:
    data = save_rows(tmp_path / "data", make_rows(kinds))
    output = tmp_path / "out"
    arguments = ["--model_name_or_path", str(start), "--data", str(data), "--output_dir", str(output)]
    assert recipe.main([*arguments, "--use_cpu", "True", "--dry_run", "True", *flags]) is None
    assert not output.exists() or not any(output.iterdir())
    return capsys.readouterr().out


def test_the_report_counts_rows_sides_and_tokens(start, tmp_path, capsys):
    text = report(start, tmp_path, capsys, "udet")
    processor = make_processor()
    lengths = [PiscesDataCollator(processor)([row])["input_ids"].shape[1] for row in make_rows("udet")]
    assert "4 (1 both, 1 generation, 1 text, 1 understanding)" in text
    assert f"tokens: {sum(lengths)} in all, shortest {min(lengths)}" in text
    assert f"longest {max(lengths)}; 0 too long" in text
    assert text.rstrip().endswith("nothing was trained and nothing was written")


def test_rows_that_are_too_long_are_listed_with_their_ids_and_lengths(start, tmp_path, capsys):
    lengths = {
        row["id"]: PiscesDataCollator(make_processor())([row])["input_ids"].shape[1] for row in make_rows("uuu")
    }
    limit = sorted(lengths.values())[0]
    text = report(start, tmp_path, capsys, "uuu", "--max_length", str(limit), recipe=lora_understanding)
    for row_id, length in lengths.items():
        assert (f"too long, left out: row {row_id}, {length} tokens" in text) == (length > limit)
    num_long = sum(length > limit for length in lengths.values())
    assert num_long > 0 and f"{num_long} too long" in text


def test_packs_are_counted(start, tmp_path, capsys):
    assert "in 1 packs" in report(start, tmp_path, capsys, "udet", "--pack_to", "400")


def test_the_table_lists_every_trained_parameter_once_with_its_dtype():
    model = make_adapted("full").to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    table = parameter_table(model)
    elements = sum(int(line.split()[-2].replace(",", "")) for line in table.splitlines())
    assert elements == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(line.endswith("float32") for line in table.splitlines())
    line = next(line for line in table.splitlines() if "q_proj.lora_A" in line)
    assert line.split()[0] == "base_model.model.model.language_model.layers.*.self_attn.q_proj.lora_A.weight"
    assert line.split()[1:4] == ["x", "2", "256"]  # two layers of 4 x 32
    assert "vision_tower" not in table


def test_the_example_marks_exactly_what_carries_a_loss():
    processor = make_processor()
    understand = mark_targets(PiscesDataCollator(processor)([make_row("understand", 0)]), processor)
    assert "<|image|> x 9" in understand and ">>red<|eot_id|><<" in understand
    assert understand.count(">>") == understand.count("<<") == 1
    draw = mark_targets(PiscesDataCollator(processor)([make_row("draw", 0)]), processor)
    assert ">><|gen_start|><|gen_image|> x 4 <|gen_end|><|eot_id|><<" in draw
    # the first of a padded batch: nothing of the padding shows
    padded = mark_targets(PiscesDataCollator(processor)(make_rows("tu")), processor)
    assert "<|pad|>" not in padded


def test_the_memory_estimate_adds_up_what_is_known_exactly():
    model = make_adapted("full")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = estimate_memory(model, num_tokens=100, num_targets=10, checkpointing=False, half_precision=False)
    assert parts["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert parts["gradients"] == 4 * trained and parts["optimizer"] == 8 * trained
    assert parts["activations"] == 100 * 2 * (8 * 32 + 3 * 48) * 4  # tokens, layers, numbers, bytes
    assert parts["logits"] == 10 * 320 * 12
    saved = estimate_memory(model, num_tokens=100, num_targets=10, checkpointing=True, half_precision=False)
    assert saved["activations"] < 0.7 * parts["activations"]


def test_streams_are_looked_at_without_being_counted():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([1, 2, 3])

    assert next(iter(iter_items(Stream()))) == 1
    assert next(iter(iter_items(ListRows([5, 6])))) == 5


def test_a_dry_run_leaves_the_current_folder_alone(start, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report(start, tmp_path, capsys, "ud")
    assert os.listdir(tmp_path / "here") == []
