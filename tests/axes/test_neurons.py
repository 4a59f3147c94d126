"""neurons: the definition, the two ways of computing it, and what it says it costs."""

import pytest
import torch
from torch.nn import functional as F

from sentei.axes.experts import neurons
from sentei.axes.experts.neurons import Neurons
from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import All, Capacity, Mass, Threshold, TopK
from sentei.core.tracing import trace

WIDTH, NEURONS, OUTPUTS = 10, 24, 7
RULES = [All(), TopK(9), Mass(0.8), Threshold(0.2), TopK(0)]


def inputs(tokens: int, dtype: torch.dtype = torch.float32):
    numbers = torch.Generator().manual_seed(tokens)
    hidden, gate, up, down = (torch.randn(*shape, generator=numbers, dtype=torch.float64) for shape in (
        (2, tokens, WIDTH), (NEURONS, WIDTH), (NEURONS, WIDTH), (NEURONS, OUTPUTS)))
    scale = torch.rand(NEURONS, generator=numbers) + 0.1
    return hidden.to(dtype), F.silu(hidden @ gate.T).to(dtype), scale, up.to(dtype), down.to(dtype)


def by_hand(rule, hidden, acts, scale, up, down) -> torch.Tensor:
    """Token by token, neuron by neuron."""
    output = torch.zeros(*hidden.shape[:-1], down.shape[1], dtype=torch.float64)
    for b in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            size = {f: float(acts[b, t, f].abs() * scale[f]) for f in range(len(up))}
            order, whole = sorted(size, key=size.get, reverse=True), sum(size.values())
            kept = order
            if isinstance(rule, TopK):
                kept = order[:rule.k]
            elif isinstance(rule, Threshold):
                kept = [f for f in order if size[f] >= rule.ratio * size[order[0]]]
            elif isinstance(rule, Mass):
                kept = [f for i, f in enumerate(order) if sum(size[g] for g in order[:i]) < rule.mass * whole]
            for f in kept:
                output[b, t] += acts[b, t, f].double() * (up[f].double() @ hidden[b, t].double()) * down[f].double()
    return output


@pytest.mark.parametrize("tokens", [1, neurons.FEW // 2, neurons.FEW])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_token_sums_what_it_keeps_whoever_looks_on(rule, tokens):
    """Few and many tokens, with the shortcut and without it."""
    given = inputs(tokens)
    room, expected = Neurons(rule), by_hand(rule, *inputs(tokens, torch.float32))
    torch.testing.assert_close(room(*given).double(), expected, rtol=1e-4, atol=1e-4)
    with trace(room) as records:
        torch.testing.assert_close(room(*given).double(), expected, rtol=1e-4, atol=1e-4)
    selection = records[0].selection
    torch.testing.assert_close(selection.weights, torch.where(
        selection.ids < 0, 0, given[1].gather(-1, selection.ids.clamp(min=0))))
    assert selection.permitted.unique().tolist() == [NEURONS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8])
def test_other_dtypes_are_computed_too(dtype, tokens):
    given = inputs(tokens, dtype)
    found = Neurons(TopK(9))(*given)
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-2, "atol": 0.3} if dtype is torch.bfloat16 else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(found.double(), by_hand(TopK(9), *given), **tolerance)


def test_the_cost_is_of_all_gates_and_of_what_is_kept():
    room = Neurons(TopK(9))
    with trace(room) as few:
        room(*(part[:1] if part.dim() == 3 else part for part in inputs(1)))
    cost, each = few[0].cost, WIDTH + OUTPUTS
    assert (cost.multiply_adds, cost.dense_multiply_adds) == (NEURONS * WIDTH + 9 * each, NEURONS * (WIDTH + each))
    assert cost.bytes == 4 * (NEURONS * WIDTH + 9 * each + WIDTH)
    with trace(room) as many:
        room(*inputs(8))
    assert many[0].cost.density() == 1.0 and many[0].impl == "eager"


def test_gradients_reach_what_is_kept():
    for tokens in (1, 8):
        hidden, acts, scale, up, down = inputs(tokens, torch.float64)
        leaves = [part.requires_grad_() for part in (hidden, acts, up, down)]
        room = Neurons(TopK(5))
        assert torch.autograd.gradcheck(lambda h, a, u, d, room=room, scale=scale: room(h, a, scale, u, d), leaves)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RuleError, match="looks at no later token"):
        Neurons(Capacity(0.5))
    hidden, acts, scale, up, down = inputs(1)
    with pytest.raises(ShapeError, match="neurons: expected hidden"):
        Neurons(All())(hidden, acts, scale[:-1], up, down)
    with pytest.raises(ShapeError, match="neurons: expected hidden"):
        Neurons(TopK(3))(hidden, acts, scale, up, down.T)
