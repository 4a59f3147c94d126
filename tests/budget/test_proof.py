"""The ladder is climbed towards dense until a plan keeps the bound on held-out text and is fast."""

import pytest

from sentei.axes.connections import Config
from sentei.budget import proof
from sentei.budget.goal import Goal
from sentei.budget.judge import Judgement
from sentei.budget.proof import RUNS, best_proven, first_proven
from sentei.budget.solver import Candidate, Solution
from sentei.conversion.plan import Entry, Plan
from sentei.measurement.latency import Comparison
from sentei.measurement.quality import Quality


def plan_of(number: int) -> Plan:
    return Plan((Entry(layer=number, room="connections", config=Config()),))


class Told:
    """A judge that is told each plan's held-out quality and speed-up, and notes what it is asked."""

    def __init__(self, *plans: tuple[float, float], strict: tuple[float, ...] = ()):
        self.ladder = [Candidate(name=str(number), plan=plan_of(number), seconds=1.0, density=1.0)
                       for number in range(len(plans))]
        self.plans, self.strict, self.asked = plans, strict, []

    def judge(self, plan: Plan, use: str, step) -> Judgement:
        number, strict = plan.entries[0].layer, plan.entries[0].config.estimator.history > 0
        self.asked.append(f"judge {number} {use}{' strictly' * strict}")
        value = self.strict[number] if strict else self.plans[number][0]
        return Judgement(quality=Quality(value=value, low=0.0, high=2.0, dense=1.0, pruned=1.0, tokens=1), density={})

    def time(self, plan: Plan, use: str, runs: int, step) -> Comparison:
        self.asked.append(f"time {plan.entries[0].layer} {use}")
        return Comparison(dense=[self.plans[plan.entries[0].layer][1]] * runs, pruned=[1.0] * runs, date="today")

    def prove(self, goal: Goal):
        return first_proven(goal, Solution(ladder=self.ladder, judged=[]), self, lambda: None)


def test_the_first_plan_that_keeps_the_bound_and_is_faster_is_taken():
    judge = Told((0.99, 1.5), (1.0, 1.2))
    found = judge.prove(Goal(quality=0.98))
    assert (found.candidate.name, found.reason, found.comparison.dense) == ("0", "", [1.5] * RUNS)
    assert found.attempts == 1
    assert judge.asked == ["judge 0 verify", "time 0 verify"]


def test_a_plan_that_fails_on_held_out_text_is_not_timed_and_makes_way():
    judge = Told((0.97, 2.0), (0.99, 1.5))
    found = judge.prove(Goal(quality=0.98))
    assert (found.candidate.name, found.reason, found.judgement.quality.value) == ("1", "", 0.99)
    assert found.attempts == 2
    assert judge.asked == ["judge 0 verify", "judge 1 verify", "time 1 verify"]


def test_a_plan_that_is_not_faster_makes_way():
    found = Told((0.99, 0.9), (0.99, 1.1)).prove(Goal(quality=0.98))
    assert (found.candidate.name, found.reason) == ("1", "")


@pytest.mark.parametrize("last, reason", [((0.5, 2.0), "below 0.98"), ((0.99, 0.9), "faster than the dense")])
def test_the_last_plan_is_measured_whole_and_says_why_it_fails(last, reason):
    judge = Told((0.5, 2.0), last)
    found = judge.prove(Goal(quality=0.98))
    assert found.candidate.name == "1" and reason in found.reason and judge.asked[-1] == "time 1 verify"


def test_for_a_speed_the_next_faster_plan_is_tried_whatever_the_quality():
    found = Told((0.9, 1.1), (0.2, 1.6), (0.1, 9.0)).prove(Goal(speed=1.5))
    assert (found.candidate.name, found.reason, found.judgement.quality.value) == ("1", "", 0.2)


@pytest.mark.parametrize("goal, plans, best", [
    (Goal(quality=0.9), [(0.99, 0.8), (0.99, 0.95), (0.99, 0.9)], "1"),
    (Goal(quality=0.9), [(0.99, 0.8), (0.5, 3.0)], "0"),
    (Goal(speed=2.0), [(0.9, 1.2), (0.8, 1.7), (0.7, 1.3)], "1"),
], ids=["the fastest that keeps the bound", "rather slow than bad", "the fastest"])
def test_when_none_meets_the_goal_the_best_one_tried_is_kept(goal, plans, best):
    found = Told(*plans).prove(goal)
    assert found.candidate.name == best and found.reason and found.attempts == len(plans)


def test_it_gives_up_after_some_steps_the_last_of_them_to_the_safest_plan(monkeypatch):
    monkeypatch.setattr(proof, "STEPS", 2)
    judge = Told((0.5, 2.0), (0.6, 2.0), (0.99, 2.0))
    assert judge.prove(Goal(quality=0.98)).candidate.name == "2"
    assert judge.asked == ["judge 0 verify", "judge 2 verify", "time 2 verify"]


def test_for_a_speed_no_step_is_left_out(monkeypatch):
    monkeypatch.setattr(proof, "STEPS", 2)
    found = Told((0.9, 1.1), (0.8, 1.2), (0.2, 9.0)).prove(Goal(speed=1.5))
    assert (found.candidate.name, bool(found.reason)) == ("1", True)


def test_without_lookahead_both_readings_are_held_to_the_bound():
    judge = Told((0.99, 2.0), (0.97, 1.8), (0.99, 1.5), strict=(0.97, 0.99, 0.985))
    found = judge.prove(Goal(quality=0.98, lookahead=False))
    assert (found.candidate.name, found.reason, found.attempts) == ("2", "", 3)
    assert (found.judgement.quality.value, found.strict.quality.value, found.quality) == (0.99, 0.985, 0.985)
    assert judge.asked[:2] == ["judge 0 verify strictly", "judge 0 verify"] and judge.asked[-1] == "time 2 verify"


def test_without_lookahead_the_lower_quality_is_the_reason():
    found = Told((0.99, 2.0), strict=(0.97,)).prove(Goal(quality=0.98, lookahead=False))
    assert found.reason == "quality 0.9700 on held-out text, below 0.98"


def best(goal: Goal, judge: Told, *ladders: list[int]):
    """What is proven best of several ladders, each the numbers of its plans."""
    first, *rivals = [[judge.ladder[number] for number in ladder] for ladder in ladders]
    return best_proven(goal, Solution(ladder=first, judged=[], rivals=rivals), judge, lambda: None)


def test_the_fastest_that_keeps_the_bound_is_taken_of_all_ladders_and_every_look_is_counted():
    judge = Told((0.5, 3.0), (0.99, 1.2), (0.99, 1.6), (0.97, 1.9), (0.99, 1.4))
    found = best(Goal(quality=0.98), judge, [0, 1], [2], [3, 4])
    assert (found.candidate.name, found.reason) == ("2", "")
    assert found.attempts == 5 and found.looked == tuple(plan_of(number) for number in range(5))


def test_a_plan_in_two_ladders_is_looked_at_once():
    assert best(Goal(quality=0.98), Told((0.5, 3.0), (0.6, 2.0), (0.99, 1.2)), [0, 2], [1, 2]).attempts == 3


def test_for_a_speed_the_best_of_those_that_reach_it_is_taken():
    judge = Told((0.9, 2.5), (0.95, 2.1), (0.99, 1.2))
    assert best(Goal(speed=2.0), judge, [0], [1], [2]).candidate.name == "1"
    assert best(Goal(speed=3.0), judge, [2], [0], [1]).candidate.name == "0", "or else what comes nearest"


def test_where_none_is_faster_a_plan_that_keeps_the_bound_goes_before_a_fast_one_that_does_not():
    assert best(Goal(quality=0.98), Told((0.5, 3.0), (0.99, 0.9)), [0], [1]).candidate.name == "1"


def test_with_lookahead_nothing_is_read_strictly():
    assert Told((0.99, 2.0)).prove(Goal(quality=0.98)).strict is None


def test_what_was_proved_and_is_not_taken_stays_beside():
    judge = Told((0.99, 1.5), (0.99, 0.9), (0.99, 1.1), (0.99, 2.0))
    first, second, third, fourth = judge.ladder
    found = best_proven(Goal(quality=0.9), Solution(ladder=[first], judged=[], rivals=[[second, third], [fourth]]),
                        judge, lambda: None)
    assert found.candidate is fourth
    assert [(each.candidate.name, each.comparison.speedup(), each.beside) for each in found.beside] == [
        ("0", 1.5, ()), ("2", 1.1, ()), ("1", 0.9, ())]
