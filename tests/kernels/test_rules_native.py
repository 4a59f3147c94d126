"""The native rules keep what core/rules.py keeps, and list it as `Tiles.from_mask` does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CASES, Case, drawn_cases

from sentei.core.errors import RuleError
from sentei.core.rules import All, Fixed, Mass, Rule, Threshold, TopK
from sentei.kernels import native
from sentei.kernels.attention import Grid, Tiles, fused_cpp
from sentei.kernels.attention.select import always_kept, choose

needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
PARTS = ("full_count", "full_ids", "partial_count", "partial_ids")
RULES = [All(), TopK(0), TopK(2), TopK(100), Mass(0.0), Mass(0.37), Mass(0.9), Mass(1.0), Threshold(0.0),
         Threshold(0.23), Threshold(1.0)]


def mask_of(rule: Rule, scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Bool [Q, C]: what native code keeps of scores [Q, C]."""
    grid = Grid(num_queries=len(scores), num_keys=scores.shape[1], query_block=1, key_block=1, causal=False)
    tiles = choose(rule, scores[None, None], forced[None, None], grid)
    return ~scores.isneginf() if tiles.is_everything else tiles.mask()[0, 0]


def same(found: Tiles, expected: Tiles) -> bool:
    """Whether two plans are one; native code leaves more empty slots."""
    if found.is_everything or expected.is_everything:
        return found.is_everything == expected.is_everything
    counts = all(torch.equal(getattr(found, part), getattr(expected, part)) for part in PARTS[::2])
    slots = all(torch.equal(getattr(found, part)[..., :getattr(expected, part).shape[-1]], getattr(expected, part))
                and (getattr(found, part)[..., getattr(expected, part).shape[-1]:] == -1).all() for part in PARTS[1::2])
    return counts and slots


def scores_of(case: Case, spread: float) -> torch.Tensor:
    """Log shares [B, H, QB, KB] drawn for a case; -inf where not permitted."""
    permitted = case.grid().permitted(torch.device("cpu"))
    shape = case.batch, case.heads, *permitted.shape[2:]
    scores = spread * torch.randn(shape, generator=torch.Generator().manual_seed(9))
    return scores.masked_fill(~permitted, -torch.inf)


@needs_library
@settings(deadline=None, max_examples=300, derandomize=True)
@given(case=drawn_cases(), rule=st.sampled_from(RULES), spread=st.sampled_from([0.0, 0.1, 3.0, 300.0]),
       window=st.integers(0, 4))
def test_the_plan_is_that_of_the_rule_s_selection(case, rule, spread, window):
    scores, grid = scores_of(case, spread), case.grid()
    forced = always_kept(grid, scores.device, window=window)
    if scores.numel():
        assert same(choose(rule, scores, forced, grid), Tiles.from_selection(rule(scores, forced=forced), grid))


@needs_library
@settings(deadline=None, max_examples=200, derandomize=True)
@given(rule=st.sampled_from(RULES), seed=st.integers(0, 2**20), size=st.integers(1, 40))
def test_any_candidate_may_be_forced_or_forbidden_and_ties_go_to_the_lower_number(rule, seed, size):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, size, generator=generator)
    scores[1:3] = (2 * scores[1:3]).round()  # many ties
    scores[2:] = scores[2:].masked_fill(torch.rand(2, size, generator=generator) < 0.4, -torch.inf)
    forced = torch.rand(4, size, generator=generator) < 0.2
    expected = rule(scores, forced=forced).mask()
    assert torch.equal(mask_of(rule, scores, forced), expected)


@needs_library
@pytest.mark.parametrize("rule, kept", [
    (TopK(3), [0, 2, 4]), (Mass(0.5), [2, 4]), (Mass(0.25), [2]), (Threshold(1.0), [2, 4, 5, 7]),
    (Mass(1.0), [0, 1, 2, 4, 5, 7]), (TopK(1), [2]), (TopK(9), [0, 1, 2, 4, 5, 7])], ids=str)
def test_ties_made_by_hand(rule, kept):
    """Four equal shares of a quarter (but for 2 that are nearly nothing): sums of them are exact in any precision."""
    scores = torch.tensor([[-200.0, -200, 0, -torch.inf, 0, 0, -torch.inf, 0]])
    forced = torch.zeros(1, 8, dtype=torch.bool)
    if rule == TopK(3):
        forced[0, 0] = forced[0, 3] = True  # the one counts, the other may not be kept
    assert mask_of(rule, scores, forced)[0].nonzero().flatten().tolist() == kept
    assert torch.equal(rule(scores, forced=forced).mask(), mask_of(rule, scores, forced))


@needs_library
@pytest.mark.parametrize("rule", [TopK((0, 3, 1)), Mass((0.9, 0.1, 1.0)), Threshold((0.0, 1.0, 0.3))], ids=str)
def test_a_parameter_a_head(rule):
    case = Case(name="three heads", queries=40, keys=40, tile=(4, 2), heads=3, groups=1)
    scores, grid = scores_of(case, 2.0), case.grid()
    forced = always_kept(grid, scores.device, window=0)
    assert same(choose(rule, scores, forced, grid), Tiles.from_selection(rule(scores, forced=forced), grid))
    with pytest.raises(RuleError, match=r"expected scores \[..., H=3, Q, C\]"):
        choose(rule, scores[:, :2], forced, grid)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", [All(), TopK(2), Mass(0.5), Threshold(0.5)], ids=str)
def test_bad_scores_are_refused_in_the_rule_s_own_words(rule, bad):
    scores, grid = scores_of(CASES[0], 1.0), CASES[0].grid()
    scores[0, 1, 2, 0] = bad
    forced = always_kept(grid, scores.device, window=0)
    with pytest.raises(RuleError) as expected:
        rule(scores)
    with pytest.raises(RuleError) as found:
        choose(rule, scores, forced, grid)
    assert str(found.value) == str(expected.value)


def test_what_native_code_does_not_have_is_chosen_by_the_definition(monkeypatch):
    scores, grid = scores_of(CASES[0], 1.0), CASES[0].grid()
    forced = always_kept(grid, scores.device, window=0)
    for rule, given_scores in ((Fixed((0, 2)), scores), (TopK(2), scores.double())):
        expected = Tiles.from_selection(rule(given_scores, forced=forced), grid)
        assert same(choose(rule, given_scores, forced, grid), expected)
    found = choose(TopK(2), scores, forced, grid)
    monkeypatch.setattr(native, "missing", lambda: "a package without its native library")
    assert same(found, choose(TopK(2), scores, forced, grid))


@needs_library
def test_it_is_a_proper_op_of_torch_and_stays_in_one_graph():
    case = CASES[0]
    scores, grid = scores_of(case, 1.0), case.grid()
    forced = always_kept(grid, scores.device, window=0)
    torch.library.opcheck(torch.ops.sentei.keep.default, (scores, forced, forced, "TopK", [2.0, 1.0]))

    def function(query, key, value):
        rows = fused_cpp.estimate(query + 0, key, grid, scale=0.3, rows=("exact", 2, 4), square=True)
        plan = torch.ops.sentei.keep(rows, forced, forced, "TopK", [1.0, 1.0])
        return fused_cpp.attend(query, key, value, Tiles(grid=grid, **dict(zip(PARTS, plan, strict=True))), scale=0.3)

    tensors = case.tensors(torch.float32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), function(*tensors))
