"""Does a block that some tokens skip take its share of the time?

One block of attention and a feed-forward network, dense and by Mixture-of-Depths, timed in turn. "Work" is
multiply-adds, attention's pairs included, ÷ those of the dense block; what stands over it is the share of the time ÷
the share of the work, less one. Training is forward and backward with the choice along the sequence; prompt is
evaluation, where a predictor chooses: here one that is the gate, moved to keep the share. The second peer is the same
block alone on a sequence as long as what is kept: what no gathering could be faster than.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sentei.axes.depth import Config, Depth, Rows, Transformer
from sentei.core.rules import Capacity
from sentei.core.tracing import trace
from sentei.measurement.latency import interleave, measured


@dataclass(frozen=True)
class Case:
    """The share of the tokens that is kept, whether it is trained, and the size, in heads of 64."""

    share: float
    train: bool
    width: int = 512
    batch: int = 4
    tokens: int = 1024

    def __str__(self) -> str:
        return (f"depth {self.share:.1%}, {'training' if self.train else 'prompt'}, width {self.width}, "
                f"{self.batch} × {self.tokens:,} tokens, float32")

    def room(self) -> Depth:
        """A room that keeps the share of standard normal tokens, in training and in evaluation."""
        torch.manual_seed(0)
        block = Transformer(width=self.width, num_heads=self.width // 64, hidden=4 * self.width, rotary=10_000.0)
        depth = Depth(Config(rule=Capacity(self.share)), block, width=self.width, work=block.work)
        with torch.no_grad():
            depth.predictor.weight.copy_(depth.gate.weight)
            normal = torch.distributions.Normal(0, depth.gate.weight.norm().item())
            depth.predictor.bias.fill_(-normal.icdf(torch.tensor(1 - self.share)).item())
        return depth.train(self.train)


CASES = {"depth": [Case(share, train) for train in (True, False) for share in (0.125, 0.5)]}


def step(call: Callable[[], torch.Tensor], train: bool) -> Callable[[], object]:
    """Forward, and in training backward."""
    def run() -> None:
        with torch.set_grad_enabled(train):
            output = call()
        if train:
            output.sum().backward()
    return run


def dense(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block on every token."""
    return x + block(x, Rows(positions=torch.arange(x.shape[1]).expand(x.shape[:2])))


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """Two rows for every case: the keys of `sentei.benches.table`, and in the first share and over.

    Args:
        names: of CASES.
        runs: timed pairs a row.
        absent: not used: the peers are torch and the block itself.
    Raises:
        AssertionError: with every token kept, the room is not the dense block.
    """
    for case in (case for name in names for case in CASES[name]):
        depth = case.room()
        check(depth, case)
        x = torch.randn(case.batch, case.tokens, case.width).requires_grad_(case.train)
        with trace(depth) as records:
            depth(x)
        kept, cost = int(records[0].selection.count().sum()) / case.batch, records[0].cost
        short = x.detach()[:, :round(kept)].clone().requires_grad_(case.train)

        def forget(leaves: tuple = (x, short, *depth.parameters())) -> None:
            for tensor in leaves:
                tensor.grad = None

        room = step(lambda depth=depth, x=x: depth(x), case.train)
        share = (cost.multiply_adds + cost.choosing) / cost.dense_multiply_adds
        for peer, read in (("the dense block", x), ("the block alone on what is kept", short)):
            theirs = step(lambda block=depth.block, read=read: dense(block, read), case.train)
            row = measured("rooms", str(case), peer, interleave(theirs, room, runs=runs, step=forget))
            yield row | ({"share": share, "over": 1 / row["ratio"] / share - 1} if read is x else {})


def check(depth: Depth, case: Case) -> None:
    """Raises AssertionError unless the room with every token kept and weighed 1 is the dense block."""
    everything = Depth(Config(), depth.block, width=case.width)
    with torch.no_grad():
        nn.init.zeros_(everything.gate.weight)
        nn.init.ones_(everything.gate.bias)
        x = torch.randn(1, min(case.tokens, 128), case.width)
        torch.testing.assert_close(everything(x), dense(depth.block, x), rtol=1e-4, atol=1e-4)
