"""Deliberately wrong depth, weights, routers, balances and Soft MoE must be rejected by comparisons made by hand."""

import math

import pytest
import torch
from depth_rooms import PADDED, Selecting, by_hand, hidden, real, room, selection_of
from torch import nn

from sentei.axes.axis import Axis
from sentei.axes.depth import Depth
from sentei.axes.experts.balance import Choices, Sums, importance_loss, load_loss, sequence_loss, switch_loss, z_loss
from sentei.axes.experts.gates import Noisy, Soft, Softmax, Unit
from sentei.axes.experts.router import Router
from sentei.axes.weights import Config as WeightsConfig
from sentei.axes.weights import Weights
from sentei.core.rules import Capacity, TopK
from sentei.core.selection import Selection
from sentei.kernels.linear.calibration import Calibration

F64 = torch.float64


def mutants(*classes: type) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutant", classes, ids=lambda mutant: mutant.__name__)


# depth


def check_depth(kind: type[Depth]) -> None:
    """Slot by slot by hand; no padding; a gate that learns; in generation no look ahead."""
    made, x = room(kind=kind, train=True), hidden()
    kept = selection_of(made, x, PADDED).mask()[..., 0]
    wanted = [math.ceil(0.4 * int(stop - start)) for start, stop in PADDED]
    assert kept.sum(1).tolist() == wanted and not kept[~real(PADDED)].any()
    output = made(x, PADDED)
    torch.testing.assert_close(output, by_hand(made, x, kept, PADDED))
    output.square().sum().backward()
    assert made.gate.weight.grad is not None and made.gate.weight.grad.any()
    made.eval()
    other = x.clone()
    other[:, -6:] = 100 * made.gate.weight.detach()[0]
    first, second = (selection_of(made, given).mask()[:, :-6] for given in (x, other))
    assert torch.equal(first, second) and 0 < first.sum() < first.numel()


class LooksAheadInGeneration(Selecting):
    def select(self, scores, x, lengths=None, cache=None, tasks=None):
        return Axis.select(self, scores, x, lengths, cache)


class UnweighedUpdate(Selecting):
    def weigh(self, selection, scores, *inputs):
        return selection.weigh(torch.ones_like(scores))


class GateWithoutGradient(Selecting):
    def weigh(self, selection, scores, *inputs):
        return selection.weigh(scores.detach())


class WithoutPositions(Depth):
    """Every kept token stands at the beginning."""

    def positions(self, x, lengths, cache):
        places = super().positions(x, lengths, cache)
        return torch.zeros_like(places).where(places >= 0, -1)


class WithoutResidual(Selecting):
    def apply(self, selection, x, *inputs, **named):
        return super().apply(selection, x, *inputs, **named).masked_fill(~selection.mask(), 0)


class PaddingCompetes(Depth):
    def score(self, x, lengths=None, cache=None, tasks=None):
        return self.gated(x)


@mutants(LooksAheadInGeneration, UnweighedUpdate, GateWithoutGradient, WithoutPositions, WithoutResidual,
         PaddingCompetes)
def test_a_wrong_depth_is_rejected(mutant):
    check_depth(Depth)
    with pytest.raises(AssertionError):
        check_depth(mutant)


# weights


def check_weights(kind: type[Weights]) -> None:
    """Columns, rows and fours by hand, before and after `fix`; columns that are refitted are the least squares."""
    layer, x = nn.Linear(8, 6, bias=False, dtype=F64), torch.randn(50, 8, dtype=F64)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]  # so that a column can stand in for another
    weight = layer.weight.detach()
    columns = weight.square().sum(0)
    best = columns.argsort()[5:].sort().values
    made = kind(WeightsConfig(rule=TopK(3), among="columns"), layer, columns)
    torch.testing.assert_close(made(x), x[:, best] @ weight[:, best].T)
    torch.testing.assert_close(made.fix()(x), x[:, best] @ weight[:, best].T)
    crowds = ("row", TopK(3), (6, 8)), ("four", TopK(2), (12, 4)), ("layer", Capacity(0.25), (1, 48))
    for among, rule, shape in crowds:
        number = rule.k if isinstance(rule, TopK) else 12
        laid = weight.abs().reshape(shape)
        keep = (laid >= laid.sort(1, descending=True).values[:, number - 1:number]).view(6, 8)
        made = kind(WeightsConfig(rule=rule, among=among), layer, weight.abs())
        torch.testing.assert_close(made(x), x @ (weight * keep).T)
        torch.testing.assert_close(made.fix()(x), x @ (weight * keep).T)
    seen = Calibration(8, 6)
    seen.gram, seen.rows = x.T @ x, len(x)
    made = kind(WeightsConfig(rule=TopK(3), among="columns", damp=0.0), layer, columns).fix(seen)
    fitted = torch.linalg.lstsq(x[:, best], x @ weight.T).solution
    torch.testing.assert_close(made(x), x[:, best] @ fitted)


class KeepsTheLeast(Weights):
    def choose(self, scores):
        return super().choose(-scores)


class OneCrowd(Weights):
    """Whatever competes with what, all compete with all."""

    def choose(self, scores):
        kept = super().choose(scores)
        return TopK(int(kept.sum()))(scores).mask()


class KeepsAllUntilFixed(Weights):
    def apply(self, selection, x):
        return super().apply(selection, x) if self.fixed is not None else self.layer(x)


class FixedElsewhere(Weights):
    def replaced(self, weight, ids):
        return super().replaced(weight.flip(-1), ids)


class WithoutLeastSquares(Weights):
    def refitted(self, weight, ids, calibration):
        return weight[:, ids]


@mutants(KeepsTheLeast, OneCrowd, KeepsAllUntilFixed, FixedElsewhere, WithoutLeastSquares)
def test_wrong_weights_are_rejected(mutant):
    check_weights(Weights)
    with pytest.raises(AssertionError):
        check_weights(mutant)


# the router


def check_router(kind: type[Router]) -> None:
    """The three metrics of one token by hand, in fp32 of narrow numbers too; noise in training alone."""
    x, rows = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -2.0]])
    cosine = 10 / math.sqrt(5)
    for metric, expected in (("dot", [3.0, -4.0]), ("l2", [-1.5, -6.0]), ("cosine", [cosine, -2 * cosine])):
        made = kind(Unit(), metric, 2, 2)
        made.weight.data.copy_(rows)
        torch.testing.assert_close(made(x)[0], torch.tensor([expected]))
    made, x = kind(Unit(), "dot", 64, 4).bfloat16(), torch.randn(5, 64).bfloat16()
    expected = x.float() @ made.weight.float().T
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            torch.testing.assert_close(made(x)[0], expected, rtol=1e-5, atol=1e-5)
    made, x = kind(Noisy(), "dot", 64, 4), torch.randn(5, 64)
    logits, noise = made.train()(x)
    assert not noise.clean.any() and logits.any() and not made.eval()(x)[0].any()


class WithoutHalfTheSquare(Router):
    def forward(self, x, tasks=None):
        logits, noise = super().forward(x, tasks)
        return logits + self.weight.square().sum(-1) / 2 if self.metric == "l2" else logits, noise


class CosineSeesSizes(Router):
    def forward(self, x, tasks=None):
        logits, noise = super().forward(x, tasks)
        return logits * x.norm(dim=-1, keepdim=True) if self.metric == "cosine" else logits, noise


class NarrowRouter(Router):
    def forward(self, x, tasks=None):
        logits, noise = super().forward(x, tasks)
        return (logits.bfloat16().float() if x.dtype == torch.bfloat16 else logits), noise


class NoiseInEvaluation(Router):
    def forward(self, x, tasks=None):
        was, self.training = self.training, True
        found = super().forward(x, tasks)
        self.training = was
        return found


class NeverNoisy(Router):
    def forward(self, x, tasks=None):
        logits, noise = super().forward(x, tasks)
        return (logits if noise is None else noise.clean), noise


@mutants(WithoutHalfTheSquare, CosineSeesSizes, NarrowRouter, NoiseInEvaluation, NeverNoisy)
def test_a_wrong_router_is_rejected(mutant):
    check_router(Router)
    with pytest.raises(AssertionError):
        check_router(mutant)


# balance


def check_balance(kind: type[Sums]) -> None:
    """Two sequences of two tokens, one of them padding; top 1 of two experts; each loss worked out by hand."""
    logits = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [9.0, 9.0]]], dtype=F64, requires_grad=True)
    keep = torch.tensor([[[True, False], [True, False]], [[False, True], [False, False]]])
    permitted = torch.tensor([[[True, True], [True, True]], [[True, True], [False, False]]])
    weighed = Selection.from_mask(keep, permitted).weigh(logits.softmax(-1))
    one, two, three = (1 / (1 + math.exp(-z)) for z in (1.0, 2.0, 3.0))  # the chosen expert's share, token by token
    sums = kind.of(Softmax(), Choices(weighed, weighed, keep), logits, None)
    parts = [kind.of(Softmax(), Choices(half, half, keep[i:i + 1]), logits[i:i + 1], None)
             for i in (0, 1) for half in [Selection.from_mask(keep[i:i + 1], permitted[i:i + 1]).weigh(
                 logits[i:i + 1].softmax(-1))]]
    shares = (one + two + 1 - three) / 3, (3 - one - two - (1 - three)) / 3
    importance = one + two, three
    mean = sum(importance) / 2
    expected = {
        switch_loss: 2 * (2 / 3 * shares[0] + 1 / 3 * shares[1]),
        importance_loss: sum((value - mean) ** 2 for value in importance) / 2 / mean**2,
        z_loss: sum(math.log(1 + math.exp(z)) ** 2 for z in (1.0, 2.0, 3.0)) / 3,
        sequence_loss: (2 * (one + two) / 2 + 2 * three) / 2,
    }
    for loss, value in expected.items():
        for found in (sums, parts[0] + parts[1]):
            assert loss(found).item() == pytest.approx(value, rel=1e-6), loss.__name__
    gradient, = torch.autograd.grad(switch_loss(sums), logits)
    assert gradient[permitted].all() and not gradient[~permitted].any()
    assert load_is_refused(sums)


def load_is_refused(sums: Sums) -> bool:
    from sentei.core.errors import RuleError

    try:
        load_loss(sums)
    except RuleError:
        return True
    return False


def changed(name: str, change) -> type[Sums]:
    """Sums of which one number is another."""
    class Changed(Sums):
        @classmethod
        def of(cls, gate, choices, logits, noise):
            sums = Sums.of(gate, choices, logits, noise)
            return Sums(**vars(sums) | {name: change(sums, choices, logits)})

    Changed.__name__ = Changed.__qualname__ = f"{name}-{change.__name__}"
    return Changed


def padding_counts(sums, choices, logits):
    return sums.tokens.new_tensor(float(logits[..., 0].numel()))


def padding_has_shares(sums, choices, logits):
    return logits.softmax(-1).sum((0, 1))


def without_gradient(sums, choices, logits):
    return sums.shares.detach()


def of_choices(sums, choices, logits):
    return sums.counts


def not_squared(sums, choices, logits):
    return sums.z.sqrt()


def weighed_counts(sums, choices, logits):
    return sums.importance


def every_sequence(sums, choices, logits):
    return sums.sequences * 0 + 1


@mutants(*(changed(name, change) for name, change in (
    ("tokens", padding_counts), ("shares", padding_has_shares), ("shares", without_gradient),
    ("importance", of_choices), ("z", not_squared), ("counts", weighed_counts), ("sequences", every_sequence))))
def test_a_wrong_balance_is_rejected(mutant):
    check_balance(Sums)
    with pytest.raises((AssertionError, RuntimeError)):  # torch's own, where a sum has lost its graph
        check_balance(mutant)


# Soft MoE


def check_soft(gate: type[Soft]) -> None:
    """Three tokens, the last one padding, and two slots: softmax over the tokens, and over the slots."""
    made, logits = gate(), torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]], dtype=F64)
    permitted = torch.tensor([[[True, True], [True, True], [False, False]]])
    dispatch = made.dispatch(logits, permitted)
    first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))  # what token 0 is of each slot
    torch.testing.assert_close(dispatch, torch.tensor([[[first, second], [1 - first, 1 - second], [0, 0]]], dtype=F64))
    weights = made.weigh(Selection.from_mask(permitted, permitted), logits).dense_weights()
    one, two = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))  # what slot 0 is of each token
    torch.testing.assert_close(weights, torch.tensor([[[one, 1 - one], [two, 1 - two], [0, 0]]], dtype=F64))
    nobody = made.dispatch(logits, torch.zeros_like(permitted))
    assert not nobody.any() and nobody.isfinite().all()


class DispatchOverSlots(Soft):
    def dispatch(self, logits, permitted):
        return logits.softmax(-1) * permitted


class PaddingIsDispatched(Soft):
    def dispatch(self, logits, permitted):
        return super().dispatch(logits, torch.ones_like(permitted))


class CombineOverTokens(Soft):
    def weigh(self, selection, logits):
        return selection.weigh(logits.softmax(-2))


class NaNWhereNobodyIs(Soft):
    def dispatch(self, logits, permitted):
        return logits.masked_fill(~permitted, -torch.inf).softmax(-2)


@mutants(DispatchOverSlots, PaddingIsDispatched, CombineOverTokens, NaNWhereNobodyIs)
def test_a_wrong_soft_moe_is_rejected(mutant):
    check_soft(Soft)
    with pytest.raises(AssertionError):
        check_soft(mutant)
