"""Attention over chosen tiles on the CPU, in C++: every kept tile once, online softmax, nothing gathered.

fp32; bfloat16 and float16 by conversion. Forward only. The instruction set is picked when the library is loaded.
"""

import ctypes

import torch

from sentei.core.errors import ImplError
from sentei.kernels import native
from sentei.kernels.attention.tiles import Grid, Tiles

_LONGS = ("batch", "queries", "keys", "heads", "groups", "plan_heads", "width", "value_width", "query_block",
          "key_block", "full_slots", "partial_slots", "causal", "threads", "sample")


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
    """
    reason = refusal(query, key, value)
    if reason:
        raise ImplError("fused_cpp", expected="tensors it can take", got=reason, do="use impl='auto'")
    batch, num_queries, heads, _ = query.shape
    tiles = tiles.listed(batch, key.shape[2], query.device)
    output = torch.empty(batch, num_queries, heads, value.shape[3])
    lse = torch.empty(batch, num_queries, heads) if return_lse else None
    if output.numel() or return_lse:
        plan = [tensor.contiguous() for tensor in (tiles.full_count, tiles.full_ids, tiles.partial_count,
                                                   tiles.partial_ids)]
        kept = (tiles.full_count + tiles.partial_count).repeat_interleave(heads // tiles.full_count.shape[1], 1)
        order = torch.argsort(kept.flatten(), descending=True)
        values = value.float() if value.stride(-1) == 1 else value.float().contiguous()
        problem, held = _problem(query, key, tiles.grid, scale)
        problem.value, problem.value_width = values.data_ptr(), value.shape[3]
        problem.value_stride = (ctypes.c_int64 * 3)(*values.stride()[:3])
        problem.plan_heads = tiles.full_count.shape[1]
        problem.full_slots, problem.partial_slots = plan[1].shape[-1], plan[3].shape[-1]
        for name, tensor in zip(("full_count", "full_ids", "partial_count", "partial_ids"), plan, strict=True):
            setattr(problem, name, tensor.data_ptr())
        problem.output, problem.order = output.data_ptr(), order.data_ptr()
        problem.lse = lse.data_ptr() if return_lse else None
        native.load().sentei_attend(ctypes.byref(problem))
        del held
    return (output.to(query.dtype), lse) if return_lse else output.to(query.dtype)


def shares(query: torch.Tensor, key: torch.Tensor, grid: Grid, *, scale: float, sample: int) -> torch.Tensor:
    """The share of every tile over one query row in `sample`, exactly: float32 [2, B, H, QB, KB], mean and mean square.

    Args:
        query, key: as in `attend`.
        sample: rows sample // 2, sample // 2 + sample, … of each query block.
    Cost: 1 / sample of the dense scores, and the exponentials of as many.
    """
    found = torch.empty(2, query.shape[0], query.shape[2], grid.num_query_blocks, grid.num_key_blocks)
    problem, held = _problem(query, key, grid, scale)
    problem.sample, problem.shares = sample, found.data_ptr()
    native.load().sentei_shares(ctypes.byref(problem))
    del held
    return found


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Why this implementation cannot take these tensors; empty when it can."""
    if not native.present():
        return "a package without its native library"
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype} on {query.device}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return "tensors that require gradients"
    return ""


def _problem(query: torch.Tensor, key: torch.Tensor, grid: Grid, scale: float) -> tuple[_Problem, tuple]:
    """What both calls share, and the tensors that must outlive the call."""
    query, key = (tensor.float() if tensor.stride(-1) == 1 else tensor.float().contiguous() for tensor in (query, key))
    lengths = None if grid.lengths is None else grid.lengths.long().contiguous()
    problem = _Problem(
        query=query.data_ptr(), key=key.data_ptr(), lengths=None if lengths is None else lengths.data_ptr(),
        query_stride=(ctypes.c_int64 * 3)(*query.stride()[:3]), key_stride=(ctypes.c_int64 * 3)(*key.stride()[:3]),
        batch=query.shape[0], queries=grid.num_queries, keys=grid.num_keys, heads=query.shape[2], groups=key.shape[2],
        width=query.shape[3], query_block=grid.query_block, key_block=grid.key_block, causal=int(grid.causal),
        threads=torch.get_num_threads(), scale=scale)
    return problem, (query, key, lengths)
