"""Diagnostics on selections made by hand, whose answers are known."""

import math

import pytest
import torch

from sentei.core.cost import Cost
from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import TopK
from sentei.core.selection import Selection
from sentei.core.tracing import Record, Trace
from sentei.measurement.specialisation import coactivation, loads, rate_bound, specialisation


def record(keep: torch.Tensor, weights: torch.Tensor | None = None, real: torch.Tensor | None = None,
           path: str = "a") -> Record:
    permitted = torch.ones_like(keep) if real is None else real.unsqueeze(-1).expand_as(keep)
    selection = Selection.from_mask(keep, permitted)
    selection = selection if weights is None else selection.weigh(weights)
    return Record(path=path, selection=selection, cost=Cost(multiply_adds=0, dense_multiply_adds=0), impl="", reason="",
                  room="experts")


def traced(*records: Record) -> Trace:
    trace = Trace()
    trace.extend(records)
    return trace


def one_hot(ids: list[int], number: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(ids), number).bool()


def test_an_even_and_a_collapsed_layer():
    even, collapsed = record(one_hot([0, 1, 2, 3])), record(one_hot([2, 2, 2, 2]), path="b")
    found = loads(traced(even, collapsed, even))
    a, b = found["a"], found["b"]
    assert (a.tokens, a.counts, a.entropy, a.variation, a.violation) == (8, (2, 2, 2, 2), 1, 0, 0)
    assert (b.tokens, b.counts, b.entropy, b.violation) == (4, (0, 0, 4, 0), 0, 3)
    assert b.variation == pytest.approx(3**0.5) and b.dropped == 0 and b.confidence == 1


def test_padding_dropped_tokens_and_confidence():
    keep = torch.tensor([[True, True], [False, False], [True, False], [True, True]])
    weights = torch.tensor([[0.75, 0.25], [9, 9], [0.4, 9], [1.0, 1.0]])
    load = loads(traced(record(keep, weights, torch.tensor([True, True, True, False]))))["a"]
    assert (load.tokens, load.counts, load.dropped) == (3, (2, 1), pytest.approx(1 / 3))
    assert load.confidence == pytest.approx((0.75 + 1) / 2)


def test_an_expert_is_dead_only_where_there_are_enough_tokens_to_say_so():
    few, many = (loads(traced(record(one_hot([0, 1, 2] * n))))["a"] for n in (100, 10_000))
    assert (few.dead, few.unknown) == ((), (3,)) and (many.dead, many.unknown) == ((3,), ())
    assert few.bounds[3] == pytest.approx(1 - (0.05 / 4) ** (1 / 300))
    rare = loads(traced(record(one_hot([0, 1, 2] * 100_000 + [3]))))["a"]
    assert rare.dead == (3,) and rare.unknown == () and rare.counts[3] == 1


@pytest.mark.parametrize("hits, draws, expected", [
    # Exact one-sided 95 % bounds: 1 - 0.05^(1/n); for n hits of n always 1; others from the binomial distribution.
    (0, 10, 1 - 0.05 ** 0.1), (10, 10, 1.0), (1, 10, 0.3941633), (5, 10, 0.7775589), (3, 100, 0.0757107)])
def test_the_bound_is_that_of_clopper_and_pearson(hits, draws, expected):
    bound = rate_bound(hits, draws)
    assert bound == pytest.approx(expected, rel=1e-5)
    if hits < draws:
        at_most = sum(math.comb(draws, i) * bound**i * (1 - bound) ** (draws - i) for i in range(hits + 1))
        assert at_most == pytest.approx(0.05)


def test_the_bound_holds_as_often_as_it_says():
    """2,000 draws of 200 tokens at a rate of 2 %: the bound fails in at most 5 %, with four standard errors."""
    hits = (torch.rand(2000, 200, dtype=torch.float64) < 0.02).sum(1)
    bounds = {int(n): rate_bound(int(n), 200) for n in hits.unique()}
    failed = sum(bounds[int(n)] < 0.02 for n in hits) / 2000
    assert 0 < failed < 0.05 + 4 * (0.05 * 0.95 / 2000) ** 0.5


def test_the_rule_of_three():
    assert rate_bound(0, 10_000) == pytest.approx(3 / 10_000, rel=0.002)
    assert rate_bound(0, 0) == 1


def test_experts_that_work_together():
    keep = torch.tensor([[True, True, False, False], [False, False, True, False]] * 50)
    lift = coactivation([record(keep[:60]), record(keep[60:])])
    assert lift[0, 1] == pytest.approx(2) and lift[0, 2] == 0 and lift[3].tolist() == [0] * 4
    chance = coactivation([record(TopK(1)(torch.randn(20_000, 2)).mask().repeat(1, 2)[:, torch.randperm(4)])])
    assert chance.isfinite().all()
    independent = torch.rand(40_000, 2) < 0.5
    assert coactivation([record(independent)])[0, 1] == pytest.approx(1, abs=0.03)


def test_experts_that_follow_the_token_are_told_from_those_that_do_not():
    tokens = torch.randint(0, 4, (6, 500))
    follow = specialisation([record(one_hot(tokens.flatten().tolist()).view(6, 500, 4))], [tokens], shuffles=40)
    assert follow.information == pytest.approx(2, abs=0.01) and follow.chance == 1 / 41
    assert torch.equal(follow.rates, torch.eye(4, dtype=torch.float64)) and follow.labels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(follow.lift().diagonal(), 3000 / follow.tokens, check_dtype=False)
    blind = specialisation([record(one_hot(torch.randint(0, 4, (3000,)).tolist()).view(6, 500, 4))], [tokens])
    assert abs(blind.excess) < 0.005 and blind.chance > 0.02


def test_many_labels_of_few_tokens_look_informative_and_are_not():
    """A vocabulary of 500 over 1,000 tokens: bits by chance alone, which the shuffles show."""
    tokens = torch.randint(0, 500, (1, 1000))
    found = specialisation([record(one_hot(torch.randint(0, 4, (1000,)).tolist()).view(1, 1000, 4))], [tokens])
    assert found.information > 0.5 and abs(found.excess) < 0.1 and found.chance > 0.01


def test_labels_of_sequences_are_shuffled_as_sequences():
    """Each sequence sticks to one expert, whatever its domain: alike inside, and no evidence of domains."""
    domains, experts = torch.arange(12) % 2, torch.randint(0, 4, (12,))
    keep = one_hot(experts.repeat_interleave(100).tolist()).view(12, 100, 4)
    by_sequence = specialisation([record(keep[:5]), record(keep[5:])], [domains[:5], domains[5:]], shuffles=200)
    by_token = specialisation([record(keep)], [domains[:, None].expand(12, 100).contiguous()], shuffles=200)
    assert by_sequence.information == pytest.approx(by_token.information)
    assert by_token.chance < 0.01 < 0.04 < by_sequence.chance


def test_padding_has_no_label():
    keep, real = one_hot([0, 1, 2, 3]).view(2, 2, 4), torch.tensor([[True, False], [True, True]])
    found = specialisation([record(keep, real=real)], [torch.tensor([[7, 9], [7, 8]])], shuffles=1)
    assert found.labels.tolist() == [7, 8] and found.tokens.tolist() == [2, 1]
    assert found.rates.tolist() == [[0.5, 0, 0.5, 0], [0, 0, 0, 1]]


def test_nothing_at_all():
    empty = record(torch.zeros(2, 0, 4, dtype=torch.bool))
    load = loads(traced(empty))["a"]
    assert (load.tokens, load.entropy, load.dead, load.unknown) == (0, 0, (), (0, 1, 2, 3))
    assert loads(Trace()) == {} and specialisation([empty], [torch.zeros(2, 0, dtype=torch.int64)]).information == 0
    assert coactivation([empty]).tolist() == [[0] * 4] * 4


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 5), torch.zeros(2, 4)], ids=str)
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(ShapeError, match="give one label a token or a sequence"):
        specialisation([record(torch.ones(2, 5, 4, dtype=torch.bool))], [labels])


@pytest.mark.parametrize("settings", [{"level": 1.0}, {"level": 0}, {"part": 0}, {"part": 2}], ids=str)
def test_levels_out_of_range_are_refused(settings):
    with pytest.raises(RuleError, match="loads: expected level and part"):
        loads(Trace(), **settings)
