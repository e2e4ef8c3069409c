"""Claims about how the "flow" head draws: its solver, and what it computes once instead of at every step."""

import pytest
import torch

from modeling_pisces.modeling_pisces_heads import PiscesFlowHead
from tests.fixtures import make_config


@pytest.fixture
def head():
    """A head whose blocks do something: they start as the identity."""
    head = PiscesFlowHead(make_config(gen_head_type="flow", gen_flow_num_layers=2)).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def states(head, rows):
    return torch.randn(rows, head.hidden_in.in_features)


def plain(head, hidden, noise, num_steps, scale=None):
    """Adams-Bashforth of two steps, every network call by itself."""
    vector, before = noise, None
    for step in range(num_steps):
        halves = [hidden] if scale is None else hidden.chunk(2)
        found = [head(vector, torch.full((len(h),), step / num_steps), head.hidden_in(h)) for h in halves]
        velocity = found[0] if scale is None else found[1] + scale * (found[0] - found[1])
        vector = vector + (velocity if before is None else 1.5 * velocity - 0.5 * before) / num_steps
        before = velocity
    return vector


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 5, 70])  # all steps at once, some, one by one
@torch.no_grad()
def test_drawing_equals_a_plain_loop(head, rows, scale):
    hidden, noise = states(head, rows * (1 if scale is None else 2)), torch.randn(rows, head.output.out_features)
    found, expected = head.sample(hidden, noise, 7, scale), plain(head, hidden, noise, 7, scale)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5  # measured: 1e-6


@torch.no_grad()
def test_any_leading_shape_draws_the_same(head):
    hidden, noise = states(head, 6), torch.randn(6, head.output.out_features)
    shaped = head.sample(hidden.view(2, 3, -1), noise.view(2, 3, -1), 5)
    torch.testing.assert_close(shaped.flatten(0, 1), head.sample(hidden, noise, 5), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_error_falls_with_the_square_of_the_steps(head):
    """Euler's falls with their number alone: half of the steps, or fewer, for the same error."""
    half = head.double().time_in[0].in_features // 2
    for fast in (slice(4, half), slice(half + 4, None)):  # random weights turn as fast as the fastest of the times'
        head.time_in[0].weight[:, fast] = 0  # frequencies; the order shows where steps are short beside the turns
    hidden, noise = states(head, 8).double(), torch.randn(8, head.output.out_features).double()
    exact = head.sample(hidden, noise, 512)
    errors = [float((head.sample(hidden, noise, steps) - exact).square().mean().sqrt()) for steps in (8, 16, 32)]
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3, errors  # Euler's: 2 and 2


@torch.no_grad()
def test_what_time_and_condition_say_is_computed_for_all_steps_at_once(head, monkeypatch):
    calls = []
    block = head.blocks[0].modulation
    monkeypatch.setattr(block, "forward", lambda x, run=block.forward: calls.append(x.shape) or run(x))
    head.sample(states(head, 1), torch.randn(1, head.output.out_features), 8)
    assert [shape[0] for shape in calls] == [8]
    calls.clear()
    head.sample(states(head, 40), torch.randn(20, head.output.out_features), 8, 3.0)
    assert [shape[0] for shape in calls] == [1] * 8  # 80 rows are as many as one product takes


@torch.no_grad()
def test_a_straight_path_is_followed_exactly_whatever_the_steps(head, monkeypatch):
    speed = torch.randn(3, head.output.out_features)
    monkeypatch.setattr(head, "_velocity", lambda *_: speed)
    noise = torch.randn_like(speed)
    for steps in (1, 2, 5, 9):
        torch.testing.assert_close(head.sample(states(head, 3), noise, steps), noise + speed, rtol=0, atol=1e-5)
