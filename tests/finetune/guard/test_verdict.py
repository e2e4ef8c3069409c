"""Claims about the verdict at the end of a run that drew: ranks, ceiling, sentence, sheet and advice."""

import pytest
import torch
import yaml
from PIL import Image

from finetune import lora_generation, lora_understanding
from finetune.guard import verdict
from finetune.guard.metrics import encode_pictures
from finetune.guard.table import point_table
from finetune.guard.verdict import advice, judge_rows, pick_evenly, sentence, summarize
from modeling_pisces.checkpoint.loading import load_pipeline
from tests.checkpoint_folder import write_checkpoint
from tests.finetune.data.data_files import write_captions
from tests.finetune.lora_fixtures import make_picture, make_row, make_rows, save_rows


pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return load_pipeline(checkpoint)


def test_a_model_that_draws_what_was_wanted_has_rank_1_everywhere(pipeline, monkeypatch):
    """Drawings put in place of the model's: the wanted pictures themselves, then those of the neighbours."""
    rows = [make_row("draw", seed) for seed in range(4)]
    wanted = [row["messages"][1]["content"][0]["image"] for row in rows]
    others = [make_picture(seed) for seed in range(200, 206)]
    for shift, ranks_are_1 in ((0, True), (1, False)):
        drawn = wanted[shift:] + wanted[:shift]
        monkeypatch.setattr(verdict, "decode_vectors", lambda pipe, vectors, drawn=drawn: drawn)
        judged = judge_rows(pipeline, rows, others)
        assert (judged.ranks == [1] * 4) == ranks_are_1 and min(judged.ranks) >= 1
        if ranks_are_1:
            assert judged.psnr == [99.0] * 4
            assert summarize(judged, 10)["within_2_db"] == 4
        else:
            assert summarize(judged, 10)["own_first"] == 0


def test_ranks_are_places_by_cosine_among_all_different_pictures(pipeline):
    rows = [make_row("draw", seed) for seed in range(3)]
    others = [make_picture(seed) for seed in range(100, 108)]  # the first three are the rows' own
    judged = judge_rows(pipeline, rows, others)
    vectors = encode_pictures(pipeline.vision_language_model, pipeline.processor, others).flatten(1)
    drawn = encode_pictures(pipeline.vision_language_model, pipeline.processor, judged.drawn).flatten(1)
    near = torch.nn.functional.cosine_similarity(drawn[:, None], vectors[None], dim=-1)
    expected = [int((near[row] > near[row, row]).sum()) + 1 for row in range(3)]
    assert judged.ranks == expected


def counts(own_first=8, captions=10, compared=100, similarity=0.95):
    return {
        "captions": captions, "compared_with": compared, "own_first": own_first, "median_rank": 1, "within_2_db": 5,
        "ceiling_similarity": similarity,
    }  # fmt: skip


def test_the_sentence_has_both_groups():
    assert sentence(counts(), None) == (
        "8 of 10 trained captions draw their own picture nearest of 100 (median rank 1), 5 of them within 2 dB of the "
        "best that the decoder can draw."
    )
    assert sentence(counts(), counts(1)).endswith("; of the captions held out 1 of 10 (median rank 1).")


@pytest.mark.parametrize(
    ("trained", "flavour", "passes", "said"),
    [
        (counts(8), "portable", 5, None),
        (counts(2), "portable", 5, "--flavour full"),
        (counts(2), "full", 5, "each picture was seen 5 times. Raise --max_steps"),
        (counts(2), "full", 100, "raise --learning_rate or --lora_r"),
        (counts(2, similarity=0.7), "full", 100, "train the decoder on these pictures"),
        (counts(2, similarity=0.3), "portable", 5, "Train the decoder on these pictures first"),
        (counts(5, compared=3), "full", 5, "Raise --max_steps"),  # no better than chance
    ],
)
def test_a_run_that_learned_nothing_names_the_next_thing_to_change(trained, flavour, passes, said):
    found = advice(trained, flavour, passes)
    assert found is None if said is None else said in found


def test_rows_are_spread_evenly_and_packs_give_one():
    assert [row["id"] for row in pick_evenly(make_rows("d" * 10), 2)] == ["draw-0", "draw-5"]
    rows = make_rows("dudu")
    assert [row["id"] for row in pick_evenly(rows, 2)] == ["draw-0", "draw-2"]
    assert [row["id"] for row in pick_evenly([{"rows": [rows[1], rows[2]]}, {"rows": [rows[3]]}], 5)] == ["draw-2"]
    assert pick_evenly(make_rows("uu"), 3) == []


def run(checkpoint, data, out, *more, main=lora_generation.main):
    return main(
        [
            *("--model_name_or_path", str(checkpoint), "--data", str(data), "--output_dir", str(out)),
            *("--max_steps", "1", "--use_cpu", "True", "--disable_tqdm", "True", "--report_to", "none", *more),
        ]
    )


def test_a_run_ends_with_a_sentence_a_sheet_and_a_warning(checkpoint, tmp_path, capsys, caplog):
    data, heldout = write_captions(tmp_path / "data", 6), write_captions(tmp_path / "heldout", 2)
    more = ("--guard_drawing", str(heldout), "--guard_steps", "5", "--judge_rows", "4")
    run(checkpoint, data, tmp_path / "out", *more)
    learned = yaml.safe_load((tmp_path / "out/run.yaml").read_text())["learned"]
    assert learned["trained"]["captions"] == 4 and learned["trained"]["compared_with"] == 6
    assert learned["heldout"]["captions"] == 2
    said = capsys.readouterr().out
    assert f"learned: {learned['said']} Look at {tmp_path / 'out/learned.png'}." in said
    assert learned["said"] in (tmp_path / "out/README.md").read_text()
    assert Image.open(tmp_path / "out/learned.png").height > 6 * 128
    if learned["advice"]:
        assert f"this run has hardly learned its pictures: {learned['said']} {learned['advice']}" in caplog.text


def test_it_can_be_left_out_and_a_run_of_answers_has_none(checkpoint, tmp_path, capsys):
    run(checkpoint, write_captions(tmp_path / "data", 3), tmp_path / "out", "--judge_rows", "0")
    run(checkpoint, save_rows(tmp_path / "rows", make_rows("uu")), tmp_path / "two", main=lora_understanding.main)
    for name in ("out", "two"):
        assert yaml.safe_load((tmp_path / name / "run.yaml").read_text())["learned"] is None
        assert not (tmp_path / name / "learned.png").exists()
    assert "learned:" not in capsys.readouterr().out


def test_a_verdict_that_fails_loses_nothing_of_the_run(checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(verdict, "find_ceiling", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    run(checkpoint, write_captions(tmp_path / "data", 3), tmp_path / "out")
    assert (tmp_path / "out/run.yaml").is_file() and (tmp_path / "out/adapter_model.safetensors").is_file()
    assert "the run could not be judged (no memory)" in caplog.text


def test_the_guards_table_has_the_trained_side_first_and_marks_what_fell():
    first = {"step": 0, "understanding": {"text_loss": 1.0}, "drawing": {"image_loss": 2.0, "vector_r2": 0.1}}
    last = {"step": 70, "understanding": {"text_loss": 1.5}, "drawing": {"image_loss": 1.0, "vector_r2": 0.6}}
    lines = [
        line.split() for line in point_table([first, last], [("understanding", "text_loss")], ["drawing"]).splitlines()
    ]
    assert lines == [
        ["guard,", "step", "70", "before", "now"],
        ["drawing", "(trained)", "image_loss", "2", "1"],
        ["vector_r2", "0.1", "0.6"],
        ["understanding", "(not", "trained)", "text_loss", "1", "1.5", "worse"],
    ]
    assert point_table([first], [], []).splitlines()[0].split() == ["guard,", "step", "0", "before"]
