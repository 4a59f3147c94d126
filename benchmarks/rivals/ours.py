"""sentei's own plans for a workload, from dense to the leanest: the solver's front over all rooms, at every price."""

import torch
from torch import nn

from sentei.axes.connections import Config
from sentei.budget import offers as offers_of
from sentei.budget import slack as slack_of
from sentei.budget.calibration import Library
from sentei.budget.judge import Judge
from sentei.budget.mixture import Market, rate_of
from sentei.budget.solver import Candidate, Forecast, uniform
from sentei.budget.workload import Workload
from sentei.conversion.plan import Plan, prunable_layers
from sentei.core.storage import Stages

# What the leanest plans may be foreseen to lose, about, in nats; a bound on quality would ask for less.
NATS = 0.1, 2.0


def front(model: nn.Module, workload: Workload, windows: dict[str, torch.Tensor]) -> list[tuple[float, Candidate]]:
    """Plans with the speed-up foreseen for each, slowest first.

    Args:
        model: dense; it is dense afterwards.
        windows: those that `sentei prune` uses, "calibrate" and "choose".
    Cost: that of `sentei slack`, some minutes on one core.
    """
    layers, config = prunable_layers(model), Config()
    library = Library(model, windows["calibrate"], workload.lever)
    used = {"calibrate": windows["calibrate"][:1], "choose": windows["choose"]}
    judge = Judge(model, workload, used, Stages(None), {}, library)
    whole = slack_of.whole_plan(workload, layers, config)
    dense, kept = (judge.seconds(plan, "calibrate", lambda: None) for plan in (Plan(), whole))
    judge.prepare("choose", lambda: None)
    slack = slack_of.measure(model, workload, used["calibrate"], layers, config, rules=slack_of.options(workload))
    offers = offers_of.measure(judge, used["calibrate"], whole)
    tried = uniform(slack, config, workload)
    middle = tried[len(tried) // 2]
    market = Market(slack=slack, offers=offers, config=config, workload=workload, dense=dense,
                    rate=rate_of([(middle, judge.judge(middle.plan, "choose", lambda: None))], slack))
    rooms = {"connections", *(offer.entry.room for offer in offers if offer.pays)}
    forecast = Forecast.made(slack, workload, dense=dense, whole=kept)
    plans = {candidate.plan: candidate for nats in NATS for candidate in market.plans(nats, rooms)}
    return sorted(((forecast(candidate), candidate) for candidate in plans.values()), key=lambda pair: pair[0])
