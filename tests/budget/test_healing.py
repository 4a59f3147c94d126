"""What is chosen to be healed, what the minutes go to, and what stands in the end."""

import math
from dataclasses import replace

import pytest
import torch

from sentei.axes.connections import Config
from sentei.budget import healing
from sentei.budget.goal import Goal
from sentei.budget.healing import PROBE, Relaxed, heal
from sentei.budget.judge import Judgement
from sentei.budget.proof import Proof, rank
from sentei.budget.solver import Candidate, Solution
from sentei.budget.workload import Prefill
from sentei.conversion.plan import Entry, Plan
from sentei.core.rules import Threshold
from sentei.core.storage import Stages
from sentei.measurement.latency import Comparison
from sentei.measurement.quality import Quality
from sentei.training.healing import Config as Minutes
from sentei.training.healing import Healing

NATS = 0.01  # that each plan loses more than the one before
LADDER = [Candidate(name=str(number), seconds=1.0, density=1.0, plan=Plan((
    Entry(layer=number, room="connections", config=Config(rule=Threshold(0.3))),))) for number in range(12)]
BOUND = Goal(quality=math.exp(-2.5 * NATS))  # plan 2 keeps it unhealed


def number_of(plan: Plan) -> int:
    return plan.entries[0].layer


class Told:
    """A judge to whom plan n costs n · NATS of which healing gives a share back, more or less on held-out text.

    Its speed is 1 + n / 10 times that of dense; a healed one's as much more as it is told.
    """

    def __init__(self, share: float = 0.0, held_out: float = 0.0, speed: float = 0.0):
        self.share, self.held_out, self.speed, self.asked = share, held_out, speed, []
        self.workload, self.stages, self.inputs, self.model, self.student = Prefill(64), Stages(None), {}, None, None
        self.windows = {"choose": torch.zeros(1, 64, dtype=torch.int64)}

    def judge(self, plan, use, step):
        self.asked.append((number_of(plan), use))
        value = math.exp(-NATS * number_of(plan) * (1 - self.share)) + self.held_out * (use == "verify")
        return Judgement(quality=Quality(value=value, low=value, high=value, dense=1.0, pruned=1.0, tokens=1),
                         density={})

    def time(self, plan, use, runs, step):
        return Comparison(dense=[1 + number_of(plan) / 10 + self.speed] * runs, pruned=[1.0] * runs, date="today")


class Chosen:
    """A chooser from the ladder up to a plan."""

    def __init__(self, boldest: int = 11):
        self.judge, self.ladder, self.asked = Told(), LADDER[:boldest + 1], []

    def solution(self, goal, step):
        self.asked.append(goal.quality)
        ladder = [each for each in self.ladder if goal.is_good(self.judge.judge(each.plan, "choose", step))]
        return Solution(ladder=ladder[::-1], judged=[])

    def judgement(self, goal, candidate, *, step, judge=None):
        return (judge or self.judge).judge(candidate.plan, "choose", step)

    def forecast(self, candidate):
        return 1 + number_of(candidate.plan) / 10

    def beside(self, candidate):
        return self.ladder


@pytest.fixture
def healed(monkeypatch):
    """Heals with told shares, of the probe and of the rest; gives what it came to, and what was healed for how long."""
    monkeypatch.setattr(healing, "convert", lambda *_: None)
    monkeypatch.setattr(healing, "complete", lambda student, plan: f"healed {number_of(plan)}")

    def run(*shares: float, goal: Goal = BOUND, chooser: Chosen | None = None, better: bool = True, unhealed: int = 2,
            proof: dict | None = None, **told):
        left, trained, chooser = list(shares), [], chooser or Chosen()

        def distil(judge, plan, rows, config, step):
            trained.append((number_of(plan), config.part))
            table = [{"quality": 0.5, "minutes": 0.1}, {"quality": 0.5 + 0.1 * better, "minutes": 2.4}]
            return Told(left.pop(0), **({} if left else told)), Healing(table=table, losses=[])

        monkeypatch.setattr(healing, "distil", distil)
        judgement = chooser.judge.judge(LADDER[unhealed].plan, "verify", None)
        before = Proof(candidate=LADDER[unhealed], judgement=judgement, strict=None, looked=(LADDER[unhealed].plan,),
                       comparison=chooser.judge.time(LADDER[unhealed].plan, "verify", 1, None), reason="")
        found = heal(chooser, goal, replace(before, **(proof or {})), lambda size: torch.zeros(4, size),
                     Minutes(minutes=10.0))
        assert not left and rank(goal, found.proof) >= rank(goal, found.before), "never worse than without"
        return found, trained

    return run


def test_what_comes_back_of_twice_the_loss_says_how_much_a_plan_may_lose(healed):
    """A probe gives 0.4 back, so that 1 / 0.6 as much may be lost: plan 4, then 3 that with 0.6 back keeps 5."""
    chooser = Chosen()
    found, trained = healed(0.4, 0.5, goal=Goal(quality=math.exp(-2.1 * NATS)), chooser=chooser)
    assert trained == [(4, PROBE), (3, 1 - PROBE)]
    assert chooser.asked == [pytest.approx(math.exp(-times * 2.1 * NATS)) for times in (2, 1 / 0.6)]
    assert found.model == "healed 4" and found.proof.candidate.name == "healed, 4"
    assert found.proof.comparison.speedup() == pytest.approx(1.4) and found.reason == ""


def test_what_was_relaxed_is_told(healed):
    found, _ = healed(0.4, 0.5, goal=Goal(quality=math.exp(-2.1 * NATS)))
    told, asked = found.to_json(), math.exp(-2.1 * NATS)
    assert told["relaxed"] == {
        "asked": asked, "share": pytest.approx(0.4), "quality": pytest.approx(asked ** (1 / 0.6)),
        "probe": {"bound": pytest.approx(asked ** 2), "unhealed": math.exp(-4 * NATS),
                  "healed": pytest.approx(math.exp(-2.4 * NATS)), "minutes": 2.4}}
    assert told["minutes"] == 10 and told["kept"] and told["table"][-1]["quality"] == 0.6
    assert told["quality_unhealed"] == math.exp(-4 * NATS), "of the plan that stands"
    assert told["unhealed"] == {"quality": math.exp(-2 * NATS), "speedup": pytest.approx(1.2)}


def test_every_plan_that_is_read_on_the_held_out_text_is_counted(healed):
    found, _ = healed(0.4, 0.5)
    assert [number_of(plan) for plan in found.proof.looked] == [2, 5, 5], "unhealed best, healed, and that unhealed"


def test_where_half_comes_back_the_plan_of_the_probe_is_healed(healed):
    chooser = Chosen()
    found, trained = healed(0.7, 0.6, chooser=chooser)
    assert trained == [(5, PROBE), (5, 1 - PROBE)] and len(chooser.asked) == 1
    assert found.relaxed.times == 2 and found.model == "healed 6"


def test_where_nothing_comes_back_no_bolder_plan_is_healed(healed):
    found, trained = healed(-0.5, 0.1)
    assert trained == [(5, PROBE), (2, 1 - PROBE)]
    assert found.relaxed.quality == BOUND.quality and found.relaxed.share == 0


def test_where_the_relaxed_bound_gives_nothing_faster_the_best_unhealed_plan_is_healed(healed):
    """It can be that of a single room, of which less was foreseen."""
    assert healed(0.0, 0.5, unhealed=3)[1] == [(5, PROBE), (3, 1 - PROBE)]


@pytest.mark.parametrize("told", [{"held_out": -0.5}, {"speed": -0.8}], ids=["a bound missed", "slower"])
def test_where_the_healed_plan_serves_the_bound_no_better_the_unhealed_one_stands(healed, told):
    found, _ = healed(0.4, 0.5, **told)
    assert found.model is None and found.proof.candidate is LADDER[2] and not found.proof.reason
    assert "on held-out text it has quality" in found.reason and "1.20 times" in found.reason
    assert len(found.proof.looked) > 1 and found.to_json()["quality_unhealed"] == math.exp(-2 * NATS)


def test_a_safer_rung_is_tried_where_the_held_out_text_is_harder(healed):
    found, _ = healed(0.4, 0.5, held_out=-0.004)
    assert found.model == "healed 4" and found.proof.quality >= BOUND.quality


def test_what_fails_unhealed_is_saved_where_the_healed_plan_does_not(healed):
    found, _ = healed(0.4, 0.5, proof={"reason": "no plan is faster"})
    assert found.model == "healed 5" and not found.proof.reason


def test_what_learns_nothing_is_not_proved(healed):
    found, _ = healed(0.4, 0.5, better=False)
    assert found.model is None and "no better than unhealed" in found.reason and len(found.proof.looked) == 1


def test_for_a_speed_the_plan_that_has_it_is_healed_for_all_of_the_time(healed):
    found, trained = healed(0.5, goal=Goal(speed=1.2))
    assert trained == [(2, 1.0)] and found.relaxed is None and found.model == "healed 2"
    assert [number_of(plan) for plan in found.proof.looked] == [2, 2] and found.to_json()["relaxed"] is None


def test_for_a_speed_a_healed_plan_that_is_worse_or_too_slow_does_not_stand(healed):
    assert healed(-0.1, goal=Goal(speed=1.2))[0].model is None
    assert healed(0.5, goal=Goal(speed=1.2), speed=-0.1)[0].model is None


def test_where_no_plan_is_bolder_the_unhealed_one_has_all_of_the_time(healed):
    found, trained = healed(0.5, chooser=Chosen(boldest=2))
    assert trained == [(2, 1.0)] and found.relaxed is None
    assert found.model == "healed 2" and found.unhealed == math.exp(-2 * NATS)


@pytest.mark.parametrize("goal", [BOUND, Goal(speed=1.2)])
def test_what_no_reading_feels_is_not_healed(healed, goal, monkeypatch):
    monkeypatch.setattr(healing, "reading", lambda plan: Plan())
    found, trained = healed(goal=goal)
    assert not trained and "nothing that the reading of a text would feel" in found.reason
    assert found.proof is found.before


@pytest.mark.parametrize("before, after, share, times", [
    (0.9, 0.9, 0, 1), (0.9, 0.8, 0, 1), (0.81, 0.9, 0.5, 2), (0.9, 1.0, 1, 2), (0.9, 1.1, 1, 2), (1.0, 0.9, 0, 1),
    (1.02, 1.03, 0, 1), (0.9 ** 4, 0.9 ** 3, 0.25, 4 / 3)])
def test_the_share_is_of_nats(before, after, share, times):
    found = Relaxed(asked=0.95, before=before, after=after, minutes=1.0)
    assert (found.share, found.times) == (pytest.approx(share), pytest.approx(times))
    assert found.quality == pytest.approx(0.95 ** times)
