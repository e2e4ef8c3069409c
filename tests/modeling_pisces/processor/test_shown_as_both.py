"""A picture that the user shows "as both": beside it stand its generation vectors, as context and never as a loss."""

import pytest
import torch

from finetune.data.collator import PiscesDataCollator
from finetune.data.packing import PackingCollator, token_lengths
from finetune.data.picture_cache import CachedPictureCollator, PictureCache
from finetune.data.schema import DataError, check_row
from finetune.precompute import pictures_of, precompute
from modeling_pisces import PiscesProcessor
from tests.finetune.lora_fixtures import make_row
from tests.fixtures import make_model, make_processor


def both_row(seed: int, turns: int = 1) -> dict:
    """An edit, its source shown as both, and more edits of what was drawn."""
    row = make_row("edit", seed)
    row["messages"][0]["content"][0]["as"] = "both"
    for turn in range(1, turns):
        row["messages"] += make_row("draw", seed + turn)["messages"]
    return row


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def batch_of(processor, *rows: dict) -> dict:
    return PiscesDataCollator(processor)(list(rows))


def test_the_vectors_stand_behind_the_picture_and_have_no_loss(processor):
    row = both_row(3)
    batch = batch_of(processor, row)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    num, drawn = processor.num_image_tokens, processor.num_gen_image_tokens
    first = ids.index(processor.image_token_id)
    assert ids[first : first + num] == [processor.image_token_id] * num
    context = [processor.gen_start_token_id, *[processor.gen_image_token_id] * drawn, processor.gen_end_token_id]
    assert ids[first + num : first + num + drawn + 2] == context
    assert ids.count(processor.gen_image_token_id) == 2 * drawn
    assert labels.count(processor.gen_image_token_id) == drawn and set(labels[: first + num + drawn + 2]) == {-100}
    plain = batch_of(processor, make_row("edit", 3))
    assert len(ids) == plain["input_ids"].shape[1] + drawn + 2
    trained = [label for label in labels if label != -100]
    assert trained == [label for label in plain["labels"][0].tolist() if label != -100]


def test_pixels_come_in_reading_order(processor):
    rows = both_row(3, turns=2), make_row("draw", 8), both_row(5)
    found = batch_of(processor, *rows)
    pictures = [
        part["image"] for row in rows for message in row["messages"] for part in message["content"] if "image" in part
    ]
    wanted = processor(gen_images=pictures, return_tensors="pt")["gen_pixel_values"]
    assert torch.equal(found["gen_pixel_values"], wanted) and found["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("head", ["mlp", "flow"])
def test_the_vectors_are_context_for_what_is_drawn(processor, head):
    model = make_model(gen_head_type=head).eval()
    batch = batch_of(processor, both_row(3))
    with torch.no_grad():
        outputs = model(**batch)
        other = batch["gen_pixel_values"].clone()
        other[0] += 1.0
        assert outputs.num_image_vectors == processor.num_gen_image_tokens  # of the target alone
        changed = model(**batch | {"gen_pixel_values": other})
        assert not torch.equal(changed.image_loss, outputs.image_loss)
        vectors = model.encode_gen_images(batch["gen_pixel_values"])
        same = model(**{k: v for k, v in batch.items() if k != "gen_pixel_values"}, gen_image_vectors=vectors)
        torch.testing.assert_close(same.loss, outputs.loss)


def test_vectors_beside_the_picture_take_the_place_of_the_tower(processor):
    model, row = make_model().eval(), both_row(3)
    pixels = batch_of(processor, row)
    source, target = model.encode_gen_images(pixels["gen_pixel_values"])
    row["messages"][0]["content"][0]["image_vectors"] = source
    row["messages"][1]["content"][0] = {"type": "image", "image_vectors": target}
    vectors = batch_of(processor, row)
    assert "gen_pixel_values" not in vectors and torch.equal(
        vectors["gen_image_vectors"], torch.stack([source, target])
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**vectors).loss, model(**pixels).loss)


def test_drawing_after_such_pictures_is_the_same_alone_and_in_a_batch(processor):
    model = make_model(gen_head_type="mlp").eval()
    rows = [both_row(3)["messages"][:1], both_row(4)["messages"][:1]]

    def draw(conversations):
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, generation_mode="image", tokenize=True, return_dict=True,
            return_tensors="pt", padding_side="left",
        )  # fmt: skip
        return model.generate(**inputs, generation_mode="image")

    together = draw(rows)
    assert together.shape[:2] == (2, processor.num_gen_image_tokens)
    for index, row in enumerate(rows):
        torch.testing.assert_close(draw([row]), together[index : index + 1], atol=1e-5, rtol=1e-5)


def test_packs_and_lengths_know_the_vectors(processor):
    model, rows = make_model(gen_head_type="mlp").eval(), [both_row(3), make_row("draw", 4), both_row(6, turns=2)]
    batch = batch_of(processor, *rows)
    assert token_lengths(rows, processor) == batch["attention_mask"].sum(-1).tolist()
    packed = PackingCollator(PiscesDataCollator(processor), processor.tokenizer.pad_token_id)([{"rows": rows}])
    with torch.no_grad():
        one, other = model(**batch), model(**packed, use_cache=False)
    torch.testing.assert_close(other.image_loss_sum, one.image_loss_sum)
    assert other.num_image_vectors == one.num_image_vectors == 4 * processor.num_gen_image_tokens


def test_a_cache_holds_both_of_it(processor, tmp_path):
    model, rows = make_model().eval(), [both_row(3), make_row("understand", 5)]
    cache = PictureCache(tmp_path)
    for kind in ("image_features", "gen_vectors"):
        precompute(model, processor, pictures_of(rows, kind), cache, kind)
    assert cache.count("image_features") == 2 and cache.count("gen_vectors") == 2
    opened = batch_of(processor, *rows)
    for kinds in (("image_features", "gen_vectors"), ("gen_vectors",)):
        cached = CachedPictureCollator(PiscesDataCollator(processor), cache, kinds)(rows)
        assert "gen_pixel_values" not in cached and ("pixel_values" in cached) == (kinds == ("gen_vectors",))
        with torch.no_grad():
            torch.testing.assert_close(model(**cached).loss, model(**opened).loss)
    with pytest.raises(
        ValueError, match=r'has no gen_vectors for a picture that is shown as "both"\. Add them: python'
    ):
        CachedPictureCollator(PiscesDataCollator(processor), cache, ("image_features",))(rows)


def test_a_row_of_data_says_it_in_turns_of_the_user():
    row = both_row(3)
    assert check_row(row)["messages"][0]["content"][0]["as"] == "both"
    row["messages"][0]["content"][0]["as"] = "understanding"
    assert "as" not in check_row(row)["messages"][0]["content"][0]
    row["messages"][0]["content"][0]["as"] = "pixels"
    with pytest.raises(
        DataError, match=r'content\[0\]\.as: found str .pixels., expected "understanding" .* or "both"'
    ):
        check_row(row)
    drawn = make_row("draw", 3)
    drawn["messages"][1]["content"][0]["as"] = "both"
    with pytest.raises(DataError, match="the assistant draws its pictures; expected as: both in turns of the user"):
        check_row(drawn)


@pytest.mark.parametrize(
    ("role", "part", "message"),
    [
        ("user", {"as": "pixels"}, "row 0, turn 0: a picture is shown as 'pixels', expected \"understanding\""),
        ("assistant", {"as": "both"}, 'row 0, turn 1: the assistant\'s pictures are drawn, not shown as "both"'),
        ("user", {"as": "both", "image": None}, 'row 0, turn 0: a picture shown as "both" needs one source'),
        ("user", {"as": "both", "path": "x.png"}, r'shown as "both" needs one source, found \[.image., .path.\]'),
    ],
)
def test_what_cannot_be_shown_so_is_refused(processor, role, part, message):
    row = make_row("edit", 3)
    row["messages"][role == "assistant"]["content"][0] |= part
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(row["messages"], tokenize=True, return_dict=True)


def test_a_model_that_cannot_draw_shows_no_vectors(processor):
    reader = PiscesProcessor(processor.image_processor, None, processor.tokenizer, num_image_tokens=4)
    with pytest.raises(ValueError, match='understanding-only: it shows no picture as "both"'):
        reader.apply_chat_template(both_row(3)["messages"][:1], tokenize=True, return_dict=True)


def test_a_template_with_other_placeholders_is_refused(processor):
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"row 0: the template wrote 0 <\|image\|> for 1 pictures"):
        processor.apply_chat_template(both_row(3)["messages"][:1], chat_template=template, tokenize=False)
