"""The proof of a plan: its quality on text it was not chosen on, and its time against dense in one run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from sentei.budget.goal import Goal
from sentei.budget.judge import Judge, Judgement
from sentei.budget.solver import Candidate, Solution
from sentei.conversion.plan import Plan
from sentei.measurement.latency import Comparison

RUNS = 3
# Steps down the ladder before giving up; each costs a judgement or a timing of the whole workload.
STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was measured of one candidate.

    Args:
        candidate: the plan.
        judgement: on held-out text, of the plan as it runs.
        strict: on the same text, of the plan without lookahead; None where the goal does not ask.
        comparison: its seconds and dense seconds.
        looked: the plans that were judged on the held-out text before one was taken, this one among them.
        reason: why the goal is not met; empty when it is.
        beside: what was proved with it and is not taken.
    """

    candidate: Candidate
    judgement: Judgement
    strict: Judgement | None
    comparison: Comparison
    looked: tuple[Plan, ...]
    reason: str
    beside: tuple["Proof", ...] = ()

    @property
    def attempts(self) -> int:
        """How many plans were judged on the held-out text; every one more makes it less unseen."""
        return len(self.looked)

    @property
    def quality(self) -> float:
        """The lowest that counts for the goal."""
        return _lowest(self.judgement, self.strict)


def best_proven(goal: Goal, solution: Solution, judge: Judge, step: Callable[[], object]) -> Proof:
    """The best of the plans proven for the ladder and for those of single rooms: never worse than these.

    That is the fastest for a quality bound, and for a speed bound the best of those that reach it.
    """
    proofs = [first_proven(goal, replace(solution, ladder=ladder), judge, step)
              for ladder in (solution.ladder, *solution.rivals)]
    looked = tuple(dict.fromkeys(plan for proof in proofs for plan in proof.looked))
    return _best(goal, [each for proof in proofs for each in (replace(proof, beside=()), *proof.beside)], looked)


def first_proven(goal: Goal, solution: Solution, judge: Judge, step: Callable[[], object]) -> Proof:
    """The first candidate of the ladder that meets the goal, or the best one tried with the reason it does not.

    A candidate that fails on held-out text makes way for the next safer one, judged on the same text: the step is
    towards dense, so a lucky text cannot be hunted for.
    """
    ladder, proofs = solution.ladder[:STEPS], []
    if goal.quality is not None:
        ladder[-1:] = solution.ladder[-1:]  # the safest, dense where it is in the ladder, is the last that is tried
    looked = tuple(candidate.plan for candidate in ladder)
    for attempts, candidate in enumerate(ladder, 1):
        strict = None if goal.lookahead else judge.judge(candidate.plan.without_lookahead(), "verify", step)
        judgement = judge.judge(candidate.plan, "verify", step)
        quality = _lowest(judgement, strict)
        if goal.quality is not None and quality < goal.quality and attempts < len(ladder):
            continue
        comparison = judge.time(candidate.plan, "verify", RUNS, step)
        proofs.append(Proof(candidate=candidate, judgement=judgement, strict=strict, comparison=comparison,
                            looked=looked[:attempts], reason=goal.shortfall(quality, comparison)))
        if not proofs[-1].reason:
            return replace(proofs[-1], beside=tuple(proofs[:-1]))
    return _best(goal, proofs, looked)


def _best(goal: Goal, proofs: list[Proof], looked: tuple[Plan, ...]) -> Proof:
    """The best of them, with the others beside it."""
    best = max(proofs, key=partial(rank, goal))
    return replace(best, looked=looked, beside=tuple(proof for proof in proofs if proof is not best))


def rank(goal: Goal, proof: Proof) -> tuple[bool, bool, float]:
    """How well a proof serves a goal, the larger the better: the goal, its bound, what it asks to be large."""
    reached = goal.speed is not None and not proof.reason
    return (not proof.reason, goal.quality is None or proof.quality >= goal.quality,
            proof.quality if reached else proof.comparison.speedup())


def _lowest(*judgements: Judgement | None) -> float:
    return min(judgement.quality.value for judgement in judgements if judgement is not None)
