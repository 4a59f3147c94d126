"""Which kernel computes everything fastest on this machine: measured once for a kind of call, see `gains`.

A plan that names tiles goes to the kernel that skips; this is about the plan that is everything, where torch's own
kernel is the one to beat, unless it would need a mask, n by n: padding, a window, fewer queries than keys. Kinds are
told apart by dtype, heads, widths, causality, threads, blocks, whether gradients are wanted and powers of two of the
lengths, and are measured on random tensors of LONGEST tokens at most, or as many pairs of fewer rows. Below SHORTEST
tokens torch's is taken unmeasured.
"""

from dataclasses import replace
from functools import partial

import torch

from sentei.core.modes import is_plain_call
from sentei.kernels import gains
from sentei.kernels.attention import eager, fused_cpp, fused_triton
from sentei.kernels.attention.tiles import Grid, Tiles

SHORTEST, LONGEST = 512, 2048
MOST_KEYS = 8 * LONGEST  # of few rows
MARGIN = 1.02  # below this a gain is noise, and torch's own kernel keeps the call


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles,
          why: str = "the fastest there is") -> tuple[str, str]:
    """The kernel of the tensors' device that skips, and why; the eager one where it cannot take them.

    Args:
        query, key, value, tiles: as in `attend`.
        why: told where it can.
    """
    if query.is_cuda:
        name, reason = "fused_triton", fused_triton.refusal(query, key, value, tiles)
    else:
        name, reason = "fused_cpp", fused_cpp.refusal(query, key, value)
    return ("eager", f"{name} cannot take {reason}") if reason else (name, why)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> tuple[str, str]:
    """The implementation for the plan that is everything, and why.

    Args:
        query, key, value: as in `attend`.
        tiles: that plan.
    Cost: where the kind of call is new to the machine, about the time of ten calls of LONGEST tokens.
    """
    grid = tiles.grid
    known = "the dense plan is torch's own kernel"
    if max(grid.num_queries, grid.num_keys) < SHORTEST or not min(grid.num_queries, grid.num_keys):
        return "eager", known
    uneven = grid.num_queries != grid.num_keys
    if grid.lengths is not None or grid.window is not None or (grid.causal and uneven and grid.num_queries > 1):
        return fused(query, key, value, tiles, "torch's own kernel needs a mask of every pair for this plan")
    if not is_plain_call() or fused_cpp.refusal(query, key, value):
        return "eager", known  # what a mode or autocast makes of a call must not be measured and remembered
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    sizes, threads = (query.shape[2], key.shape[2], query.shape[3], value.shape[3]), torch.get_num_threads()
    queries = min(_power(grid.num_queries), LONGEST)
    keys = min(_power(grid.num_keys), MOST_KEYS, LONGEST ** 2 // queries)
    blocks = grid.query_block, grid.key_block
    case = ("attention", query.dtype, sizes, blocks, grid.causal, queries, keys, threads,
            "trained" if trained else "read")
    gain, origin = gains.gain(case, lambda: _ways(
        query.dtype, sizes, replace(grid, num_queries=queries, num_keys=keys), trained))
    name = "fused_cpp" if gain >= MARGIN else "eager"
    return name, f"{origin}: fused_cpp is {gain:.2f} times as fast as torch's own kernel"


def _power(tokens: int) -> int:
    """The largest power of two that is no more than so many tokens, of which there are some."""
    return 1 << (tokens.bit_length() - 1)


def _ways(dtype: torch.dtype, sizes: tuple[int, int, int, int], grid: Grid, trained: bool) -> gains.Ways:
    """Torch's kernel and ours on random tensors; with the gradients of what a loss is of its output, if `trained`.

    Heads lie as they do where such calls are made: apart in the cache that a few rows read, else side by side.
    """
    heads, groups, width, value_width = sizes
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (grid.num_queries, heads, width), (grid.num_keys, groups, width), (grid.num_keys, groups, value_width)
    tensors = [torch.randn(1, *shape, generator=generator, device="cpu").to(dtype) for shape in shapes]
    if grid.num_queries <= fused_cpp.FEW_ROWS:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    tensors = [tensor.requires_grad_(trained) for tensor in tensors]

    def way(impl) -> None:
        with torch.set_grad_enabled(trained):
            output = impl.attend(*tensors, Tiles(grid=grid), scale=width ** -0.5)
            if trained:
                torch.autograd.grad(output, tensors, torch.ones_like(output))

    return partial(way, eager), partial(way, fused_cpp)
