"""Subspaces: known angles, CKA's invariances, and nulls that tell structure from chance."""

import math

import pytest
import torch

from sentei.core.errors import RuleError, ShapeError
from sentei.geometry.subspaces import alignments, compare, linear_cka, overlap, overlaps, principal_angles, subspace


def axis(*directions: int, width: int = 6) -> torch.Tensor:
    return torch.eye(width, dtype=torch.float64)[list(directions)]


def test_angles_between_known_planes():
    turned = torch.tensor([[1.0, 0, 0, 0], [0, math.cos(0.3), math.sin(0.3), 0]], dtype=torch.float64)
    torch.testing.assert_close(principal_angles(axis(0, 1, width=4), turned),
                               torch.tensor([0.0, 0.3], dtype=torch.float64), atol=1e-7, rtol=0)
    assert overlap(axis(0, 1), axis(2, 3)) == pytest.approx(0, abs=1e-12)
    assert overlap(axis(0, 1), axis(0, 1, 2)) == pytest.approx(1)


def test_a_subspace_is_what_holds_the_energy():
    rows = torch.diag(torch.tensor([3.0, 1.0, 1e-3, 0.0]))
    assert [len(subspace(rows, energy=share)) for share in (0.5, 0.89, 0.91, 1 - 1e-9, 1)] == [1, 1, 2, 3, 3]
    assert len(subspace(torch.zeros(3, 4))) == 0 and overlap(subspace(torch.zeros(3, 4)), axis(0, width=4)) == 0
    space = subspace(torch.randn(5, 8), energy=1)
    torch.testing.assert_close(space @ space.T, torch.eye(5, dtype=torch.float64))


def test_random_subspaces_overlap_as_the_formula_says():
    spaces = [subspace(torch.randn(rank, 40), energy=1) for rank in (4, 10) for _ in range(30)]
    mean = sum(overlap(a, b) for a in spaces[:30] for b in spaces[30:]) / 900
    assert mean == pytest.approx(10 / 40, rel=0.05)


def test_cka_is_blind_to_rotation_size_and_place_and_0_for_unrelated_answers():
    x = torch.randn(2000, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1)
    assert linear_cka(x, torch.randn(2000, 4)) < 0.01
    assert linear_cka(x, torch.ones(2000, 2)) == 0
    kernels = [part - part.mean(0) for part in (x[:50], x[:50, :3].exp())]
    grams = [part @ part.T for part in kernels]
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    assert linear_cka(x[:50], x[:50, :3].exp()) == pytest.approx(expected.item())


def test_experts_with_their_own_directions_differ_from_both_nulls():
    neurons = torch.zeros(4, 8, 32)
    for e in range(4):
        neurons[e, :, 8 * e:8 * e + 8] = torch.randn(8, 8)
    found = compare(neurons, overlaps, draws=40)
    assert found.mean < 1e-6 < found.shuffled.mean() and found.random.mean() > 0.1
    assert found.chance("shuffled") == found.chance("random") == 1 / 41
    torch.testing.assert_close(found.observed.diagonal(), torch.ones(4, dtype=torch.float64))


def test_experts_that_are_chance_look_like_chance():
    chances = [compare(torch.randn(4, 6, 24), overlaps, draws=19, seed=seed).chance("shuffled") for seed in range(10)]
    assert sorted(chances)[5] > 0.1


def test_answers_are_compared_through_the_same_nulls():
    """Copies answer alike; dealt anew they do not."""
    x = torch.randn(100, 6, dtype=torch.float64)
    neurons = torch.randn(1, 5, 12, dtype=torch.float64).expand(3, -1, -1)

    def alike(rows: torch.Tensor) -> torch.Tensor:
        return alignments((x @ rows[..., :6].mT).relu() @ rows[..., 6:])

    found = compare(neurons, alike, draws=20)
    assert found.mean == pytest.approx(1) and found.shuffled.max() < 0.999 and found.chance("shuffled") == 1 / 21


def test_the_same_seed_draws_the_same():
    neurons = torch.randn(3, 4, 9)
    first, again, other = (compare(neurons, overlaps, draws=3, seed=seed).random for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("call, error", [
    (lambda: subspace(torch.zeros(3)), ShapeError), (lambda: subspace(torch.ones(2, 2), energy=0), RuleError),
    (lambda: subspace(torch.full((2, 2), torch.nan)), RuleError), (lambda: principal_angles(axis(0), axis(0, width=5)),
                                                                   ShapeError),
    (lambda: linear_cka(torch.ones(3, 2), torch.ones(4, 2)), ShapeError),
    (lambda: compare(torch.ones(1, 2, 3), overlaps), RuleError),
    (lambda: compare(torch.ones(2, 2, 3), overlaps, draws=0), RuleError), (lambda: compare(torch.ones(2, 3), overlaps),
                                                                           ShapeError)])
def test_what_cannot_be_compared_is_refused(call, error):
    with pytest.raises(error):
        call()
