"""The kept (token, slot) pairs sorted by expert, and the way back: nothing is scattered, so nothing collides."""

from typing import NamedTuple

import torch


class Order(NamedTuple):
    """Where the rows of each expert are.

    Args:
        counts: int64 [1 + E]; empty slots, then rows of each expert. Rows stand in that order.
        token: int64 [N]; of each row, N = T · K, those of empty slots first.
        place: int64 [T, K]; the row of each slot.
    """

    counts: torch.Tensor
    token: torch.Tensor
    place: torch.Tensor


def sort(ids: torch.Tensor, experts: int) -> Order:
    """The order of ids [T, K] in -1 … experts - 1; rows of one expert stay in the order of their tokens."""
    flat = ids.reshape(-1)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=flat.device))
    return Order(counts, order // max(ids.shape[1], 1), place.view_as(ids))


def gather(rows: torch.Tensor, ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows [N, D] by token and slot, [T, K, D]; zeros where a slot is empty."""
    return rows.index_select(0, place.flatten()).view(*place.shape, -1).masked_fill((ids < 0).unsqueeze(-1), 0)


def combine(answers: torch.Tensor, ids: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighed sums [T, D] of the answers [N, D] in their dtype, made in fp32 or wider."""
    wide = torch.promote_types(answers.dtype, torch.float32)
    kept = weights.masked_fill(ids < 0, 0).to(wide)
    return torch.bmm(kept.unsqueeze(1), gather(answers, ids, place).to(wide)).squeeze(1).to(answers.dtype)
