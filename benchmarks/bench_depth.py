"""Does a block that some tokens skip take its share of the time?

Run from the repository's root: python -m benchmarks.bench_depth

One block of attention and a feed-forward network, dense and by Mixture-of-Depths, timed in turn. "Share of the work"
is multiply-adds, attention's pairs included, ÷ those of the dense block; "share of the time" is the median over
neighbouring pairs of the time ÷ the dense block's. Training is forward and backward with the choice along the
sequence; prompt is evaluation, where a predictor chooses: here one that is the gate, moved to keep the share. "Block
alone" is the same block on a sequence as long as what is kept: what no gathering could be faster than.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.depth import Config, Depth, Rows, Transformer
from sentei.core.rules import Capacity
from sentei.core.tracing import trace
from sentei.measurement.latency import interleave

SHARES = (0.125, 0.5)


def rooms(width: int, share: float) -> Depth:
    """A room that keeps `share` of standard normal tokens, in training and in evaluation."""
    torch.manual_seed(0)
    block = Transformer(width=width, num_heads=width // 64, hidden=4 * width, rotary=10_000.0)
    depth = Depth(Config(rule=Capacity(share)), block, width=width, work=block.work)
    with torch.no_grad():
        depth.predictor.weight.copy_(depth.gate.weight)
        cut = torch.distributions.Normal(0, depth.gate.weight.norm().item()).icdf(torch.tensor(1 - share))
        depth.predictor.bias.fill_(-cut.item())
    return depth


def step(call: Callable[[], torch.Tensor], train: bool) -> Callable[[], object]:
    """Forward, and in training backward."""
    def run() -> None:
        with torch.set_grad_enabled(train):
            output = call()
        if train:
            output.sum().backward()
    return run


def forget(depth: Depth, inputs: tuple[torch.Tensor, ...]) -> None:
    """Drops the gradients, as a step of an optimizer does."""
    for tensor in (*inputs, *depth.parameters()):
        tensor.grad = None


def rows(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """One line a share and a way."""
    for train in (True, False):
        for share in SHARES:
            depth = rooms(arguments.width, share).train(train)
            x = torch.randn(arguments.batch, arguments.tokens, arguments.width).requires_grad_(train)
            with trace(depth) as records:
                depth(x)
            kept = int(records[0].selection.count().sum()) / arguments.batch
            short = x.detach()[:, :round(kept)].clone().requires_grad_(train)

            def dense(x: torch.Tensor, block: nn.Module = depth.block) -> torch.Tensor:
                return x + block(x, Rows(positions=torch.arange(x.shape[1]).expand(x.shape[:2])))

            shares = {}
            for name, call in (("room", lambda x=x, depth=depth: depth(x)), ("alone", lambda x=short: dense(x))):
                timed = interleave(step(lambda x=x: dense(x), train), step(call, train), runs=arguments.runs,
                                   step=lambda depth=depth, inputs=(x, short): forget(depth, inputs))
                shares[name] = [1 / ratio for ratio in timed.ratios()]
                if name == "room":
                    dense_s, room_s = timed.seconds()
            cost = records[0].cost
            work = (cost.multiply_adds + cost.choosing) / cost.dense_multiply_adds
            time, alone = (statistics.median(shares[name]) for name in ("room", "alone"))
            line = {"training": train, "share": share, "kept": kept, "work": work, "time": time, "alone": alone,
                    "low": min(shares["room"]), "high": max(shares["room"]), "dense_ms": 1000 * dense_s,
                    "room_ms": 1000 * room_s}
            print(json.dumps(line), flush=True)
            yield ["training" if train else "prompt", f"{share:.1%}", f"{kept / arguments.tokens:.1%}",
                   f"{1000 * dense_s:,.1f}", f"{1000 * room_s:,.1f}", f"{work:.1%}",
                   f"**{time:.1%}** ({line['low']:.1%} to {line['high']:.1%})", f"{alone:.1%}",
                   f"{100 * (time / work - 1):+.1f} %"]


def main() -> None:
    """Measures one size and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the block, in heads of 64")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a call")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs a row")
    arguments = parser.parse_args()
    head = ["call", "capacity", "kept", "dense, ms", "room, ms", "share of the work", "share of the time",
            "block alone", "time over work"]
    lines = list(rows(arguments))
    title = f"Width {arguments.width}, {arguments.batch} × {arguments.tokens:,} tokens, float32."
    write_result("depth", __doc__, [title, table(head, lines)])


if __name__ == "__main__":
    main()
