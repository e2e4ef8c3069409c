"""Claims about DPO on answers: the data, the loss against TRL's own parts, the reference, and a run as a command."""

import copy
import json
import math

import pytest
import torch
import yaml
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForMultimodalLM
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from finetune.dpo_understanding import PiscesDPOConfig, PiscesDPOTrainer, main
from finetune.preferences.pairs import TextPairCollator, load_pairs
from tests.finetune.lora_fixtures import (
    ListRows,
    make_adapted,
    make_picture,
    make_rows,
    save_checkpoint,
    save_rows,
)
from tests.finetune.preferences.preference_fixtures import (
    adapter_of,
    curve,
    dpo_flags,
    make_picture_pair,
    make_text_pair,
    save_pairs,
    text_turn,
)
from tests.fixtures import make_model, make_processor


PAIRS = [make_text_pair(seed) for seed in range(4)]


def make_trainer(output, pairs=PAIRS, model=None, **settings) -> PiscesDPOTrainer:
    settings = {
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        **settings,
    }
    args = PiscesDPOConfig(output_dir=str(output), **settings)
    return PiscesDPOTrainer(model or make_adapted(), args, ListRows(pairs), processing_class=make_processor())


def log_probabilities(model, pair, answer: str) -> float:
    """log p(answer | prompt), token by token from the logits, one conversation at a time."""
    batch = TextPairCollator(make_processor()).conversations([pair], [answer])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits[0, :-1].float().log_softmax(-1)
    targets = labels[0, 1:]
    kept = targets != -100
    return float(logits[kept].gather(1, targets[kept].unsqueeze(1)).sum())


def test_a_batch_is_what_trl_makes_of_the_same_pairs():
    def as_trl(pair):
        pair = copy.deepcopy(pair)
        return {**pair, "images": [pair["prompt"][0]["content"][0].pop("image")]}

    expected = DataCollatorForVisionPreference(make_processor())([as_trl(pair) for pair in PAIRS])
    found = TextPairCollator(make_processor())(PAIRS)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_only_the_last_turn_is_compared():
    pair = make_text_pair(0)
    earlier = [text_turn("user", "what is it?", make_picture(3)), text_turn("assistant", "a thing")]
    pair["prompt"] = [*earlier, text_turn("user", "what color?")]
    batch = TextPairCollator(make_processor())([pair])
    tokenizer = make_processor().tokenizer
    answers = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert answers == ["red<|eot_id|>", "a green one<|eot_id|>"]


def test_the_first_loss_is_ln_2_and_margins_grow_from_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    losses, margins = curve(trainer), curve(trainer, "rewards/margins")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and margins[0] == pytest.approx(0, abs=1e-6)
    assert losses[2] < losses[1] < losses[0] and margins[2] > margins[1] > 0.1


def test_the_reference_is_the_model_with_its_adapter_disabled(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"]  # TRL's copy of the adapter is gone
    batch = trainer.data_collator(PAIRS)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    base = make_model()
    for found, answer in ((chosen, "chosen"), (rejected, "rejected")):
        expected = torch.tensor([log_probabilities(base, pair, answer) for pair in PAIRS])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_loss_of_a_batch_is_that_of_its_pairs_one_by_one(tmp_path):
    """Against the formula of the paper (arXiv 2305.18290, eq. 7), from plain logits of both models."""
    trainer = make_trainer(tmp_path, beta=0.3)
    trainer.train()
    model, base = trainer.model.eval(), make_model()
    expected = []
    for pair in PAIRS:
        ratios = [
            log_probabilities(model, pair, name) - log_probabilities(base, pair, name)
            for name in ("chosen", "rejected")
        ]
        expected.append(-F.logsigmoid(torch.tensor(0.3 * (ratios[0] - ratios[1]))))
    with torch.no_grad():
        batched = trainer.compute_loss(trainer.model, trainer.data_collator(PAIRS))
        single = [trainer.compute_loss(trainer.model, trainer.data_collator([pair])) for pair in PAIRS]
    assert min(expected) < 0.6  # the adapter has moved
    torch.testing.assert_close(torch.stack(single), torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batched, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_accumulation_changes_nothing(tmp_path):
    runs = []
    for size in (4, 1):
        trainer = make_trainer(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        trainer.train()
        runs.append(trainer)
    assert curve(runs[0]) == pytest.approx(curve(runs[1]), abs=1e-5)
    for name, value in adapter_of(runs[0]).items():
        torch.testing.assert_close(adapter_of(runs[1])[name], value, rtol=0, atol=1e-4)


# ---- the command


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_three_steps_of_the_command_leave_an_adapter_that_loads(start, tmp_path):
    data = save_pairs(tmp_path / "data", PAIRS)
    eval_flags = ("--eval_data", str(data), "--eval_strategy", "steps", "--eval_steps", "3")
    trainer = main(dpo_flags(start, data, tmp_path / "out", "--flavour", "full", *eval_flags))
    losses = curve(trainer)
    assert len(losses) == 3 and losses[2] < losses[0] and curve(trainer, "eval_loss")[-1] < math.log(2)
    folder = tmp_path / "out"
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert record["recipe"] == "dpo_understanding" and "4 rows (4 answer)" in record["data"]
    assert not (folder / "ref").exists() and not list(folder.glob("*.bin"))
    loaded = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(start), folder).eval()
    trained = log_probabilities(trainer.model.eval(), PAIRS[0], "chosen")
    assert log_probabilities(loaded, PAIRS[0], "chosen") == pytest.approx(trained, abs=1e-4)


def test_an_interrupted_run_ends_as_the_uninterrupted_one(start, tmp_path):
    data = save_pairs(tmp_path / "data", PAIRS)
    whole = main(dpo_flags(start, data, tmp_path / "out", "--save_steps", "2"))
    (tmp_path / "out/run.yaml").unlink()
    (tmp_path / "out/checkpoint-3").rename(tmp_path / "gone")  # as if it had died in step 3
    resumed = main(dpo_flags(start, data, tmp_path / "out", "--save_steps", "2"))
    assert resumed.state.global_step == 3 and curve(resumed) == curve(whole)
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], value)


def test_a_guard_watches_the_run_and_takes_none_of_its_metrics(start, tmp_path):
    """TRL adds the metrics of the step under way to whatever is logged; a guard logs in the middle of a step."""
    data, watched = save_pairs(tmp_path / "data", PAIRS), save_rows(tmp_path / "watched", make_rows("uu"))
    trainer = main(
        dpo_flags(start, data, tmp_path / "out", "--guard_understanding", str(watched), "--guard_steps", "1")
    )
    assert (tmp_path / "out/guard.json").is_file()
    points = [point for point in trainer.state.log_history if "rewards/margins" in point]
    assert len(points) == 3 and all("loss" in point for point in points)


def test_a_dry_run_marks_the_chosen_answer(start, tmp_path, capsys):
    data = save_pairs(tmp_path / "data", PAIRS)
    assert main(dpo_flags(start, data, tmp_path / "out", "--dry_run", "True")) is None
    printed = capsys.readouterr().out
    assert "4 (4 answer)" in printed and ">>red<|eot_id|><<" in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--pack_to", "100"], "--pack_to 100: this recipe neither packs rows nor reads a cache"),
        (["--picture_cache", "towers"], "--picture_cache towers: this recipe neither packs rows nor reads a cache"),
        (["--sync_ref_model", "True"], "the reference is the model with the adapter disabled"),
        (["--max_length", "10"], r"none of its 4 pairs has at most 10 tokens \(shortest: \d+\)"),
    ],
)
def test_settings_that_cannot_work_stop_before_training(more, message, start, tmp_path):
    data = save_pairs(tmp_path / "data", PAIRS)
    with pytest.raises(ValueError, match=message):
        main(dpo_flags(start, data, tmp_path / "out", *more))


def test_pairs_of_pictures_are_sent_to_the_other_recipe(start, tmp_path):
    data = save_pairs(tmp_path / "data", [make_picture_pair(0)])
    with pytest.raises(ValueError, match=r"\{'draw': 1\}. Pairs of pictures need finetune.dpo_generation"):
        main(dpo_flags(start, data, tmp_path / "out"))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan. Lower --learning_rate"):
        trainer.train()


# ---- the data


@pytest.fixture
def load(tmp_path):
    """Records written as JSON Lines beside two pictures, loaded as pairs."""

    def load_records(*records, name="pairs.jsonl", **keys):
        for number in range(2):
            make_picture(number).save(tmp_path / f"{number}.png")
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records) + "\n")
        return load_pairs([{"path": str(tmp_path / name), **keys}], make_processor(), make_model(), None)

    return load_records


FORMS = [
    {"image": "0.png", "prompt": "what color?", "chosen": "red", "rejected": "blue"},
    {"images": ["0.png"], "prompt": "<image>what color?", "chosen": "red", "rejected": "blue"},
    {
        "images": ["0.png"],
        "prompt": [{"role": "user", "content": "what color?"}],
        "chosen": [{"role": "assistant", "content": "red"}],
        "rejected": [{"role": "assistant", "content": "blue"}],
    },
    {
        "images": ["0.png"],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}],
        "chosen": "red",
        "rejected": "blue",
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "what color?"}],
            },
            {"role": "assistant", "content": "red"},
        ],
        "rejected": "blue",
    },
]


@pytest.mark.parametrize("record", FORMS)
def test_all_forms_of_a_record_are_the_same_pair(record, load):
    (pair,) = [load(record).dataset[0]]
    shown, asked = pair["prompt"][0]["content"]
    assert shown["image"].tobytes() == make_picture(0).tobytes() and asked == {"type": "text", "text": "what color?"}
    assert pair["chosen"][0]["content"] == [{"type": "text", "text": "red"}]
    assert pair["rejected"][0] == {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}


def test_columns_have_other_names_if_the_source_says_so(load):
    record = {"picture": "0.png", "question": "what color?", "good": "red", "bad": "blue"}
    columns = {"image": "picture", "prompt": "question", "chosen": "good", "rejected": "bad"}
    assert load(record, columns=columns).dataset[0]["rejected"][0]["content"][0]["text"] == "blue"


def test_a_table_with_pictures_inside_is_read(tmp_path):
    import datasets

    make_picture(0).save(tmp_path / "0.png")
    record = {
        "images": [{"bytes": (tmp_path / "0.png").read_bytes(), "path": None}],
        **{k: FORMS[2][k] for k in ("prompt", "chosen", "rejected")},
    }
    datasets.Dataset.from_list([record] * 3).to_parquet(tmp_path / "pairs.parquet")
    rows = load_pairs([{"path": str(tmp_path / "pairs.parquet"), "max_rows": 2}], make_processor(), make_model(), None)
    assert len(rows.dataset) == 2 and rows.sides == {"answer": 2}
    assert rows.dataset[1]["prompt"][0]["content"][0]["image"].tobytes() == make_picture(0).tobytes()


GOOD = FORMS[0]
BAD = [
    ({**GOOD, "rejected": "red"}, "chosen and rejected are the same"),
    ({**GOOD, "rejected": 3}, "rejected: found int 3, expected a text or one assistant message"),
    ({**GOOD, "image": "9.png"}, "no file '9.png'"),
    ({**GOOD, "image": "../9.png"}, "leads out of the data folder"),
    (
        {"prompt": "a", "chosen": "b"},
        "found fields prompt, chosen, expected one of these sets: prompt, chosen and rejected",
    ),
    ({**GOOD, "chosen": ""}, "with the chosen answer: .*says and draws nothing"),
    (["a"], "found list .*expected an object with fields"),
    ({"messages": [{"role": "user", "content": "a"}], "rejected": "b"}, "expected a prompt and the chosen answer"),
    (
        {**GOOD, "rejected": [{"role": "assistant", "content": [{"type": "image", "image": "1.png"}]}]},
        "one has a picture and the other has none",
    ),
    ({**GOOD, "prompt": "<image>a<image>b"}, "found 2 <image> places but 1 pictures"),
]


@pytest.mark.parametrize("record, message", BAD)
def test_a_bad_record_is_named_with_its_line(record, message, load):
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        load(record, max_bad_records=0)


def test_a_few_bad_records_are_left_out(load):
    rows = load(GOOD, BAD[0][0], GOOD, max_bad_records=1)
    assert len(rows.dataset) == 2 and rows.dataset.num_bad_records == 1


def test_pairs_that_are_too_long_are_left_out_by_name(load):
    rows = load({**GOOD, "id": "short"}, {**GOOD, "id": "long", "rejected": "blue " * 100})
    limit = max(rows.lengths) - 1
    (path,) = [rows.dataset.store]
    assert len(path) == 2
    shorter = load_pairs([{"path": rows.dataset.name}], make_processor(), make_model(), limit)
    assert shorter.too_long == [("long", limit + 1)] and len(shorter.dataset) == 1


@pytest.mark.parametrize(
    "keys, message",
    [({"streaming": True}, "a stream cannot hold preferences"), ({"format": "scenes"}, "format scenes cannot hold")],
)
def test_sources_without_an_index_are_refused(keys, message, load):
    with pytest.raises(ValueError, match=message):
        load(GOOD, **keys)


def test_several_sources_are_refused():
    with pytest.raises(ValueError, match="found 2 sources of preferences, expected one"):
        load_pairs(["a.jsonl", "b.jsonl"], make_processor(), make_model(), None)
