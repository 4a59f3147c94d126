"""How sure a mean is: Student's t intervals, and order statistics for medians."""

import math
import statistics
from collections.abc import Sequence

from sentei.core.errors import RuleError

# 97.5 % quantiles of Student's t, from one degree of freedom on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
NORMAL = 1.95996


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by its expansion in 1 ÷ freedom (2e-4 right)."""
    if freedom < 1:
        raise RuleError("student", expected="one degree of freedom or more", got=str(freedom), do="measure twice")
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent measurements and its 95 % interval (Student's t): mean, low, high.

    Raises:
        RuleError: fewer than two values, which say nothing about their spread.
    """
    if len(values) < 2:
        raise RuleError("mean_interval", expected="two values or more", got=str(len(values)), do="measure again")
    mean, freedom = statistics.fmean(values), len(values) - 1
    margin = student(freedom) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - margin, mean + margin


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and an interval that holds the true one at 95 % or more, from the order alone: median, low, high.

    The values are independent, of any distribution. Below six of them the whole range holds it less surely: with n
    values at 1 - 2^(1 - n).
    """
    ordered, number = sorted(values), len(values)
    if number < 2:
        raise RuleError("median_interval", expected="two values or more", got=str(number), do="measure again")
    below, missed = 0, 0.5**number  # the chance that the true median lies below the lowest value
    while below < (number - 1) // 2 and 2 * (missed + math.comb(number, below + 1) * 0.5**number) <= 0.05:
        below += 1
        missed += math.comb(number, below) * 0.5**number
    return statistics.median(ordered), ordered[below], ordered[number - 1 - below]


def paired_interval(gaps: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean of paired differences [trainings][places] and its 95 % interval: mean, low, high.

    The margin is the larger of two, each for a question of its own: over trainings (Student's t of their means), would
    another training say the same, and over places (of their means), would another text.
    """
    means = mean_interval([statistics.fmean(row) for row in gaps])
    places = mean_interval([statistics.fmean(column) for column in zip(*gaps, strict=True)])
    margin = max(means[2] - means[0], places[2] - places[0])
    return means[0], means[0] - margin, means[0] + margin
