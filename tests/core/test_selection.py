"""A selection and its mask are two views of one thing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.core.errors import ShapeError
from sentei.core.selection import Selection

SETTINGS = settings(deadline=None, max_examples=60)


@st.composite
def masks(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """What to keep and what is permitted, bool [..., Q, C] of any small size, empty ones too."""
    shape = (*draw(st.lists(st.integers(0, 2), max_size=2)), draw(st.integers(0, 5)), draw(st.integers(0, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keep, permitted = (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
                       for _ in range(2))
    return keep, permitted


@SETTINGS
@given(masks())
def test_a_mask_comes_back_and_never_keeps_what_is_forbidden(pair):
    keep, permitted = pair
    selection = Selection.from_mask(keep, permitted, unit=16)
    assert torch.equal(selection.mask(), keep & permitted)
    assert torch.equal(selection.permitted, permitted.sum(-1))
    assert (selection.num_candidates, selection.unit) == (keep.shape[-1], 16)
    assert selection.mask().dtype == torch.bool and selection.ids.dtype == torch.int64


@SETTINGS
@given(masks())
def test_ids_ascend_and_empty_slots_come_last_with_weight_0(pair):
    selection = Selection.from_mask(*pair)
    filled = selection.ids >= 0
    assert torch.equal(selection.weights, filled.to(selection.weights.dtype))
    assert bool((selection.ids >= -1).all()) and bool((selection.ids < max(selection.num_candidates, 1)).all())
    following = selection.ids[..., 1:]
    assert bool(((following > selection.ids[..., :-1]) | (following == -1)).all())
    width = selection.count().max() if selection.count().numel() else 0
    assert selection.ids.shape[-1] == width


def test_ids_ascend_in_long_rows_too():
    keep = (torch.arange(1000) % 3 == 0).expand(2, -1)
    assert Selection.from_mask(keep, torch.ones_like(keep)).ids.tolist() == [list(range(0, 1000, 3))] * 2


@SETTINGS
@given(masks())
def test_counts_density_and_load_are_those_of_the_mask(pair):
    keep, permitted = pair
    selection, kept = Selection.from_mask(keep, permitted), keep & permitted
    assert torch.equal(selection.count(), kept.sum(-1))
    assert torch.equal(selection.load(), kept.sum(-2))
    assert selection.density() == (int(kept.sum()) / int(permitted.sum()) if permitted.any() else 1.0)


@SETTINGS
@given(masks())
def test_flipping_twice_gives_the_same_choice_and_weights(pair):
    selection = Selection.from_mask(*pair)
    selection = selection.weigh(torch.randn(selection.mask().shape))
    flipped = selection.flip()
    assert torch.equal(flipped.mask(), selection.mask().transpose(-1, -2))
    assert torch.equal(flipped.count(), selection.load())
    assert flipped.num_candidates == selection.ids.shape[-2]
    back = flipped.flip()
    assert torch.equal(back.ids, selection.ids) and torch.equal(back.weights, selection.weights)


@SETTINGS
@given(masks())
def test_weights_are_taken_where_a_candidate_is_kept(pair):
    selection = Selection.from_mask(*pair)
    numbers = torch.randn(selection.mask().shape, dtype=torch.float64)
    weighed = selection.weigh(numbers)
    assert torch.equal(weighed.ids, selection.ids) and weighed.weights.dtype == torch.float64
    assert torch.equal(weighed.dense_weights(), torch.where(selection.mask(), numbers, 0.0))


@SETTINGS
@given(masks())
def test_softmax_weights_are_those_of_the_masked_softmax(pair):
    selection = Selection.from_mask(*pair)
    scores = torch.randn(selection.mask().shape, dtype=torch.float64)
    expected = torch.nan_to_num(scores.masked_fill(~selection.mask(), -torch.inf).softmax(-1), nan=0.0)
    torch.testing.assert_close(selection.weigh_softmax(scores).dense_weights(), expected, rtol=1e-12, atol=1e-12)


def test_a_query_that_keeps_nothing_sends_no_nan_back():
    keep = torch.tensor([[True, False], [False, False]])
    scores = torch.zeros(2, 2, requires_grad=True)
    weights = Selection.from_mask(keep, torch.ones_like(keep)).weigh_softmax(scores).weights
    weights.square().sum().backward()
    assert weights.tolist() == [[1.0], [0.0]] and torch.isfinite(scores.grad).all()


def test_gradients_reach_the_weights_of_what_is_kept_and_nothing_else():
    keep = torch.tensor([[True, False, True]])
    numbers = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    Selection.from_mask(keep, torch.ones_like(keep)).weigh(numbers).weights.sum().backward()
    assert numbers.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_keeping_everything_is_keeping_all_but_one_for_the_rest():
    """The short way for everything gives what the long one gives, weights and gradients too."""
    numbers = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    some = torch.ones(2, 4, 5, dtype=torch.bool)
    some[0, 0, 4] = False
    whole, nearly = (Selection.from_mask(keep, torch.ones_like(keep)) for keep in (torch.ones_like(some), some))
    assert whole.is_everything and not nearly.is_everything
    assert torch.equal(whole.ids[1], nearly.ids[1]) and torch.equal(whole.mask()[1], nearly.mask()[1])
    for weigh in (Selection.weigh, Selection.weigh_softmax):
        rows = [weigh(selection, numbers) for selection in (whole, nearly)]
        assert torch.equal(rows[0].weights[1], rows[1].weights[1])
        assert torch.equal(rows[0].dense_weights()[1], rows[1].dense_weights()[1])
        gradients = [torch.autograd.grad(row.dense_weights()[1].square().sum(), numbers)[0] for row in rows]
        torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-15)


def test_as_many_slots_as_candidates_in_another_order_are_put_in_order():
    selection = Selection(ids=torch.tensor([[1, 0]]), weights=torch.tensor([[0.25, 0.75]]), permitted=torch.tensor([2]),
                          num_candidates=2)
    assert selection.dense_weights().tolist() == [[0.75, 0.25]]


@pytest.mark.parametrize("ids, weights, permitted", [
    ((2, 3), (2, 2), (2,)), ((2, 3), (2, 3), (3,)), ((2, 3), (2, 3), (2, 3)),
], ids=["weights", "permitted", "permitted has slots"])
def test_parts_that_do_not_fit_are_refused(ids, weights, permitted):
    with pytest.raises(ShapeError, match=r"Selection: expected ids and weights \[\.\.\., Q, K\]"):
        Selection(ids=torch.zeros(ids, dtype=torch.int64), weights=torch.zeros(weights),
                  permitted=torch.zeros(permitted, dtype=torch.int64), num_candidates=3)


def test_a_selection_cannot_be_changed():
    selection = Selection.from_mask(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(AttributeError):
        selection.unit = 2
