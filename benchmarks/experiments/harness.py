"""Models trained on the same text at equal training FLOPs, and how sure a difference between them is.

A run is one variant and one seed, which draws the weights and the order of the text. Each run spends the same training
FLOPs: three times those of the forward pass by the model's own count (`Transformer.cost`, routers and scores that
choose included), so a variant that does less for a token reads more of them. Losses are nats a byte on held-out
windows that no run is trained on. A run that was killed goes on from its checkpoint, and one that is done is not done
again.

A difference is that to the baseline of the same seed on the same windows. Its two intervals answer two questions:
"seeds" (Student's t over the seeds' means) whether another training would say the same, "text" (normal, over windows)
whether other text would.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.core.storage import read_json, write_json
from sentei.core.tracing import trace
from sentei.geometry.intervals import student
from sentei.training import data
from sentei.training.loop import METRICS, Config, Optimizer, read_metrics, train
from sentei.training.losses import Balanced, Weights, of_predictors, window_losses

SEEN = 8  # sequences whose forward pass is counted


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the models that are compared.

    Args:
        make: a model with fresh weights, drawn by torch's own generator; a Transformer, or a wrapper whose `inner` is.
        about: what is particular about it.
        balance: what the losses of its experts' balance count.
        rate: the highest learning rate; None for the experiment's.
    """

    make: Callable[[], nn.Module]
    about: str = ""
    balance: Weights = Weights()
    rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Variants, what they read, and what each may spend.

    Args:
        name: of the results.
        variants: by name; the first is the baseline.
        text: names of texts below the folder that is given, without ".txt".
        flops: of one run's training.
        seeds: runs a variant.
        context, held_out: bytes of a sequence; windows that are kept for the losses.
        training: what of `training.Config` holds for all; its steps and seed are not read.
    """

    name: str
    variants: dict[str, Variant]
    text: tuple[str, ...]
    flops: float
    seeds: int = 3
    context: int = 256
    held_out: int = 96
    training: Config = field(default_factory=lambda: Config(batch=8, optimizer=Optimizer(rate=3e-3, warmup=40)))

    @property
    def baseline(self) -> str:
        """The variant the others are compared with."""
        return next(iter(self.variants))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where texts are read and runs are kept."""

    texts: Path
    out: Path

    def windows(self, experiment: Experiment, seed: int) -> data.Windows:
        """The experiment's text, in the order of a seed."""
        texts = data.texts_of(tuple(f"{name}.txt" for name in experiment.text), self.texts)
        self.out.mkdir(parents=True, exist_ok=True)
        return data.Windows(data.prepare(texts, data.Bytes(), self.out), context=experiment.context,
                            held_out=experiment.held_out, seed=seed)


def forward_flops(model: nn.Module, context: int) -> float:
    """FLOPs a token of a forward pass in training, with what the choices take; two a multiply-add."""
    tokens = torch.randint(0, 256, (SEEN, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model.train()) as records:
        model(tokens)
    cost = getattr(model, "inner", model).cost(records, tokens.shape)
    return 2 * (cost.multiply_adds + cost.choosing) / tokens.numel()


def training_flops(model: nn.Module, context: int) -> float:
    """FLOPs a token of a training step.

        3 · forward - Σ over the frozen weights of  2 · out · in

    A product y = x Wᵀ has a gradient of x and one of W, as much work each as the product itself, and so has one of two
    activations, as in attention. A frozen weight gets none, but what lies below needs that of x all the same. (Where
    nothing below the first layer is trained, its gradient of x is charged and not made.)
    """
    inner = getattr(model, "inner", model)
    plain = [module.weight for module in inner.modules() if isinstance(module, nn.Linear)] + [inner.embedding.weight]
    frozen = sum(weight.numel() for weight in plain if not weight.requires_grad)
    return 3 * forward_flops(model, context) - 2 * frozen


def config_of(experiment: Experiment, variant: Variant, seed: int) -> tuple[Config, float]:
    """How a run is trained, and its training FLOPs a token."""
    torch.manual_seed(seed)
    each = training_flops(variant.make(), experiment.context)
    given = experiment.training
    steps = round(experiment.flops / (each * given.batch * experiment.context))
    rate = given.optimizer.rate if variant.rate is None else variant.rate
    return replace(given, steps=steps, seed=seed, optimizer=replace(given.optimizer, rate=rate)), each


def trained(experiment: Experiment, name: str, seed: int, place: Place) -> tuple[nn.Module, dict]:
    """The model of a run and what is known of it, trained here unless that was done before.

    Returns:
        the model in eval mode; variant, seed, steps, flops_a_token, tokens, parameters, losses (of each held-out
        window) and curve (step, tokens, FLOPs and held-out loss of each evaluation).
    """
    variant, windows = experiment.variants[name], place.windows(experiment, seed)
    config, each = config_of(experiment, variant, seed)
    folder = place.out / experiment.name / f"{name.replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = variant.make()
    job = {"experiment": experiment.name, "variant": name, "text": windows.sha256,
           "training": json.loads(json.dumps(asdict(config)))}
    print(f"{name}, seed {seed}: {config.steps} steps", flush=True)
    train(model, windows, config, folder, job=job, terms=(of_predictors, Balanced(variant.balance)))
    model.eval()
    path = folder / "result.json"
    if not path.exists():
        tokens = config.batch * experiment.context
        curve = [{"step": row["step"], "tokens": row["step"] * tokens, "flops": row["step"] * tokens * each,
                  "loss": row["held_out"]} for row in read_metrics(folder / METRICS, config.steps) if "held_out" in row]
        write_json(path, {"variant": name, "seed": seed, "steps": config.steps, "flops_a_token": each,
                          "tokens": config.steps * tokens, "parameters": sum(map(torch.numel, model.parameters())),
                          "losses": window_losses(model, windows.held_out()).tolist(), "curve": curve})
    return model, read_json(path)


def results(experiment: Experiment, place: Place) -> Iterator[dict]:
    """Every run, seed by seed; those that are done come from their file."""
    for seed in range(experiment.seeds):
        for name in experiment.variants:
            yield trained(experiment, name, seed, place)[1]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference in loss and its two 95 % margins; `seeds` is infinite for one seed."""

    mean: float
    seeds: float
    text: float

    def __str__(self) -> str:
        over_seeds = f"± {self.seeds:.4f}" if math.isfinite(self.seeds) else "one seed"
        return f"{self.mean:+.4f} (seeds {over_seeds}, text ± {self.text:.4f})"

    @property
    def verdict(self) -> str:
        """Lower or higher where both intervals leave out 0, of one seed the text's, which is said; else open."""
        one = math.isinf(self.seeds)
        if abs(self.mean) <= max(self.text, 0 if one else self.seeds):
            return "open"
        return ("lower" if self.mean < 0 else "higher") + ", of one seed" * one


def difference(theirs: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Difference:
    """Of losses [seeds][windows] to those of the baseline, pair by pair."""
    gaps = torch.tensor(theirs, dtype=torch.float64) - torch.tensor(baseline, dtype=torch.float64)
    seeds, windows = gaps.shape
    means, places = gaps.mean(1).tolist(), gaps.mean(0)
    over_seeds = student(seeds - 1) * statistics.stdev(means) / math.sqrt(seeds) if seeds > 1 else math.inf
    return Difference(mean=float(gaps.mean()), seeds=over_seeds, text=1.96 * float(places.std()) / math.sqrt(windows))


def comparison(experiment: Experiment, found: list[dict]) -> str:
    """The table of an experiment."""
    losses = {name: [run["losses"] for run in found if run["variant"] == name] for name in experiment.variants}
    lines = []
    for name, variant in experiment.variants.items():
        run = next(run for run in found if run["variant"] == name)
        against = difference(losses[name], losses[experiment.baseline])
        told = ["the baseline", ""] if name == experiment.baseline else [str(against), against.verdict]
        lines.append([name, variant.about, f"{run['parameters'] / 1e6:.2f}", f"{run['flops_a_token'] / 1e6:.2f}",
                      f"{run['flops_a_token'] * run['tokens'] / 1e12:.2f}",
                      f"{run['tokens'] / 1e6:.2f}",
                      f"{statistics.fmean(statistics.fmean(row) for row in losses[name]):.4f}", *told])
    return table(["variant", "what it is", "M parameters", "training MFLOPs a token", "TFLOPs in all", "M tokens",
                  "held-out loss", "difference, nats a byte", "loss"], lines)


def place_of(about: str) -> Place:
    """What every experiment is told on the command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder that corpora.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; one that is there goes on")
    options = parser.parse_args()
    sys.argv[1:] = ["--texts", "TEXTS", "--out", "RUNS"]  # what a page tells of the command: no folders of a machine
    return Place(texts=options.texts, out=options.out)


def publish(experiment: Experiment, about: str, found: list[dict], parts: list[str]) -> Path:
    """Writes the page and, beside it, every run as JSON."""
    setting = (f"{experiment.seeds} seed{'s' * (experiment.seeds > 1)}, {experiment.context} bytes a sequence, "
               f"{experiment.held_out} held-out windows, {experiment.training.batch} sequences a step, text "
               f"{', '.join(experiment.text)}, rate {experiment.training.optimizer.rate:g}.")
    path = write_result(f"experiment-{experiment.name}", about, [setting, comparison(experiment, found), *parts])
    write_json(path.with_suffix(".json"), {"experiment": experiment.name, "runs": found})
    return path


def carry_out(experiment: Experiment, about: str, *parts: Callable[[Place], str]) -> None:
    """Trains what is not trained, and writes the page: the comparison, and what the parts tell of the runs."""
    place = place_of(about)
    found = list(results(experiment, place))
    publish(experiment, about, found, [part(place) for part in parts])
