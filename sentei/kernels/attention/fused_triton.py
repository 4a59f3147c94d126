"""Attention over chosen tiles on a GPU, in Triton: every kept tile once, online softmax, nothing gathered.

bfloat16 and float16 on tensor cores with sums in fp32; fp32 by three products of TensorFloat32, which together are as
exact as fp32. The gradients make the scores again, tile by tile, so that memory stays linear in the tokens. Each call
is an op of torch (`sentei::attend_triton`, `sentei::attend_triton_backward`), so that `torch.compile` keeps it in its
graph and tensors without memory never reach it. Triton is imported by the first call.
"""

import importlib.util

import torch
from torch.autograd.forward_ad import unpack_dual

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels import ops
from sentei.kernels.attention.tiles import Grid, Tiles

MAX_WIDTH = 256
_PLAN = ("full_count", "full_ids", "partial_count", "partial_ids")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: Tiles,
    *,
    scale: float,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `sentei.kernels.attention.attend`.

    Raises:
        ImplError: `refusal` has a reason.
        ShapeError: a plan that names tiles the grid does not have.
    """
    reason = refusal(query, key, value, tiles)
    if reason:
        raise ImplError("fused_triton", expected="tensors and blocks it can take", got=reason, do="use impl='auto'")
    if scale < 0:  # the kernels take the largest score before they scale it
        query, scale = -query, -scale
    grid, plan = tiles.grid, [] if tiles.is_everything else [getattr(tiles, name) for name in _PLAN]
    output, lse, _ = torch.ops.sentei.attend_triton(query, key, value, plan, grid.lengths,
                                                    sizes_of(grid), scale, softcap)
    return (output, lse) if return_lse else output


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> str:
    """Why this implementation cannot take these tensors and this plan; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "a Python without triton"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not ops.runs_triton(query.device):
        return f"{query.dtype} on {query.device}"
    widths = query.shape[-1], value.shape[-1]
    if not all(1 <= width <= MAX_WIDTH for width in widths):
        return f"heads {widths[0]} and {widths[1]} wide, not 1 to {MAX_WIDTH}"
    blocks = tiles.grid.query_block, tiles.grid.key_block
    if not tiles.is_everything and not all(block >= 16 and block & (block - 1) == 0 for block in blocks):
        return f"blocks of {blocks[0]} by {blocks[1]}, not powers of two from 16"
    if any(unpack_dual(tensor).tangent is not None for tensor in (query, key, value)):
        return "tensors that carry a forward gradient"
    return ""


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: list[torch.Tensor],
             lengths: torch.Tensor | None, sizes: list[int], scale: float,
             softcap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `sentei::attend_triton`: output, lse, and what the gradients need of the softmax.

    That is float32 [2, B, Tq, H]: the largest score, in powers of two, and 1 ÷ the sum.

    Args:
        plan: full counts and ids, partial counts and ids, as `Tiles` has them; empty for the dense plan.
        lengths: the grid's.
        sizes: query block, key block, 1 for causal, and the window or 0.
    """
    from sentei.kernels.attention import triton_tiles

    grid = _grid(query, key, lengths, sizes)
    _check(plan, grid)
    return triton_tiles.forward((query, key, value), plan, grid, scale, softcap,
                                triton_tiles.launch("forward", query, value))


def _forward_shapes(query, key, value, plan, lengths, sizes, scale, softcap):
    shape = query.shape[:3]
    return (query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=torch.float32),
            query.new_empty((2, *shape), dtype=torch.float32))


def _backward(given: list[torch.Tensor], plan: list[torch.Tensor], lengths: torch.Tensor | None, sizes: list[int],
              scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `sentei::attend_triton_backward`: the gradients of query, key and value.

    Args:
        given: query, key, value, output, the softmax of `_forward`, and the gradients of output and lse.
        plan, lengths, sizes, scale, softcap: as in `_forward`.
    """
    from sentei.kernels.attention import triton_tiles

    starts = tuple(triton_tiles.launch(half, given[0], given[2]) for half in ("query", "key"))
    return triton_tiles.backward(tuple(given), plan, _grid(*given[:2], lengths, sizes), scale, softcap, starts)


def _backward_shapes(given, plan, lengths, sizes, scale, softcap):
    return tuple(tensor.new_empty(tensor.shape) for tensor in given[:3])


def _save(ctx, inputs, output):
    query, key, value, plan, lengths, ctx.sizes, ctx.scale, ctx.softcap = inputs
    ctx.set_materialize_grads(False)  # zeros, two for each of the softmax
    ctx.save_for_backward(query, key, value, *output, lengths, *plan)


def _differentiate(ctx, gradient, lse_gradient, _):
    query, key, value, output, lse, softmax, lengths, *plan = ctx.saved_tensors
    gradient = torch.zeros_like(output) if gradient is None else gradient
    lse_gradient = torch.zeros_like(lse) if lse_gradient is None else lse_gradient
    given = [query, key, value, output, softmax, gradient, lse_gradient]
    gradients = torch.ops.sentei.attend_triton_backward(given, plan, lengths, ctx.sizes, ctx.scale, ctx.softcap)
    return *gradients, [None] * len(plan), None, None, None, None


_DEVICES = "CUDA", "CPU"  # the CPU for Triton's interpreter
ops.define("attend_triton(Tensor query, Tensor key, Tensor value, Tensor[] plan, Tensor? lengths, int[] sizes, "
           "float scale, float softcap) -> (Tensor, Tensor, Tensor)", _forward, _forward_shapes, _DEVICES)
ops.define("attend_triton_backward(Tensor[] given, Tensor[] plan, Tensor? lengths, int[] sizes, float scale, "
           "float softcap) -> (Tensor, Tensor, Tensor)", _backward, _backward_shapes, _DEVICES)
ops.differentiate_once("attend_triton", _differentiate, _save, impl="fused_triton",
                       do="use impl='eager' or 'reference'")


def sizes_of(grid: Grid) -> list[int]:
    """The part of a grid that tensors do not tell."""
    return [grid.query_block, grid.key_block, int(grid.causal), grid.window or 0]


def _grid(query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor | None, sizes: list[int]) -> Grid:
    """The grid that `_forward` was given in parts."""
    return Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=sizes[0], key_block=sizes[1],
                causal=bool(sizes[2]), window=sizes[3] or None, lengths=lengths)


def _check(plan: list[torch.Tensor], grid: Grid) -> None:
    """Raises ShapeError for a plan that names a block the grid does not have: it would be read outside the tensors."""
    wrong = [(torch.arange(ids.shape[-1], device=ids.device) < count[..., None])
             & ((ids < 0) | (ids >= grid.num_key_blocks)) for count, ids in zip(plan[::2], plan[1::2], strict=True)]
    wrong += [count > ids.shape[-1] for count, ids in zip(plan[::2], plan[1::2], strict=True)]
    if plan and bool(torch.stack([part.any() for part in wrong]).any()):
        raise ShapeError("attend", expected=f"blocks from 0 to {grid.num_key_blocks - 1} up to the count",
                         got="a plan that names others", do="build plans with Tiles.from_mask")
