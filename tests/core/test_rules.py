"""Every rule against a sentence of its definition, on scores with ties, forbidden rows and empty sizes."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.core.errors import FileError, RuleError
from sentei.core.rules import RULES, All, Capacity, Certified, Fixed, Mass, Rule, Threshold, TopK, rule_from_json

SETTINGS = settings(deadline=None, max_examples=60)
EVERY_RULE = [All(), TopK(2), Mass(0.7), Threshold(0.3), Capacity(0.5), Fixed((0,)), TopK((1, 2)), Mass((0.5, 0.9)),
              Threshold((0.1, 0.2)), Capacity((0.2, 1.0)), TopK(0), Mass(0), Capacity(0), Fixed(()), Mass(1.0)]
NUMBERS = st.one_of(st.just(-math.inf), st.integers(-3, 3).map(float), st.floats(-20, 20, width=32))


@st.composite
def scores(draw, min_size: int = 1) -> torch.Tensor:
    """Scores [Q, C] with ties, forbidden candidates and forbidden rows."""
    num_queries, num_candidates = draw(st.integers(1, 4)), draw(st.integers(min_size, 9))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=num_candidates, max_size=num_candidates),
                         min_size=num_queries, max_size=num_queries))
    return torch.tensor(rows, dtype=draw(st.sampled_from([torch.float32, torch.float64])))


def draw_forced(data, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(data.draw(st.lists(st.booleans(), min_size=x.numel(), max_size=x.numel()))).view_as(x)


def ranked(row: torch.Tensor) -> list[int]:
    """The permitted candidates of a row, best first, ties to the lower number."""
    return sorted((c for c, s in enumerate(row.tolist()) if s > -math.inf), key=lambda c: (-row[c].item(), c))


def shares(row: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(row.double().softmax(-1), nan=0.0)


@SETTINGS
@given(scores(), st.integers(0, 10))
def test_topk_keeps_the_k_highest_and_ties_go_to_the_lower_number(x, k):
    selection = TopK(k)(x)
    for row, kept in zip(x, selection.mask(), strict=True):
        assert kept.nonzero().flatten().tolist() == sorted(ranked(row)[:k])


def test_ties_go_to_the_lower_number_in_long_rows_too():
    """Beyond 16 elements a sort that is not stable shows it."""
    x = torch.arange(1000).remainder(3).float().expand(2, -1)
    best = list(range(2, 1000, 3))
    assert TopK(100)(x).ids.tolist() == [best[:100]] * 2
    assert Mass(0.5)(torch.zeros(1, 1024)).ids.tolist() == [list(range(512))]


@SETTINGS
@given(scores(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_mass_keeps_a_superset(x, a, b):
    low, high = sorted((a, b))
    assert bool((~Mass(low)(x).mask() | Mass(high)(x).mask()).all())


@SETTINGS
@given(scores(), st.floats(0, 1))
def test_mass_keeps_the_fewest_whose_shares_reach_it(x, mass):
    for row, kept in zip(x, Mass(mass)(x).mask(), strict=True):
        order = [c for c in ranked(row) if kept[c]]
        assert order == ranked(row)[:len(order)], "not the best ones"
        if ranked(row):
            assert shares(row)[order].sum() >= mass - 1e-5
        if order and mass < 1:
            assert shares(row)[order[:-1]].sum() <= mass + 1e-5


@SETTINGS
@given(scores())
def test_a_mass_of_1_and_a_threshold_of_0_keep_all(x):
    everything = All()(x).mask()
    assert torch.equal(everything, ~torch.isneginf(x))
    assert torch.equal(Mass(1)(x).mask(), everything) and torch.equal(Threshold(0)(x).mask(), everything)


@SETTINGS
@given(scores(), st.floats(0, 1))
def test_threshold_compares_with_the_largest_share(x, ratio):
    for row, kept in zip(x, Threshold(ratio)(x).mask(), strict=True):
        if not ranked(row):
            assert not kept.any()
            continue
        relative = (row.double() - row.double().max()).exp()
        assert bool(kept[relative > ratio + 1e-5].all())
        assert not bool((kept & (relative < ratio - 1e-5)).any())
        assert bool(kept[ranked(row)[0]])


def test_a_threshold_of_1_keeps_the_largest_and_its_equals():
    assert Threshold(1)(torch.tensor([[2.0, 1.0, 2.0], [0.0, 3.0, 1.0]])).ids.tolist() == [[0, 2], [1, -1]]


def test_a_threshold_of_0_keeps_even_a_share_of_0():
    assert Threshold(0)(torch.tensor([[0.0, -1e4]])).count().item() == 2


@pytest.mark.parametrize("num_queries", [1, 7, 13, 21, 49, 300])
def test_a_capacity_of_k_nths_of_n_queries_is_k(num_queries):
    x = torch.randn(num_queries, 2, generator=torch.Generator().manual_seed(0))
    for k in range(num_queries + 1):
        assert Capacity(k / num_queries)(x).load().tolist() == [k, k]


@SETTINGS
@given(scores(), st.floats(0, 1))
def test_capacity_is_the_candidates_choice_of_queries(x, capacity):
    selection = Capacity(capacity)(x)
    for column, kept in zip(x.T, selection.mask().T, strict=True):
        slots = math.ceil(capacity * len(ranked(column)) - 1e-9)
        assert kept.nonzero().flatten().tolist() == sorted(ranked(column)[:slots])


@SETTINGS
@given(scores(min_size=3), st.lists(st.integers(0, 2), max_size=4))
def test_fixed_looks_at_no_score(x, ids):
    named = torch.zeros(x.shape, dtype=torch.bool)
    named[:, ids] = True
    assert torch.equal(Fixed(tuple(ids))(x).mask(), named & ~torch.isneginf(x))


def test_fixed_refuses_a_candidate_that_does_not_exist():
    with pytest.raises(RuleError, match=r"expected ids in 0\.\.2, got \(0, 3\)"):
        Fixed((0, 3))(torch.zeros(2, 3))


@pytest.mark.parametrize("rule", [rule for rule in EVERY_RULE if not isinstance(rule, All)], ids=str)
@SETTINGS
@given(data=st.data())
def test_forced_candidates_are_kept_where_permitted(rule, data):
    x = torch.stack([data.draw(scores())] * 2)
    forced = draw_forced(data, x)
    assert bool((rule(x, forced=forced).mask() | ~forced | torch.isneginf(x)).all())
    assert not (rule(x, forced=forced).mask() & torch.isneginf(x)).any()


@SETTINGS
@given(st.data(), st.integers(0, 10))
def test_forced_candidates_are_counted_among_the_k(data, k):
    x = data.draw(scores())
    forced, permitted = draw_forced(data, x), ~torch.isneginf(x)
    count = TopK(k)(x, forced=forced).count()
    assert torch.equal(count, torch.maximum((forced & permitted).sum(-1), permitted.sum(-1).clamp(max=k)))


def test_forced_candidates_count_first_towards_the_mass():
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    forced = torch.tensor([False, False, False, True])
    assert Mass(0.5)(x, forced=forced).ids.tolist() == [[0, 3]]
    assert Mass(0.2)(x, forced=forced).ids.tolist() == [[3]]


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_a_row_with_nothing_permitted_is_empty(rule):
    x = torch.full((2, 3, 4), -torch.inf)
    x[:, 0] = 1.0
    selection = rule(x, forced=torch.ones(4, dtype=torch.bool))
    assert selection.count()[:, 1:].sum() == 0 and selection.permitted.tolist() == [[4, 0, 0]] * 2
    assert bool((selection.ids[:, 1:] == -1).all()) and bool((selection.weights[:, 1:] == 0).all())


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0), (2, 0, 0), (2, 1, 1), (2, 1, 5), (2, 5, 1)], ids=str)
@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_sizes_of_0_and_1_are_no_exception(rule, shape):
    if isinstance(rule, Fixed) and shape[-1] == 0:
        rule = Fixed(())
    selection = rule(torch.zeros(shape), unit=8)
    assert selection.mask().shape == shape and selection.unit == 8
    assert 0 <= selection.density() <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_nan_and_infinity_are_refused(rule, bad):
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = bad
    with pytest.raises(RuleError, match="expected finite scores, or -inf to forbid, got NaN or \\+inf"):
        rule(x)


@pytest.mark.parametrize("rule, singles", [
    (TopK((0, 1, 3)), [TopK(0), TopK(1), TopK(3)]), (Mass((0.2, 0.6, 1.0)), [Mass(0.2), Mass(0.6), Mass(1.0)]),
    (Threshold((0.0, 0.5, 1.0)), [Threshold(0.0), Threshold(0.5), Threshold(1.0)]),
    (Capacity((0.1, 0.5, 0.9)), [Capacity(0.1), Capacity(0.5), Capacity(0.9)]),
], ids=str)
def test_a_tuple_is_one_number_a_head(rule, singles):
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    for head, single in enumerate(singles):
        assert torch.equal(rule(x).mask()[:, head], single(x[:, head]).mask())
    for wrong in (x[:, :2], x[0, 0]):
        with pytest.raises(RuleError, match=r"expected scores \[\.\.\., H=3, Q, C\]"):
            rule(wrong)


@pytest.mark.parametrize("rule", [rule for rule in EVERY_RULE if not isinstance(rule, Capacity)], ids=str)
def test_a_row_of_the_batch_does_not_see_the_others(rule):
    x = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rule(x).mask()[1:2], rule(x[1:2]).mask())


def test_low_precision_scores_are_summed_in_more():
    x = torch.zeros(1, 4096, dtype=torch.bfloat16)
    assert Mass(0.5)(x).count().item() == 2048


@pytest.mark.parametrize("make", [
    lambda: TopK(-1), lambda: TopK(1.5), lambda: TopK(True), lambda: TopK(()), lambda: TopK((1, -1)),
    lambda: TopK(2**31), lambda: TopK("2"), lambda: Mass(-0.1), lambda: Mass(1.1), lambda: Mass(math.nan),
    lambda: Mass((0.5, 2)), lambda: Mass(None), lambda: Threshold(2), lambda: Capacity(1.01), lambda: Fixed((-1,)),
    lambda: Fixed((0.5,)), lambda: Fixed(3), lambda: Fixed([0]), lambda: Fixed((True,)),
])
def test_a_parameter_outside_its_range_is_refused(make):
    with pytest.raises(RuleError):
        make()


@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_a_rule_survives_json(rule):
    text = json.dumps(rule.to_json(), allow_nan=False)
    assert json.loads(text) == rule.to_json() and rule_from_json(json.loads(text)) == rule


@pytest.mark.parametrize("value", [
    None, [], "topk", {}, {"name": "best", "k": 1}, {"name": "TopK", "k": 1}, {"name": "topk"}, {"k": 1},
    {"name": ["topk"], "k": 1}, {"name": "topk", "k": 1, "more": 2}, {"name": "topk", "k": -1},
    {"name": "topk", "k": 1.5},
    {"name": "mass", "mass": 2}, {"name": "mass", "mass": [[0.5]]}, {"name": "mass", "mass": {}},
    {"name": "mass", "mass": math.nan}, {"name": "fixed", "ids": 3}, {"name": "fixed", "ids": ["0"]},
    {"name": "topk", "k": 10**30},
], ids=str)
def test_what_is_no_rule_is_refused(value):
    with pytest.raises(FileError, match="^rule: expected"):
        rule_from_json(value)


def test_the_table_of_names_is_whole():
    assert set(RULES.values()) == {rule for rule in Rule.__subclasses__() if rule.__module__ == "sentei.core.rules"}
    assert all(rule.__name__.lower() == name for name, rule in RULES.items())


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.one_of(st.floats(-30, 30), st.just(-math.inf)), min_size=5, max_size=5), min_size=1,
                max_size=4), st.floats(1e-9, 0.999))
def test_certified_drops_less_than_eps_of_every_query(scores, eps):
    scores = torch.tensor(scores, dtype=torch.float64)
    kept = Certified(eps)(scores).mask()
    assert ((scores.softmax(-1).nan_to_num(0) * ~kept).sum(-1) < eps).all()


def test_certified_drops_what_is_small_enough_and_nothing_else():
    scores = torch.tensor([[0.0, math.log(0.1 / 3) + 1e-6, math.log(0.1 / 3) - 1e-6]], dtype=torch.float64)
    assert Certified(0.1)(scores).mask().tolist() == [[True, True, False]]


@pytest.mark.parametrize("eps", [0.0, 1.0, 2.0, math.nan, "0.1", (0.1, 0.2)])
def test_certified_wants_one_number_between_0_and_1(eps):
    with pytest.raises(RuleError, match="Certified: expected"):
        Certified(eps)
