"""Is a decoded token's attention faster over 15 % of its pages than torch's over the whole cache, the choice included?

Run from the repository's root: python -m benchmarks.bench_decode

One query row, 9 query heads, 3 key/value heads, 64 wide, batch 1, as a layer of SmolLM2-135M has it. Ours is everything
`Connections` does for a layer: page bounds, TopK over the pages, attention to those kept, and Python. The peer is
torch's sdpa over all keys, as transformers calls it (`enable_gqa`) and with the heads repeated beforehand, untimed:
the faster of the two counts. As in a model, caches of 30 layers are read in turn, so that none waits in the processor.
The update of the cache is timed against transformers' `DynamicLayer`. A time is that of one layer, a ratio the median
over neighbouring pairs of rounds, peer ÷ ours; GB/s are the bytes of the bounds, keys and values that ours has to read.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from benchmarks.publish import table, write_result
from sentei.axes.connections import Config, Connections
from sentei.conversion.cache import layer_class
from sentei.core.rules import TopK
from sentei.core.tracing import trace
from sentei.kernels.paging import PAGE
from sentei.measurement.latency import interleave
from sentei.measurement.outcome import environment

LAYERS, HEADS, GROUPS, WIDTH, KEPT = 30, 9, 3, 64, 0.15
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """A cache of so many keys, in every layer."""

    keys: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.keys:,} keys, {str(self.dtype).removeprefix('torch.')}"

    @cached_property
    def layers(self) -> list:
        """Our caches, full but for the room they keep."""
        made = [layer_class()() for _ in range(LAYERS)]
        for layer in made:
            layer.update(*(torch.randn(1, GROUPS, self.keys, WIDTH, dtype=self.dtype) for _ in range(2)))
        return made

    @cached_property
    def query(self) -> torch.Tensor:
        """[1, H, 1, D], as transformers has it."""
        return torch.randn(1, HEADS, 1, WIDTH, dtype=self.dtype)

    @cached_property
    def room(self) -> Connections:
        """Keeps 15 % of the pages."""
        return Connections(Config(decode=TopK(round(KEPT * self.keys / PAGE))))

    def ours(self, layer, room: Connections | None = None) -> torch.Tensor:
        """A layer's attention, from what transformers hands over to what it takes back."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (self.query, layer.keys, layer.values))
        return (room or self.room)(query, key, value, None, layer.keys.pages).contiguous()

    def grouped(self, layer) -> torch.Tensor:
        """sdpa as transformers calls it."""
        return scaled_dot_product_attention(self.query, layer.keys, layer.values, enable_gqa=True)

    def repeated(self, tensors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """sdpa with a key and a value for every query head."""
        return scaled_dot_product_attention(self.query, *tensors)

    def bytes_read(self) -> int:
        """Of one layer: the bounds of every page, and the keys and values kept."""
        with trace(self.room) as records:
            self.ours(self.layers[0])
        return records[0].cost.bytes


def attention(case: Case) -> Iterator[tuple[str, Callable, Callable]]:
    """The peers: name, ours for all layers, theirs for all layers."""
    repeated = [tuple(tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (layer.keys, layer.values))
                for layer in case.layers]
    ours = everywhere(case.ours, case.layers)
    yield "torch sdpa, enable_gqa", ours, everywhere(case.grouped, case.layers)
    yield "torch sdpa, heads repeated", ours, everywhere(case.repeated, repeated)


def everywhere(call: Callable, layers: list) -> Callable[[], None]:
    """Calls it for one layer after another."""
    def run() -> None:
        for layer in layers:
            call(layer)
    return run


def update(case: Case) -> tuple[Callable, Callable]:
    """A token appended to every layer, in ours and in transformers' own, which both start full."""
    theirs = [DynamicLayer() for _ in range(LAYERS)]
    for layer, full in zip(theirs, case.layers, strict=True):
        layer.update(full.keys, full.values)
    token = torch.randn(1, GROUPS, 1, WIDTH, dtype=case.dtype)
    return (everywhere(lambda layer: layer.update(token, token), case.layers),
            everywhere(lambda layer: layer.update(token, token), theirs))


def check(case: Case) -> None:
    """With every page kept ours is what sdpa gives.

    Raises:
        AssertionError: it differs by more than TOLERANCE.
    """
    everything = Connections(Config(decode=TopK(case.keys)))
    found, expected = case.ours(case.layers[0], everything).transpose(1, 2), case.grouped(case.layers[0])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=TOLERANCE[case.dtype])


def row_of(case: Case, peer: str, calls: tuple[Callable, Callable], runs: int, read: int) -> dict:
    """Times both in turn; seconds are those of a layer."""
    timed = interleave(calls[1], calls[0], runs=runs)
    peer_s, ours_s = (seconds / LAYERS for seconds in timed.seconds())
    ratios = timed.ratios()
    return {"bench": "decode", "case": str(case), "peer": peer, "ours_s": ours_s, "peer_s": peer_s,
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "gb_s": read / ours_s / 1e9,
            "machine": environment()["processor"]}


@torch.no_grad()
def rows(cases: list[Case], runs: int) -> Iterator[dict]:
    """For every case the faster of the two kinds of sdpa, then the update."""
    for case in cases:
        check(case)
        read = case.bytes_read()
        yield min((row_of(case, peer, (ours, theirs), runs, read) for peer, ours, theirs in attention(case)),
                  key=lambda row: row["peer_s"])
        yield row_of(case, "DynamicLayer.update", update(case), runs, 0)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="*", default=[8000, 32000])
    parser.add_argument("--runs", type=int, default=11, help="timed pairs a row; of DynamicLayer's as many tokens")
    arguments = parser.parse_args()
    lines = []
    for row in rows([Case(keys, dtype) for keys in arguments.keys for dtype in TOLERANCE], arguments.runs):
        print(json.dumps(row), flush=True)
        lines.append([row["case"], row["peer"], f"{1e6 * row['ours_s']:,.0f}", f"{1e6 * row['peer_s']:,.0f}",
                      f"**{row['ratio']:.1f}** ({row['low']:.1f} to {row['high']:.1f})",
                      f"{row['gb_s']:.1f}" if row["gb_s"] else ""])
    head = ["case", "peer", "ours µs", "peer µs", "peer ÷ ours", "our GB/s"]
    write_result("decode", __doc__, [table(head, lines)])


if __name__ == "__main__":
    main()
