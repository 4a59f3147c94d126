"""Costs add up, and their quotient is the density."""

import pytest

from sentei.core.cost import Cost


def test_costs_add_field_by_field():
    a = Cost(multiply_adds=1, dense_multiply_adds=2, bytes=3, choosing=4)
    b = Cost(multiply_adds=10, dense_multiply_adds=20, bytes=30, choosing=40)
    assert a + b == Cost(multiply_adds=11, dense_multiply_adds=22, bytes=33, choosing=44)


@pytest.mark.parametrize("done, dense, density", [(0, 8, 0.0), (2, 8, 0.25), (8, 8, 1.0), (0, 0, 1.0)])
def test_density_is_performed_over_dense(done, dense, density):
    assert Cost(multiply_adds=done, dense_multiply_adds=dense).density() == density


def test_choosing_is_no_part_of_the_density():
    assert Cost(multiply_adds=1, dense_multiply_adds=4, choosing=100).density() == 0.25


def test_a_sum_of_huge_costs_stays_exact():
    huge = Cost(multiply_adds=10**20 + 1, dense_multiply_adds=10**21)
    assert (huge + huge).multiply_adds == 2 * 10**20 + 2
