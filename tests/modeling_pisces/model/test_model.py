"""Claims about `forward`: both losses against plain loops, where vectors land, what trains, and what is refused."""

import math

import pytest
import torch

from modeling_pisces import PiscesModel
from tests.fixtures import make_model


# ids of tests/fixtures.py; N = 9 understanding vectors, M = 4 generated vectors of width 12
BOS, PAD, IMAGE, GEN, START, END = 256, 261, 262, 263, 264, 265
TEXT_ROW = [BOS, 10, 11, 12, 13, 14, 15]
SEEN_ROW = [BOS, *[IMAGE] * 9, 20, 21, 22]
DRAWN_ROW = [BOS, 30, 31, START, *[GEN] * 4, END, 32]


def make_batch(*rows: list[int], ignore: tuple[int, ...] = (BOS,)) -> dict[str, torch.Tensor]:
    """Right-padded rows with labels on everything but `ignore`, and random images for their placeholders."""
    torch.manual_seed(1)
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    labels = ids.clone()
    for token in (*ignore, PAD):
        labels[ids == token] = -100
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
    if num_images := sum(row.count(IMAGE) for row in rows) // 9:
        batch["pixel_values"] = torch.randn(num_images, 3, 12, 12)
    if num_drawn := sum(row.count(GEN) for row in rows) // 4:
        batch["gen_pixel_values"] = torch.randn(num_drawn, 3, 16, 16)
    return batch


BATCHES = {
    "text": make_batch(TEXT_ROW, TEXT_ROW[:4]),
    "understanding": make_batch(SEEN_ROW, [BOS, 5, *[IMAGE] * 18, 6, 7]),
    "generation": make_batch(DRAWN_ROW, [BOS, 40, START, *[GEN] * 4, END]),
    "vectors only": make_batch(DRAWN_ROW, ignore=(BOS, 30, 31, 32, START, END)),
    "context only": make_batch([*DRAWN_ROW, 33, 34], ignore=(BOS, GEN, START, END)),
    "nothing labelled": make_batch(DRAWN_ROW, ignore=(BOS, 30, 31, 32, START, END, GEN)),
    "mixed": make_batch(TEXT_ROW, SEEN_ROW, DRAWN_ROW, [BOS, *[IMAGE] * 9, 50, START, *[GEN] * 4, END]),
}


@torch.no_grad()
def plain_losses(model, batch) -> tuple[list[float], list[float]]:
    """Per labelled token its cross entropy, per labelled vector its mean squared error, position by position."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs).last_hidden_state
    targets = []
    if "gen_pixel_values" in batch:
        targets = list(model.encode_gen_images(batch["gen_pixel_values"]).flatten(0, 1))
    tokens, vectors = [], []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for position, token in enumerate(ids):
            target = targets.pop(0) if token == GEN else None
            label = int(batch["labels"][row, position])
            if label in (-100, IMAGE) or position == 0:
                continue
            state = hidden[row, position - 1]
            if label == GEN:
                error = model.model.gen_head(state) - target
                vectors.append(sum(float(value) ** 2 for value in error) / len(error))
            else:
                scores = (model.lm_head.weight @ state).double()
                tokens.append(float(torch.logsumexp(scores, 0) - scores[label]))
    return tokens, vectors


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("kind", BATCHES)
def test_losses_equal_a_plain_loop(kind, head):
    model = make_model(gen_head_type=head, image_loss_weight=0.25)
    tokens, vectors = plain_losses(model, BATCHES[kind])
    with torch.no_grad():
        out = model(**BATCHES[kind])
    assert (int(out.num_text_tokens), int(out.num_image_vectors)) == (len(tokens), len(vectors))
    total = 0.0
    for side, weight, values in (("text", 1.0, tokens), ("image", 0.25, vectors)):
        loss, loss_sum = getattr(out, f"{side}_loss"), getattr(out, f"{side}_loss_sum")
        if not values:
            assert loss is None and (loss_sum is None or float(loss_sum) == 0.0)
            continue
        assert float(loss) == pytest.approx(sum(values) / len(values), rel=1e-5)  # worst of 14 cases: 1.1e-7
        assert float(loss_sum) == pytest.approx(sum(values), rel=1e-5)
        total += weight * sum(values) / len(values)
    assert float(out.loss) == pytest.approx(total, rel=1e-5)


def test_image_target_variance_is_the_error_of_predicting_the_mean():
    model = make_model()
    out = model(**BATCHES["generation"])
    targets = model.encode_gen_images(BATCHES["generation"]["gen_pixel_values"]).flatten(0, 1)
    expected = ((targets - targets.mean(0)) ** 2).mean()
    torch.testing.assert_close(out.image_target_variance, expected, rtol=1e-5, atol=0)


def test_cosine_loss_equals_a_plain_loop_and_draws_vectors_of_length_root_dg():
    """The direction alone is learned, so a drawn vector has the length of a whitened one."""
    model = make_model(gen_loss_type="cosine")
    head, hidden, targets = model.model.gen_head, torch.randn(3, 32), torch.randn(3, 12)
    losses = head.loss_per_vector(hidden, targets).detach()
    for state, target, loss in zip(hidden, targets, losses, strict=True):
        found = head(state).detach()
        cosine = (found @ target) / (found.norm() * target.norm())
        assert float(loss) == pytest.approx(1 - float(cosine), abs=1e-6)
    drawn = model.model.predict_gen_vectors(hidden)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.full((3,), 12**0.5))
    torch.testing.assert_close(head.loss_per_vector(hidden, drawn), torch.zeros(3), atol=1e-6, rtol=0)
    assert not model.config.image_loss_is_squared_error and make_model().config.image_loss_is_squared_error


def test_flow_loss_is_repeatable_in_evaluation_and_random_in_training():
    model = make_model(gen_head_type="flow")
    losses = [float(model(**BATCHES["generation"]).image_loss) for _ in range(2)]
    assert losses[0] == losses[1]
    model.train()
    losses = [float(model(**BATCHES["generation"]).image_loss) for _ in range(2)]
    assert losses[0] != losses[1]


def test_flow_loss_equals_a_plain_loop():
    model = make_model(gen_head_type="flow")
    head, hidden, targets = model.model.gen_head, torch.randn(3, 32), torch.randn(3, 12)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(head.num_samples, 3, 12, generator=draw)
    time = torch.rand(head.num_samples, 3, generator=draw) ** 2
    for vector, loss in enumerate(head.loss_per_vector(hidden, targets)):
        errors = []
        for sample in range(head.num_samples):
            t, start = time[sample, vector], noise[sample, vector]
            place = t * targets[vector] + (1 - t) * start
            velocity = head(place[None], t[None], head.hidden_in(hidden[vector])[None])[0]
            errors.append(((velocity - (targets[vector] - start)) ** 2).mean())
        torch.testing.assert_close(loss, sum(errors) / len(errors), rtol=1e-5, atol=0)


def test_training_logits_are_left_out_and_evaluation_logits_are_whole():
    model, batch = make_model(), BATCHES["mixed"]
    whole = model(**batch).logits
    assert whole.shape == (*batch["input_ids"].shape, 320)
    assert torch.equal(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    assert torch.equal(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    model.train()
    assert model(**batch).logits is None
    assert model(**batch, skip_logits=False).logits.shape == whole.shape


def test_vectors_replace_their_placeholders_in_reading_order():
    model, batch = make_model().model, BATCHES["mixed"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    embeds, features, vectors, mask = model.merge_inputs(**inputs)
    expected = model.get_input_embeddings()(batch["input_ids"]).clone()
    seen, drawn = list(features.flatten(0, 1)), list(model.embed_gen_vectors(vectors).flatten(0, 1))
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for position, token in enumerate(ids):
            if token in (IMAGE, GEN):
                expected[row, position] = (seen if token == IMAGE else drawn).pop(0)
    assert torch.equal(embeds, expected) and torch.equal(mask, batch["input_ids"] == GEN)


@pytest.mark.parametrize("head", ["mlp", "flow"])
@pytest.mark.parametrize("towers", ["frozen", "vision_tower trained"])
@pytest.mark.parametrize("kind", BATCHES)
def test_every_trainable_parameter_gets_a_gradient_in_every_kind_of_batch(kind, towers, head):
    model = make_model(gen_head_type=head).train()
    model.model.gen_vision_tower.requires_grad_(False)
    model.model.vision_tower.requires_grad_(towers != "frozen")
    model(**BATCHES[kind]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_absent_sides_get_a_gradient_of_zero():
    model = make_model().train()
    model.model.vision_tower.requires_grad_(False)
    plain = make_model()  # in evaluation mode nothing is touched
    for each in (model, plain):
        each(**BATCHES["text"]).loss.backward()
    for (name, touched), (_, untouched) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if untouched.grad is None:
            assert touched.grad is None or not touched.grad.any(), name
        else:
            assert torch.equal(touched.grad, untouched.grad), name


def test_the_gen_tower_never_trains_through_the_model():
    model = make_model().train()
    assert model.model.gen_vision_tower.layers[0].mlp.fc1.weight.requires_grad
    vectors = model.encode_gen_images(BATCHES["generation"]["gen_pixel_values"])
    assert not vectors.requires_grad
    model(**BATCHES["generation"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.gen_vision_tower.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**BATCHES["mixed"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5)  # measured: 0.0


def test_input_noise_moves_inputs_in_training_only_and_never_targets():
    quiet, noisy = make_model(), make_model(gen_input_noise=0.5)
    assert float(quiet(**BATCHES["generation"]).loss) == float(noisy(**BATCHES["generation"]).loss)
    noisy.train()
    inputs = {name: BATCHES["generation"][name] for name in ("input_ids", "gen_pixel_values")}
    first, second = (noisy.model.merge_inputs(**inputs) for _ in range(2))
    clean = noisy.encode_gen_images(inputs["gen_pixel_values"])
    assert torch.equal(first[2], clean) and torch.equal(second[2], clean)  # the targets
    assert not torch.equal(first[0], second[0])
    drawn = torch.stack([noisy.model._noised(clean) - clean for _ in range(200)])
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.05) and abs(float(drawn.mean())) < 0.02


def test_bf16_losses_stay_near_fp32():
    exact, rounded = make_model(), make_model().to(torch.bfloat16)
    for kind in ("understanding", "generation", "mixed"):
        expected, found = exact(**BATCHES[kind]), rounded(**BATCHES[kind])
        assert found.loss.dtype == torch.float32
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=0.02)  # worst of 3: 1.1e-3


def test_gen_image_vectors_stand_in_for_pixels():
    model, batch = make_model(), dict(BATCHES["generation"])
    expected = model(**batch)
    batch["gen_image_vectors"] = model.encode_gen_images(batch.pop("gen_pixel_values"))
    assert torch.equal(model(**batch).loss, expected.loss) and torch.equal(model(**batch).logits, expected.logits)


def test_embeddings_stand_in_for_ids_and_encoder_outputs_for_pixels():
    model, batch = make_model(), dict(BATCHES["mixed"])
    expected = model(**batch)
    encoded = dict(batch, mm_encoder_outputs={"image": model.get_image_features(batch["pixel_values"])})
    del encoded["pixel_values"]
    embedded = dict(batch, inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
    del embedded["input_ids"]
    for inputs in (encoded, embedded):
        out = model(**inputs)
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)


def test_backbone_equals_the_whole_model_without_its_head(tmp_path):
    model, batch = make_model(), dict(BATCHES["mixed"])
    del batch["labels"]
    model.save_pretrained(tmp_path)
    backbone = PiscesModel.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head(backbone(**batch).last_hidden_state), model(**batch).logits)


def test_tied_and_resized_embeddings_stay_consistent():
    text = make_model().config.text_config.to_dict() | {"tie_word_embeddings": True}
    model = make_model(text_config=text)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = model(**BATCHES["mixed"]).logits
    model.resize_token_embeddings(384)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.text_config.vocab_size == 384 and model.config.get_text_config().vocab_size == 384
    after = model(**BATCHES["mixed"])
    assert torch.equal(after.logits[..., :320], before) and math.isfinite(float(after.loss))


def test_labels_shifted_by_the_caller_replace_labels():
    model, batch = make_model(), dict(BATCHES["mixed"])
    expected = model(**batch)
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((4, 1), -100)], dim=1)
    for labels in ({}, {"labels": torch.zeros_like(shifted)}):
        found = model(**(batch | {"labels": None} | labels), shift_labels=shifted)
        for side in ("loss", "text_loss", "image_loss", "num_text_tokens", "num_image_vectors"):
            assert torch.equal(found[side], expected[side])
