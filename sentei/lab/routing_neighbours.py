"""Claim 5: routing is a search for nearest neighbours among the rows of W_g, and with a bias a power diagram.

    top-k of x·w_i + b_i  =  the k least |x - w_i|² - r_i²,  r_i² = |w_i|² + 2 b_i  =  the k nearest of lifted rows

The router is that of a small mixture trained here, the tokens those of held-out text: what the model itself chose is
compared with a k-nearest-neighbour index over its rows. Beside it, what is *not* the same: the nearest rows as they
are, by distance or by angle; and a power diagram for a gate whose bias is added to sigmoids (DeepSeek-V3).
Intervals are exact for rates (Clopper and Pearson).
Source: the lecture, "the similarity of MoE and kNN"; see `geometry/neighbours.py` for the formulas.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from sentei.axes.experts.gates import Renormalised
from sentei.axes.experts.router import Router
from sentei.core.rules import TopK
from sentei.geometry.neighbours import at_zero, lifted, nearest, same_sets
from sentei.lab.finding import Finding, Row, measured
from sentei.lab.trained import KEPT, Routing, mixture, one_thread, routings
from sentei.measurement.charts import Chart, Series
from sentei.measurement.specialisation import rate_bound

CLAIM = ("A router's choice is that of a nearest-neighbour search among its rows, by inner product; with a bias it is "
         "a power diagram.")
NEARLY = 0.999
BALANCING, SPEED = 200, 0.02  # steps and size of the moves that make the bias
# From points [N, D], rows [E, D] and a bias [E] to the numbers of the k rows found, [N, k].
Search = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def search(points: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The index: nearest neighbours among the lifted rows."""
    return nearest(at_zero(points), lifted(rows, bias), KEPT)


@one_thread
def measure(seen: Callable[[], list[Routing]] | None = None, index: Search = search) -> Finding:
    """Compares choices with searches.

    Args:
        seen: one a layer; by default those of the trained mixture on its held-out text.
        index: the search that is judged.
    Cost: a training of half a minute, unless it is done.
    """
    layers = routings(mixture(0).model, mixture(0).windows.held_out()) if seen is None else seen()
    same: dict[tuple[str, str, bool], list[torch.Tensor]] = {}
    for layer in layers:
        for (choice, found, judged), ids in _pairs(layer, index).items():
            same.setdefault((choice, found, judged), []).append(same_sets(*ids))
    return judge([_row(*key, torch.cat(parts)) for key, parts in same.items()])


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    checks = tuple(measured(f"agreement of {row['choice']} with {row['search']} is",
                            (row["agreement"], row["low"], row["high"]), least=NEARLY)
                   for row in rows if row["judged"] == "yes")
    places = tuple(map(float, range(len(rows))))
    chart = Chart(title="The share of tokens for which both find the same experts, with 95 % intervals.",
                  x="comparison", y="agreement", labels=tuple(str(number + 1) for number in range(len(rows))), series=(
                      Series(name="same sets of experts", x=places, y=tuple(row["agreement"] for row in rows),
                             low=tuple(row["low"] for row in rows), high=tuple(row["high"] for row in rows)),))
    notes = tuple(f"{number + 1}: {row['choice']} and {row['search']}, {row['agreement']:.1%}."
                  for number, row in enumerate(rows))
    return Finding(claim=CLAIM, rows=tuple(rows), checks=checks, charts=(chart,), notes=notes,
                   within=f"{100 * (1 - NEARLY):.1g} % of the tokens, for ties of rounding")


@torch.no_grad()
def balancing_bias(logits: torch.Tensor) -> torch.Tensor:
    """A bias [E] that evens the load of logits [N, E], by steps towards the mean (arXiv 2408.15664)."""
    bias = torch.zeros(logits.shape[-1])
    for _ in range(BALANCING):
        load = TopK(KEPT)(logits + bias).load().double()
        bias += SPEED * torch.sign(load.mean() - load).float()
    return bias


@torch.no_grad()
def _pairs(layer: Routing, index: Search) -> dict[tuple[str, str, bool], tuple[torch.Tensor, torch.Tensor]]:
    """Choices beside searches: their names, whether the claim says that they are the same, and both."""
    x, rows = layer.points, layer.rows
    logits = F.linear(x, rows)
    bias = balancing_bias(logits)
    biased, sigmoid = (TopK(KEPT)(scores).ids for scores in (logits + bias, logits.sigmoid() + bias))
    by_distance = Router(Renormalised(), "l2", x.shape[-1], len(rows))
    by_distance.weight.copy_(rows)
    unit = (F.normalize(x, dim=-1), F.normalize(rows, dim=-1))
    plain = nearest(x, rows, KEPT)
    return {("the model's choice", "the index by inner product", True): (layer.ids, index(x, rows, None)),
            ("the same with a balancing bias", "the index of the power diagram", True): (biased, index(x, rows, bias)),
            ("a router with the metric l2", "the nearest rows", True): (TopK(KEPT)(by_distance(x)[0]).ids, plain),
            ("the model's choice", "the nearest rows", False): (layer.ids, plain),
            ("the model's choice", "the rows of the smallest angle", False): (layer.ids, nearest(*unit, KEPT)),
            ("the same with a balancing bias", "the index without it", False): (biased, index(x, rows, None)),
            ("a bias added to sigmoids", "the index of the power diagram", False): (sigmoid, index(x, rows, bias))}


def _row(choice: str, found: str, judged: bool, same: torch.Tensor) -> Row:
    hits, number = int(same.sum()), len(same)
    return {"choice": choice, "search": found, "judged": "yes" if judged else "no", "tokens": number,
            "agreement": hits / number, "low": 1 - rate_bound(number - hits, number, 0.975),
            "high": rate_bound(hits, number, 0.975)}
