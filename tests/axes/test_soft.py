"""Soft MoE: the formula, with a selection and without one, and its gradients."""

import math
from contextlib import nullcontext

import pytest
import torch
from mixtures import UNIT, WIDTH, E, layer, x_of
from torch.nn import functional as F

from sentei.axes.experts import soft
from sentei.core.errors import RuleError
from sentei.core.tracing import trace


def test_soft_moe_is_the_formula():
    made, x = layer("soft"), x_of(2, 7)
    logits = made.router.scale * F.normalize(x, dim=-1) @ F.normalize(made.router.weight, dim=-1).T
    dispatch, combine = logits.softmax(1), logits.softmax(2)
    slots = torch.einsum("bts,btd->bsd", dispatch, x)
    answers = torch.stack([expert(slots[:, 2 * e:2 * e + 2]) for e, expert
                           in enumerate(made.experts.stack(made.up, made.down))], 1).flatten(1, 2)
    torch.testing.assert_close(made(x), torch.einsum("bts,bsd->btd", combine, answers), rtol=1e-12, atol=1e-12)
    assert made.router.scale.item() == 1


@pytest.mark.parametrize("spread", [1, 100])
def test_soft_moe_computes_what_its_selection_says(spread):
    """Without a trace it is computed without a selection. In fp64, as the scale's gradient is next to nothing."""
    made, x = layer("soft"), x_of(2, 7).requires_grad_()
    with torch.no_grad():
        made.router.scale *= spread
    found = []
    for listen in (trace(made), nullcontext()):
        with listen:
            y = made(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *made.parameters()))))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12 * expected.abs().max().item())


def test_gradients_of_soft_moe_in_float32_are_as_good_as_with_a_selection():
    """Where a slot is nearly one token, the gradient of a share is nearly that of the mean it is a part of."""
    made, x = layer("soft"), x_of(4, 30)
    with torch.no_grad():
        made.router.scale *= 100
    exact = gradients_of(made, x)
    made.float()
    with trace(made):
        expected = gradients_of(made, x.float())
    for ours, theirs, right in zip(gradients_of(made, x.float()), expected, exact, strict=True):
        assert (ours - right).norm() <= 2 * (theirs - right).norm()


def gradients_of(made, x):
    """Of the tokens and of the weights but for the router's scale, which is a sum of next to nothing."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(made(x).square().sum(), (x, made.router.weight, made.up, made.down))


def test_soft_moe_by_the_reference_has_gradients_of_gradients():
    made, x = layer("soft"), x_of(1, 3).requires_grad_()
    made.experts.impl = "reference"
    assert torch.autograd.gradgradcheck(made, (x,), fast_mode=True)


def test_soft_moe_without_a_selection_forbids_and_refuses_as_with_one():
    made, x = layer("soft").float(), x_of(1, 5).float()
    logits, _ = made.router(x)
    logits[:, 2, :3] = -torch.inf
    inputs = x, logits, made.up, made.down
    with trace(made.experts):
        expected = made.experts(*inputs)
    assert torch.equal(made.experts(*inputs), expected)
    logits[:, 0, 0] = torch.nan
    with pytest.raises(RuleError, match="NaN or .inf"):
        made.experts(*inputs)


def test_soft_moe_costs_its_slots_and_not_its_tokens():
    made = layer("soft")
    with trace(made) as records:
        made(x_of(2, 50))
    an_expert = 3 * UNIT * WIDTH
    assert records[0].cost.multiply_adds == 2 * 16 * an_expert + 2 * 50 * 16 * 2 * WIDTH
    assert records[0].cost.dense_multiply_adds == 2 * 50 * E * an_expert


# two tokens and two slots by hand

F64 = torch.float64
LOGITS = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=F64)
FIRST, SECOND = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))  # what token 0 is of each slot
DISPATCHED = torch.tensor([[[FIRST, SECOND], [1 - FIRST, 1 - SECOND]]], dtype=F64)
ONE, TWO = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))  # what slot 0 is of each token
COMBINED = torch.tensor([[[ONE, 1 - ONE], [TWO, 1 - TWO]]], dtype=F64)
RIGHT = soft.through_softmax


def check_means() -> None:
    """The same shares of all that is permitted, and what they make of a gradient: a softmax's is that of the numbers
    less their mean."""
    each, gradient = torch.eye(2, dtype=F64)[None], torch.tensor([[[3.0, -1.0], [0.5, 2.0]]], dtype=F64)
    for function, shares, dim in ((soft._Dispatch, DISPATCHED, -2), (soft._Combine, COMBINED, -1)):
        read, logits = each.clone().requires_grad_(), LOGITS.clone().requires_grad_()
        means = function.apply(read, logits)
        if function is soft._Dispatch:
            means = means.mT
        torch.testing.assert_close(means.detach(), shares)
        found = torch.autograd.grad((means * gradient).sum(), (read, logits))
        turned = (shares, gradient.mT) if function is soft._Dispatch else (shares.mT, gradient)
        torch.testing.assert_close(found[0], turned[0] @ turned[1])
        mean = (shares * gradient).sum(dim, keepdim=True)
        torch.testing.assert_close(found[1], shares * (gradient - mean))


def no_mean(gradient, shares, dim):
    return gradient.mul_(shares)


def another_mean(gradient, shares, dim):
    return RIGHT(gradient, shares, -3 - dim)


def not_of_the_shares(gradient, shares, dim):
    return gradient.sub_(gradient.mean(dim, keepdim=True)).mul_(shares)


@pytest.mark.parametrize("mutant", [no_mean, another_mean, not_of_the_shares])
def test_a_wrong_gradient_of_soft_moe_is_rejected(mutant, monkeypatch):
    check_means()
    monkeypatch.setattr(soft, "through_softmax", mutant)
    with pytest.raises(AssertionError):
        check_means()
