"""Healing that is killed, wherever, goes on bit for bit; and all of it together keeps to its minutes."""

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from sentei.axes.rank import Config as Rank
from sentei.axes.weights import Config as Weights
from sentei.budget.goal import Goal
from sentei.budget.healing import Relaxed, heal
from sentei.budget.judge import Judge
from sentei.budget.proof import first_proven
from sentei.budget.solver import Candidate, Solution
from sentei.budget.workload import Prefill
from sentei.conversion.plan import Plan
from sentei.core.rules import TopK
from sentei.core.storage import Stages
from sentei.measurement.latency import Comparison
from sentei.training import healing as training

NATS = 0.2  # that each plan is foreseen to lose more than the one before
LADDER = [Candidate(name=str(number), seconds=1.0, density=1.0, plan=Plan.everywhere(
    range(3), "weights", Weights(rule=TopK(96 - 8 * number), saliency="magnitude"))) for number in range(1, 6)]
GOAL = Goal(quality=math.exp(-1.1 * NATS))  # the first plan, the second for the probe, the third if 0.7 come back
DRAWN = torch.randint(3, 259, (14, 32), generator=torch.Generator().manual_seed(0))


class Killed(BaseException):
    """Stands for a kill."""


class Chosen:
    """A chooser from the ladder that foresees, with the real judge."""

    def __init__(self, judge):
        self.judge = judge

    def solution(self, goal, step):
        return Solution(ladder=[LADDER[int(-math.log(goal.quality) / NATS) - 1]], judged=[])

    def judgement(self, goal, candidate, *, step, judge=None):
        return (judge or self.judge).judge(candidate.plan, "choose", step)

    def forecast(self, candidate):
        return float(candidate.name)

    def beside(self, candidate):
        return [LADDER[0], candidate]


@pytest.fixture
def started(monkeypatch):
    """Heals the tiny model in a folder, in what would be a process of its own, and is killed at an event, if at any.

    Gives what came of it and the seconds of each healing: of passes of the student, each of which takes one.
    Events are steps, judgements and timings.
    """
    events, clocks, step, judged, healed = [], [], training._Healer.step, Judge.judge, training.heal

    def event(name: str) -> None:
        events.append(name)
        if len(events) == events_until:
            raise Killed

    def clocked(teacher, student, *given, **named):
        passes: list[int] = []
        handle = student.model.register_forward_pre_hook(lambda *_: passes.append(1))
        found = healed(teacher, student, *given, **named, now=lambda: float(len(passes)))
        handle.remove()
        clocks.append(len(passes))
        return found

    def time(judge, plan, use, runs, step):
        event("time")
        return Comparison(dense=[100.0 - plan.entries[0].config.rule.k if plan.entries else 1.0], pruned=[1.0], date="")

    monkeypatch.setattr(training._Healer, "step", lambda run, number: event("step") or step(run, number))
    monkeypatch.setattr(Judge, "judge", lambda judge, *given: event("judge") or judged(judge, *given))
    monkeypatch.setattr(Judge, "time", time)
    monkeypatch.setattr(training, "heal", clocked)
    monkeypatch.setattr(Relaxed, "times", 2.8)
    monkeypatch.setattr(training.Healing, "kept", True)  # the random model's texts are no likelier to the dense one

    def run(folder: Path, until: int = 0):
        nonlocal events_until
        events.clear(), clocks.clear()
        events_until = until
        windows = {use: DRAWN[start:start + 2] for use, start in (("choose", 0), ("verify", 2))}
        judge = Judge(tiny_model("llama"), Prefill(32), windows, Stages(folder), {"text": "one"})
        for use in windows:
            judge.prepare(use, lambda: None)
        before = first_proven(GOAL, Solution(ladder=[LADDER[0]], judged=[]), judge, lambda: None)
        minutes = training.Config(minutes=1.0, rank=Rank(rank=4))
        found = heal(Chosen(judge), GOAL, before, lambda size: DRAWN[4:, :size], minutes)
        return found, list(clocks)

    events_until = 0
    return run, events


@pytest.mark.parametrize("every", [23, *(pytest.param(every, marks=pytest.mark.slow) for every in (9, 40))])
def test_killed_again_and_again_it_comes_to_the_same_bit_for_bit(started, tmp_path, every):
    run, events = started
    whole, seconds = run(tmp_path / "whole")
    first, count = events.index("step"), len(events)
    assert whole.model is not None and whole.relaxed is not None and len(seconds) == 2
    assert 40 < sum(seconds) <= 60 and seconds[0] <= 15 < seconds[1], "both healings together have a minute"
    kills, found = 0, None
    for place in range(first + every, count + every, every):
        try:
            found, seconds = run(tmp_path / "killed", place)
            break
        except Killed:
            kills += 1
    assert kills and len(seconds) == 1, "the probe was done again"
    assert found.to_json() == whole.to_json() and found.proof == whole.proof
    assert all(torch.equal(*tensors) for tensors in zip(
        found.model.state_dict().values(), whole.model.state_dict().values(), strict=True))
