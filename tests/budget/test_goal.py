"""When a plan may be chosen, and when it has met the bound."""

import pytest

from sentei.budget.goal import Goal
from sentei.budget.judge import Judgement
from sentei.core.errors import SenteiError
from sentei.measurement.latency import Comparison
from sentei.measurement.quality import Quality


def judged(value: float, low: float | None = None) -> Judgement:
    low = value if low is None else low
    return Judgement(quality=Quality(value=value, low=low, high=2 * value - low, dense=1.0, pruned=1.0, tokens=1),
                     density={})


def timed(*speedups: float) -> Comparison:
    return Comparison(dense=list(speedups), pruned=[1.0] * len(speedups), date="today")


@pytest.mark.parametrize("value, low, good", [
    (0.95, 0.95, True), (0.9499, 0.9499, False), (0.96, 0.94, True), (0.96, 0.93, False), (0.94, 0.94, False),
])
def test_a_plan_is_chosen_when_it_keeps_the_bound_less_one_standard_error(value, low, good):
    assert Goal(quality=0.95).is_good(judged(value, low)) is good


@pytest.mark.parametrize("goal, quality, speedup, reason", [
    (Goal(quality=0.95), 0.95, 1.01, ""),
    (Goal(quality=0.95), 0.9499, 2.0, "quality 0.9499 on held-out text, below 0.95"),
    (Goal(quality=0.95), 0.95, 1.0, "no plan that keeps quality 0.95 is faster than the dense model on this machine"),
    (Goal(speed=1.5), 0.1, 1.5, ""),
    (Goal(speed=1.5), 1.0, 1.49, "the fastest plan tried is 1.49 times as fast as dense"),
], ids=["met", "bad", "slow", "fast", "not fast enough"])
def test_the_reason_why_a_bound_is_not_met(goal, quality, speedup, reason):
    assert goal.shortfall(quality, timed(speedup)) == reason


@pytest.mark.parametrize("ratios, met", [((1.2, 0.99, 1.2), True), ((1.2, 0.99, 0.99), False)])
def test_faster_is_what_the_median_pair_of_runs_says(ratios, met):
    assert (Goal(quality=0.9).shortfall(1.0, timed(*ratios)) == "") is met


@pytest.mark.parametrize("settings", [{}, {"quality": 0.9, "speed": 2.0}, {"quality": 0.0}, {"quality": 1.001},
                                      {"quality": float("nan")}, {"speed": 0.999}, {"speed": float("inf")},
                                      {"quality": 0.9, "lookahead": "no"}, {"quality": 0.9, "lookahead": None}],
                         ids=str)
def test_a_goal_that_is_none_is_refused(settings):
    with pytest.raises(SenteiError):
        Goal(**settings)


def test_the_ends_of_the_ranges_are_goals():
    assert Goal(quality=1.0).quality == Goal(speed=1.0).speed == 1.0


def test_a_relaxed_goal_lets_so_many_times_as_many_nats_be_lost():
    goal = Goal(quality=0.9, lookahead=False)
    assert goal.relaxed(2).quality == pytest.approx(0.81) and not goal.relaxed(2).lookahead and goal.relaxed(1) == goal
