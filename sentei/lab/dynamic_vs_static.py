"""Claim 11: at equal cost, what is chosen for each input beats the best fixed choice on the same model.

    loss with the best fixed choice - loss with the input's own choice > 0, at the same number of kept candidates

- edges: each byte and head attends to EDGES bytes: the largest scores; or fixed places by attention, or a window;
- experts: two of eight for each byte by the router, or the best fixed pair of each layer;
- depth: half of the bytes pass the block, by the predictor, or the best fixed half of the places.

Where there are several fixed choices the best is the one with the lowest loss on the very text that is judged.

The models are small and trained here (`trained`), three seeds; nothing is trained for the fixed choices, and none read
the held-out windows. Losses are nats a byte; the interval is the wider of that over seeds and that over windows.
"Equal" is of the candidates computed: choosing edges by their scores needs every score, choosing experts and depth next
to nothing.
Source: the lecture's thesis, "from the static map to the dynamic circuit".
"""

from collections.abc import Callable, Sequence

import torch

from sentei.axes.connections import Config as Attended
from sentei.axes.connections import Connections
from sentei.axes.depth import Depth
from sentei.axes.experts import Experts
from sentei.core.rules import TopK
from sentei.core.tracing import trace
from sentei.geometry.intervals import mean_interval, paired_interval
from sentei.lab.finding import Finding, Row, measured
from sentei.lab.fixed_choices import SINKS, Places, attention, best_halves, best_pairs, best_places, with_rules
from sentei.lab.trained import SEEDS, Trained, mixture, mixture_of_depths, one_thread
from sentei.measurement.charts import Chart, Series
from sentei.training.losses import window_losses

CLAIM = "At equal cost, input-dependent selection beats the best fixed selection on the same model."
SEARCHED, EDGES = 8, 8  # windows a search reads; bytes attended to
DYNAMIC, WHOLE = "its own", "all bytes"  # every other way is a fixed choice
# By what is chosen and how: the held-out windows' losses of each seed.
Losses = dict[str, dict[str, list[list[float]]]]
Part = Callable[[int], dict[str, list[float]]]


@one_thread
def measure(seeds: tuple[int, ...] = SEEDS, parts: dict[str, Part] | None = None) -> Finding:
    """Trains what is not trained, searches, and compares.

    Args:
        seeds: two or more.
        parts: from a seed to the losses of DYNAMIC and of fixed choices on the same windows, by what is chosen.
    Cost: six trainings of half a minute on two cores, and the searches.
    """
    found: Losses = {}
    for what, part in (PARTS if parts is None else parts).items():
        for seed in seeds:
            for how, losses in part(seed).items():
                found.setdefault(what, {}).setdefault(how, []).append(losses)
    kept = [kept_by_predictor(mixture_of_depths(seed)) for seed in seeds] if parts is None else []
    return judge(found, kept)


def judge(found: Losses, kept: Sequence[float] = ()) -> Finding:
    """The finding of losses as `measure` collects them, and of the shares of bytes that the predictors kept."""
    rows = []
    for what, ways in found.items():
        for how, losses in ways.items():
            gap = paired_interval([[one - own for one, own in zip(row, base, strict=True)]
                                   for row, base in zip(losses, ways[DYNAMIC], strict=True)])
            rows.append({"chosen": what, "how": how, "loss": mean_interval([sum(row) / len(row) for row in losses])[0],
                         "over its own": gap[0], "low": gap[1], "high": gap[2]})
    return of_rows(rows, [f"The predictors keep {100 * share:.1f} % of the bytes, the fixed halves 50 %."
                          for share in kept])


def of_rows(rows: list[Row], notes: Sequence[str]) -> Finding:
    """The finding of the table, whose verdict is about the best fixed choice of each kind."""
    best = {row["chosen"]: min((other for other in rows if other["chosen"] == row["chosen"] and other["how"] not in (
        DYNAMIC, WHOLE)), key=lambda other: other["loss"]) for row in rows}
    checks = [measured(f"{what}: loss of the best fixed choice ({row['how']}) over the input's own, nats a byte, is",
                       (row["over its own"], row["low"], row["high"]), least=0) for what, row in best.items()]
    places = tuple(map(float, range(len(best))))
    ends = {key: tuple(row[name] for row in best.values())
            for key, name in (("y", "over its own"), ("low", "low"), ("high", "high"))}
    chart = Chart(title="What the best fixed choice loses against the input's own, with 95 % intervals.",
                  x="what is chosen", y="nats a byte", labels=tuple(best), series=(
                      Series(name="no difference", x=places, y=(0.0,) * len(places), expected=True),
                      Series(name="best fixed - its own", x=places, **ends)))
    return Finding(claim=CLAIM, rows=tuple(rows), checks=tuple(checks), charts=(chart,), notes=(
        "Small models, bytes, one text: no other follows. The best fixed choice is the best that was found.",
        *notes))


def edges(seed: int) -> dict[str, list[float]]:
    """The trained mixture with EDGES bytes for each byte and head to attend to."""
    trained = mixture(seed)
    model, held = trained.model, trained.windows.held_out()
    heads = attention(model, trained.windows.batch(0, SEARCHED))
    back = torch.arange(held.shape[1] - 1) < EDGES
    number = len(heads[0][0])
    window = Places(back.expand(number, -1), torch.zeros(number, SINKS, dtype=torch.bool))
    layers = [block.block.attention for block in model.blocks]
    dense, losses = [layer.connections for layer in layers], {WHOLE: window_losses(model, held).tolist()}
    for how, rules in ((DYNAMIC, [TopK(EDGES)] * len(layers)), ("fixed places", best_places(heads, EDGES)),
                       ("a sliding window", [window] * len(layers))):
        for layer, rule in zip(layers, rules, strict=True):
            layer.connections = Connections(Attended(rule=rule, tile=(1, 1), window=0))
        losses[how] = window_losses(model, held).tolist()
    for layer, room in zip(layers, dense, strict=True):
        layer.connections = room
    return losses


def chosen_experts(seed: int) -> dict[str, list[float]]:
    """The trained mixture with the router's two experts, and with the best fixed pairs."""
    trained = mixture(seed)
    model, held = trained.model, trained.windows.held_out()
    pairs = best_pairs(model, trained.windows.batch(0, SEARCHED))
    return {DYNAMIC: window_losses(model, held).tolist(),
            "a fixed pair": with_rules(model, Experts, pairs, held).tolist()}


def depth(seed: int) -> dict[str, list[float]]:
    """The trained Mixture-of-Depths by its predictor, and with the best fixed halves."""
    trained: Trained = mixture_of_depths(seed)
    model, held = trained.model, trained.windows.held_out()
    halves = best_halves(model, trained.windows.batch(0, SEARCHED))
    return {DYNAMIC: window_losses(model, held).tolist(),
            "a fixed half": with_rules(model, Depth, halves, held).tolist()}


@torch.no_grad()
def kept_by_predictor(trained: Trained) -> float:
    """The share of the held-out bytes that the predictors let pass: near one half, not exactly."""
    with trace(trained.model) as records:
        trained.model(trained.windows.held_out()[:, :-1])
    choices = [record.selection for record in records if record.room == "depth"]
    return (sum(int(choice.count().sum()) for choice in choices)
            / sum(int(choice.permitted.sum()) for choice in choices))


PARTS: dict[str, Part] = {f"edges, {EDGES} a byte": edges, "experts, 2 of 8": chosen_experts, "depth, half": depth}
