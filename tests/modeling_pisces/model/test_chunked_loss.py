"""Claims about the text loss of many tokens: in parts it is the same loss, and no logits are kept for backward."""

import peft
import pytest
import torch

from modeling_pisces import modeling_pisces
from tests.fixtures import make_model
from tests.modeling_pisces.model.test_model import BATCHES


TOKENS_AT_ONCE = 3


@pytest.fixture
def in_parts(monkeypatch):
    def switch(model) -> None:
        monkeypatch.setattr(modeling_pisces, "_MAX_LOGITS", TOKENS_AT_ONCE * model.config.text_config.vocab_size)

    return switch


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    outputs = model(**batch, skip_logits=True)
    outputs.loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return outputs.loss.detach(), found


def saved_shapes(model, batch) -> list[torch.Size]:
    """Shapes of everything that autograd keeps between forward and backward."""
    shapes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch, skip_logits=True)
    return shapes


@pytest.mark.parametrize("name", ["text", "mixed", "vectors only"])
def test_a_loss_in_parts_is_the_whole_loss_with_the_same_gradients(name, in_parts):
    model = make_model().train()
    loss, gradients = loss_and_gradients(model, BATCHES[name])
    in_parts(model)
    loss_in_parts, gradients_in_parts = loss_and_gradients(model, BATCHES[name])
    torch.testing.assert_close(loss_in_parts, loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == gradients_in_parts.keys() and gradients
    for weight, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_parts[weight], gradient, rtol=1e-5, atol=1e-6, msg=weight)


def test_trained_token_rows_get_the_same_gradient_in_parts(in_parts):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 264, 265])
    model = peft.get_peft_model(make_model(), config).train()
    _, gradients = loss_and_gradients(model, BATCHES["mixed"])
    in_parts(model.get_base_model())
    _, gradients_in_parts = loss_and_gradients(model, BATCHES["mixed"])
    assert any("token_adapter" in name for name in gradients)
    for weight, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_parts[weight], gradient, rtol=1e-5, atol=1e-6, msg=weight)


def test_logits_of_a_loss_in_parts_are_not_kept_for_backward(in_parts):
    model = make_model().train()
    vocab_size = model.config.text_config.vocab_size

    def kept() -> list[torch.Size]:
        shapes = saved_shapes(model, BATCHES["mixed"])
        return [shape for shape in shapes if len(shape) == 2 and shape[1] == vocab_size and shape[0] < 100]

    assert kept()  # log-probabilities of all labelled tokens
    in_parts(model)
    assert not kept()


def test_a_loss_in_parts_without_gradients_is_the_whole_loss(in_parts):
    model = make_model().eval()
    with torch.no_grad():
        loss = model(**BATCHES["mixed"]).loss
        in_parts(model)
        torch.testing.assert_close(model(**BATCHES["mixed"]).loss, loss, rtol=1e-6, atol=1e-6)
