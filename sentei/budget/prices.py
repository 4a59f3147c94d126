"""Slack as a table: for every layer and room what each option costs and saves, e.g. in perplexity a millisecond.

Options of connections change the stream by an error (`sentei.budget.slack`); one plan of theirs, judged on the real
model, says how many nats an error is. Those of the other rooms are measured one by one (`sentei.budget.offers`).
"""

from dataclasses import replace
from statistics import median

import torch
from torch import nn

from sentei.axes.connections import Config
from sentei.budget import offers as offers_of
from sentei.budget import slack as slack_of
from sentei.budget.calibration import Library
from sentei.budget.judge import Judge
from sentei.budget.mixture import rate_of
from sentei.budget.solver import Timed, fit, mean, uniform
from sentei.budget.workload import Workload
from sentei.conversion.plan import Plan, prunable_layers
from sentei.conversion.rooms import WAYS
from sentei.core.progress import Progress
from sentei.core.storage import Stages
from sentei.measurement.outcome import measure_of


def measure(model: nn.Module, workload: Workload, windows: dict[str, torch.Tensor], progress: Progress) -> dict:
    """The table.

    Args:
        windows: at least one "calibrate" and one "choose".
    Returns:
        threads; measure, where it is not perplexity; dense: seconds of one run of the workload and perplexity, None of
        an encoder; options, each with layer, room, option (in words), milliseconds (what it saves of a run), nats, and
        by the measure's name what it loses: perplexity (what it adds) and perplexity_per_millisecond, or cosine (what
        it takes off) and cosine_per_millisecond; these and nats None where it saves no more time than timing varies by.
    """
    library, measure = Library(model, windows["calibrate"], workload.lever), workload.measure
    windows = {use: rows[:measure.texts] for use, rows in windows.items()}
    judge = Judge(model, workload, windows, Stages(None), {}, library)
    layers, config = prunable_layers(model), Config()
    whole = slack_of.whole_plan(workload, layers, config)
    with progress.stage("dense", 2) as step:
        seconds = judge.seconds(Plan(), "calibrate", step)
        judge.prepare("choose", step)
    with progress.stage("connections", len(layers) + 1) as step:
        slack = slack_of.measure(model, workload, windows["calibrate"][:1], layers, config,
                                 rules=slack_of.options(workload), step=step)
        tried = uniform(slack, config, workload)
        middle = tried[len(tried) // 2]
        rate = rate_of([(middle, judge.judge(middle.plan, "choose", step))], slack)
    with progress.stage("rooms", len(offers_of.candidates(model, workload.lever))) as step:
        offers = offers_of.measure(judge, windows["choose"], whole, step=step)
    level = measure.level(judge.dense["choose"])
    timings = fit(slack)
    varies = median(abs(option.seconds - timed.seconds(mean(option.density))) for timed in timings
                    for option in timed.slack.options[1:])
    options = [row for timed in timings for row in _connections(timed, workload, rate, varies)]
    options += [{"layer": offer.entry.layer, "room": offer.entry.room, "option": WAYS[offer.entry.room].words(
        offer.entry.config), "nats": offer.nats, "milliseconds": offer.seconds * 1e3} for offer in offers]
    for option in options:
        lost = None if option["nats"] is None else measure.lost(option["nats"], level)
        option |= {measure.name: lost, f"{measure.name}_per_millisecond": lost and lost / option["milliseconds"]}
    return {"threads": torch.get_num_threads(), **measure_of(measure.name),
            "dense": {"seconds": seconds, "perplexity": level}, "options": options}


def _connections(timed: Timed, workload: Workload, rate: float, varies: float) -> list[dict]:
    """A layer's rules, all heads alike; `varies` are the seconds by which measured ones lie beside those fitted."""
    rows = []
    for option in timed.slack.options[1:]:
        density = mean(option.density)
        saved = timed.whole_seconds - timed.seconds(density)
        words = WAYS["connections"].words(replace(Config(), **{workload.lever: option.rule}))
        rows.append({"layer": timed.slack.layer, "room": "connections", "option": f"{words}, density {density:.2f}",
                     "nats": rate * sum(option.error) if saved > varies else None,
                     "milliseconds": saved * workload.timed_runs * 1e3})
    return rows
