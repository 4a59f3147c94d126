"""Which kernel computes a stack of experts fastest on this machine.

Ours computes in fp32, whatever the dtype. Where torch's own products of bfloat16 are faster than those of float32,
because the processor has instructions for them, many rows an expert are left to torch. That is measured once.
"""

import statistics
import time
from functools import cache

import torch

MANY = 16  # rows an expert
MARGIN = 1.2
SIZE, RUNS = 384, 5


def fastest(hidden: torch.Tensor, ids: torch.Tensor, experts) -> tuple[str, str]:
    """The implementation for arguments of `route` that `fused_cpp` can take, and why.

    Args:
        experts: a `Stack`.
    Cost: in the first call of many rows in bfloat16, about 20 products of SIZE.
    """
    if hidden.dtype is not torch.bfloat16 or torch.compiler.is_compiling() or ids.numel() < MANY * len(experts):
        return "fused_cpp", "made for experts in a stack"
    gain = _gain(torch.get_num_threads())
    name = "eager" if gain >= MARGIN else "fused_cpp"
    return name, f"measured here: torch's bfloat16 products are {gain:.2f} times as fast as its float32 ones"


@cache
def _gain(threads: int) -> float:
    """Seconds of a product in float32 ÷ in bfloat16, the median over neighbouring pairs."""
    wide = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ratios = []
    for run in range(RUNS + 1):
        seconds = []
        for x in (wide, wide.bfloat16()):
            start = time.perf_counter()
            torch.nn.functional.linear(x, x)
            seconds.append(time.perf_counter() - start)
        ratios += [seconds[0] / seconds[1]] if run else []
    return statistics.median(ratios)
