"""Attention to chosen pages, as the definition reads: one row, one page at a time.

Any floating dtype, for reading and for tests. Reference: Quest, arXiv 2406.10774, section 3.3.
"""

import math

import torch

from sentei.kernels.paging.pages import PAGE, Pages


@torch.no_grad()
def score(query: torch.Tensor, key: torch.Tensor, pages: Pages, *, scale: float) -> torch.Tensor:
    """See `sentei.kernels.paging.score`."""
    (batch, rows, heads, _), groups = query.shape, key.shape[2]
    query, key = (tensor.to(torch.promote_types(query.dtype, torch.float32)) for tensor in (query, key))
    scores = query.new_full((batch, groups, rows, pages.num_pages), -torch.inf)
    for b, g, r in _places(batch, groups, rows):
        shares = []
        for h in range(heads // groups * g, heads // groups * (g + 1)):
            bounds = query.new_full((pages.num_pages,), -torch.inf)
            for c in range(pages.num_pages):
                seen = key[b, _seen(pages, b, r, c), g]
                if len(seen):
                    low, high = seen.amin(0), seen.amax(0)
                    most = torch.maximum(query[b, r, h] * low, query[b, r, h] * high).sum()
                    bounds[c] = scale * most + math.log(len(seen))
            shares.append(bounds.log_softmax(0) if bounds.max() > -torch.inf or bounds.isnan().any() else bounds)
        scores[b, g, r] = torch.stack(shares).logsumexp(0) - math.log(len(shares))
    return scores


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    *,
    scale: float,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sentei.kernels.paging.attend`."""
    if kept is None:
        kept = pages.choose(score(query, key, pages, scale=scale))
    (batch, rows, heads, _), groups, dtype = query.shape, key.shape[2], query.dtype
    query, key, value = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (query, key, value))
    output = query.new_zeros(batch, rows, heads, value.shape[3])
    for b, g, r in _places(batch, groups, rows):
        seen = [j for c in kept[b, g, r].nonzero()[:, 0].tolist() for j in _seen(pages, b, r, c)]
        for h in range(heads // groups * g, heads // groups * (g + 1)):
            output[b, r, h] = (scale * (key[b, seen, g] @ query[b, r, h])).softmax(0) @ value[b, seen, g]
    return output.to(dtype), kept


def _places(batch: int, groups: int, rows: int):
    return ((b, g, r) for b in range(batch) for g in range(groups) for r in range(rows))


def _seen(pages: Pages, b: int, row: int, page: int) -> list[int]:
    """The positions of a page's keys that a row may see."""
    start, stop = (0, pages.num_keys) if pages.lengths is None else pages.lengths[b].tolist()
    last = pages.num_keys - pages.num_queries + row if pages.causal else pages.num_keys
    return [j for j in range(page * PAGE, min(pages.num_keys, (page + 1) * PAGE)) if start <= j < stop and j <= last]
