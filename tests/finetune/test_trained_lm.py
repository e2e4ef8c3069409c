"""The short form of `make test-real-parts`: a small language model that was trained learns to draw and keeps what it knew.

Random weights have no facts to lose and no habits to break; the model in tests/tiny_lm answers plain questions.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.checks.real_parts import (
    compare_text,
    gap_of_logits,
    image_openings,
    new_token_loss,
    open_checkpoint,
    ranks_of_start,
    text_right,
)
from benchmarks.real_parts import questions_of
from conversion.assemble import AssembleArguments, assemble
from conversion.merge_adapter import merge_adapter
from finetune import lora_generation
from finetune.guard.rows import PLAIN_TEXT


ROOT = Path(__file__).parents[2]
TINY_LM, TOWERS = ROOT / "tests/tiny_lm/model", str(ROOT / "pisces-tiny")
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple", "grey", "pink", "brown", "cyan")
THINGS = ("square", "wall", "sky", "flag")


def drawing_rows(words=("draw a {} {}", "please draw the {} {}"), colours=COLOURS[:8]):
    """Requests with the picture of their colour, opened."""
    return [
        {
            "id": f"{colour}-{thing}",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": words[place % 2].format(colour, thing)}]},
                {"role": "assistant", "content": [{"type": "image", "image": Image.new("RGB", (64, 64), colour)}]},
            ],
        }
        for place, (colour, thing) in enumerate((colour, thing) for colour in colours for thing in THINGS)
    ]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The assembled checkpoint, an adapter of forty steps, and the two merged."""
    folder = tmp_path_factory.mktemp("trained")
    parts = {"vision_tower": TOWERS, "gen_vision_tower": TOWERS, "decoder": TOWERS}
    assemble(AssembleArguments(str(TINY_LM), dtype="float32", **parts), folder / "pisces")
    (folder / "data").mkdir()
    lines = []
    for row in drawing_rows():
        row["messages"][1]["content"][0]["image"].save(folder / f"data/{row['id']}.png")
        row["messages"][1]["content"][0]["image"] = f"{row['id']}.png"
        lines.append(json.dumps(row))
    (folder / "data/rows.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--model_name_or_path", str(folder / "pisces"), "--data", str(folder / "data/rows.jsonl")]
    flags += ["--output_dir", str(folder / "adapter"), "--max_steps", "40", "--per_device_train_batch_size", "8"]
    flags += ["--save_strategy", "no", "--use_cpu", "True", "--disable_tqdm", "True", "--guard_steps", "40"]
    flags += ["--learning_rate", "2e-3"]  # of a model this small; the rule is for those that know a language
    lora_generation.main(flags)
    merge_adapter(folder / "pisces", folder / "adapter", folder / "merged")
    return folder


@pytest.fixture(scope="module")
def adapted(work):
    return open_checkpoint(work / "pisces", adapter=work / "adapter")


def test_the_language_model_knows_something():
    lines = (ROOT / "tests/tiny_lm/model/model.safetensors").stat().st_size
    assert lines < 1_100_000
    model, processor = open_checkpoint_alone()
    assert sum(text_right(model, processor, questions_of(PLAIN_TEXT))) >= 50


def open_checkpoint_alone():
    class TextProcessor:
        """The tokenizer, asked as a processor is: by conversations whose contents are lists of parts."""

        def __init__(self):
            self.tokenizer = AutoTokenizer.from_pretrained(TINY_LM, padding_side="left")

        def apply_chat_template(self, conversations, processor_kwargs=None, **options):
            plain = [
                [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in conversation]
                for conversation in conversations
            ]
            return self.tokenizer.apply_chat_template(plain, padding=True, **options)

        def batch_decode(self, *args, **options):
            return self.tokenizer.batch_decode(*args, **options)

    return AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32).eval(), TextProcessor()


def test_assembled_it_writes_what_it_writes_alone(work):
    model, processor = open_checkpoint(work / "pisces")
    alone, own = open_checkpoint_alone()
    asked = [question for question, _ in questions_of(PLAIN_TEXT)][::3]
    found = compare_text(model, processor, alone, own.tokenizer, asked)
    assert (found["equal_answers"], found["equal_tokens"]) == (1.0, 1.0)


def test_the_new_tokens_are_learned(adapted):
    """Where they stand in rows like those it was taught; both start at ln 512 = 6.2 or above."""
    assert new_token_loss(*adapted, drawing_rows()[::3])["mean"] < 0.5


def test_a_request_opens_an_image_and_a_question_seldom_does(adapted):
    """Half a million weights know few words: the bars of a real model are those of `make test-real-parts`."""
    requests = [row["messages"][0]["content"][0]["text"] for row in drawing_rows()]
    questions = [question for question, _ in questions_of(PLAIN_TEXT)]
    opened, wrongly = (image_openings(*adapted, texts)["opened"] for texts in (requests, questions))
    assert opened >= 0.9 * len(requests) and wrongly <= 0.25 * len(questions)
    assert ranks_of_start(*adapted, requests)["median"] == 0 < ranks_of_start(*adapted, questions)["median"]


def test_what_it_knew_survives_forty_steps_of_drawing(work):
    points = json.loads((work / "adapter/guard.json").read_text())["points"]
    assert points[0]["text"]["right"] >= 0.9 and points[-1]["text"]["kept"] >= 0.95
    assert "fact-1" in points[-1]["text_right"], "the capital of France"


def test_the_merged_model_computes_the_same(work, adapted):
    assert gap_of_logits(open_checkpoint(work / "merged")[0], adapted[0]) < 1e-5
