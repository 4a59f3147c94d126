"""depth: no token knows a later one, slots and calls do not matter; the cache and the predictor."""

import copy
from math import log

import pytest
import torch
from depth_rooms import LEFT, PADDED, B, D, Selecting, T, by_hand, hidden, real, room, selection_of

from sentei.axes.depth import Cache, Depth, Rows
from sentei.core.definition import apply
from sentei.core.errors import RuleError
from sentei.core.rules import All, Capacity
from sentei.core.selection import Selection
from sentei.core.tracing import trace

# The checks, each with the wrong rooms it must reject


def check_definition(kind) -> None:
    """x + the loop of the definition, outputs and gradients."""
    for train in (True, False):
        depth, x = room(kind=kind, network=True, train=train), hidden()
        x.requires_grad_()
        selection = selection_of(depth, x)
        assert 0 < selection.density() < 1
        weighed = selection.weigh(depth.gate(x))
        expected = x + apply(weighed, [lambda row, depth=depth: depth.block(row, None)], x)
        output, wanted = depth(x), [x, *depth.block.parameters(), *depth.gate.parameters()]
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(y.sin().sum(), wanted, materialize_grads=True) for y in (output, expected))
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def check_prefix(kind, train: bool = False) -> None:
    """No token knows a later one."""
    depth, x = room(kind=kind, train=train), hidden()
    before = depth(x)
    for cut in range(1, T):
        later = x.clone()
        later[:, cut:] = 5 * torch.randn_like(later[:, cut:])
        torch.testing.assert_close(depth(later)[:, :cut], before[:, :cut], rtol=1e-11, atol=1e-11)


def check_slots(kind, train: bool = False) -> None:
    """A sequence gives the same whatever stands beside it, and whatever stands in its padding."""
    depth, x = room(kind=kind, train=train), hidden()
    for lengths in (None, PADDED):
        together = depth(x, lengths)
        for slot in range(B):
            start, stop = (0, T) if lengths is None else lengths[slot].tolist()
            alone = depth(x[slot:slot + 1, start:stop])
            torch.testing.assert_close(together[slot:slot + 1, start:stop], alone, rtol=1e-11, atol=1e-11)
            assert torch.equal(together[slot, :start], x[slot, :start]), "padding passes unchanged"


def check_cache(kind) -> None:
    """Prompt and generation in calls of any length are one call, and so is the choice, in bits."""
    for calls in ([1] * T, [7, 1, 1, 4, 3], [0, 9, 7], [T]):
        for lengths in (None, LEFT):
            depth, x, cache = room(kind=kind), hidden(), Cache()
            whole, kept = depth(x, lengths), selection_of(depth, x, lengths).mask()
            outputs, choices = [], []
            for part in x.split(calls, 1):
                begin = sum(y.shape[1] for y in outputs)
                bounds = None if lengths is None else (lengths - begin).clamp(0, part.shape[1])
                with trace(depth) as records:
                    outputs.append(depth(part, bounds, cache))
                choices.append(records[0].selection.mask())
            torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-11)
            assert torch.equal(torch.cat(choices, 1), kept)


def check_by_hand(kind) -> None:
    """Attention inside the block sees the rows kept, at their own positions, and nothing else."""
    for lengths in (None, PADDED):
        depth, x = room(kind=kind), hidden()
        kept = selection_of(depth, x, lengths).mask()[..., 0]
        assert len(set(kept.sum(1).tolist())) > 1, "ragged"
        torch.testing.assert_close(depth(x, lengths), by_hand(depth, x, kept, lengths), rtol=1e-11, atol=1e-11)


class LooksAhead(Selecting):
    """Generates by the rule of training."""

    def select(self, scores, x, lengths=None, cache=None):
        return self.rule(scores)


class SharesCapacity(Selecting):
    """One capacity for the whole batch."""

    def select(self, scores, x, lengths=None, cache=None):
        kept = self.rule(scores.flatten(0, 1)).mask().view_as(scores)
        return Selection.from_mask(kept, ~scores.isneginf())


class Unweighed(Selecting):
    def weigh(self, selection, scores, *inputs):
        return selection


class Detached(Selecting):
    """The gate weighs and does not learn."""

    def weigh(self, selection, scores, *inputs):
        return selection.weigh(scores.detach())


class ForgetsTime(Depth):
    """Every call begins at position 0."""

    def positions(self, x, lengths, cache):
        return super().positions(x, lengths, None)


class HalvesTime(Depth):
    """Tokens stand nearer to one another than they do."""

    def positions(self, x, lengths, cache):
        return super().positions(x, lengths, cache) // 2


class CachesAll(Selecting):
    """Skipped tokens leave keys and values too."""

    def apply(self, selection, x, lengths=None, cache=None):
        if cache is not None and x.shape[1] == 1:
            copied = copy.copy(cache)
            self.block(x, Rows(positions=self.positions(x, lengths, copied), cache=cache))
        return super().apply(selection, x, lengths, cache)


class RanksAtOnce(Depth):
    """Generates by the rule of training, without a selection."""

    def chosen(self, x, lengths):
        return self.rule(self.score(x, lengths)).mask()[..., 0]


class KeepsPadding(Depth):
    def chosen(self, x, lengths):
        return super().chosen(x, None)


class WeighsAtOnce(Depth):
    """The gate weighs the rows kept and does not learn."""

    def passed(self, kept, weights, x, *inputs):
        return super().passed(kept, self.gated(x).detach() if weights is None else weights, x, *inputs)


class CountsAtOnce(Depth):
    def passed(self, kept, weights, x, *inputs):
        return super().passed(kept, torch.ones_like(x[..., :1]) if weights is None else weights, x, *inputs)


RIGHT = [(check_definition, {}), (check_prefix, {}), (check_slots, {}), (check_slots, {"train": True}),
         (check_cache, {}), (check_by_hand, {})]
WRONG = [(check_prefix, LooksAhead), (check_cache, LooksAhead), (check_slots, SharesCapacity),
         (check_definition, Unweighed), (check_definition, Detached), (check_by_hand, Unweighed),
         (check_prefix, RanksAtOnce), (check_cache, RanksAtOnce), (check_slots, KeepsPadding),
         (check_definition, WeighsAtOnce), (check_by_hand, CountsAtOnce),
         (check_cache, ForgetsTime), (check_by_hand, HalvesTime), (check_cache, CachesAll)]


@pytest.mark.parametrize("kind", [Depth, Selecting], ids=["at once", "selecting"])
@pytest.mark.parametrize("check, settings", RIGHT, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_room_passes(check, settings, kind):
    check(kind, **settings)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("lengths", [None, PADDED], ids=["whole", "padded"])
def test_without_a_trace_there_is_no_selection_and_the_same_is_computed(train, lengths, monkeypatch):
    depth, x = room(train=train), hidden().requires_grad_()
    wanted = [x, *depth.block.parameters(), *depth.gate.parameters()]
    with trace(depth):
        expected = depth(x, lengths)
    monkeypatch.setattr(Depth, "select", None)
    output = depth(x, lengths)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for found, right in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (output, expected)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("check, kind", WRONG, ids=lambda value: value.__name__)
def test_a_wrong_room_is_rejected(check, kind):
    with pytest.raises(AssertionError):
        check(kind)


def test_the_choice_of_training_sees_the_future_and_is_caught():
    with pytest.raises(AssertionError):
        check_prefix(Depth, train=True)


@pytest.mark.parametrize("train", [True, False])
def test_the_choice_and_its_weights_are_in_fp32_under_autocast_and_of_bfloat16(train):
    depth, x = room(train=train).float(), hidden(64).float()
    for given in (x, x.bfloat16()):
        plain = selection_of(depth, given.float())
        with torch.autocast("cpu", torch.bfloat16):
            narrow = selection_of(depth, given)
        assert torch.equal(narrow.ids, plain.ids) and torch.equal(narrow.weights, plain.weights)
    half = selection_of(depth.bfloat16(), x.bfloat16())
    assert half.weights.dtype == torch.float32 and depth(x.bfloat16()).dtype == torch.bfloat16


# The cache


def test_the_cache_knows_which_positions_it_holds():
    depth, x, cache = room(), hidden(), Cache()
    kept = selection_of(depth, x, LEFT).mask()[..., 0]
    for part in range(0, T, 4):
        depth(x[:, part:part + 4], (LEFT - part).clamp(0, 4), cache)
    for slot in range(B):
        places = (kept[slot].nonzero()[:, 0] - LEFT[slot, 0]).tolist()
        held = cache.positions[slot].tolist()
        assert [place for place in held if place >= 0] == places and held == sorted(held)
    assert cache.seen.tolist() == [16, 11, 7]
    assert cache.keys.rows.shape == (B, kept.sum(1).max(), 2, D // 2) == cache.values.rows.shape


def test_a_ragged_prompt_does_not_make_each_token_a_copy_of_all():
    cache, positions, places = Cache(), torch.arange(9).expand(2, 9).clone(), set()
    positions[1, 6:] = -1
    with torch.no_grad():
        cache.extend(*torch.randn(2, 2, 9, 3, 4).unbind(), positions)
        for step in range(9, 13):
            cache.extend(*torch.randn(2, 2, 1, 3, 4).unbind(), torch.tensor([[step], [step - 3]]))
            places.add(cache.keys.rows.data_ptr())
    assert cache.positions[1].tolist() == [-1, -1, -1, *range(10)] and len(places) == 1


def test_slots_of_the_batch_may_advance_by_different_numbers_of_tokens():
    depth, x, cache, done = room(), hidden(), Cache(), torch.zeros(B, dtype=torch.int64)
    whole, outputs = depth(x), torch.zeros_like(x)
    for steps in ([7, 3, 5], [0, 6, 1], [5, 5, 5], [4, 2, 5]):
        steps = torch.tensor(steps)
        part = torch.full((B, int(steps.max()), D), torch.nan, dtype=torch.float64)
        for slot, (start, count) in enumerate(zip(done.tolist(), steps.tolist(), strict=True)):
            part[slot, :count] = x[slot, start:start + count]
        output = depth(part, torch.stack([torch.zeros_like(steps), steps], 1), cache)
        for slot, (start, count) in enumerate(zip(done.tolist(), steps.tolist(), strict=True)):
            outputs[slot, start:start + count] = output[slot, :count]
        done += steps
        assert torch.equal(cache.seen, done)
    torch.testing.assert_close(outputs, whole, rtol=1e-11, atol=1e-11)


def test_a_cache_in_training_is_refused_where_the_choice_looks_along():
    with pytest.raises(RuleError, match="no cache while Capacity looks along the sequence.*call eval"):
        room(train=True)(hidden(), None, Cache())
    room(All(), train=True)(hidden(), None, Cache())


# The predictor


def test_the_predictors_loss_is_the_cross_entropy_of_having_been_kept():
    for lengths in (None, PADDED):
        depth, x = room(train=True), hidden()
        kept = selection_of(depth, x, lengths).mask()[..., 0]
        terms = []
        for slot, place in (torch.ones(B, T) if lengths is None else real(lengths)).nonzero().tolist():
            row = x[slot, place]
            logit = (row / row.square().mean().sqrt() @ depth.predictor.weight[0] + depth.predictor.bias).item()
            terms.append(log(1 + torch.tensor(-logit if kept[slot, place] else logit).exp()))
        assert depth.predictor_loss(x, lengths).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_the_predictors_loss_trains_the_predictor_alone():
    depth, x = room(train=True), hidden().requires_grad_()
    depth.predictor_loss(x).backward()
    assert {name for name, part in depth.named_parameters() if part.grad is not None} == {
        "predictor.weight", "predictor.bias"}
    assert x.grad is None


def test_the_predictor_learns_what_the_rule_keeps():
    depth = room(Capacity(0.25), network=True, train=True)
    optimizer = torch.optim.Adam(depth.predictor.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        depth.predictor_loss(torch.randn(4, 64, D, dtype=torch.float64)).backward()
        optimizer.step()
    x = torch.randn(4, 64, D, dtype=torch.float64)
    wanted, got = selection_of(depth, x).mask(), selection_of(depth.eval(), x).mask()
    assert (wanted == got).double().mean() > 0.85 and abs(got.double().mean() - 0.25) < 0.1
