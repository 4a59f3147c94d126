"""Is a decoded token's attention faster over 15 % of its pages than torch's over the whole cache, the choice included?

One query row, 9 query heads, 3 key/value heads, 64 wide, batch 1, as a layer of SmolLM2-135M has it. Ours is
everything `Connections` does for a layer: page bounds, TopK over the pages, attention to those kept, and Python. The
peer is torch's sdpa over all keys, as transformers calls it (`enable_gqa`), with the heads repeated beforehand,
untimed, and of bfloat16 with casts to float32: the fastest counts. As in a model, caches of 30 layers are read in
turn, so that none waits in the processor. The update of the cache is timed against transformers' `DynamicLayer`. A
time is that of one layer, a ratio the median over neighbouring pairs of rounds, peer ÷ ours; GB/s are the bytes of
the bounds, keys and values that ours has to read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.axes.connections import Config, Connections
from sentei.conversion.cache import layer_class
from sentei.core.rules import TopK
from sentei.core.tracing import trace
from sentei.kernels.paging import PAGE
from sentei.measurement.latency import LEAST, Comparison, interleave, measured

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

    def cast(self, layer) -> torch.Tensor:
        """sdpa in float32, the casts of the cache included."""
        tensors = (tensor.float() for tensor in (self.query, layer.keys, layer.values))
        return scaled_dot_product_attention(*tensors, enable_gqa=True).to(self.dtype)

    def repeated(self, tensors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """sdpa with a key and a value for every query head."""
        return scaled_dot_product_attention(self.query, *tensors)

    def bytes_read(self) -> int:
        """Of one layer: the bounds of every page, and the keys and values kept."""
        with trace(self.room) as records:
            self.ours(self.layers[0])
        return records[0].cost.bytes


CASES = {str(keys): [Case(keys, dtype) for dtype in TOLERANCE] for keys in (8000, 32000)}


def attention(case: Case) -> Iterator[tuple[str, Callable, Callable]]:
    """The peers: name, ours for all layers, theirs for all layers."""
    repeated = [tuple(tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (layer.keys, layer.values))
                for layer in case.layers]
    ours = everywhere(case.ours, case.layers)
    yield "torch sdpa, enable_gqa", ours, everywhere(case.grouped, case.layers)
    yield "torch sdpa, heads repeated", ours, everywhere(case.repeated, repeated)
    if case.dtype != torch.float32:
        yield "torch sdpa, cast to float32", ours, everywhere(case.cast, case.layers)


def everywhere(call: Callable, layers: list) -> Callable[[], None]:
    """Calls it for one layer after another."""
    def run() -> None:
        for layer in layers:
            call(layer)
    return run


def update(case: Case) -> tuple[Callable, Callable]:
    """A token appended to every layer, in ours and in transformers' own, which both start full."""
    from transformers.cache_utils import DynamicLayer

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


def each_layer(timed: Comparison) -> Comparison:
    """Seconds of a layer, of those of all."""
    return replace(timed, dense=[run / LAYERS for run in timed.dense], pruned=[run / LAYERS for run in timed.pruned])


@torch.no_grad()
def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """For every case the fastest of the kinds of sdpa, then the update: keys of `sentei.benches.table`, and gb_s.

    Args:
        names: of CASES, numbers of keys.
        runs: timed pairs a row, of attention more until they took `LEAST` seconds; of the update as many tokens.
        absent: not used: torch and transformers are always there.
    Raises:
        AssertionError: with every page kept ours is not what sdpa gives; there is no ratio then.
    """
    for case in (case for name in names for case in CASES[name]):
        check(case)
        found = [measured("decode", str(case), peer, each_layer(interleave(theirs, ours, runs=runs, least=LEAST)))
                 for peer, ours, theirs in attention(case)]
        fastest = min(found, key=lambda row: row["peer_s"])
        yield {**fastest, "gb_s": case.bytes_read() / fastest["ours_s"] / 1e9}
        ours, theirs = update(case)
        yield measured("decode", str(case), "DynamicLayer.update", each_layer(interleave(theirs, ours, runs=runs)))
