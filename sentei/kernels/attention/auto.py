"""Which kernel computes everything fastest on this machine: measured once for a kind of call, then remembered.

A plan that names tiles goes to the kernel that skips; this is about the plan that is everything, where torch's own
kernel is the one to beat, unless it would need a mask, n by n: padding, a window, fewer queries than keys. Kinds are
told apart by dtype, heads, widths, causality, threads and a power of two of the length, and are measured on random
tensors of LONGEST tokens at most.
"""

import statistics
import time
from functools import cache

import torch

from sentei.core.modes import is_plain_call
from sentei.kernels.attention import eager, fused_cpp
from sentei.kernels.attention.tiles import Grid, Tiles

SHORTEST, LONGEST = 512, 2048
RUNS = 4
MARGIN = 1.02  # below this a gain is noise, and torch's own kernel keeps the call
BLOCK = 64


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> tuple[str, str]:
    """The implementation for the plan that is everything, and why.

    Args:
        query, key, value: as in `attend`.
        tiles: that plan.
    Cost: where the kind of call is new, about the time of ten calls of LONGEST tokens.
    """
    grid = tiles.grid
    known = "the dense plan is torch's own kernel"
    if max(grid.num_queries, grid.num_keys) < SHORTEST:
        return "eager", known
    uneven = grid.num_queries != grid.num_keys
    if grid.lengths is not None or grid.window is not None or (grid.causal and uneven and grid.num_queries > 1):
        refusal = fused_cpp.refusal(query, key, value)
        return ("eager", f"fused_cpp cannot take {refusal}") if refusal else (
            "fused_cpp", "torch's own kernel needs a mask of every pair for this plan")
    if uneven or grid.query_block != BLOCK or grid.key_block != BLOCK:
        return "eager", known
    wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if wants_gradients or not is_plain_call() or fused_cpp.refusal(query, key, value):
        return "eager", known  # what a mode or autocast makes of a call must not be measured and remembered
    gain = _gain(query.dtype, (query.shape[2], key.shape[2], query.shape[3], value.shape[3]), grid.causal,
                 min(LONGEST, 1 << (grid.num_queries.bit_length() - 1)), torch.get_num_threads())
    name = "fused_cpp" if gain >= MARGIN else "eager"
    return name, f"measured here: fused_cpp is {gain:.2f} times as fast as torch's own kernel"


@cache
def _gain(dtype: torch.dtype, sizes: tuple[int, int, int, int], causal: bool, tokens: int, threads: int) -> float:
    """Seconds of torch's kernel ÷ seconds of ours, the median over neighbouring pairs of runs."""
    heads, groups, width, value_width = sizes
    generator = torch.Generator("cpu").manual_seed(0)
    query, key, value = (torch.randn(1, tokens, *shape, generator=generator, device="cpu").to(dtype) for shape in (
        (heads, width), (groups, width), (groups, value_width)))
    tiles = Tiles(grid=Grid(num_queries=tokens, num_keys=tokens, query_block=BLOCK, key_block=BLOCK, causal=causal))
    seconds = ([], [])
    for run in range(RUNS + 1):
        for which in (0, 1) if run % 2 else (1, 0):
            start = time.perf_counter()
            with torch.no_grad():
                (eager.attend, fused_cpp.attend)[which](query, key, value, tiles, scale=width ** -0.5)
            if run:
                seconds[which].append(time.perf_counter() - start)
    return statistics.median(theirs / ours for theirs, ours in zip(*seconds, strict=True))
