"""A plan that is to be healed: chosen under a relaxed bound, healed, chosen anew as it now is, and proved.

Healing is expected to give part of the loss back. What part is measured: for the first quarter of the minutes a plan is
healed that may lose twice as many nats as the bound lets it, and the share of them that comes back says how many more a
plan may lose that is healed for the rest. So short a healing gives no more back than the longer one, so the share is
rather too small; what more there is, connections use up: which of their rules keeps the bound the healed model is asked
itself. Where none does on the text that played no part, or none is faster, the unhealed plan stands.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sentei.budget.chooser import Chooser
from sentei.budget.distilled import context_of, digest, distil
from sentei.budget.goal import Goal
from sentei.budget.judge import Judge, Judgement, reading
from sentei.budget.proof import RUNS, Proof, first_proven, rank
from sentei.budget.solver import Candidate, Solution, search
from sentei.conversion.plan import Plan, complete, convert
from sentei.training import healing as training

# How many times as many nats the plan of the probe may lose; no plan is chosen that may lose more.
PROBED = 2.0
# The share of the minutes that the probe has.
PROBE = 0.25
# About how many calls of `step` there are; only the length of a progress bar.
STEPS = 2 * (training.PARTS + 1) + 30 + 2 * RUNS + 2 + 2

Texts = Callable[[int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    """How far the bound on quality was relaxed, and what that follows from.

    Args:
        asked: the bound.
        before, after: quality of the plan of the probe on the text for choosing, unhealed and healed.
        minutes: that it was healed for.
    """

    asked: float
    before: float
    after: float
    minutes: float

    @property
    def share(self) -> float:
        """Of the nats that the plan of the probe lost, what came back, 0 to 1; 0 where it lost none."""
        return min(max(0.0, 1 - math.log(self.after) / math.log(self.before)), 1.0) if self.before < 1 else 0.0

    @property
    def times(self) -> float:
        """How many times as many nats a plan may lose: as many as keep the bound when that share comes back."""
        return PROBED if self.share >= 1 - 1 / PROBED else 1 / (1 - self.share)

    @property
    def quality(self) -> float:
        """The relaxed bound."""
        return self.asked ** self.times

    def to_json(self) -> dict:
        """For the public object."""
        return {"asked": self.asked, "quality": self.quality, "share": self.share, "probe": {
            "bound": self.asked ** PROBED, "unhealed": self.before, "healed": self.after, "minutes": self.minutes}}


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What healing came to.

    Args:
        before: the proof of the plan that is best unhealed.
        proof: of the healed model, or `before` where that is not kept.
        minutes: that were asked for.
        relaxed: how the plan was chosen; None where it is the unhealed one.
        unhealed: quality of the proven plan without healing, on held-out text.
        model: the healed one, a model of its own; None where it is not kept.
        reason: why it is not kept; empty where it is.
        table: see `training.healing.Healing`; empty where nothing was trained.
        judged: the plans that the healed model was judged with on the text for choosing.
    """

    before: Proof
    proof: Proof
    minutes: float
    relaxed: Relaxed | None
    unhealed: float
    model: nn.Module | None = None
    reason: str = ""
    table: list[dict] = field(default_factory=list)
    judged: list[tuple[Candidate, Judgement]] = field(default_factory=list)

    def to_json(self) -> dict:
        """For the public object: the minutes asked, whether it is kept, why not, what was relaxed, and the table.

        `quality_unhealed` is of the plan that is delivered, `unhealed` the best there is without healing.
        """
        return {"minutes": self.minutes, "kept": self.model is not None, "reason": self.reason,
                "quality_unhealed": self.unhealed, "relaxed": self.relaxed and self.relaxed.to_json(),
                "unhealed": {"quality": self.before.judgement.quality.value,
                             "speedup": self.before.comparison.speedup()}, "table": self.table}


def heal(chooser: Chooser, goal: Goal, before: Proof, texts: Texts, config: training.Config, *,
         step: Callable[..., object] = lambda note="": None) -> Healed:
    """Chooses a plan to be healed, heals it and proves it; never worse for the goal than `before`.

    Args:
        chooser: the model of its judge is dense afterwards.
        before: the proof of the plan that is best unhealed.
        texts: int64 [N, T] to heal on for a length T.
        config: its minutes are for all healing together.
        step: called after every check, with a note, and after every window and every timing.
    Raises:
        SenteiError, FileError: see `training.healing.heal`.
    """
    judge = chooser.judge
    candidate, relaxed = _to_heal(chooser, goal, before, texts, config, step)
    kept = Healed(before=before, proof=before, minutes=config.minutes, relaxed=relaxed,
                  unhealed=before.judgement.quality.value)
    if not reading(candidate.plan).entries:  # what only decoding prunes cannot be healed on text
        return replace(kept, reason="the plan prunes nothing that the reading of a text would feel")
    rows = texts(context_of(candidate.plan, judge.workload.tokens))
    own, found = distil(judge, candidate.plan, rows, replace(config, part=1 - PROBE) if relaxed else config, step)
    kept = replace(kept, table=found.table)
    if not found.kept:
        return replace(kept, reason="it is no better than unhealed: quality on the checks "
                       f"{found.table[-1]['quality']:.4f}, {found.table[0]['quality']:.4f} before")
    ladder, judged = _as_healed(chooser, goal, candidate, own, step)
    proof = first_proven(goal, Solution(ladder=ladder, judged=[]), own, step)
    convert(judge.model, Plan())
    looked, plan = (*before.looked, *proof.looked), proof.candidate.plan  # another model on the same text
    kept, same = replace(kept, judged=judged), plan == before.candidate.plan
    if _place(goal, proof, same) <= _place(goal, before, same):
        return replace(kept, proof=replace(before, looked=looked), reason=f"on held-out text it has {_words(proof)}; "
                       f"unhealed, the best plan serves the bound better with {_words(before)}")
    if not same:
        kept = replace(kept, unhealed=judge.judge(plan, "verify", step).quality.value)
        looked += (plan,)
    return replace(kept, proof=replace(proof, looked=looked), model=complete(own.student, plan))


def _to_heal(chooser: Chooser, goal: Goal, before: Proof, texts: Texts, config: training.Config,
             step: Callable[..., object]) -> tuple[Candidate, Relaxed | None]:
    """The plan to be healed, and how far the bound was relaxed for it; for a speed it is the one that has the speed.

    Where no bolder plan is foreseen to be faster, it is the best unhealed one.
    """
    def chosen(times: float) -> Candidate:
        return chooser.solution(goal.relaxed(times), step).ladder[0]

    def bolder(candidate: Candidate) -> bool:
        faster = chooser.forecast(candidate) > chooser.forecast(before.candidate)
        return faster and bool(reading(candidate.plan).entries)

    if goal.quality is None or not bolder(probed := chosen(PROBED)):
        return before.candidate, None
    relaxed = _probe(chooser, goal, probed, texts, replace(config, part=PROBE), step)
    candidate = probed if relaxed.times == PROBED else chosen(relaxed.times)
    return candidate if bolder(candidate) else before.candidate, relaxed


def _probe(chooser: Chooser, goal: Goal, candidate: Candidate, texts: Texts, config: training.Config,
           step: Callable[..., object]) -> Relaxed:
    """What a short healing of a plan gives back; remembered as a stage is."""
    judge, plan = chooser.judge, candidate.plan
    rows = texts(context_of(plan, judge.workload.tokens))

    def read(by: Judge) -> float:
        return chooser.judgement(goal, candidate, step=step, judge=by).quality.value

    def work() -> dict:
        own, found = distil(judge, plan, rows, config, step)
        return {"after": read(own), "minutes": found.table[-1]["minutes"]}

    told = judge.stages.run("probe", {**judge.inputs, "plan": plan.to_json(), "lookahead": goal.lookahead,
                                      "rows": digest(rows), "healing": config.to_json()}, work)
    return Relaxed(asked=goal.quality, before=read(judge), **told)


def _as_healed(chooser: Chooser, goal: Goal, candidate: Candidate, own: Judge, step: Callable[..., object]
               ) -> tuple[list[Candidate], list[tuple[Candidate, Judgement]]]:
    """The plans to try with a healed model, as `Solution.ladder`, and what was judged on the way.

    For a bound on quality connections may go as far as the healed model keeps it; other rooms are what they are.
    """
    if goal.quality is None:
        return [candidate], []
    judged: list[tuple[Candidate, Judgement]] = []

    def good(each: Candidate) -> bool:
        judged.append((each, chooser.judgement(goal, each, step=step, judge=own)))
        return goal.is_good(judged[-1][1])

    ladder = [replace(each, name=f"healed, {each.name}") for each in chooser.beside(candidate)]
    return ladder[:search(ladder, good) + 1][::-1], judged


def _place(goal: Goal, proof: Proof, same: bool) -> tuple:
    """What proofs are compared by: the one of the same plan differs in its quality, its speed is the clock's."""
    return (*rank(goal, proof)[:2], proof.quality) if same else rank(goal, proof)


def _words(proof: Proof) -> str:
    return f"quality {proof.quality:.4f} and {proof.comparison.speedup():.2f} times the speed of dense"
