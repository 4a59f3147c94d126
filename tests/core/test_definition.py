"""The loop against Einstein sums in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.core.definition import apply
from sentei.core.errors import ShapeError
from sentei.core.rules import All, TopK
from sentei.core.selection import Selection

LEAD = st.lists(st.integers(0, 2), max_size=2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(LEAD, st.integers(0, 4), st.integers(0, 5), st.integers(0, 3), st.integers(0, 9))
def test_rows_are_summed_with_their_weights(lead, num_queries, num_candidates, width, seed):
    keep = random(*lead, num_queries, num_candidates, seed=seed) > 0
    selection = Selection.from_mask(keep, torch.ones_like(keep)).weigh(random(*keep.shape, seed=seed + 1))
    rows = random(*lead, num_candidates, width, seed=seed + 2)
    expected = torch.einsum("...qc,...cd->...qd", selection.dense_weights(), rows)
    torch.testing.assert_close(apply(selection, rows), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(LEAD, st.integers(0, 4), st.integers(1, 5), st.integers(0, 9))
def test_functions_are_called_on_their_query(lead, num_queries, num_candidates, seed):
    keep = random(*lead, num_queries, num_candidates, seed=seed) > 0
    selection = Selection.from_mask(keep, torch.ones_like(keep)).weigh(random(*keep.shape, seed=seed + 1))
    matrices, x = random(num_candidates, 3, 2, seed=seed + 2), random(*lead, num_queries, 2, seed=seed + 3)
    y = apply(selection, [lambda x, matrix=matrix: matrix @ x for matrix in matrices], x)
    expected = torch.einsum("...qc,cde,...qe->...qd", selection.dense_weights(), matrices, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_a_query_that_keeps_nothing_gives_0():
    keep = torch.tensor([[True, True], [False, False]])
    selection = Selection.from_mask(keep, torch.ones_like(keep))
    assert apply(selection, torch.ones(2, 3)).tolist() == [[2.0] * 3, [0.0] * 3]
    assert apply(TopK(0)(torch.zeros(2, 2)), torch.full((2, 3), torch.nan)).tolist() == [[0.0] * 3] * 2


def test_an_empty_slot_may_stand_anywhere():
    selection = Selection(ids=torch.tensor([[-1, 1]]), weights=torch.tensor([[9.0, 2.0]]),
                          permitted=torch.tensor([2]), num_candidates=2)
    assert apply(selection, torch.ones(2, 3)).tolist() == [[2.0] * 3]


def test_what_is_not_kept_is_neither_computed_nor_read():
    selection = TopK(1)(torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    assert torch.isfinite(apply(selection, torch.tensor([[1.0], [torch.nan]]))).all()
    called = []
    values = [lambda x: called.append(0) or x, lambda x: pytest.fail("computed for nobody")]
    apply(selection, values, torch.ones(2, 3))
    assert called == [0, 0]


def test_gradients_are_those_of_the_formula():
    keep = torch.tensor([[True, False, True], [False, True, True]])
    weights, rows = random(2, 3).requires_grad_(), random(3, 4, seed=1).requires_grad_()

    def loop(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return apply(Selection.from_mask(keep, torch.ones_like(keep)).weigh(weights), rows)

    assert torch.autograd.gradcheck(loop, (weights, rows))


def test_another_number_of_values_is_refused():
    selection = All()(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="apply: expected 3 values.*got 2 values, queries absent"):
        apply(selection, torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="got 2 values, queries given"):
        apply(selection, [torch.neg] * 2, torch.zeros(2, 4))


def test_functions_need_queries_and_there_must_be_one():
    with pytest.raises(ShapeError, match="got 3 values, queries absent"):
        apply(All()(torch.zeros(2, 3)), [torch.neg] * 3)
    with pytest.raises(ShapeError, match="if functions, at least one and queries, got 0 values"):
        apply(All()(torch.zeros(2, 0)), [], torch.zeros(2, 4))
