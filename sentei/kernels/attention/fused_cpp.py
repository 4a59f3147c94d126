"""Attention over chosen tiles on the CPU, in C++: every kept tile once, online softmax, nothing gathered.

fp32; bfloat16 and float16 by conversion. Forward only. The instruction set is picked when the library is loaded.
"""

import ctypes

import torch
from torch.autograd.forward_ad import unpack_dual

from sentei.core.errors import ImplError, ResourceError, ShapeError
from sentei.kernels import native
from sentei.kernels.attention.tiles import Grid, Tiles

_LONGS = ("batch", "queries", "keys", "heads", "groups", "plan_heads", "width", "value_width", "query_block",
          "key_block", "full_slots", "partial_slots", "causal", "threads", "first",
          "stride")


class _Problem(ctypes.Structure):
    """The struct of native/attention.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "lse")),
        *((name, ctypes.c_int64 * 3) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_void_p) for name in ("full_count", "full_ids", "partial_count", "partial_ids", "lengths",
                                               "order")),
        *((name, ctypes.c_int64) for name in _LONGS),
        ("scale", ctypes.c_float), ("shares", ctypes.c_void_p),
    ]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: Tiles,
    *,
    scale: float,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `sentei.kernels.attention.attend`.

    Raises:
        ImplError: `refusal` has a reason.
        ShapeError: a plan that names tiles the grid does not have.
        ResourceError: memory ran out.
    """
    reason = refusal(query, key, value)
    if reason:
        raise ImplError("fused_cpp", expected="tensors it can take", got=reason, do="use impl='auto'")
    batch, num_queries, heads, _ = query.shape
    tiles = tiles.listed(batch, key.shape[2], query.device)
    output = torch.empty(batch, num_queries, heads, value.shape[3], dtype=torch.float32, device="cpu")
    lse = torch.empty(batch, num_queries, heads, dtype=torch.float32, device="cpu") if return_lse else None
    if output.numel() or return_lse:
        values = _rows(value)
        problem, held = _problem(query, key, tiles.grid, scale)
        plan = _set_plan(problem, tiles, heads)
        problem.value, problem.value_width = values.data_ptr(), value.shape[3]
        problem.value_stride = (ctypes.c_int64 * 3)(*values.stride()[:3])
        problem.output, problem.lse = output.data_ptr(), lse.data_ptr() if return_lse else None
        _finish(native.load().sentei_attend(ctypes.byref(problem)))
        del held, plan
    return (output.to(query.dtype), lse) if return_lse else output.to(query.dtype)


def shares(
    query: torch.Tensor, key: torch.Tensor, grid: Grid, *, scale: float, first: int, stride: int
) -> torch.Tensor:
    """The share of every tile over one query row in `stride`, exactly: float32 [2, B, H, QB, KB], mean and mean square.

    Args:
        query, key: as in `attend`.
        first, stride: rows first, first + stride, … of each query block; first < query_block.
    Raises:
        ResourceError: memory ran out.
    Cost: 1 / stride of the dense scores, and the exponentials of as many.
    """
    found = torch.empty(2, query.shape[0], query.shape[2], grid.num_query_blocks, grid.num_key_blocks,
                        dtype=torch.float32, device="cpu")
    problem, held = _problem(query, key, grid, scale)
    problem.first, problem.stride, problem.shares = first, stride, found.data_ptr()
    _finish(native.load().sentei_shares(ctypes.byref(problem)))
    del held
    return found


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Why this implementation cannot take these tensors; empty when it can."""
    if native.missing():
        return native.missing()
    if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in (query, key, value)):
        return f"a {type(query).__name__}, which may hold no memory of its own"
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype} on {query.device}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return "tensors that require gradients"
    if any(unpack_dual(tensor).tangent is not None for tensor in (query, key, value)):
        return "tensors that carry a forward gradient"
    return ""


def _problem(query: torch.Tensor, key: torch.Tensor, grid: Grid, scale: float) -> tuple[_Problem, tuple]:
    """What both calls share, and the tensors that must outlive the call."""
    query, key = _rows(query), _rows(key)
    lengths = None if grid.lengths is None else grid.lengths.contiguous()
    problem = _Problem(
        query=query.data_ptr(), key=key.data_ptr(), lengths=None if lengths is None else lengths.data_ptr(),
        query_stride=(ctypes.c_int64 * 3)(*query.stride()[:3]), key_stride=(ctypes.c_int64 * 3)(*key.stride()[:3]),
        batch=query.shape[0], queries=grid.num_queries, keys=grid.num_keys, heads=query.shape[2], groups=key.shape[2],
        width=query.shape[3], query_block=grid.query_block, key_block=grid.key_block, causal=int(grid.causal),
        threads=torch.get_num_threads(), scale=scale)
    return problem, (query, key, lengths)


def _set_plan(problem: _Problem, tiles: Tiles, heads: int) -> tuple[torch.Tensor, ...]:
    """Enters the plan and the order of its items, longest first; returns the tensors that must outlive the call."""
    counts_and_ids = (tiles.full_count, tiles.full_ids), (tiles.partial_count, tiles.partial_ids)
    for count, ids in counts_and_ids:
        filled = torch.arange(ids.shape[-1], device=ids.device) < count[..., None]
        if not torch.equal(ids >= 0, filled) or bool((ids >= tiles.grid.num_key_blocks).any()):
            raise ShapeError("attend", expected=f"{tiles.grid.num_key_blocks} key blocks, -1 beyond the count",
                             got="a plan that names others", do="build plans with Tiles.from_mask")
    plan = [tensor.contiguous() for pair in counts_and_ids for tensor in pair]
    kept = (tiles.full_count + tiles.partial_count).repeat_interleave(heads // tiles.full_count.shape[1], 1)
    order = torch.argsort(kept.flatten(), descending=True)
    for name, tensor in zip(("full_count", "full_ids", "partial_count", "partial_ids"), plan, strict=True):
        setattr(problem, name, tensor.data_ptr())
    problem.plan_heads, problem.order = tiles.full_count.shape[1], order.data_ptr()
    problem.full_slots, problem.partial_slots = plan[1].shape[-1], plan[3].shape[-1]
    return (*plan, order)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 with contiguous rows, itself where it is that already."""
    return tensor.float() if tensor.stride(-1) == 1 else tensor.float().contiguous()


def _finish(status: int) -> None:
    """Raises what the native call could not."""
    if status:
        raise ResourceError("attend", expected="memory for a packed copy of keys and values", got="none left",
                            do="use a shorter input, a smaller batch or a machine with more memory")
