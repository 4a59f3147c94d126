"""Several processes against one: the same losses, gradients, weights and balance; and checkpoints that fit any number.

In float64, where all that is left between them is the order of sums. A checkpoint holds everything a step depends on;
the gradients are compared through the moments of AdamW.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from processes import run

from sentei.axes import depth, experts
from sentei.axes.experts.gates import Renormalised, Sigmoid
from sentei.core.rules import Capacity, TopK
from sentei.model import Config as Shape
from sentei.model import Routed, Transformer
from sentei.training import checkpoints
from sentei.training.data import Bytes, Windows, prepare
from sentei.training.loop import METRICS, Config, Optimizer, read_metrics, train
from sentei.training.losses import Balanced, Weights, of_rooms
from sentei.training.parallel import Config as Parallel
from sentei.training.parallel import world

TEXT = " ".join(f"{number} squared is {number * number}." for number in range(400))
SETTINGS = Config(steps=4, batch=4, accumulate=2, evaluate=2, save=2, optimizer=Optimizer(rate=1e-2, warmup=2))
PLAIN = {"width": 16, "layers": 2, "heads": (2, 1)}
SHAPES = {
    "dense": Shape(**PLAIN, feed_forward=24),
    "softmax": Shape(**PLAIN, feed_forward=Routed(neurons=48, room=experts.Config(
        rule=TopK(2), gate=Renormalised(), unit=8, shared=2, metric="cosine"))),
    "sigmoid": Shape(**PLAIN, feed_forward=Routed(neurons=32, room=experts.Config(
        rule=TopK(2), gate=Sigmoid(speed=0.05), unit=8))),
    "depth": Shape(**PLAIN, feed_forward=24, depth=depth.Config(rule=Capacity(0.5))),
}
WEIGHTS = {"softmax": Weights(switch=0.1, importance=0.1, z=0.01), "sigmoid": Weights(sequence=0.1)}
LAYOUTS = {"copies": Parallel(), "shard": Parallel(shard=True), "experts": Parallel(experts=2),
           "both": Parallel(shard=True, experts=2), "all experts": Parallel(experts=4)}
CASES = {2: [("dense", "copies"), ("dense", "shard"), ("softmax", "copies"), ("softmax", "experts"),
             ("sigmoid", "both"), ("depth", "copies")],
         4: [("dense", "shard"), ("softmax", "both"), ("softmax", "all experts"), ("sigmoid", "experts"),
             ("sigmoid", "shard"), ("depth", "shard")]}
NAMES = [pytest.param(size, *case, id=f"{size} {' '.join(case)}") for size, cases in CASES.items() for case in cases]
SPREAD = 1e-10  # between sums in another order in float64, as AdamW divides them by 1e-8 at the least


class Stopped(BaseException):
    """Stands for a kill that comes to all processes."""


def trained(kind: str, layout: str, out: Path, last: int = 4) -> dict:
    """A run in the processes there are, from the newest checkpoint on; stopped after step `last`."""
    done = []

    def step(note):
        done.append(note)
        if len(done) == last < 4:
            raise Stopped

    with world() as processes:
        out.mkdir(exist_ok=True)
        windows = Windows(processes.in_turn(lambda: prepare([TEXT], Bytes(), out)), context=16, held_out=3, seed=0)
        torch.manual_seed(0)
        model = Transformer(SHAPES[kind]).double()
        processes.place(model, LAYOUTS[layout])
        terms = (of_rooms, Balanced(WEIGHTS.get(kind, Weights()), processes))
        try:
            return train(model, windows, SETTINGS, out, job={"kind": kind}, terms=terms, world=processes, step=step)
        except Stopped:
            return {}


def several(folder: Path, cases: list) -> list[dict]:
    """All the cases, one after the other in the same processes."""
    return [trained(kind, layout, folder / f"{kind} {layout}") for kind, layout in cases]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folders of runs in one process, by kind."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in SHAPES:
        trained(kind, "copies", folder / kind)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folders of runs in several, by their number."""
    folders = {size: tmp_path_factory.mktemp(f"world{size}") for size in CASES}
    for size, cases in CASES.items():
        for result in run(several, size, folders[size], cases):
            assert len(result) == len(cases) and isinstance(result[0], dict), result
    return folders


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds, read in one process."""
    found = checkpoints.newest(out)
    filled = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in found.shapes().items()}
    found.fill(filled)
    return filled


def compare(out: Path, reference: Path, step: int = 4) -> None:
    """The metrics and the newest checkpoint of two runs."""
    rows, expected = (read_metrics(folder / METRICS, step) for folder in (out, reference))
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=SPREAD, abs=SPREAD), row["step"]
    torch.testing.assert_close(tensors(out), tensors(reference), rtol=SPREAD, atol=SPREAD)


@pytest.mark.parametrize(("size", "kind", "layout"), NAMES)
def test_several_processes_do_what_one_does(alone, together, size, kind, layout):
    compare(together[size] / f"{kind} {layout}", alone / kind)
