"""Claim 7, a hypothesis: experts own orthogonal subspaces, and grow apart in training.

Three places to look, each from 0 (orthogonal, or unrelated) to 1 (the same), the mean over pairs of different experts:

- weights: the mean squared cosine of the principal angles between the directions that hold 90 % of the energy of two
  experts' neurons (rows of gate and up, columns of down, side by side);
- inputs: the same between the tokens that are routed to two experts, around their common mean;
- answers: linear CKA of two experts' answers to the same held-out tokens.

Nulls: random experts (neurons of the same lengths in random directions); the same neurons, or tokens, dealt to experts
at random; and "two seeds", experts of one number in models of two seeds, which cannot know of each other. Orthogonal
would be an overlap below ORTHOGONAL; a subspace of one's own at all, less overlap than the random nulls. Before
training, after a quarter of it and after it. Intervals are Student's t over layers and seeds.
Source: the lecture's caution; Kudugunta et al. 2021 (2110.03742) saw similarity fall.
"""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch.nn import functional as F

from sentei.geometry.intervals import mean_interval
from sentei.geometry.subspaces import alignments, compare, linear_cka, overlap, overlaps, subspace
from sentei.lab.finding import Finding, Row, measured
from sentei.lab.trained import EXPERTS, SEEDS, Routing, Trained, mixture, neurons, one_thread, routings
from sentei.measurement.charts import Chart, Series

CLAIM = "Experts own orthogonal subspaces, and grow apart in training."
ORTHOGONAL, DRAWS, TOKENS = 0.05, 4, 512
PLACES = ("weights", "inputs", "answers")
NULLS = ("random", "dealt", "two seeds")
# By place, step and kind (observed, or a null): a number for each layer and seed, or pair of seeds.
Values = dict[tuple[str, int, str], list[float]]


@one_thread
def measure(seeds: tuple[int, ...] = SEEDS) -> Finding:
    """Trains mixtures and compares their experts.

    Args:
        seeds: two or more.
    Cost: a training of half a minute a seed, and as long for the nulls.
    """
    values: Values = {}
    for steps in mixture(seeds[0]).stages:
        layers = {seed: list(_layers(mixture(seed), steps)) for seed in seeds}
        for place, kind, value in (found for each in layers.values() for layer in each for found in _of_layer(*layer)):
            values.setdefault((place, steps, kind), []).append(value)
        for one, other in combinations(seeds, 2):
            for first, second in zip(layers[one], layers[other], strict=True):
                for place, value in _of_two_seeds(first, second):
                    values.setdefault((place, steps, "two seeds"), []).append(value)
    return judge(values)


def judge(values: Values) -> Finding:
    """The finding of values as `measure` collects them."""
    stages = sorted({steps for _, steps, _ in values})
    last, first = stages[-1], stages[0]
    checks = [measured(f"overlap of experts' {place} after training is", mean_interval(values[place, last, "observed"]),
                       most=ORTHOGONAL) for place in ("weights", "inputs")]
    for place, null in (("weights", "random"), ("weights", "dealt"), ("inputs", "dealt")):
        gaps = _gaps(values[place, last, "observed"], values[place, last, null])
        checks.append(measured(f"overlap of experts' {place} - that of {null} ones is", gaps, most=0))
    for place in PLACES:
        gaps = _gaps(values[place, last, "observed"], values[place, first, "observed"])
        checks.append(measured(f"likeness of experts' {place} after training - before is", gaps, most=0))
    rows = [_row(values, place, steps) for place in PLACES for steps in stages]
    return Finding(claim=CLAIM, rows=tuple(rows), checks=tuple(checks), notes=tuple(_notes(values, stages)),
                   charts=tuple(_chart(values, place, stages) for place in PLACES))


def _gaps(one: list[float], other: list[float]) -> tuple[float, float, float]:
    return mean_interval([first - second for first, second in zip(one, other, strict=True)])


def _row(values: Values, place: str, steps: int) -> Row:
    mean, low, high = mean_interval(values[place, steps, "observed"])
    nulls = {null: mean_interval(values[place, steps, null])[0] if (place, steps, null) in values else ""
             for null in NULLS}
    return {"of experts": place, "steps": steps, "likeness": mean, "low": low, "high": high, **nulls}


def _notes(values: Values, stages: list[int]) -> Iterator[str]:
    for place in PLACES:
        change, low, high = _gaps(values[place, stages[-1], "observed"], values[place, stages[0], "observed"])
        way = "apart" if high < 0 else "together" if low > 0 else "neither apart nor together for sure"
        yield f"By their {place}, experts grow {way} in training: {change:+.3f} ({low:+.3f} to {high:+.3f})."


def _chart(values: Values, place: str, stages: list[int]) -> Chart:
    x, series = tuple(map(float, stages)), []
    for kind in ("observed", *NULLS):
        if (place, stages[0], kind) in values:
            ends = [mean_interval(values[place, steps, kind]) for steps in stages]
            y, low, high = zip(*ends, strict=True)
            series.append(Series(name=kind, x=x, y=y, low=low, high=high))
    return Chart(title=f"Likeness of different experts' {place}: 0 is orthogonal, 1 the same.", x="training steps",
                 y="likeness", series=tuple(series))


def _layers(trained: Trained, steps: int) -> Iterator[tuple[torch.Tensor, Routing]]:
    """The neurons of each layer's experts after so many steps, and what its router did with held-out text."""
    model = trained.at(steps)
    yield from zip(neurons(model), routings(model, trained.windows.held_out()), strict=True)


def answers(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What experts of neurons [E, F, 3 D] answer to x [N, D]: [E, N, D]."""
    gate, up, down = weights.chunk(3, -1)
    return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down


def _of_layer(weights: torch.Tensor, routing: Routing) -> Iterator[tuple[str, str, float]]:
    """Every likeness in one layer, observed and of the nulls inside it."""
    x = routing.points[:TOKENS]
    for place, likeness in (("weights", overlaps), ("answers", lambda part: alignments(answers(part, x)))):
        found = compare(weights, likeness, draws=DRAWS)
        yield place, "observed", found.mean
        yield place, "random", float(found.random.mean())
        yield place, "dealt", float(found.shuffled.mean())
    points = routing.points - routing.points.mean(0)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    for kind, ids in (("observed", routing.ids), ("dealt", routing.ids[order])):
        spaces = [subspace(points[(ids == number).any(-1)]) for number in range(EXPERTS) if bool((ids == number).any())]
        pairs = [overlap(one, other) for one, other in combinations(spaces, 2)]
        yield "inputs", kind, sum(pairs) / len(pairs)


def _of_two_seeds(first: tuple[torch.Tensor, Routing], second: tuple[torch.Tensor, Routing]
                  ) -> Iterator[tuple[str, float]]:
    """Likeness of experts of one number in two models."""
    spaces = [(subspace(one), subspace(other)) for one, other in zip(first[0], second[0], strict=True)]
    yield "weights", sum(overlap(*pair) for pair in spaces) / len(spaces)
    both = zip(*(answers(weights, routing.points[:TOKENS]) for weights, routing in (first, second)), strict=True)
    alike = [linear_cka(one, other) for one, other in both]
    yield "answers", sum(alike) / len(alike)
