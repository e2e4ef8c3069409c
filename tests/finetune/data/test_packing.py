"""Claims about `finetune.data.packing` and `finetune.training.packed_attention`: samples that share a row lose nothing and see nothing."""

import random

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from finetune.data.collator import PiscesDataCollator
from finetune.data.packing import PackedRows, PackedStream, PackingCollator, pack_batch, pack_lengths, token_lengths
from finetune.training import packed_attention
from tests.fixtures import make_model, make_processor


def picture(seed: int, side: int = 16) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))


def understanding_row(seed: int, answer: str = "red", num_pictures: int = 1) -> dict:
    parts = [{"type": "image", "image": picture(seed + index)} for index in range(num_pictures)]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]},
            {"role": "assistant", "content": answer},
        ]
    }


def drawing_row(seed: int, prompt: str = "a red fox", num_pictures: int = 1) -> dict:
    drawn = [{"type": "image", "image": picture(seed + index)} for index in range(num_pictures)]
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": drawn}]}


def text_row(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]}


def editing_row(seed: int) -> dict:
    """Sees a picture, writes and draws."""
    shown, drawn = ({"type": "image", "image": picture(seed + index)} for index in range(2))
    return {
        "messages": [
            {"role": "user", "content": [shown, {"type": "text", "text": "make it blue"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "so:"}, drawn]},
        ]
    }


MIXED = [
    drawing_row(1),
    understanding_row(2, "a long answer about a red square"),
    text_row("hm"),
    editing_row(3),
    drawing_row(5, "x", num_pictures=2),
    understanding_row(7, "no", num_pictures=2),
]
SIDES = {
    "text": [text_row("hm"), text_row("a longer answer"), text_row("")],
    "understanding": [understanding_row(1), understanding_row(2, "blue and green"), understanding_row(3, "", 2)],
    "drawing": [drawing_row(1), drawing_row(2, ""), drawing_row(3, "two", 2)],
    "mixed": MIXED,
}


def losses_and_gradients(model, batch) -> tuple[dict, dict]:
    model.zero_grad()
    out = model.train()(**batch)
    out.loss.backward()
    names = ("loss", "text_loss", "image_loss", "num_text_tokens", "num_image_vectors")
    values = {name: out[name].detach() for name in names if out.get(name) is not None}
    return values, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- which rows share a pack


def test_best_fit_decreasing_on_a_case_worked_by_hand():
    # 7 opens, 6 opens, 3 closes the first, 2 and 2 fill the second, 2 opens the third
    assert pack_lengths([2, 7, 3, 6, 2, 2], 10) == [[1, 2], [3, 0, 4], [5]]


def test_every_row_is_packed_once_and_no_pack_overflows():
    rng = random.Random(0)
    lengths = [rng.randint(1, 700) for _ in range(3000)]
    packed = PackedRows(list(range(3000)), lengths, capacity=1000, window=512, seed=1)
    assert sorted(index for pack in packed.packs for index in pack) == list(range(3000))
    assert max(sum(lengths[index] for index in pack) for pack in packed.packs) <= 1000
    assert packed.fill > 0.97  # 0.994


def test_packs_depend_on_the_seed_alone():
    lengths = [random.Random(i).randint(1, 50) for i in range(300)]
    first, again, other = (PackedRows(list(range(300)), lengths, 64, window=64, seed=s).packs for s in (3, 3, 4))
    assert first == again and first != other


def test_a_window_mixes_long_and_short_rows_over_the_epoch():
    """Sorted data would otherwise train the long rows first."""
    rng = random.Random(0)
    lengths = sorted(rng.randint(1, 500) for _ in range(2000))
    packs = PackedRows(list(range(2000)), lengths, 512, window=256).packs
    half = len(packs) // 2
    longest = [max(lengths[index] for index in pack) for pack in packs]
    means = [sum(part) / len(part) for part in (longest[:half], longest[half:])]
    assert abs(means[0] - means[1]) < 30  # 13; 123 if all rows were packed at once


def test_a_stream_gives_the_same_packs_again_and_skips_what_was_seen():
    rows = [{"length": random.Random(i).randint(1, 60)} for i in range(200)]
    stream = PackedStream(rows, lambda row: row["length"], capacity=50, window=32)
    packs = list(stream)
    assert packs == list(stream)
    assert stream.num_skipped == sum(row["length"] > 50 for row in rows) > 0
    assert sum(len(pack["rows"]) for pack in packs) == 200 - stream.num_skipped
    assert all(sum(row["length"] for row in pack["rows"]) <= 50 for pack in packs)


def test_rows_longer_than_a_pack_are_named_or_skipped_on_purpose():
    with pytest.raises(ValueError, match=r"1 of 3 rows are longer than a pack of 10 tokens: rows 1 \(11 tokens\)\."):
        PackedRows("abc", [3, 11, 4], capacity=10)
    with pytest.raises(ValueError, match=r"6 of 6 rows .* 4 \(9 tokens\), \.\.\.\. Raise the capacity"):
        pack_lengths([9] * 6, 8)
    packed = PackedRows("abc", [3, 11, 4], capacity=10, on_overflow="skip")
    assert packed.num_skipped == 1 and sorted(packed[0]["rows"]) == ["a", "c"]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="2 lengths for 3 rows"):
        PackedRows("abc", [1, 2], capacity=10)
    with pytest.raises(ValueError, match=r"no row fits into a pack of 10 tokens \(2 rows, 2 too long\)"):
        PackedRows("ab", [11, 12], capacity=10, on_overflow="skip")
    with pytest.raises(ValueError, match="on_overflow='drop': expected 'error' or 'skip'"):
        PackedRows("ab", [1, 2], capacity=10, on_overflow="drop")


def test_token_lengths_are_exact_without_opening_a_picture():
    processor = make_processor()
    batch = PiscesDataCollator(processor)(MIXED)
    without_pictures = [
        {
            "messages": [
                {
                    **message,
                    "content": [
                        {"type": "image", "image": "nowhere.png"} if part["type"] == "image" else part
                        for part in message["content"]
                    ]
                    if isinstance(message["content"], list)
                    else message["content"],
                }
                for message in row["messages"]
            ]
        }
        for row in MIXED
    ]
    assert token_lengths(without_pictures, processor, batch_size=4) == batch["attention_mask"].sum(-1).tolist()


# ---- rows of several samples


def test_a_packed_row_written_out():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0], [3, 4, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]),
        "labels": torch.tensor([[5, 6, 7], [8, 9, -100], [-100, 4, -100]]),
        "pixel_values": torch.ones(2, 3, 4, 4),
    }
    packed = pack_batch(batch, [2, 1], pad_token_id=1)
    assert "attention_mask" not in packed
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 1, 1, 1]]
    assert packed["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 4, -100, -100, -100]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 3, 5, 7, 10]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == 3
    assert packed["pixel_values"] is batch["pixel_values"]


def test_left_padding_packs_like_right_padding():
    right = {"input_ids": torch.tensor([[5, 6], [8, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    left = {"input_ids": torch.tensor([[5, 6], [0, 8]]), "attention_mask": torch.tensor([[1, 1], [0, 1]])}
    for name, value in pack_batch(right, [2]).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(pack_batch(left, [2])[name])), name


def test_batches_that_cannot_be_unpadded_are_refused():
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="no attention_mask"):
        pack_batch({"input_ids": ids}, [2])
    with pytest.raises(ValueError, match=r"2 rows but the packs hold 3 samples \(\[2, 1\]\)"):
        pack_batch({"input_ids": ids, "attention_mask": ids}, [2, 1])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_sdpa"])
@pytest.mark.parametrize("side", SIDES)
def test_packed_and_padded_have_the_same_losses_and_gradients(side, attention):
    model = make_model()
    rows = SIDES[side]
    padded = PiscesDataCollator(make_processor())(rows)
    model.set_attn_implementation({"text_config": "sdpa" if attention == "packed_sdpa" else attention})
    expected, expected_gradients = losses_and_gradients(model, padded)
    model.set_attn_implementation({"text_config": attention})
    for packs in ([rows], [rows[:2], rows[2:]], [[row] for row in rows]):
        batch = PackingCollator(PiscesDataCollator(make_processor()))([{"rows": pack} for pack in packs])
        assert batch["input_ids"].shape[0] == len(packs)
        found, gradients = losses_and_gradients(model, batch)
        assert found.keys() == expected.keys() and gradients.keys() == expected_gradients.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)  # worst: 5e-7
        for name, gradient in expected_gradients.items():
            scale = max(float(gradient.abs().max()), 1.0)
            torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed_sdpa"])
def test_no_sample_sees_another_sample_of_its_row(attention):
    """What one sample's tokens, pictures and vectors are changes nothing in the other's hidden states."""
    model = make_model()
    model.set_attn_implementation({"text_config": attention})
    collator = PackingCollator(PiscesDataCollator(make_processor()))
    kept = editing_row(3)
    with torch.no_grad():
        states = [
            model.model(**{k: v for k, v in collator([{"rows": [first, kept]}]).items() if k != "labels"})
            for first in (editing_row(11), editing_row(21))
        ]
    length = states[0].last_hidden_state.shape[1] // 2
    changed, same = (
        (states[0].last_hidden_state - states[1].last_hidden_state)[:, part].abs().max()
        for part in (slice(None, length), slice(length, None))
    )
    assert changed > 0.1 and same == 0


def test_packed_attention_without_boundaries_is_plain_sdpa():
    """Padding and causal masks stay: with a name alone transformers would drop both."""
    model = make_model()
    inputs = PiscesDataCollator(make_processor())(MIXED)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation({"text_config": packed_attention.NAME})
        found = model(**inputs).logits
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-6)


def test_packed_attention_keeps_a_sliding_window():
    text = {
        "model_type": "mistral",
        "sliding_window": 4,
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
    }
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 261}
    model = make_model(text_config=text)
    batch = PackingCollator(PiscesDataCollator(make_processor()))([{"rows": MIXED}])
    expected, _ = losses_and_gradients(model, batch)
    model.set_attn_implementation({"text_config": packed_attention.NAME})
    found, _ = losses_and_gradients(model, batch)
    torch.testing.assert_close(found["loss"], expected["loss"])


def test_a_loader_over_packs_trains_and_the_loss_falls():
    processor, model = make_processor(), make_model().train()
    rows = PackedRows(MIXED, token_lengths(MIXED, processor), capacity=128)
    loader = DataLoader(rows, batch_size=2, collate_fn=PackingCollator(PiscesDataCollator(processor)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curve = []
    for _ in range(6):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
    assert sum(curve[-len(loader) :]) < 0.7 * sum(curve[: len(loader)])
