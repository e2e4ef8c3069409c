"""Claims about the two-sided guard: what it measures, when, what it leaves behind, and that training does not notice it."""

import json
import logging
import sys
import types

import pytest
import torch
import yaml
from PIL import Image

from finetune import lora_editing, lora_generation, lora_joint, lora_understanding
from finetune.data.collator import PiscesDataCollator
from finetune.guard import guard as guard_module
from finetune.guard import metrics
from finetune.guard import pictures as guard_pictures
from finetune.guard.guard import TwoSidedGuard, base_of, find_falls, guard_table
from finetune.guard.metrics import measure_drawing, measure_losses, measure_understanding
from finetune.guard.rows import GuardArguments, load_guard_rows, pick_rows
from tests.finetune.lora_fixtures import (
    make_adapted,
    make_picture,
    make_row,
    make_rows,
    make_trainer,
    save_checkpoint,
    save_rows,
)
from tests.fixtures import make_model, make_processor
from tests.modeling_pisces.pipeline.pipeline_fixtures import make_full_pipeline, make_pipeline


RECIPES = {
    "understanding": lora_understanding,
    "generation": lora_generation,
    "editing": lora_editing,
    "joint": lora_joint,
}


def watched(understanding: str = "uut", drawing: str = "dde") -> dict:
    """Rows of both sides that are in no training set here: their pictures have other seeds."""
    names = {"u": "understand", "t": "text", "d": "draw", "e": "edit"}
    sides = {"understanding": understanding, "drawing": drawing}
    return {
        side: [make_row(names[kind], 50 + seed) for seed, kind in enumerate(kinds)]
        for side, kinds in sides.items()
        if kinds
    }


def guarded_run(folder, guarded=True, rows=None, kinds="udte", resume=None, **settings):
    """Four steps with dropping noise on the vectors that are read back; returns trainer and guard."""
    model = make_adapted(gen_head_type="flow", gen_input_noise=0.3)
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, **settings}
    trainer = make_trainer(model, make_rows(kinds), folder, **settings)
    guard = TwoSidedGuard(trainer, rows or watched(), ["understanding"], every=2) if guarded else None
    if guard is not None:
        trainer.add_callback(guard)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, guard


# ---- what is measured ----


def conversation(*turns: str) -> dict:
    messages = []
    for number in range(0, len(turns), 2):
        for role, text in zip(("user", "assistant"), turns[number : number + 2], strict=True):
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    return {"id": "talk", "messages": messages}


def script_answers(model, processor, answers: dict[str, str], monkeypatch) -> list[list[str]]:
    """Let `generate` say a given text after a prompt that ends in a given question; returns the prompts by batch."""
    prompts: list[list[str]] = []

    def generate(input_ids, max_new_tokens, do_sample, use_cache, **inputs):
        assert not do_sample and use_cache
        prompts.append(processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        said = [next(said for asked, said in answers.items() if asked in prompt) for prompt in prompts[-1]]
        ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"][:max_new_tokens] for text in said]
        end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
        ids = [(found + [end] + [pad] * max_new_tokens)[:max_new_tokens] for found in ids]
        return torch.cat([input_ids, torch.tensor(ids)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    return prompts


def test_exact_match_is_the_share_of_equal_answers(monkeypatch):
    model, processor = make_model(), make_processor()
    rows = [conversation(f"q{n}?", answer) for n, answer in enumerate(["Red.", "two", "a star", "left", "no"])]
    said = {"q0?": " red", "q1?": "two stars and more than was asked", "q2?": "a star", "q3?": "right", "q4?": "no"}
    prompts = script_answers(model, processor, said, monkeypatch)
    assert measure_understanding(model, processor, rows, batch_size=2)["exact_match"] == 3 / 5
    assert [len(batch) for batch in prompts] == [2, 2, 1]


def test_rows_of_several_turns_are_asked_one_question_each_with_what_came_before(monkeypatch):
    model, processor = make_model(), make_processor()
    rows = [conversation("first?", "one", "second?", "two")] * 3
    prompts = script_answers(model, processor, {"second?": "two", "first?": "one"}, monkeypatch)
    assert measure_understanding(model, processor, rows)["exact_match"] == 1.0
    assert ["second?" in prompt for prompt in prompts[0]] == [False, True, False]
    assert "one" in prompts[0][1] and "one" not in prompts[0][0]


def test_long_answers_are_not_compared():
    """The tokenizer of the fixtures has one token per byte: 17 characters are too many."""
    metrics = measure_understanding(make_model(), make_processor(), [conversation("why?", "because it is seventeen")])
    assert set(metrics) == {"text_loss"}


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_losses_are_those_of_a_plain_loop(head):
    model, processor, rows = make_model(gen_head_type=head), make_processor(), make_rows("uddeut")
    collator, sums = PiscesDataCollator(processor), torch.zeros(4)
    with torch.no_grad():
        for row in rows:
            out = model(**collator([row]))
            sums += torch.stack(
                [out.text_loss_sum, out.num_text_tokens, out.image_loss_sum or torch.zeros(()), out.num_image_vectors]
            )
        assert measure_losses(model, processor, rows, "understanding")["text_loss"] == pytest.approx(
            float(sums[0] / sums[1]), rel=1e-5
        )
        drawn = measure_losses(model, processor, rows, "drawing", batch_size=1)["image_loss"]
    assert drawn == pytest.approx(float(sums[2] / sums[3]), rel=1e-5)


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_drawn_vectors_are_compared_with_those_of_the_picture(head):
    """Against one row at a time, and 1.0 for a model that draws exactly what is wanted."""
    model, processor, rows = make_model(gen_head_type=head), make_processor(), watched()["drawing"]
    with torch.no_grad():
        metrics, drawn = measure_drawing(model, processor, rows)
        targets = [PiscesDataCollator(processor)([row])["gen_pixel_values"] for row in rows]
        wanted = torch.cat([model.encode_gen_images(pixels) for pixels in targets])
        alone = torch.cat([measure_drawing(model, processor, [row])[1] for row in rows])
        again, _ = measure_drawing(model, processor, rows)
    assert drawn.shape == (3, 4, 12) and torch.allclose(drawn, alone, atol=1e-4)  # measured: 2e-6
    flat = wanted.flatten(0, 1)
    r2 = 1 - (drawn - wanted).square().mean() / (flat - flat.mean(0)).square().mean()
    assert metrics["vector_r2"] == pytest.approx(float(r2), abs=1e-4)
    cosines = [torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(drawn.flatten(0, 1), flat, strict=True)]
    assert metrics["vector_cosine"] == pytest.approx(float(sum(cosines) / 12), abs=1e-4)
    assert again == metrics

    model.generate = lambda **inputs: wanted
    with torch.no_grad():
        perfect, _ = measure_drawing(model, processor, rows)
    assert perfect["vector_r2"] == pytest.approx(1.0) and perfect["vector_cosine"] == pytest.approx(1.0)


def test_what_counts_as_a_fall():
    """A share may fall by the tolerance, a loss rise by that part of itself; NaN is a fall, getting better never is."""
    before = {
        "understanding": {"text_loss": 0.5, "exact_match": 0.9},
        "drawing": {"image_loss": 2.0, "vector_r2": 0.6},
    }
    now = {"understanding": {"text_loss": 0.52, "exact_match": 0.84}, "drawing": {"image_loss": 2.3, "vector_r2": 0.9}}
    falls = find_falls([before, now], 0.05)
    assert [(fall.side, fall.metric) for fall in falls] == [
        ("understanding", "exact_match"),
        ("drawing", "image_loss"),
    ]
    assert find_falls([before, now], 0.2) == [] and find_falls([now, before], 0.2) != find_falls([before, now], 0.2)
    now["drawing"]["image_loss"] = float("nan")
    assert ("drawing", "image_loss", 2.0) == find_falls([before, now], 0.2)[0][:3]


# ---- when, and what is left behind ----


def test_it_measures_before_during_and_after(tmp_path, capsys):
    _, guard = guarded_run(tmp_path, max_steps=5)
    assert [point["step"] for point in guard.points] == [0, 2, 4, 5]
    written = json.loads((tmp_path / "guard.json").read_text())
    assert written["points"] == guard.points and written["trained"] == ["understanding"]
    assert written["rows"]["drawing"] == ["draw-50", "draw-51", "edit-52"]
    tables = capsys.readouterr().out.split("guard, step ")[1:]
    assert len(tables) == 4
    words = [line.split() for line in tables[-1].splitlines()[:2]]
    before, now = (f"{point['understanding']['text_loss']:.4g}" for point in (guard.points[0], guard.points[-1]))
    assert words[0] == ["5", "before", "now"]
    assert words[1][:5] == ["understanding", "(trained)", "text_loss", before, now]
    assert {"image_loss", "vector_r2", "vector_cosine"} <= set(tables[-1].split())


def test_points_go_to_the_log_of_the_trainer(tmp_path):
    """And so to every tracker that `--report_to` names."""
    trainer, guard = guarded_run(tmp_path)
    logged = [p for p in trainer.state.log_history if "eval_guard_drawing_image_loss" in p]
    assert [point["step"] for point in logged] == [0, 2, 4]
    assert logged[-1]["eval_guard_understanding_text_loss"] == guard.points[-1]["understanding"]["text_loss"]


def test_the_first_and_the_last_point_are_of_the_model_before_and_after(tmp_path):
    trainer, guard = guarded_run(tmp_path)
    model, rows = trainer.model.eval(), watched()
    with torch.no_grad():
        after = measure_understanding(base_of(model), make_processor(), rows["understanding"])
        with model.disable_adapter():
            before = measure_understanding(base_of(model), make_processor(), rows["understanding"])
    assert guard.points[0]["understanding"] == pytest.approx(before)
    assert guard.points[-1]["understanding"] == pytest.approx(after)
    assert after["text_loss"] != pytest.approx(before["text_loss"], rel=1e-3)


def test_training_is_the_same_with_and_without_it(tmp_path):
    """Bit for bit, in a run whose losses draw random numbers."""
    (plain, _), (guarded, _) = guarded_run(tmp_path / "a", guarded=False), guarded_run(tmp_path / "b")
    curves = [[p["loss"] for p in trainer.state.log_history if "loss" in p] for trainer in (plain, guarded)]
    assert len(curves[0]) == 4 and curves[0] == curves[1]
    for (name, a), b in zip(plain.model.named_parameters(), guarded.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert guarded.model.training == plain.model.training


def test_the_default_interval_is_a_quarter_of_the_run(tmp_path):
    trainer = make_trainer(make_adapted(), make_rows("udte"), tmp_path, max_steps=8)
    guard = TwoSidedGuard(trainer, watched("u", ""))
    trainer.add_callback(guard)
    trainer.train()
    assert [point["step"] for point in guard.points] == [0, 2, 4, 6, 8]
    assert "drawing" not in guard.points[0]


@pytest.mark.parametrize("keep_file", [True, False])
def test_a_resumed_run_keeps_what_was_before(keep_file, tmp_path):
    """With `guard.json` its points; without, the model with the adapter disabled is measured."""
    _, whole = guarded_run(tmp_path, save_strategy="steps", save_steps=2)
    if not keep_file:
        (tmp_path / "guard.json").unlink()
    _, resumed = guarded_run(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert [point["step"] for point in resumed.points] == ([0, 2, 4] if keep_file else [0, 4])
    for side in ("understanding", "drawing"):
        assert resumed.points[0][side] == pytest.approx(whole.points[0][side], rel=1e-6)
        assert resumed.points[-1][side] == pytest.approx(whole.points[-1][side], rel=1e-6)


def test_points_of_other_rows_are_not_gone_on_with(tmp_path):
    guarded_run(tmp_path, save_strategy="steps", save_steps=2)
    _, resumed = guarded_run(tmp_path, rows=watched("ut", "d"), resume=str(tmp_path / "checkpoint-2"))
    assert [point["step"] for point in resumed.points] == [0, 4]


def test_it_warns_when_the_untouched_side_falls(tmp_path, caplog, monkeypatch):
    """Drawings that get worse while answers are trained; the warning says what to do."""
    losses = iter([1.0, 1.04, 1.2])
    monkeypatch.setattr(
        guard_module, "measure_drawing", lambda *args: ({"image_loss": next(losses), "vector_r2": 0.5}, None)
    )
    with caplog.at_level(logging.WARNING):
        _, guard = guarded_run(tmp_path, kinds="uuut")
    falls = [fall for fall in guard.record()["falls"] if fall["side"] == "drawing"]
    assert falls == [{"side": "drawing", "metric": "image_loss", "before": 1.0, "now": 1.2}]
    messages = [record.getMessage() for record in caplog.records if "drawing, which" in record.getMessage()]
    assert messages == [
        "guard, step 4: drawing, which this run does not train, got worse: image_loss 1 -> 1.2, more than "
        "--guard_tolerance 0.05 allows. Lower --learning_rate or --lora_r, train fewer steps, or mix rows of that side "
        "into --data with finetune.lora_joint."
    ]
    table = guard_table(guard.record())
    assert "| drawing (not trained) | image_loss | 1 | 1.2 | worse |" in table
    assert "| drawing (not trained) | vector_r2 | 0.5 | 0.5 |  |" in table


def test_it_is_silent_when_nothing_falls(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, guard = guarded_run(tmp_path, learning_rate=1e-7)
    assert guard.record()["falls"] == [] and "got worse" not in caplog.text


def test_of_a_model_in_shards_only_losses_are_measured(tmp_path):
    """Through the wrapped model, whose `config` may be something else; `generate` needs whole weights."""

    class Wrapped(torch.nn.Module):
        config = "not the model's"

        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, **inputs):
            return self.module(**inputs)

    trainer = make_trainer(make_adapted(), make_rows("ud"), tmp_path)
    guard = TwoSidedGuard(trainer, watched())
    with guard._undisturbed():
        whole = {side: guard._measure(side)[0] for side in guard.rows}
        trainer.is_fsdp_enabled, trainer.model_wrapped = True, Wrapped(trainer.model)
        sharded = {side: guard._measure(side) for side in guard.rows}
    assert sharded == {
        "understanding": ({"text_loss": pytest.approx(whole["understanding"]["text_loss"])}, None),
        "drawing": ({"image_loss": pytest.approx(whole["drawing"]["image_loss"])}, None),
    }


def test_a_resumed_run_without_adapter_and_file_says_where_its_first_point_is(tmp_path):
    trainer = make_trainer(make_model(), make_rows("ud"), tmp_path, save_strategy="steps", max_steps=2, save_steps=1)
    trainer.train()
    again = make_trainer(make_model(), make_rows("ud"), tmp_path, max_steps=2)
    guard = TwoSidedGuard(again, watched("u", ""))
    again.add_callback(guard)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [point["step"] for point in guard.points] == [1, 2]


# ---- sheets ----


def test_a_checkpoint_with_a_decoder_gives_sheets(tmp_path, monkeypatch):
    make_full_pipeline(gen_head_type="flow").save_pretrained(tmp_path / "base")
    save_checkpoint(tmp_path / "base", gen_head_type="flow")
    trainer = make_trainer(make_adapted(gen_head_type="flow"), make_rows("udte"), tmp_path / "out", max_steps=2)
    decoder = guard_pictures.load_decoder(str(tmp_path / "base"), base_of(trainer.model), make_processor())
    sent = fake_trackers(trainer, monkeypatch)
    trainer.add_callback(TwoSidedGuard(trainer, watched(), every=2, decoder=decoder))
    trainer.train()
    sheets = sorted(path.name for path in (tmp_path / "out/guard").iterdir())
    assert sheets == ["step-000000.png", "step-000002.png"]
    first, last = (Image.open(tmp_path / "out/guard" / name) for name in sheets)
    assert first.size == last.size and first.width == 12 + 3 * (128 + 12)  # three rows, side by side
    assert first.tobytes() != last.tobytes()
    for tracker in ("wandb", "trackio"):
        assert [(tag, step) for name, tag, step in sent if name == tracker] == [
            ("guard/drawings", 0),
            ("guard/drawings", 2),
        ]


def fake_trackers(trainer, monkeypatch) -> list:
    """Packages that take pictures, as the trainer would find them; returns what they are sent."""
    sent = []
    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.Image = lambda picture: picture.size
        module.log = lambda values, name=name: sent.extend(
            (name, tag, values["train/global_step"]) for tag in values if tag.startswith("guard/")
        )
        monkeypatch.setitem(sys.modules, name, module)
    trainer.args.report_to = ["wandb", "trackio"]
    return sent


def test_tensorboard_gets_the_sheet(tmp_path, monkeypatch):
    class Writer:
        def add_image(self, tag, pixels, step, dataformats):
            self.found = (tag, pixels.shape, step, dataformats)

    class TensorBoard:
        tb_writer = Writer()

    monkeypatch.setattr(guard_pictures, "TensorBoardCallback", TensorBoard)
    trainer = make_trainer(make_adapted(), make_rows("d"), tmp_path)
    trainer.callback_handler.callbacks.append(TensorBoard())
    guard_pictures.report_picture(trainer, Image.new("RGB", (7, 5)), 3)
    assert TensorBoard.tb_writer.found == ("guard/drawings", (5, 7, 3), 3, "HWC")


def test_a_sheet_shows_at_most_eight_rows_and_returns_the_decoder():
    rows = [make_row("draw", seed) for seed in range(10)]
    pipe = make_pipeline(vision_language_model=make_model(), processor=make_processor())
    sheet = guard_pictures.make_sheet(pipe, rows, torch.zeros(10, 4, 12), 7)
    assert sheet.width == 12 + 8 * (128 + 12)
    assert pipe.unet.device.type == "cpu"


def test_without_a_decoder_there_is_a_sentence(tmp_path, caplog):
    save_checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert guard_pictures.load_decoder(str(tmp_path), make_model(), make_processor()) is None
    assert "has no decoder, so there will be numbers and no sheets" in caplog.text


def test_an_edit_is_made_when_the_drawing_is_nearer_to_the_result_than_to_the_source(monkeypatch):
    """Drawings of known distance: the result itself, the source itself, and a row whose two pictures are the same."""
    model, processor = make_model(gen_head_type="mlp"), make_processor()
    rows = [make_row("edit", seed) for seed in (60, 61, 62)]
    rows[2]["messages"][1]["content"][0]["image"] = rows[2]["messages"][0]["content"][0]["image"]
    pictures = [row["messages"][turn]["content"][0]["image"] for row, turn in zip(rows, (1, 0, 0), strict=True)]
    made = metrics.encode_pictures(model, processor, pictures)
    monkeypatch.setattr(metrics, "draw_vectors", lambda *args: made)
    found, drawn = metrics.measure_editing(model, processor, rows)
    assert found["nearer_result"] == 0.5 and torch.equal(drawn, made)
    assert {"image_loss", "vector_r2", "vector_cosine"} < found.keys()
    found, _ = metrics.measure_editing(model, processor, rows[2:])
    assert "nearer_result" not in found


# ---- rows and flags ----


def test_rows_are_spread_over_the_source_and_have_the_side(tmp_path):
    data = save_rows(tmp_path, make_rows("ud" * 12))
    rows = pick_rows([str(data)], "drawing", 4)
    assert [row["id"] for row in rows] == ["draw-1", "draw-7", "draw-13", "draw-19"]
    assert [row["id"] for row in pick_rows(str(data), "understanding", 99)] == [
        f"understand-{n}" for n in range(0, 24, 2)
    ]
    picture = rows[0]["messages"][1]["content"][0]["image"]
    assert isinstance(picture, Image.Image) and picture.tobytes() == make_picture(101).tobytes()


@pytest.mark.parametrize(
    ("side", "kinds", "expected"),
    [
        ("drawing", "uut", "a picture in an assistant turn"),
        ("editing", "uutd", "a picture in a user turn before one in an assistant turn"),
        ("understanding", "dd", "words in an assistant turn"),
    ],
)
def test_a_source_without_the_side_is_refused(side, kinds, expected, tmp_path):
    data = save_rows(tmp_path, make_rows(kinds))
    with pytest.raises(ValueError, match=f"--guard_{side} .*rows.jsonl.*none of its rows has {expected}"):
        pick_rows(str(data), side, 4)


def test_a_side_that_nothing_watches_is_named_with_its_flag(tmp_path, caplog):
    flags = GuardArguments(guard_understanding=[str(save_rows(tmp_path, make_rows("uu")))])
    with caplog.at_level(logging.WARNING):
        rows = load_guard_rows(flags, ["understanding"], draws=True)
    assert list(rows) == ["understanding", "text"] and len(rows["understanding"]) == 2
    assert "guard: nothing watches drawing in this run; though it is not trained, it can get worse" in caplog.text
    assert "add --guard_drawing ROWS" in caplog.text and "nothing watches understanding" not in caplog.text


def test_editing_is_missed_by_whoever_trains_it_alone(caplog):
    for trained, is_missed in ((["editing"], True), (["understanding", "generation"], False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_guard_rows(GuardArguments(guard_text=["off"]), trained, draws=True)
        assert ("nothing watches editing" in caplog.text and "--guard_editing ROWS" in caplog.text) == is_missed


def test_a_model_that_cannot_draw_has_no_drawing_to_watch(caplog):
    with caplog.at_level(logging.WARNING):
        assert load_guard_rows(GuardArguments(guard_text=["off"]), ["understanding"], draws=False) == {}
    assert "nothing watches drawing" not in caplog.text and "what it could do before can be lost" in caplog.text
    with pytest.raises(ValueError, match="--guard_drawing: this checkpoint cannot draw"):
        load_guard_rows(GuardArguments(guard_drawing=["x"]), ["understanding"], draws=False)
    with pytest.raises(ValueError, match="--guard_editing: this checkpoint cannot draw"):
        load_guard_rows(GuardArguments(guard_editing=["x"]), ["understanding"], draws=False)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("guard_steps", 0, "--guard_steps 0: expected a whole number from 1"),
        ("guard_rows", 0, "--guard_rows 0: expected"),
        ("guard_tolerance", -0.1, "--guard_tolerance -0.1: expected a number from 0"),
    ],
)
def test_impossible_flags_are_refused(flag, value, message):
    with pytest.raises(ValueError, match=message):
        GuardArguments(**{flag: value})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_the_flags_and_records_what_was_found(name, tmp_path):
    start = save_checkpoint(tmp_path / "start")
    kinds = {"understanding": "uut", "generation": "dde", "editing": "eed", "joint": "udte"}[name]
    data, watch = save_rows(tmp_path / "data", make_rows(kinds)), save_rows(tmp_path / "watch", make_rows("udude"))
    flags = ["--model_name_or_path", str(start), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    flags += ["--max_steps", "2", "--use_cpu", "True", "--disable_tqdm", "True", "--guard_steps", "1"]
    flags += ["--guard_rows", "1", "--guard_understanding", str(watch), "--guard_drawing", str(watch)]
    flags += ["--guard_editing", str(watch)]
    RECIPES[name].main(flags)
    record = yaml.safe_load((tmp_path / "out/run.yaml").read_text())
    assert [point["step"] for point in record["guard"]["points"]] == [0, 1, 2]
    trained = {"understanding": ["understanding"], "generation": ["drawing"], "joint": ["understanding", "drawing"]}
    trained |= {"editing": ["editing"]}
    assert record["guard"]["trained"] == trained[name]
    card = (tmp_path / "out/README.md").read_text()
    for side in ("understanding", "drawing", "editing"):
        assert f"| {side} ({'trained' if side in trained[name] else 'not trained'}) |" in card
