"""A linear layer of few rows: sentei's native kernel against torch's, and both against reading memory.

Weights are cycled through many copies, so that none is in the cache when its turn comes. In turn with both, a native
loop reads as many bytes of another buffer with the same threads; `bandwidth` is sentei's share of what that reached.
Python is in every figure. Before a case is timed the outputs are compared.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sentei.kernels import native
from sentei.kernels.linear import linear
from sentei.measurement.latency import Comparison, measured
from sentei.measurement.outcome import today

COLD = 256 << 20  # bytes of weights that are cycled through, many times the cache
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
        return x, weight.repeat(max(COLD // self.bytes, 2), 1, 1)


SHAPES = [(4096, 4096), (576, 1536), (1536, 576), (576, 576), (576, 192), (576, 49152)]
CASES = {str(dtype).removeprefix("torch."): [Case(*shape, rows, dtype) for shape in SHAPES for rows in (1, 4, 8)]
         for dtype in (torch.float32, torch.bfloat16)}


def read(memory: torch.Tensor, first: int, count: int) -> None:
    """Reads `count` floats of memory, from `first` on, with torch's number of threads."""
    native.load().sentei_read(ctypes.c_void_p(memory.data_ptr() + 4 * first), ctypes.c_int64(count),
                              ctypes.byref(ctypes.c_float()), ctypes.c_int64(torch.get_num_threads()))


def turns(case: Case, runs: int, memory: torch.Tensor) -> dict[str, list[float]]:
    """Seconds a weight, turn by turn, of sentei, of torch and of reading `memory`.

    Raises:
        AssertionError: the outputs differ by more than the rounding of sums of unit normals.
    """
    x, weights = case.tensors()
    named = {"ours": lambda w: linear(x, w, impl="fused_cpp"), "torch": lambda w: torch.nn.functional.linear(x, w)}
    torch.testing.assert_close(named["ours"](weights[0]), named["torch"](weights[0]), rtol=0.02,
                               atol=1e-3 if case.dtype == torch.float32 else 0.5)
    copies = list(weights)
    each = min(max(TURN // case.bytes, 1), len(copies))
    floats = case.bytes * each // 4 // 128 * 128
    seconds, at = {"ours": [], "torch": [], "read": []}, 0
    for turn in range(runs + 1):
        for name in seconds if turn % 2 else reversed(seconds):
            start = time.perf_counter()
            if name == "read":
                read(memory, at * floats % (memory.numel() - floats) // 32 * 32, floats)
            else:
                for number in range(each):
                    named[name](copies[(at * each + number) % len(copies)])
            spent = (time.perf_counter() - start) / each
            seconds[name] += [spent] if turn else []
            at += 1
    return seconds


@torch.no_grad()
def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case: the keys of `sentei.benches.table`, bandwidth and the GB/s that reading reached.

    Args:
        names: of CASES.
        runs: timed turns a row.
        absent: not used: torch is always there.
    """
    memory = torch.ones(COLD // 4)
    for case in (case for name in names for case in CASES[name]):
        seconds = turns(case, runs, memory)
        shares = [bare / ours for bare, ours in zip(seconds["read"], seconds["ours"], strict=True)]
        timed = Comparison(dense=seconds["torch"], pruned=seconds["ours"], date=today())
        yield {**measured("linear", str(case), "torch F.linear", timed), "bandwidth": statistics.median(shares),
               "gb_s": case.bytes / 1e9 / statistics.median(seconds["read"])}
