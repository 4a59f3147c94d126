"""Does a decoded token's attention cost what its cache has bytes?

One query row over a long cache, 8 query heads, and 8, 4, 2 or 1 key/value heads: MHA, GQA and MQA. The peer is MHA of
the same room, timed in turn; "bytes" is the share of MHA's cache, and what stands over it is the share of the time ÷
that share, less one. The other peer is torch's sdpa over the same heads. As in a model, the heads of a cache lie apart,
and the caches of many layers are read in turn, so that none waits in the processor; a time is that of one layer, GB/s
are those of its keys and values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.axes.heads import Config, Heads, cache_bytes
from sentei.benches import cold
from sentei.measurement.latency import interleave, measured

HEADS, WIDTH = 8, 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """So many key/value heads, keys, and the dtype of the cache."""

    groups: int
    keys: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (f"decode {HEADS}/{self.groups} × {WIDTH}, {self.keys:,} keys, "
                f"{str(self.dtype).removeprefix('torch.')}")

    @property
    def bytes(self) -> int:
        """Of one layer's cache."""
        return self.keys * cache_bytes(self.groups, WIDTH, self.dtype)

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Query [1, 1, H, D], key and value [1, keys, G, D] of each layer, heads apart in memory."""
        generator = torch.Generator().manual_seed(0)
        return [tuple(torch.randn(1, heads, rows, WIDTH, generator=generator).to(self.dtype).transpose(1, 2)
                      for rows, heads in ((1, HEADS), (self.keys, self.groups), (self.keys, self.groups)))
                for _ in range(max(2, cold.size() // self.bytes))]


ROOM = Heads(Config())
CASES = {"heads": [Case(groups, 16_384, dtype) for dtype in TOLERANCE for groups in (HEADS, 4, 2, 1)]}


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one row by torch, [1, 1, H, D]."""
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*heads, enable_gqa=key.shape[2] != query.shape[2]).transpose(1, 2)


def everywhere(attention: Callable, layers: list) -> Callable[[], None]:
    """Attends in one layer after another."""
    def run() -> None:
        for layer in layers:
            attention(*layer)
    return run


@torch.no_grad()
def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """For every case a row against sdpa, and against MHA where it is not that: gb_s, and in the second share and over.

    Args:
        names: of CASES.
        runs: timed pairs a row.
        absent: not used: torch is always there.
    Raises:
        AssertionError: the room's output is not sdpa's; there is no ratio then.
    """
    for case in (case for name in names for case in CASES[name]):
        layers, whole = case.layers(), replace(case, groups=HEADS)
        torch.testing.assert_close(ROOM(*layers[0]), sdpa(*layers[0]), rtol=0.02, atol=TOLERANCE[case.dtype])
        peers = {"torch sdpa": (sdpa, layers)} | ({} if case == whole else {"8/8, MHA": (ROOM, whole.layers())})
        for peer, (attention, read) in peers.items():
            timed = interleave(everywhere(attention, read), everywhere(ROOM, layers), runs=runs)
            row = measured("rooms", str(case), peer, timed.per_call(len(read), len(layers)))
            row["gb_s"] = case.bytes / row["ours_s"] / 1e9
            share = case.bytes / whole.bytes
            yield row if read is layers else row | {"share": share, "over": 1 / row["ratio"] / share - 1}
