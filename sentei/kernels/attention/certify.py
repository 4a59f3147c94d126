"""Attention that drops only what it can prove to be negligible: at most a mass of eps a row.

All scores are made; a tile is dropped where every row's scores in it lie more than ln(L / eps) below a larger score of
the row, L being the number of keys. Each of the at most L keys a row loses then weighs less than eps / L of the row's
largest, so together they hold less than eps of its softmax. What is saved are the tile's exponentials and its half of
the products.
"""

import math

import torch
from torch.nn.functional import pad

from sentei.core.errors import RuleError
from sentei.kernels.attention import eager, fused_cpp
from sentei.kernels.attention.tiles import Grid, Tiles


def attend_certified(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, eps: float, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the tiles that can hold more than eps of a row's mass together, and which they were.

    Args:
        query, key, value: as in `attend`; gradients flow through what is kept.
        grid: what is permitted.
        eps: above 0 and below 1.
        scale: on the scores.
    Returns:
        output [B, Tq, H, Dv], and bool [B, H, QB, KB]. What stands in padding, NaN included, reaches neither.
    Raises:
        ShapeError: tensors and grid do not fit.
        RuleError: eps out of range.
    Cost: the dense scores, and the other half of the work for what is kept. Natively a tile is held against the
        scores before it, so a few more are kept than by the final largest score.
    """
    grid.check("attend_certified", query, key, value)
    if not 0 < eps < 1:
        raise RuleError("Certified", expected="eps above 0 and below 1", got=str(eps), do="choose another eps")
    key, value = grid.without_padding(key, value)
    cut = math.log(max(grid.num_keys, 1) / eps)
    reason = fused_cpp.refusal(query, key, value)
    wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if not reason and not wants_gradients:
        return fused_cpp.certify(query, key, value, grid, scale=scale, cut=cut)
    with torch.no_grad():
        kept = (_kept(query, key, grid, scale, cut) if reason
                else fused_cpp.certify(query, key, value, grid, scale=scale, cut=cut)[1])
    impl = eager if reason else fused_cpp
    return impl.attend(query, key, value, Tiles.from_mask(kept, grid), scale=scale), kept


def _kept(query, key, grid, scale, cut):
    """The tiles to keep by a row's final largest score, in fp32 at least, a query block at a time; a NaN is kept."""
    query, key = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (query, key))
    positions, rows = torch.arange(grid.num_keys, device=query.device), torch.arange(len(query), device=query.device)
    kept = []
    for start in range(0, grid.num_queries, grid.query_block):
        block = query[:, start:start + grid.query_block].unflatten(2, (key.shape[2], -1))
        scores = torch.einsum("btgpd,bjgd->bgptj", block, key).flatten(1, 2) * scale
        seen = grid.pairs((torch.arange(start, start + block.shape[1], device=query.device) + grid.offset)[:, None],
                          positions, rows.view(-1, 1, 1))[:, None]
        scores = scores.masked_fill(~seen, -torch.inf)
        matters = seen & ~(scores < scores.amax(-1, keepdim=True) - cut)
        padded = pad(matters.any(2), (0, -grid.num_keys % grid.key_block))
        kept.append(padded.unflatten(-1, (-1, grid.key_block)).any(-1))
    shape = query.shape[0], query.shape[2], 0, grid.num_key_blocks
    return torch.stack(kept, 2) if kept else torch.zeros(shape, dtype=torch.bool, device=query.device)
