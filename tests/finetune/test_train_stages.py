"""Claims about `finetune.parts.stages`, `finetune.train_stages` and `finetune.parts`, at toy size."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor, SiglipVisionConfig, SiglipVisionModel

from finetune.data.collator import PiscesDataCollator
from finetune.parts import assemble as tiny
from finetune.parts.captioned import load_pictures, prepare
from finetune.parts.pictures import to_pixel_values
from finetune.parts.stages import StageConversations as Conversations
from finetune.parts.stages import _sample_turns
from finetune.scenes.edits import write_edits
from finetune.scenes.render import write_scenes
from finetune.train_stages import StageArguments, train_stage
from modeling_pisces import PiscesGenVisionConfig, PiscesGenVisionModel
from tests.fixtures import make_model


ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", num_scenes=24, seed=3)


def StageConversations(data: Path, *args, **settings) -> Conversations:
    """Of a data folder, which is prepared beside itself."""
    return Conversations(load_pictures(data, folder=data.with_name("prepared")), *args, **settings)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory) -> Path:
    """A checkpoint as `finetune.parts assemble` writes it, with small random towers."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    vision = SiglipVisionConfig(image_size=64, patch_size=16, vision_use_head=False, **SMALL)
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    gen_vision = PiscesGenVisionConfig(image_size=64, patch_size=16, output_size=8, use_class_token=False, **SMALL)
    PiscesGenVisionModel(gen_vision).save_pretrained(folder / "gen_vision")
    tiny.assemble(data, folder / "vision", folder / "gen_vision", folder / "checkpoint", "flow", seed=0)
    return folder / "checkpoint"


@pytest.mark.parametrize("both", ["vision_tower", "gen_vision_tower"])
def test_one_tower_can_serve_both_sides(data, start, tmp_path, both):
    """Either tower for both; drawn vectors are whitened, and reading them starts from the layer that is named."""
    tiny.split_towers(start, tmp_path)
    layer = {"vision_tower": None, "gen_vision_tower": -1}[both]
    towers = (tmp_path / both, tmp_path / both, tmp_path / "out")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "gen_pool_stride": 4, "gen_loss_type": "cosine"}
    tiny.assemble(data, *towers, "mlp", seed=0, whiten=True, vision_feature_layer=layer, **sizes)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_gen_image_tokens == 1 and model.config.text_config.hidden_size == 64
    assert model.config.gen_loss_type == model.model.gen_head.loss_type == "cosine"
    pictures = to_pixel_values(load_pictures(data, folder=data.with_name("prepared")).pictures)
    vectors = model.encode_gen_images(pictures).flatten(0, 1)
    torch.testing.assert_close(vectors.std(0, correction=0), torch.ones(vectors.shape[1]), atol=1e-3, rtol=0)
    tower = AutoModel.from_pretrained(tmp_path / both).eval()
    with torch.no_grad():
        seen = tower(pictures, output_hidden_states=True)
    expected = seen.last_hidden_state if layer is None else seen.hidden_states[layer]
    assert expected.shape[-1] == 16 and torch.equal(model.encode_images(pictures), expected)


def run_arguments(start: Path, data: Path, output: Path, **settings) -> StageArguments:
    settings = {"max_steps": 4, "batch_size": 4, "warmup_steps": 1, "log_steps": 1, "save_steps": 2, **settings}
    return StageArguments(checkpoint=str(start), data=[str(data)], output=str(output), **settings)


def test_a_row_depends_on_seed_stage_and_index_alone(data):
    first = StageConversations(data, "instruct", num_rows=64, batch_size=4, seed=5)
    second = StageConversations(data, "instruct", num_rows=128, batch_size=4, seed=5)
    assert [first[i] for i in (0, 5, 40)] == [second[i] for i in (0, 5, 40)]
    assert first[0] != StageConversations(data, "instruct", num_rows=64, batch_size=4, seed=6)[0]


def test_blocks_follow_the_pattern(data):
    rows = StageConversations(data, "pretrain", num_rows=24, batch_size=4, pattern="ugg")
    draws = [rows[i]["messages"][-1]["content"][0]["type"] == "image" for i in range(24)]
    assert draws == ([False] * 4 + [True] * 8) * 2


def test_a_block_holds_rows_of_similar_length_and_every_length_comes(data):
    made = StageConversations(data, "instruct", num_rows=16 * 8, batch_size=8, pattern="g")
    lengths = [len(made[i]["messages"][0]["content"][0]["text"]) for i in range(16 * 8)]
    blocks = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
    padded = sum(max(block) * len(block) for block in blocks)
    assert padded < 1.25 * sum(lengths)  # in random order: more than 1.8
    assert blocks != sorted(blocks)  # no curriculum by length


def test_a_discussion_draws_and_then_answers_about_the_drawing(data):
    rows = StageConversations(data, "instruct", num_rows=16, batch_size=4, pattern="d")
    for index in range(16):
        roles = [message["role"] for message in rows[index]["messages"]]
        kinds = [[part["type"] for part in message["content"]] for message in rows[index]["messages"]]
        assert roles == ["user", "assistant"] * 3
        assert kinds == [["text"], ["image"]] + [["text"]] * 4
        assert rows[index]["messages"][0]["content"][0]["text"]  # never about the empty prompt


@pytest.fixture(scope="module")
def edits(data, tmp_path_factory) -> Path:
    """Scenes and edits of scenes, prepared together."""
    folder = tmp_path_factory.mktemp("edits")
    write_edits(folder / "edits", num_edits=24, seed=3)
    return prepare([str(data), str(folder / "edits" / "rows.jsonl")], None, folder / "ready")


def test_an_edit_shows_a_picture_and_draws_what_the_instruction_gives(edits):
    found = load_pictures(edits)
    vectors = torch.arange(len(found.records))[:, None, None].expand(-1, 4, 8)
    rows = Conversations(found, "review", num_rows=256, batch_size=4, pattern="e", vectors=vectors)
    wanted = {
        (found.pictures[source if turn == 0 else turns[turn - 1]["picture"]].sum().item(), turns[turn]["picture"])
        for source, record in enumerate(found.records)
        for turns in record.get("edits", ())
        for turn in range(len(turns))
    }
    lengths = set()
    for index in range(256):
        messages = rows[index]["messages"]
        first, *later = [[part["type"] for part in message["content"]] for message in messages]
        assert first == ["image", "text"] and later in ([["image"]], [["image"], ["text"], ["image"]])
        lengths.add(len(messages))
        shown = np.asarray(messages[0]["content"][0]["image"], dtype=np.int64).sum().item()
        assert (shown, int(messages[1]["content"][0]["image_vectors"][0, 0])) in wanted
    assert lengths == {2, 4}  # chained edits both ways: as one conversation, and each turn alone
    empty = sum(rows[index]["messages"][0]["content"][1]["text"] == "" for index in range(256)) / 256
    assert 0.01 < empty < 0.12  # one in twenty, the negative side of guidance


def test_pictures_that_nothing_is_said_about_are_not_asked_about(edits, data):
    found = load_pictures(edits)
    assert found.num_with_texts == 24 < len(found.records)
    alone = StageConversations(data, "instruct", num_rows=64, batch_size=4, pattern="ugd", seed=5)
    beside = Conversations(found, "instruct", num_rows=64, batch_size=4, pattern="ugd", seed=5)
    assert [alone[index] for index in range(64)] == [beside[index] for index in range(64)]


def test_a_stage_learns_edits_beside_everything_else(edits, start, tmp_path):
    run = run_arguments(start, edits, tmp_path / "out", stage="review", pattern="uge", learning_rate=3e-3)
    results = json.loads((train_stage(run) / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"].keys() == {"text_loss", "image_loss"}


def test_edits_that_are_not_there_are_asked_for(data):
    with pytest.raises(ValueError, match=r"pattern 'ue' edits, but the data has no edits\. Add some"):
        StageConversations(data, "review", num_rows=8, batch_size=4, pattern="ue")


def test_hard_questions_are_asked_more_often():
    questions = [[{"type": "compare"}], [{"type": "count"}]]
    picked = [_sample_turns(questions, 1, {"compare": 3.0}, random.Random(seed))[0]["type"] for seed in range(2000)]
    assert 0.71 < picked.count("compare") / 2000 < 0.79  # 3 of 4


def test_stages_say_what_their_names_promise(data):
    rows = [json.loads(line) for line in (data / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]
    detailed = {row["captions"][-1] for row in rows}
    short = {caption for row in rows for caption in row["captions"][:-1]}

    def prompts(stage: str) -> list[str]:
        made = StageConversations(data, stage, num_rows=200, batch_size=1, pattern="g", empty_caption_rate=0.0)
        return [made[i]["messages"][0]["content"][0]["text"] for i in range(200)]

    assert set(prompts("pretrain")) <= short
    assert 0.8 < sum(prompt in detailed for prompt in prompts("detail")) / 200 < 0.98  # nine in ten
    questions = StageConversations(data, "instruct", num_rows=8, batch_size=8, pattern="u", num_questions=5)
    assert len(questions[0]["messages"]) == 10


def test_one_in_ten_prompts_is_empty_for_guidance(data):
    rows = StageConversations(data, "instruct", num_rows=1000, batch_size=1, pattern="g")
    share = sum(rows[i]["messages"][0]["content"][0]["text"] == "" for i in range(1000)) / 1000
    assert 0.07 < share < 0.13


def test_labels_cover_exactly_what_the_assistant_says_and_draws(data, start):
    processor = AutoProcessor.from_pretrained(start)
    image = str(data / "images/000000.png")
    ask = [{"type": "image", "image": image}, {"type": "text", "text": "what shape?"}]
    understanding = [{"role": "user", "content": ask}, {"role": "assistant", "content": "a red star"}]
    drawing = [
        {"role": "user", "content": "a star"},
        {"role": "assistant", "content": [{"type": "image", "image": image}]},
    ]
    batch = PiscesDataCollator(processor)([{"messages": understanding}, {"messages": drawing}])
    spoken = [
        processor.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert spoken[0] == "a red star<|end|>"
    assert spoken[1] == "<|gen_start|>" + "<|gen_image|>" * 4 + "<|gen_end|><|end|>"
    assert batch["pixel_values"].shape[0] == batch["gen_pixel_values"].shape[0] == 1


def test_upper_case_costs_nothing_and_any_text_has_a_spelling(start):
    tokenizer = AutoProcessor.from_pretrained(start).tokenizer
    assert tokenizer("A RED Star").input_ids == tokenizer("a red star").input_ids
    assert tokenizer.decode(tokenizer("naïve 東京 ✓").input_ids) == "naïve 東京 ✓"


def test_a_stage_lowers_both_losses_and_leaves_the_towers_alone(data, start, tmp_path):
    run = run_arguments(start, data, tmp_path / "out", stage="instruct", max_steps=12, learning_rate=3e-3)
    train_stage(run)
    curve = [
        point for point in json.loads((tmp_path / "out/results.json").read_text())["curve"] if "text_loss" in point
    ]
    assert curve[-1]["text_loss"] < 0.8 * curve[0]["text_loss"]
    assert curve[-1]["image_loss"] < curve[0]["image_loss"]
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    towers = {name for name in before if "vision_tower." in name}
    assert same == towers
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").config.gen_input_noise == 0.0


def test_a_new_head_is_trained_alone(data, start, tmp_path):
    train_stage(run_arguments(start, data, tmp_path / "out", pattern="g", new_head="mlp"))
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    kept = {name for name in before if "gen_head" not in name}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not any("gen_head.blocks" in name for name in after)  # the flow head's
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").config.gen_head_type == "mlp"


def test_a_resumed_stage_ends_with_the_same_weights(data, start, tmp_path):
    whole = run_arguments(start, data, tmp_path / "whole", schedule="constant_with_warmup")
    train_stage(whole)
    # the first half alone, its checkpoints kept; then the whole length from there
    halves = run_arguments(start, data, tmp_path / "halves", schedule="constant_with_warmup", max_steps=2)
    train_stage(halves, keep_checkpoints=True)
    halves.max_steps = 4
    train_stage(halves)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unknown_stage_and_pattern_are_refused(data):
    with pytest.raises(ValueError, match=r"'warmup' is not known.*pretrain, detail, instruct"):
        StageConversations(data, "warmup", num_rows=1, batch_size=1)
    with pytest.raises(ValueError, match="pattern 'ux'"):
        StageConversations(data, "pretrain", num_rows=1, batch_size=1, pattern="ux")


def test_full_precision_attention_keeps_causal_and_padding_masks():
    """It once came without a mask function: transformers then dropped every mask, and training saw the answers."""
    model = make_model()
    ids = torch.randint(0, 250, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("full_precision_sdpa")
    found = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_as_one_that_takes_the_blocks_of_both(start, data, tmp_path):
    """The new head regresses, so that no noise is drawn; one process sees understanding only, the other drawing."""
    settings = {"new_head": "mlp", "input_noise": 0.0, "learning_rate": 1e-3, "max_steps": 3}
    train_stage(run_arguments(start, data, tmp_path / "one", pattern="ugug", **settings))
    flags = vars(run_arguments(start, data, tmp_path / "two", pattern="ug", **settings))
    flags["data"] = str(data)
    flags = [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, "-m", "finetune.train_stages", *flags], cwd=ROOT, check=True, capture_output=True)

    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    trained = [name for name in one if "gen_head" in name]
    assert trained and one.keys() == two.keys()
    before = load_file(start / "model.safetensors")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
        assert name in trained or torch.equal(two[name], before[name])
