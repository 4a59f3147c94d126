"""Estimates of the mass of tiles against the softmax written out, and what no rule may drop."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import CASES, Case

from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.rules import Threshold
from sentei.kernels.attention.select import (
    ESTIMATORS,
    Antidiagonal,
    PageBounds,
    Pooled,
    Sampled,
    Trailing,
    always_kept,
    estimate,
    estimator_from_json,
    see_values,
    share_in_group,
)
from sentei.kernels.attention.tiles import Grid

ALL = [Pooled(), Antidiagonal(2), PageBounds(), Sampled(1), Sampled(2), Trailing(0), Trailing(2)]
SCALE = 6 ** -0.5
SQUARE = Case(name="causal", queries=16, keys=16, tile=(4, 2), heads=4, kept=1.0)
EXACT = [SQUARE, Case(name="grouped", queries=12, keys=12, tile=(4, 3), heads=6, groups=2, kept=1.0),
         Case(name="cross", queries=8, keys=14, tile=(4, 4), kept=1.0),
         Case(name="bidirectional", queries=8, keys=12, tile=(4, 4), kept=1.0, causal=False),
         Case(name="ragged keys", queries=8, keys=11, tile=(4, 4), kept=1.0, causal=False),
         Case(name="padded left", queries=16, keys=16, tile=(4, 2), kept=1.0, lengths=((5, 16), (9, 16))),
         Case(name="padded left, one row", queries=16, keys=16, tile=(4, 2), kept=1.0, lengths=((5, 16),)),
         Case(name="padded right", queries=16, keys=16, tile=(4, 2), kept=1.0, lengths=((0, 16), (0, 7)))]


def shares(case: Case) -> torch.Tensor:
    """Fp64 [B, H, QB, R, KB]: the share of each row's softmax on each tile; a row that sees nothing has 0."""
    query, key, _ = case.tensors()
    key = key.repeat_interleave(case.heads // case.groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * SCALE
    rows = torch.nan_to_num(scores.masked_fill(~case.pairs(), -torch.inf).softmax(-1), nan=0.0)
    rows = torch.nn.functional.pad(rows, (0, -case.keys % case.tile[1]))
    return rows.unflatten(-1, (-1, case.tile[1])).sum(-1).unflatten(2, (-1, case.tile[0]))


def estimated(estimator, case: Case, **extra) -> torch.Tensor:
    query, key, _ = case.tensors()
    return estimate(estimator, query, key, case.grid(), SCALE, **extra)


def permitted(case: Case, scores: torch.Tensor) -> torch.Tensor:
    return case.grid().permitted(scores.device).expand_as(scores)


@pytest.mark.parametrize("pool", ["mean", "rms"])
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_the_oracle_is_the_mass(case, pool):
    rows = shares(case)
    expected = rows.mean(3) if pool == "mean" else rows.square().mean(3).sqrt()
    scores = estimated(Sampled(1), case, pool=pool)
    seen = permitted(case, scores)
    torch.testing.assert_close(scores.exp()[seen], expected[seen], rtol=1e-9, atol=1e-12)
    assert scores[~seen].isneginf().all() and scores[seen].isfinite().all()


@pytest.mark.parametrize("stride", [2, 4])
def test_a_sample_is_the_mass_of_the_sampled_rows(stride):
    scores, rows = estimated(Sampled(stride), SQUARE), shares(SQUARE)[:, :, :, stride // 2::stride]
    seen = permitted(SQUARE, scores)
    torch.testing.assert_close(scores.exp()[seen], rows.mean(3)[seen], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [Pooled(), PageBounds(), Antidiagonal(2)], ids=str)
def test_keys_that_are_alike_in_a_tile_are_estimated_exactly(estimator):
    query, key, _ = SQUARE.tensors()
    key = key[:, ::2].repeat_interleave(2, 1)
    query = query[:, ::4].repeat_interleave(4, 1)
    grid = replace(SQUARE, causal=False).grid()  # on the diagonal the rows of a fold see different keys
    scores, expected = (estimate(kind, query, key, grid, SCALE) for kind in (estimator, Sampled(1)))
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ALL, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.queries and case.tile in ((4, 4), (4, 2), (2, 2))],
                         ids=lambda case: case.name)
def test_scores_are_finite_where_permitted_and_forbidden_elsewhere(estimator, case):
    scores = estimated(estimator, case)
    seen = permitted(case, scores)
    assert scores.shape == (case.batch, case.heads, *case.keep().shape[2:]) and not scores.isnan().any()
    assert scores[seen].isfinite().all() and scores[~seen].isneginf().all()
    assert (scores.exp().sum(-1) <= 1 + 1e-9).all(), "shares add up to at most 1"


@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_no_score_looks_at_a_later_token(estimator):
    query, key, _ = SQUARE.tensors()
    before = estimate(estimator, query, key, SQUARE.grid(), SCALE)
    query[:, 8:], key[:, 8:] = query[:, 8:] * 3, key[:, 8:] + 5
    after = estimate(estimator, query, key, SQUARE.grid(), SCALE)
    assert torch.equal(after[:, :, :2], before[:, :, :2]) and not torch.equal(after, before)


@pytest.mark.parametrize("estimator", ALL, ids=str)
@pytest.mark.parametrize("at_once", [1, 300])
def test_the_size_of_the_slabs_does_not_matter(estimator, at_once, monkeypatch):
    expected = estimated(estimator, SQUARE)
    monkeypatch.setattr("sentei.kernels.attention.select.PAIRS_AT_ONCE", at_once)
    torch.testing.assert_close(estimated(estimator, SQUARE), expected, rtol=1e-9, atol=1e-9)


def test_half_precision_is_scored_in_float32():
    query, key, _ = SQUARE.tensors(torch.bfloat16)
    assert estimate(Pooled(), query, key, SQUARE.grid(), SCALE).dtype == torch.float32


@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_an_estimator_is_the_same_after_json(estimator):
    assert estimator_from_json(estimator.to_json()) == estimator
    assert ESTIMATORS[estimator.to_json()["name"]] is type(estimator)


@pytest.mark.parametrize("value", [None, [], "pooled", {}, {"name": "guess"}, {"name": []}, {"name": "pooled", "x": 1},
                                   {"name": "sampled"}], ids=str)
def test_what_is_not_an_estimator_is_refused_as_a_bad_file(value):
    with pytest.raises(FileError, match="^estimator: expected one of pooled, "):
        estimator_from_json(value)


@pytest.mark.parametrize("kind", [Antidiagonal, Sampled])
@pytest.mark.parametrize("stride", [0, -1, 1.5, "8", True, 2**64], ids=str)
def test_a_bad_stride_is_refused_and_in_a_file_it_is_the_file_s_fault(kind, stride):
    with pytest.raises(RuleError, match=f"{kind.__name__}: expected a stride from 1 to 4096"):
        kind(stride)
    with pytest.raises(FileError, match="estimator: expected a stride from 1 to 4096"):
        estimator_from_json({"name": kind.__name__.lower(), "stride": stride})


@pytest.mark.parametrize("history", [-1, 1.5, "8", True, 2**64], ids=str)
def test_a_bad_history_is_refused_and_in_a_file_it_is_the_file_s_fault(history):
    with pytest.raises(RuleError, match="Trailing: expected a history from 0 to 4096 blocks"):
        Trailing(history)
    with pytest.raises(FileError, match="estimator: expected a history from 0 to 4096 blocks"):
        estimator_from_json({"name": "trailing", "history": history})


@pytest.mark.parametrize("pool, power", [("mean", 1), ("rms", 2)])
@pytest.mark.parametrize("history", [0, 1, 2, 9])
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_trailing_joins_the_first_rows_of_a_block_and_of_those_before_it(case, history, pool, power):
    found, rows = estimated(Trailing(history), case, pool=pool), shares(case)[:, :, :, 0] ** power
    for block in range(found.shape[2]):
        expected = rows[:, :, max(0, block - history):block + 1].mean(2) ** (1 / power)
        seen = permitted(case, found)[:, :, block]
        # No share is told as less than the smallest number there is, and a root of it is not as small.
        torch.testing.assert_close(found[:, :, block].exp()[seen], expected[seen], rtol=1e-9, atol=1e-12)
    assert torch.equal(found.isneginf(), ~permitted(case, found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trailing_looks_at_no_row_after_the_first(dtype):
    query, key, _ = SQUARE.tensors(dtype)
    other = query.clone()
    other[:, 5:8] += 3
    assert torch.equal(*(estimate(Trailing(3), q, key, SQUARE.grid(), SCALE) for q in (query, other)))


@pytest.mark.parametrize("query, key, lengths, message", [
    ((1, 8, 2, 6), (1, 8, 4, 6), None, "G dividing H"),
    ((1, 8, 4, 6), (1, 8, 2, 5), None, "G dividing H"),
    ((2, 8, 4, 6), (1, 8, 2, 6), None, "G dividing H"),
    ((1, 7, 4, 6), (1, 8, 2, 6), None, "a grid of 7 queries and 8 keys, got 8 and 8"),
    ((2, 8, 4, 6), (2, 8, 2, 6), [[0, 8]], r"lengths \[2, 2\], got \[1, 2\]"),
], ids=["more groups than heads", "width", "batch", "grid", "lengths"])
@pytest.mark.parametrize("estimator", [Pooled(), Sampled(2)], ids=str)
def test_tensors_that_do_not_fit_are_refused_before_they_are_read(query, key, lengths, message, estimator):
    grid = Grid(num_queries=8, num_keys=8, query_block=4, key_block=2, lengths=lengths and torch.tensor(lengths))
    with pytest.raises(ShapeError, match="^estimate: .*" + message):
        estimate(estimator, torch.ones(query), torch.ones(key), grid, SCALE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_a_nan_among_the_keys_is_refused_by_the_rule_and_not_swallowed(estimator, dtype):
    query, key, _ = SQUARE.tensors(dtype)
    key[:, 1] = torch.nan
    scores = estimate(estimator, query, key, SQUARE.grid(), SCALE)
    assert scores[:, :, 1:, 0].isnan().all()
    with pytest.raises(RuleError, match="got NaN"):
        Threshold(0.1)(scores)


def test_an_antidiagonal_that_does_not_fit_the_blocks_is_refused():
    with pytest.raises(RuleError, match="Antidiagonal: expected blocks that 3 divides, got 4 x 2"):
        estimated(Antidiagonal(3), SQUARE)


def test_seeing_values_adds_the_distance_from_the_guessed_output():
    scores, value = estimated(Sampled(1), SQUARE), SQUARE.tensors()[2]
    mean = value.unflatten(1, (8, 2)).mean(2).repeat_interleave(2, 2)
    output = torch.einsum("bhqk,bkhd->bhqd", scores.exp(), mean)
    distance = (output[:, :, :, None] - mean.transpose(1, 2)[:, :, None]).norm(dim=-1)
    torch.testing.assert_close(see_values(scores, value, SQUARE.grid()), scores + distance.log(), rtol=1e-6, atol=1e-6)


def test_a_group_has_the_mean_share_of_its_heads():
    scores = estimated(Sampled(1), SQUARE)
    expected = scores.exp().unflatten(1, (2, 2)).mean(2).log()
    torch.testing.assert_close(share_in_group(scores, 2), expected)
    assert math.isinf(share_in_group(torch.full((1, 2, 1, 1), -torch.inf), 1))


def test_what_is_always_kept_is_permitted_and_holds_every_edge():
    for case in CASES:
        grid, device = case.grid(), torch.device("cpu")
        kept = always_kept(grid, device, window=2)
        assert not (kept & ~grid.permitted(device)).any()
        assert not (grid.permitted(device) & ~grid.full(device) & ~kept).any()
        assert torch.equal(kept[:, :, -1:], grid.permitted(device)[:, :, -1:])


def test_a_wider_window_keeps_more():
    grid, device = Grid(num_queries=24, num_keys=24, query_block=4, key_block=2), torch.device("cpu")
    counts = [int(always_kept(grid, device, window=window).sum()) for window in (0, 4, 24)]
    assert counts == sorted(set(counts)) and counts[-1] == int(grid.permitted(device).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_query_of_nothing_but_nan_is_refused_by_the_rule_too(dtype):
    query, key, _ = SQUARE.tensors(dtype)
    query[:, 5] = torch.nan
    with pytest.raises(RuleError, match="got NaN"):
        Threshold(0.1)(estimate(Sampled(1), query, key, SQUARE.grid(), SCALE))
