"""Attention over the best keys of each query in plain torch: some rows of scores at a time, then a gather.

Autograd gives the backward, through the gathered keys and values alone.
"""

import torch

from sentei.kernels.attention.tiles import Grid
from sentei.kernels.topk.choice import Choice

# Scores held at once; query rows are cut to stay near it (8 MB in fp32, about the last-level cache).
SCORES_AT_ONCE = 1 << 21


def attend_topk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k: int | Choice,
    *,
    causal: bool = True,
    lengths: torch.Tensor | None = None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `sentei.kernels.topk.attend_topk`."""
    choice = k if isinstance(k, Choice) else Choice(k)
    grid = Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=1, key_block=1, causal=causal,
                lengths=lengths)
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = query.to(wide).unflatten(2, (key.shape[2], -1))  # [B, Tq, G, P, D]
    keys, values = key.to(wide), value.to(wide)
    size = max(1, SCORES_AT_ONCE // max(1, query.shape[0] * query.shape[2] * grid.num_keys))
    parts = [_rows(queries[:, start:start + size], keys, values, start, (choice, grid, scale))
             for start in range(0, max(1, grid.num_queries), size)]
    output, lse, ids = (torch.cat(part, 1).flatten(2, 3) for part in zip(*parts, strict=True))
    return output.to(query.dtype), lse, ids


def _rows(queries, keys, values, start, how):
    """Output [B, R, G, P, Dv], lse and ids of query rows start, start + 1, …"""
    choice, grid, scale = how
    ids, broken = _choose(queries, keys, start, how)
    batch, group = (torch.arange(size, device=ids.device) for size in keys.shape[0:3:2])
    places = batch.view(-1, 1, 1, 1, 1), ids.clamp(min=0), group.view(-1, 1, 1)
    empty = ids < 0
    # Neither a weight of 0 nor a score of -inf silences the NaN of a key that fills an empty slot.
    kept_keys, kept_values = (tensor[places].masked_fill(empty[..., None], 0) for tensor in (keys, values))
    scores = scale * torch.einsum("brgpd,brgpkd->brgpk", queries, kept_keys)
    none = empty.all(-1, keepdim=True)
    # A row that keeps nothing takes part as if all its slots were full, so that no gradient is NaN.
    scores = scores.masked_fill(empty & ~none, -torch.inf)
    shares = scores.softmax(-1).masked_fill(empty, 0)
    output = torch.einsum("brgpk,brgpkd->brgpd", shares, kept_values)
    lse = scores.logsumexp(-1).masked_fill(none[..., 0], -torch.inf)
    return output.masked_fill(broken[..., None], torch.nan), lse.masked_fill(broken, torch.nan), ids.int()


@torch.no_grad()
def _choose(queries, keys, start, how):
    """Int64 [B, R, G, P, K]: the keys kept, ascending, -1 in empty slots; and bool [B, R, G, P]: broken rows."""
    choice, grid, scale = how
    positions = torch.arange(start, start + queries.shape[1], device=keys.device) + grid.offset
    every, batch = torch.arange(grid.num_keys, device=keys.device), torch.arange(len(keys), device=keys.device)
    seen = grid.pairs(positions[:, None], every, batch.view(-1, 1, 1))[:, :, None, None]
    scores = (scale * torch.einsum("brgpd,bkgd->brgpk", queries, keys)).masked_fill(~seen, -torch.inf)
    slots = choice.slots(grid.num_keys)
    broken = (scores.isnan() | scores.isposinf()).any(-1) & bool(slots)
    forced = choice.forced(positions, grid)[:, :, None, None] & ~scores.isneginf()
    first = scores.masked_fill(forced, torch.inf)
    count = min(choice.k, grid.num_keys)
    keep = forced
    if count:
        least = first.topk(count).values[..., -1:]
        # Which of equal scores torch.topk takes is not defined.
        above, tied = first > least, first == least
        keep = keep | above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    keep = keep & ~scores.isneginf() & ~broken[..., None]
    ids = torch.where(keep, every, grid.num_keys).topk(slots, largest=False, sorted=True).values
    return torch.where(ids < grid.num_keys, ids, -1), broken
