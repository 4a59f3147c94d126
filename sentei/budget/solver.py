"""From slack to plans: at each price of a second, the cheapest choice for every head.

A layer's attention takes about `a + b · density` seconds (fitted to what was measured here, in all layers), so with a
price λ on a second every head picks the option with the least error + λ · b · density / H and the layer keeps all
where that costs less. Sweeping λ gives a family of plans from dense to sparsest. Errors of layers do not add up, so
which of them is good enough is for the real model to say: `search` judges whole plans and halves the interval between
the last good one and the first bad one.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sentei.axes.connections import Config
from sentei.budget.goal import Goal
from sentei.budget.judge import Judgement, takes_attention
from sentei.budget.slack import LayerSlack
from sentei.budget.workload import Workload
from sentei.conversion.plan import Entry, Plan
from sentei.core.rules import All, Threshold

PRICES = 96


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan with what is foreseen of it.

    Args:
        name: how it was made.
        plan: what to convert.
        seconds: of all prunable layers' attention, foreseen.
        density: mean over all prunable layers and heads, foreseen.
        saved: seconds of one run of the workload that other rooms than connections save, foreseen, by room; they are
            taken off `seconds` too.
    """

    name: str
    plan: Plan
    seconds: float
    density: float
    saved: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A layer's measured options and the time fitted to all layers; `whole_seconds` is that of keeping everything."""

    slack: LayerSlack
    fixed: float
    per_density: float
    whole_seconds: float

    def seconds(self, density: float) -> float:
        """Seconds of the layer's attention at a density."""
        return self.fixed + self.per_density * density


def family(slack: list[LayerSlack], config: Config, workload: Workload) -> list[Candidate]:
    """The plans for growing prices of a second, dense first and sparsest last, without repetitions."""
    layers = fit(slack)
    # Where dropping costs nothing at all, any price sweeps from dense to sparsest.
    errors = [max(option.error) for layer in slack for option in layer.options[1:] if max(option.error)] or [1.0]
    candidates = [dense_of(layers)]
    seconds = max(candidates[0].seconds, 1e-9)
    low, high = math.log(1e-6 * max(errors) / seconds), math.log(1e3 * sum(errors) / seconds)
    for number in range(PRICES):
        price = math.exp(low + (high - low) * number / (PRICES - 1))
        candidate = _at_price(layers, config, workload, price)
        if candidate.plan != candidates[-1].plan and (candidate.seconds < candidates[-1].seconds
                                                      or not candidates[-1].plan.entries):
            candidates.append(candidate)
    return candidates


def beside(candidate: Candidate, slack: list[LayerSlack], config: Config, workload: Workload) -> list[Candidate]:
    """The other rooms of a candidate with connections at every price of a second: most kept first, sparsest last.

    The candidate itself is among them, in its place.
    """
    gone = {entry.layer for entry in candidate.plan.entries if takes_attention(entry)}
    left, others = [layer for layer in slack if layer.layer not in gone], candidate.plan.standing("in").entries
    if not left:
        return [candidate]
    spared = sum(candidate.saved.values()) / workload.timed_runs - sum(
        layer.whole_seconds for layer in fit(slack) if layer.slack.layer in gone)
    found = [replace(each, plan=Plan((*each.plan.entries, *others)), seconds=each.seconds - spared,
                     density=each.density * len(left) / len(slack), saved=candidate.saved)
             for each in family(left, config, workload)[1:]]
    return sorted([*found, candidate], key=lambda each: -each.seconds)


def uniform(slack: list[LayerSlack], config: Config, workload: Workload) -> list[Candidate]:
    """The same rule in every layer, for comparison: dense first and sparsest last."""
    layers = fit(slack)
    candidates = [dense_of(layers)]
    for number, option in enumerate(slack[0].options):
        if isinstance(option.rule, All):
            continue
        densities = [mean(layer.slack.options[number].density) for layer in layers]
        plan = Plan.everywhere([layer.layer for layer in slack], "connections",
                               replace(config, **{workload.lever: option.rule}))
        seconds = sum(layer.seconds(density) for layer, density in zip(layers, densities, strict=True))
        candidates.append(Candidate(name=f"uniform {option.rule}", plan=plan, seconds=seconds,
                                    density=mean(densities)))
    return candidates


def dense_of(layers: list[Timed]) -> Candidate:
    """The dense model."""
    return Candidate(name="dense", plan=Plan(), seconds=sum(layer.whole_seconds for layer in layers), density=1.0)


def search(candidates: list[Candidate], good: Callable[[Candidate], bool]) -> int:
    """The place of the last candidate that is good, by bisection; 0 when none after the first is.

    Assumes what holds up to noise: after a bad candidate none is good. About log2(len) judgements.
    """
    low, high = 0, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(candidates[middle]) else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is best for the connections of a layer at a price: the entry, and what it means."""

    entry: Entry
    seconds: float
    density: float
    error: float


def choice_at(layer: Timed, config: Config, workload: Workload, price: float) -> Choice:
    """The best choice for one layer at a price of a second, in errors."""
    options = layer.slack.options
    heads = range(len(options[0].density))
    picks = [_pick(layer, [head] if workload.per_head else heads, price) for head in heads]
    density = mean([options[pick].density[head] for head, pick in enumerate(picks)])
    error = sum(options[pick].error[head] for head, pick in enumerate(picks))
    may_be_dense = isinstance(options[0].rule, All)
    seconds = layer.seconds(density)
    if may_be_dense and error + price * seconds >= price * layer.whole_seconds:
        rule, seconds, density, error = options[0].rule, layer.whole_seconds, 1.0, 0.0
    else:
        ratios = tuple(0.0 if pick == 0 else options[pick].rule.ratio for pick in picks)
        rule = Threshold(ratios if workload.per_head else ratios[0])
    entry = Entry(layer=layer.slack.layer, room="connections", config=replace(config, **{workload.lever: rule}))
    return Choice(entry=entry, seconds=seconds, density=density, error=error)


def _at_price(layers: list[Timed], config: Config, workload: Workload, price: float) -> Candidate:
    choices = [choice_at(layer, config, workload, price) for layer in layers]
    return Candidate(name=f"price {price:.3g}", plan=Plan(tuple(choice.entry for choice in choices)),
                     seconds=sum(choice.seconds for choice in choices),
                     density=mean([choice.density for choice in choices]))


def _pick(layer: Timed, heads: Sequence[int], price: float) -> int:
    """The option with the least error plus priced time for these heads together."""
    options = layer.slack.options
    per_head = price * layer.per_density / len(options[0].density)
    return min(range(len(options)), key=lambda pick: sum(
        options[pick].error[head] + per_head * options[pick].density[head] for head in heads))


def fit(slack: list[LayerSlack]) -> list[Timed]:
    """Least squares of seconds over mean density for the options that choose, over all layers at once.

    Layers of one model have one shape, so what differs between their clocks is noise: a slope fitted to one layer
    alone can come out flat, and a flat layer looks as if keeping everything were free.
    """
    points = [(mean(option.density), option.seconds) for layer in slack for option in layer.options[1:]]
    mean_x, mean_y = mean([x for x, _ in points]), mean([y for _, y in points])
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread) if spread else 0.0
    whole = statistics.median(layer.options[0].seconds for layer in slack)
    return [Timed(slack=layer, fixed=max(0.0, mean_y - slope * mean_x), per_density=slope, whole_seconds=whole)
            for layer in slack]


def mean(values: list[float]) -> float:
    """Of at least one value, e.g. the densities of a layer's heads."""
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What the solver found.

    Args:
        ladder: candidates in the order to try them; each next one is safer (quality bound) or faster (speed bound).
        judged: every candidate judged on the way, with its judgement.
        rivals: the ladders of single rooms that may come out as well.
    """

    ladder: list[Candidate]
    judged: list[tuple[Candidate, Judgement]]
    rivals: list[list[Candidate]] = field(default_factory=list)


def solve(goal: Goal, workload: Workload, slack: list[LayerSlack], config: Config,
          judge: Callable[[Candidate], Judgement], forecast: Callable[[Candidate], float]) -> Solution:
    """The plans to try for a goal.

    For a quality bound: of the graded family and of the uniform one the fastest plan that `judge` finds good, and
    below it the safer ones. For a speed bound: the graded plans that are foreseen to be fast enough, densest first.

    Args:
        judge: judges a candidate on text kept for choosing.
        forecast: the speed-up foreseen for a candidate.
    """
    judged: list[tuple[Candidate, Judgement]] = []

    def good(candidate: Candidate) -> bool:
        judged.append((candidate, judge(candidate)))
        return goal.is_good(judged[-1][1])

    graded = family(slack, config, workload)
    if goal.speed is not None:
        ladder = [candidate for candidate in graded if forecast(candidate) >= goal.speed] or graded[-1:]
        judged.append((ladder[0], judge(ladder[0])))
        return Solution(ladder=ladder, judged=judged)
    ladders = [candidates[:search(candidates, good) + 1] for candidates in (graded, uniform(slack, config, workload))]
    return Solution(ladder=min(ladders, key=lambda ladder: ladder[-1].seconds)[::-1], judged=judged)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The speed-up a candidate is foreseen to have: `forecast(candidate)`.

    Args:
        dense: seconds of the dense workload.
        others: seconds of everything but the prunable layers' attention, where that is ours.
        runs: how often each layer attends in the workload.
    """

    dense: float
    others: float
    runs: int

    @classmethod
    def made(cls, slack: list[LayerSlack], workload: Workload, *, dense: float, whole: float) -> "Forecast":
        """From measured seconds of the workload: dense, and with every layer keeping everything."""
        attention = workload.timed_runs * dense_of(fit(slack)).seconds
        return cls(dense=dense, others=whole - attention, runs=workload.timed_runs)

    def __call__(self, candidate: Candidate) -> float:
        return self.dense / max(self.others + self.runs * candidate.seconds, 1e-9) if candidate.plan.entries else 1.0
