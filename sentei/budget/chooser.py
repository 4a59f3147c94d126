"""Plans for any bound, by what was measured of one model on one machine: slack, offers, and the judge's readings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sentei.axes.connections import Config
from sentei.budget.goal import Goal
from sentei.budget.judge import Judge, Judgement
from sentei.budget.mixture import Market, rate_of, solve_all
from sentei.budget.offers import Offer
from sentei.budget.slack import LayerSlack
from sentei.budget.solver import Candidate, Forecast, Solution, beside, solve
from sentei.conversion.rungs import may_be_plain


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """Chooses plans; asked again, with another bound, it measures nothing but the plans that are new.

    Args:
        judge: of the dense model, with the windows "choose".
        slack: the connections' options by layer.
        offers: the other rooms' options.
        config: of the connections, without the rule.
        forecast: the speed-up foreseen for a candidate.
        plain: whether shapes must fit an ordinary checkpoint.
    """

    judge: Judge
    slack: list[LayerSlack]
    offers: list[Offer]
    config: Config
    forecast: Forecast
    plain: bool = False

    def solution(self, goal: Goal, step: Callable[[], object]) -> Solution:
        """The plans to try for a goal, with all that was judged on the way; a step a window that is read."""
        judged = partial(self.judgement, goal, step=step)
        alone = solve(goal, self.judge.workload, self.slack, self.config, judged, self.forecast)
        offers = [offer for offer in self.offers if not self.plain or may_be_plain(self.judge.model, offer.entry.room)]
        market = Market(slack=self.slack, offers=offers, config=self.config, workload=self.judge.workload,
                        rate=rate_of(alone.judged, self.slack), dense=self.forecast.dense, plain=self.plain)
        return solve_all(goal, market, alone, judged, self.forecast)

    def judgement(self, goal: Goal, candidate: Candidate, *, step: Callable[[], object], judge: Judge | None = None
                  ) -> Judgement:
        """A candidate on the text for choosing, read as the goal asks; by default by the judge of the dense model."""
        plan = candidate.plan if goal.lookahead else candidate.plan.without_lookahead()
        return (judge or self.judge).judge(plan, "choose", step)

    def beside(self, candidate: Candidate) -> list[Candidate]:
        """What else connections could do beside the other rooms of a candidate, see `solver.beside`."""
        return beside(candidate, self.slack, self.config, self.judge.workload)
