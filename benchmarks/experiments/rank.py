"""LoRA against full fine-tuning on a domain shift, at equal training FLOPs.

A model that read code and English prose is trained on German, wholly or by low-rank factors of every linear layer. A
step of LoRA makes no gradients of the frozen weights W, but those of their inputs, so that it takes more steps:

    full    3 · (W + attention)                    a product, the gradient of its input and that of its weight
    LoRA    2 · W + 3 · (attention + factors)      the logits' matrix, which is the embedding's, among W

Either method has the better of two learning rates, chosen by the held-out German of seed 0. The second table has what
is forgotten: the loss on the first domains, whose windows the first training held out.
"""

import statistics
from dataclasses import replace
from functools import partial

from torch import nn

from benchmarks.experiments.harness import (
    Experiment,
    Place,
    Variant,
    difference,
    place_of,
    publish,
    trained,
)
from benchmarks.experiments.parts import transformer
from benchmarks.publish import table
from sentei.axes.rank import Config as Rank
from sentei.conversion.adapters import add
from sentei.training.loop import Config as Training
from sentei.training.loop import Optimizer
from sentei.training.losses import window_losses

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
FIRST = Experiment(name="rank-first", text=("code", "prose"), flops=1.0e12, seeds=3, variants={"dense": Variant(
    make=lambda: transformer(width=96, layers=2, heads=(4, 4), feed_forward=192))})
RANKS = {"LoRA 4": 4, "LoRA 32": 32}
RATES = {"full": (1e-3, 3e-3), "LoRA 4": (3e-3, 1e-2), "LoRA 32": (3e-3, 1e-2)}
TRAINING = Training(batch=8, optimizer=Optimizer(rate=1e-3, warmup=20, decay=0.0))


def start(place: Place, seed: int, rank: int | None) -> nn.Module:
    """The model that read the first domains, as it is trained on."""
    model, _ = trained(FIRST, "dense", seed, place)
    if rank is not None:
        add(model, TARGETS, Rank(rank=rank, alpha=2.0 * rank))
    return model


def second(place: Place, seed: int) -> Experiment:
    """Training on German, of the model of one seed."""
    variants = {}
    for method, rates in RATES.items():
        rank = RANKS.get(method)
        for rate in rates:
            variants[f"{method} at {rate:g}"] = Variant(
                make=partial(start, place, seed, rank), rate=rate,
                about="every weight" if rank is None else f"rank {rank} in every linear layer")
    return Experiment(name="rank", text=("german",), flops=0.3e12, seeds=3, variants=variants, training=TRAINING)


def main() -> None:
    """Trains what is not trained, and writes the page."""
    place = place_of(__doc__)
    found, first, learned = [], {}, {}
    chosen = []
    for seed in range(FIRST.seeds):
        experiment = second(place, seed)
        old = place.windows(FIRST, seed).held_out()
        before = start(place, seed, None)
        first.setdefault("before", []).append(window_losses(before, old).tolist())
        new = place.windows(experiment, seed).held_out()
        learned.setdefault("before", []).append(window_losses(before, new).tolist())
        runs = {name: trained(experiment, name, seed, place) for name in experiment.variants if not chosen
                or name in chosen}
        if not chosen:
            chosen = [min((name for name in runs if name.startswith(method)),
                          key=lambda name: statistics.fmean(runs[name][1]["losses"])) for method in RATES]
        for name in chosen:
            model, run = runs[name]
            found.append(run)
            first.setdefault(name, []).append(window_losses(model, old).tolist())
            learned.setdefault(name, []).append(run["losses"])
    experiment = replace(experiment, variants={name: experiment.variants[name] for name in chosen})
    lines = []
    for name in first:
        mean = [statistics.fmean(map(statistics.fmean, losses[name])) for losses in (learned, first)]
        told = ["", ""] if name == "before" else [str(difference(losses[name], losses["before"]))
                                                  for losses in (learned, first)]
        against = difference(first[name], first[chosen[0]]) if name in chosen[1:] else ""
        lines.append([name, f"{mean[0]:.4f}", told[0], f"{mean[1]:.4f}", told[1], str(against)])
    head = ["model", "German", "learned: less than before", "code and prose", "forgotten: more than before",
            "forgotten: more than by full fine-tuning"]
    publish(experiment, __doc__, found, [table(head, lines)])


if __name__ == "__main__":
    main()
