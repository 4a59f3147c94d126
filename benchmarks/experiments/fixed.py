"""The best fixed choice against the one made for each byte, at equal cost and on the same trained model.

- experts: the top-2 models of `experts.py`. Fixed is one pair of experts a layer, found by a search over all pairs,
  layer by layer, for the lowest loss on text that is not held out, from the pair with the most load on; then the pair
  with the most load in a window's own domain, which is a choice by task. Weights stay those of each byte.
- connections: the dense models of `experts.py`, each byte and head attending to K of the bytes before. Dynamic are the
  K largest scores. Fixed are K places, relative ones or one of the first bytes, those of a head with the most attention
  on text that is not held out. A sliding window is what is used where nothing is known. The K largest need every score,
  so that "equal" is of the bytes attended to.
- depth: the half models of `depth.py`. Dynamic is the causal predictor; fixed are every other byte, and a random half.

All differences are to the dynamic choice, on held-out windows; nothing is trained for the fixed one. What a fixed
choice gives that is trained from the start is the dense model of the same cost, in `experts.py` and `depth.py`.
"""

from collections.abc import Callable

import torch

from benchmarks.experiments import depth as depths
from benchmarks.experiments import experts as mixtures
from benchmarks.experiments.harness import Experiment, Place, difference, place_of, trained
from benchmarks.experiments.mixture_of_domains import domains_of
from benchmarks.publish import table, write_result
from sentei.axes.connections import Config as Attended
from sentei.axes.connections import Connections
from sentei.axes.depth import Depth
from sentei.axes.experts import Experts
from sentei.core.rules import Fixed, TopK
from sentei.core.storage import write_json
from sentei.lab.fixed_choices import (
    SINKS,
    Places,
    attention,
    best_pairs,
    best_places,
    halves,
    loads,
    rooms,
    with_rules,
)
from sentei.training.losses import window_losses

SEARCHED, KEPT = 8, (8, 32)  # windows a search reads; bytes attended to
Losses = dict[str, list[list[float]]]


def of_experts(place: Place, seed: int) -> dict[str, list[float]]:
    """Losses of one model of two experts a byte."""
    model, found = trained(mixtures.EXPERIMENT, "top 2", seed, place)
    windows = place.windows(mixtures.EXPERIMENT, seed)
    held, searched, domains = windows.held_out(), windows.batch(0, SEARCHED), domains_of(place, windows)
    by_task = torch.zeros(len(held), dtype=torch.float64)
    train = torch.stack([windows.tokens[start:start + windows.size].long() for start in range(
        0, len(windows.tokens) - windows.size, len(windows.tokens) // 96) if start // windows.size not in
        set(windows.held_places.tolist())])
    starts = torch.linspace(0, 2.999, len(train)).long()
    for number in domains.unique().tolist():
        rules = [Fixed(tuple(load.topk(2).indices.tolist())) for load in loads(model, train[starts == number])]
        by_task[domains == number] = with_rules(model, Experts, rules, held[domains == number])
    return {"dynamic": found["losses"],
            "fixed, by search": with_rules(model, Experts, best_pairs(model, searched), held).tolist(),
            "fixed, by load in the domain": by_task.tolist()}


def of_connections(place: Place, seed: int) -> dict[str, list[float]]:
    """Losses of one dense model."""
    model, found = trained(mixtures.EXPERIMENT, "dense", seed, place)
    windows = place.windows(mixtures.EXPERIMENT, seed)
    held, heads = windows.held_out(), attention(model, windows.batch(0, SEARCHED))
    losses, layers = {"all": found["losses"]}, len(heads)
    for kept in KEPT:
        back = torch.arange(held.shape[1] - 1) < kept
        window = Places(back.expand(len(heads[0][0]), -1), torch.zeros(len(heads[0][0]), SINKS, dtype=torch.bool))
        for name, rules in ((f"dynamic, {kept}", [TopK(kept)] * layers), (f"fixed, {kept}", best_places(heads, kept)),
                            (f"window, {kept}", [window] * layers)):
            for block, rule in zip(model.blocks, rules, strict=True):
                block.block.attention.connections = Connections(Attended(rule=rule, tile=(1, 1), window=0))
            losses[name] = window_losses(model, held).tolist()
    return losses


def of_depth(place: Place, seed: int) -> dict[str, list[float]]:
    """Losses of one Mixture-of-Depths."""
    model, found = trained(depths.EXPERIMENT, "half", seed, place)
    held = place.windows(depths.EXPERIMENT, seed).held_out()
    number, (every_other, *_, random) = len(rooms(model, Depth)), halves(held.shape[1] - 1)
    return {"dynamic": found["losses"],
            "fixed, every other byte": with_rules(model, Depth, [every_other] * number, held).tolist(),
            "fixed, a random half": with_rules(model, Depth, [random] * number, held).tolist()}


PARTS: dict[str, tuple[Experiment, Callable[[Place, int], dict[str, list[float]]]]] = {
    "experts, 2 of 16": (mixtures.EXPERIMENT, of_experts), "connections": (mixtures.EXPERIMENT, of_connections),
    "depth, half of the bytes": (depths.EXPERIMENT, of_depth)}


def main() -> None:
    """Measures all three and writes the page."""
    place = place_of(__doc__)
    lines, everything = [], {}
    for part, (experiment, measure) in PARTS.items():
        losses: Losses = {}
        for seed in range(experiment.seeds):
            for name, row in measure(place, seed).items():
                losses.setdefault(name, []).append(row)
        everything[part] = losses
        for name, rows in losses.items():
            kept = name.partition(", ")[2]
            dynamic = losses.get(f"dynamic, {kept}", losses.get("dynamic", rows))
            told = "" if rows is dynamic else difference(rows, dynamic)
            lines.append([part, name, f"{torch.tensor(rows).mean():.4f}", str(told), told and told.verdict])
    path = write_result("experiment-fixed", __doc__, [table(
        ["room", "choice", "held-out loss", "difference to dynamic, nats a byte", "loss"], lines)])
    write_json(path.with_suffix(".json"), {"experiment": "fixed", "losses": everything})


if __name__ == "__main__":
    main()
