"""The small models that claims about training are measured on: trained here, each once a process.

Bytes of the interpreter's documentation, a model of two layers, a few hundred steps. What is small here is said to be
small: no claim about models of other sizes follows.
"""

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, wraps
from itertools import count
from pathlib import Path

import torch
from torch import nn

from sentei.axes import depth, experts
from sentei.axes.depth import Depth
from sentei.axes.experts.gates import Renormalised
from sentei.core.rules import Capacity, TopK
from sentei.core.tracing import trace
from sentei.model import Config as Shape
from sentei.model import Routed, Transformer
from sentei.training import data
from sentei.training.loop import Config, Optimizer, train
from sentei.training.losses import Balanced, Term, Weights, of_predictors

EXPERTS, KEPT, UNIT = 8, 2, 48
SHAPE = {"width": 96, "layers": 2, "heads": (4, 4)}
CONTEXT, HELD_OUT, STEPS, BATCH = 128, 64, 300, 8
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model after its training.

    Args:
        model: in eval mode.
        windows: what it read, and its held-out windows.
        stages: its weights by the number of steps done: none of them, a quarter, and all.
    """

    model: Transformer
    windows: data.Windows
    stages: dict[int, dict[str, torch.Tensor]]

    def at(self, steps: int) -> Transformer:
        """The model as it was after so many steps, one of `stages`; in eval mode."""
        model = deepcopy(self.model)
        model.load_state_dict(self.stages[steps])
        return model.eval()


@cache
def mixture(seed: int, steps: int = STEPS) -> Trained:
    """A decoder whose feed-forward layers are eight experts, two a byte, balanced by a loss."""
    room = experts.Config(rule=TopK(KEPT), gate=Renormalised(), unit=UNIT)
    shape = Shape(**SHAPE, feed_forward=Routed(neurons=EXPERTS * UNIT, room=room))
    return _train(lambda: Transformer(shape), seed, steps, lambda: [Balanced(Weights(switch=0.01))])


@cache
def mixture_of_depths(seed: int, steps: int = STEPS) -> Trained:
    """A decoder of four layers, every other of which half of the bytes pass."""
    def make() -> Transformer:
        shape = {**SHAPE, "layers": 4, "feed_forward": 192}
        model = Transformer(Shape(**shape, depth=depth.Config(rule=Capacity(0.5))))
        for room in (part for part in model.modules() if isinstance(part, Depth)):
            nn.init.normal_(room.gate.weight, std=0.02)
        dense = Transformer(Shape(**shape))
        for number in (0, 2):
            model.blocks[number] = dense.blocks[number]
        return model

    return _train(make, seed, steps, lambda: [of_predictors])


def neurons(model: Transformer) -> list[torch.Tensor]:
    """The experts' neurons of every layer, [E, F, 3 · width]: rows of the gate and of `up`, column of `down`."""
    layers = [layer for layer in model.modules() if isinstance(layer, experts.MixtureOfExperts)]
    return [torch.cat([*layer.up.detach().chunk(2, 1), layer.down.detach().transpose(1, 2)], -1).clone()
            for layer in layers]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a layer's router saw and chose.

    Args:
        points: x [N, D].
        rows: W_g [E, D].
        ids: int64 [N, k], the experts that the model kept.
    """

    points: torch.Tensor
    rows: torch.Tensor
    ids: torch.Tensor


@torch.no_grad()
def routings(model: Transformer, windows: torch.Tensor) -> list[Routing]:
    """Of every mixture of a model, on windows [N, context + 1]."""
    layers = [layer for layer in model.modules() if isinstance(layer, experts.MixtureOfExperts)]
    seen: list[torch.Tensor] = []
    handles = [layer.router.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
               for layer in layers]
    with trace(model) as records:
        model(windows[:, :-1])
    for handle in handles:
        handle.remove()
    chosen = [record.selection.ids.flatten(0, -2) for record in records if record.room == "experts"]
    return [Routing(points=points, rows=layer.router.weight.detach(), ids=ids)
            for points, layer, ids in zip(seen, layers, chosen, strict=True)]


def one_thread(measure: Callable) -> Callable:
    """A function with torch on one thread, as its attribute `threads` tells: models so small gain little by two, and
    lose much beside others.

    Threads of a parallel part spin while they wait for one another. 40 steps took 2.1 s on one thread and 1.5 on two
    of a quiet machine, 4.8 and 20 s on one that others used; and comparing experts is made of smaller parts still.
    """
    @wraps(measure)
    def alone(*args, **kwargs):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return measure(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    alone.threads = 1
    return alone


def _train(make: Callable[[], Transformer], seed: int, steps: int, terms: Callable[[], Sequence[Term]]) -> Trained:
    """The model of a seed after so many steps."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = make()
        stages = {0: _copied(model)}

        numbers = count(1)

        def step(_: str) -> None:
            number = next(numbers)
            if number in (steps // 4, steps):
                stages[number] = _copied(model)

        path = data.prepare(data.texts_of(("python-documentation",), Path(folder)), data.Bytes(), Path(folder))
        windows = data.Windows(path, context=CONTEXT, held_out=HELD_OUT, seed=seed)
        config = Config(steps=steps, batch=BATCH, seed=seed, evaluate=steps, save=steps,
                        optimizer=Optimizer(rate=3e-3, warmup=40))
        train(model, windows, config, Path(folder), job={"seed": seed}, terms=terms(), step=step)
        return Trained(model=model.eval(), windows=windows, stages=stages)


def _copied(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
