"""A mixture of experts of 10 million parameters on code, prose and French, and its dense twin at equal training FLOPs.

The first of four layers is dense in both, because loads become even last there (2401.06066, 4.1). In the others a byte
keeps two of 42 experts of 128 neurons and one that all bytes share, against a dense layer of 384. Sigmoid gates with a
bias for the choice alone (2408.15664) and a weak balance loss; the texts are the large ones of `corpora.py`. Load, dead
experts and specialisation are those of the held-out windows, by `sentei/measurement/specialisation.py`: "information"
is what the domain of a window tells of an expert that one of its bytes keeps, and chance is what shuffled domains tell.
"Settled" is the trained model whose biases went on to move over some batches of training text while its weights stood
still.
"""

import statistics

import torch

from benchmarks.experiments.harness import (
    Experiment,
    Place,
    Variant,
    difference,
    place_of,
    publish,
    trained,
)
from benchmarks.experiments.parts import mixture, transformer
from benchmarks.publish import table
from sentei.axes.experts import MixtureOfExperts
from sentei.axes.experts.gates import Sigmoid
from sentei.core.tracing import trace
from sentei.measurement.specialisation import loads, specialisation
from sentei.model import Transformer
from sentei.training.data import Windows
from sentei.training.loop import Config as Training
from sentei.training.loop import Optimizer
from sentei.training.losses import Weights, window_losses

SHAPE = {"width": 192, "layers": 4, "heads": (6, 6)}
DOMAINS = ("code", "prose", "french")
SETTLED = 160
NEURONS = 384
ROUTED = mixture(42, 2, 128, Sigmoid(speed=2e-3), shared=1)


def dense() -> Transformer:
    """The twin."""
    return transformer(**SHAPE, feed_forward=NEURONS)


def routed() -> Transformer:
    """Experts in all layers but the first."""
    model = transformer(**SHAPE, feed_forward=ROUTED)
    model.blocks[0] = dense().blocks[0]
    return model


EXPERIMENT = Experiment(
    name="mixture-of-domains", text=DOMAINS, flops=50e12, seeds=1, held_out=192,
    variants={"dense": Variant(make=dense, about=f"{NEURONS} neurons"),
              "experts": Variant(make=routed, about="42 x 128, top 2, and 1 x 128 shared, in three of four layers",
                                 balance=Weights(switch=0.003))},
    training=Training(batch=16, evaluate=100, save=100, optimizer=Optimizer(rate=3e-3, warmup=50)))


@torch.no_grad()
def settle(model: Transformer, windows: Windows) -> Transformer:
    """Moves the biases of the gates over SETTLED batches of training text, no weight; in place."""
    model.train()
    for step in range(SETTLED):
        model(windows.batch(step, EXPERIMENT.training.batch)[:, :-1])
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.update_bias()
    return model.eval()


def domains_of(place: Place, windows: Windows) -> torch.Tensor:
    """Int64 [N]: the domain each held-out window begins in; texts stand one after another, each with its end."""
    sizes = [(place.texts / f"{name}.txt").stat().st_size + 1 for name in DOMAINS]
    return torch.bucketize(windows.held_places * windows.size, torch.tensor(sizes).cumsum(0), right=True)


def work(model: Transformer, windows: torch.Tensor, domains: torch.Tensor) -> list[list[str]]:
    """Load, dead experts and specialisation of each layer, a line a layer."""
    with torch.no_grad(), trace(model) as records:
        model(windows[:, :-1])
    lines = []
    for path, load in loads(records).items():
        found = specialisation(records.at(path), [domains])
        lift, names = found.lift(), [DOMAINS[label] for label in found.labels]
        most = ", ".join(f"{name} {lift[row].max():.1f}" for row, name in enumerate(names))
        least = min(load.counts) / statistics.fmean(load.counts)
        lines.append([path.split(".")[1], f"{1 + load.violation:.2f}", f"{least:.2f}", f"{load.entropy:.4f}",
                      f"{len(load.dead)} and {len(load.unknown)}", f"{max(load.bounds):.3f}",
                      f"{found.information:.3f} ({float(found.by_chance.max()):.3f})", most])
    return lines


def curve(runs: dict[str, dict]) -> list[list[str]]:
    """Held-out losses at equal training FLOPs, the twin's between its evaluations on a line."""
    twin = [(point["flops"], point["loss"]) for point in runs["dense"]["curve"]]
    lines = []
    for point in runs["experts"]["curve"]:
        behind = [(flops, loss) for flops, loss in twin if flops <= point["flops"]]
        ahead = [(flops, loss) for flops, loss in twin if flops >= point["flops"]]
        (start, before), (stop, after) = behind[-1], (ahead or behind[-1:])[0]
        part = (point["flops"] - start) / (stop - start) if stop > start else 0.0
        theirs = before + part * (after - before)
        lines.append([f"{point['flops'] / 1e12:.1f}", f"{point['tokens'] / 1e6:.2f}", f"{point['loss']:.4f}",
                      f"{theirs:.4f}", f"{point['loss'] - theirs:+.4f}"])
    return lines


def by_domain(runs: dict[str, dict], domains: torch.Tensor) -> list[list[str]]:
    """The final losses of each domain's windows."""
    losses = {name: torch.tensor(run["losses"], dtype=torch.float64) for name, run in runs.items()}
    lines = []
    for number, name in enumerate(DOMAINS):
        ours, theirs = (losses[key][domains == number] for key in ("experts", "dense"))
        lines.append([name, f"{len(ours)}", f"{ours.mean():.4f}", f"{theirs.mean():.4f}",
                      str(difference([ours.tolist()], [theirs.tolist()]))])
    return lines


def main() -> None:
    """Trains what is not trained, and writes the page."""
    place = place_of(__doc__)
    windows = place.windows(EXPERIMENT, 0)
    held, domains = windows.held_out(), domains_of(place, windows)
    models, runs = {}, {}
    for name in ("experts", "dense"):
        models[name], runs[name] = trained(EXPERIMENT, name, 0, place)
    as_trained = work(models["experts"], held, domains)
    settled = settle(models["experts"], windows)
    moved = difference([window_losses(settled, held).tolist()], [runs["experts"]["losses"]])
    head = ["layer", "largest load ÷ mean", "smallest ÷ mean", "entropy", "dead and unknown experts",
            "largest 95 % bound of a rate", "information, bits (most by chance)", "largest lift in a domain"]
    publish(EXPERIMENT, __doc__, [runs[name] for name in EXPERIMENT.variants], [
        table(["TFLOPs", "M bytes (experts)", "experts", "dense", "difference"], curve(runs)),
        table(["domain", "windows", "experts", "dense", "difference"], by_domain(runs, domains)),
        "As trained:", table(head, as_trained), f"Settled; its loss is other by {moved} nats a byte:",
        table(head, work(settled, held, domains))])


if __name__ == "__main__":
    main()
