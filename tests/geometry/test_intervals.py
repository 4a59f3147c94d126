"""Intervals hold the truth as often as they say."""

import math
import statistics

import pytest
import torch

from sentei.core.errors import SenteiError
from sentei.geometry.intervals import STUDENT, mean_interval, median_interval, paired_interval, student


def covered(interval, draw, truth: float, times: int = 2000) -> float:
    """How often the interval of a draw holds the truth."""
    found = [interval(draw().tolist()) for _ in range(times)]
    return sum(low <= truth <= high for _, low, high in found) / times


@pytest.mark.parametrize("number", [2, 5, 12])
def test_the_mean_is_held_95_times_of_100(number):
    assert abs(covered(mean_interval, lambda: torch.randn(number), 0.0) - 0.95) < 0.015


@pytest.mark.parametrize(("number", "expected"), [(6, 0.969), (11, 0.988), (25, 0.957)])
def test_the_median_is_held_as_often_as_its_order_says(number, expected):
    found = covered(median_interval, lambda: torch.empty(number).exponential_(), math.log(2))
    assert found >= 0.94 and abs(found - expected) < 0.015


def test_few_values_have_their_whole_range():
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_quantiles_go_on_where_the_table_ends():
    assert abs(student(31) - 2.0395) < 2e-4 and abs(student(1000) - 1.96234) < 2e-4
    assert list(STUDENT) == sorted(STUDENT, reverse=True) and student(30) > student(31)


def test_a_paired_interval_is_the_wider_of_two():
    alike = [[1.0, 2.0, 3.0, 2.0]] * 2  # no spread over trainings, some over places
    assert paired_interval(alike) == pytest.approx(mean_interval([1.0, 2.0, 3.0, 2.0]))
    apart = [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert paired_interval(apart) == pytest.approx(mean_interval([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("interval", [mean_interval, median_interval])
def test_one_value_says_nothing(interval):
    with pytest.raises(SenteiError, match="two values"):
        interval([1.0])
    assert interval([1.0, 1.0])[0] == statistics.fmean([1.0, 1.0])


def test_no_freedom_is_refused():
    with pytest.raises(SenteiError, match="degree of freedom"):
        student(0)
