"""A linear layer of few rows: sentei's native kernel against torch's, and both against reading memory.

Weights are cycled through many copies, four times as many bytes as the largest cache has, so that none is in a cache
when its turn comes. In turn with both, a native loop reads copies with the same threads, many in one call;
`bandwidth` is sentei's share of what that reached. The same loop, one copy a call, says what the start of the threads
and the first misses leave of it: `a_call` is sentei's share of that. Ours is called as a converted model calls it;
Python is in every figure. Before a case is timed the outputs are compared.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import linear as torch_linear

from sentei.benches import cold
from sentei.kernels.linear import fused_cpp, linear
from sentei.measurement.latency import Comparison, measured
from sentei.measurement.outcome import today

TURN = 32 << 20  # bytes a timed turn reads, about


@dataclass(frozen=True)
class Case:
    """One shape: inputs to outputs, and rows."""

    width: int
    outputs: int
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (f"{self.width} to {self.outputs:,}, {self.rows} row{'s' * (self.rows > 1)}, "
                f"{str(self.dtype).removeprefix('torch.')}")

    @property
    def bytes(self) -> int:
        """Of one weight."""
        return self.width * self.outputs * self.dtype.itemsize

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x [R, I] and the copies of the weight [N, O, I]."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.outputs, self.width, generator=generator).to(self.dtype)
        x = torch.randn(self.rows, self.width, generator=generator).to(self.dtype)
        return x, weight.repeat(max(cold.size() // self.bytes, 2), 1, 1)


SHAPES = [(4096, 4096), (576, 1536), (1536, 576), (576, 576), (576, 192), (576, 49152)]
CASES = {str(dtype).removeprefix("torch."): [Case(*shape, rows, dtype) for shape in SHAPES for rows in (1, 4, 8)]
         for dtype in (torch.float32, torch.bfloat16)}


def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product, as a converted model calls it."""
    output = fused_cpp.at_once(x, weight, None)
    return linear(x, weight, impl="fused_cpp") if output is None else output


def turns(case: Case, runs: int) -> dict[str, list[float]]:
    """Seconds a weight, turn by turn, of sentei, of torch, and of reading: many weights in a call, and one.

    Raises:
        AssertionError: the outputs differ by more than the rounding of sums of unit normals.
    """
    x, weights = case.tensors()
    torch.testing.assert_close(ours(x, weights[0]), torch_linear(x, weights[0]), rtol=0.02,
                               atol=1e-3 if case.dtype == torch.float32 else 0.5)
    each = min(max(TURN // case.bytes, 1), len(weights))
    parts = [(part, list(part)) for part in weights.split(each) if len(part) == each]
    named = {"ours": partial(ours, x), "torch": partial(torch_linear, x), "call": cold.read}
    seconds, at = {name: [] for name in (*named, "read")}, 0
    for turn in range(runs + 1):
        for name in seconds if turn % 2 else reversed(seconds):
            part, copies = parts[at % len(parts)]
            start = time.perf_counter()
            if name == "read":
                cold.read(part)
            else:
                for weight in copies:
                    named[name](weight)
            spent = (time.perf_counter() - start) / each
            seconds[name] += [spent] if turn else []
            at += 1
    return seconds


@torch.no_grad()
def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case: the keys of `sentei.benches.table`, bandwidth, a_call and the GB/s that reading reached.

    Args:
        names: of CASES.
        runs: timed turns a row.
        absent: not used: torch is always there.
    """
    for case in (case for name in names for case in CASES[name]):
        seconds = turns(case, runs)
        shares = {name: statistics.median(bare / own for bare, own in zip(seconds[name], seconds["ours"], strict=True))
                  for name in ("read", "call")}
        timed = Comparison(dense=seconds["torch"], pruned=seconds["ours"], date=today())
        yield {**measured("linear", str(case), "torch F.linear", timed), "bandwidth": shares["read"],
               "a_call": shares["call"], "gb_s": case.bytes / 1e9 / statistics.median(seconds["read"])}
