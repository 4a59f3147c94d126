"""The proof of a plan: its quality on text it was not chosen on, and its time against dense in one run."""

from collections.abc import Callable
from dataclasses import dataclass

from sentei.budget.goal import Goal
from sentei.budget.judge import Judge, Judgement
from sentei.budget.solver import Candidate, Solution
from sentei.measurement.latency import Comparison

RUNS = 3
# Steps down the ladder before giving up; each costs a judgement or a timing of the whole workload.
STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was measured of one candidate.

    Args:
        candidate: the plan.
        judgement: on held-out text; its quality counts for the goal.
        as_run: on the same text, of the plan as it runs; the same unless the goal is without lookahead.
        comparison: its seconds and dense seconds.
        attempts: plans judged on the held-out text up to this one.
        reason: why the goal is not met; empty when it is.
    """

    candidate: Candidate
    judgement: Judgement
    as_run: Judgement
    comparison: Comparison
    attempts: int
    reason: str


def first_proven(goal: Goal, solution: Solution, judge: Judge, step: Callable[[], object]) -> Proof:
    """The first candidate of the ladder that meets the goal, or the best one tried with the reason it does not.

    A candidate that fails on held-out text makes way for the next safer one, judged on the same text: the step is
    towards dense, so a lucky text cannot be hunted for.
    """
    ladder, proofs = solution.ladder[:STEPS], []
    for attempts, candidate in enumerate(ladder, 1):
        judgement = judge.judge(goal.judged(candidate.plan), "verify", step)
        if goal.quality is not None and judgement.quality.value < goal.quality and attempts < len(ladder):
            continue
        comparison = judge.time(candidate.plan, "verify", RUNS, step)
        as_run = judgement if goal.lookahead else judge.judge(candidate.plan, "verify", step)
        proofs.append(Proof(candidate=candidate, judgement=judgement, as_run=as_run, comparison=comparison,
                            attempts=attempts, reason=goal.shortfall(judgement, comparison)))
        if not proofs[-1].reason:
            return proofs[-1]
    return max(proofs, key=lambda proof: (goal.quality is None or proof.judgement.quality.value >= goal.quality,
                                          proof.comparison.speedup()))
