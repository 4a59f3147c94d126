"""sentei's own plans for a workload, at several speeds: those that `sentei prune --speed` chooses before it proves."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from sentei.axes.connections import Config
from sentei.budget import offers as offers_of
from sentei.budget import slack as slack_of
from sentei.budget.calibration import Library
from sentei.budget.chooser import Chooser
from sentei.budget.goal import Goal
from sentei.budget.judge import Judge
from sentei.budget.solver import Forecast
from sentei.budget.workload import Workload
from sentei.conversion.plan import Plan, prunable_layers
from sentei.core.storage import Stages


def whole_plan(model: nn.Module, workload: Workload) -> Plan:
    """The plan that prunes nothing: all that can be native is."""
    return slack_of.whole_plan(workload, prunable_layers(model), Config())


def plans(model: nn.Module, workload: Workload, windows: dict[str, torch.Tensor], speeds: tuple[float, ...],
          work: Path) -> Iterator[tuple[float, Plan]]:
    """The best plan that is foreseen to be so many times as fast as the one that prunes nothing, for each of `speeds`.

    Args:
        model: dense; it is dense afterwards.
        windows: "calibrate", of which the first is timed, and "choose".
        work: a folder in which finished stages are kept.
    Cost: that of the slack and solve stages of `sentei prune`, some minutes.
    """
    chooser, kept = _chooser(model, workload, windows, work)
    for speed in speeds:
        goal = Goal(speed=max(1.0, speed * chooser.forecast.dense / kept))
        yield speed, chooser.solution(goal, lambda: None).ladder[0].plan


def _chooser(model: nn.Module, workload: Workload, windows: dict[str, torch.Tensor], work: Path
             ) -> tuple[Chooser, float]:
    """A chooser, and the seconds of the plan that prunes nothing."""
    layers, config, stages = prunable_layers(model), Config(), Stages(work)
    library, used = Library(model, windows["calibrate"], workload.lever), windows["calibrate"][:1]
    judge = Judge(model, workload, {"calibrate": used, "choose": windows["choose"]}, stages, {}, library)
    whole = whole_plan(model, workload)
    dense, kept = (judge.seconds(plan, "calibrate", lambda: None) for plan in (Plan(), whole))
    judge.prepare("choose", lambda: None)
    slack = slack_of.from_json(stages.run("slack", judge.inputs, lambda: {"layers": slack_of.to_json(slack_of.measure(
        model, workload, used, layers, config, rules=slack_of.options(workload)))})["layers"])
    offers = offers_of.from_json(stages.run("offers", judge.inputs, lambda: {"offers": offers_of.to_json(
        offers_of.measure(judge, windows["choose"], whole))})["offers"])
    forecast = Forecast.made(slack, workload, dense=dense, whole=kept)
    return Chooser(judge=judge, slack=slack, offers=offers, config=config, forecast=forecast), kept
