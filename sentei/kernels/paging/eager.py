"""Attention to chosen pages in plain torch: every score is made and those of the pages dropped are masked.

Any floating dtype and device; differentiable, as far as the choice is taken for granted.
"""

import torch
from torch.nn.functional import pad

from sentei.kernels.attention.select import share_in_group
from sentei.kernels.paging.pages import PAGE, Pages, bounds_of


@torch.no_grad()
def score(query: torch.Tensor, key: torch.Tensor, pages: Pages, *, scale: float) -> torch.Tensor:
    """See `sentei.kernels.paging.score`."""
    wide, groups, grid = torch.promote_types(query.dtype, torch.float32), key.shape[2], pages.grid
    queries = (query.to(wide) * scale).transpose(1, 2).unflatten(1, (groups, -1)).unsqueeze(4)  # [B, G, P, R, 1, D]
    bounds = bounds_of(key.transpose(1, 2)) if pages.bounds is None else pages.bounds
    low, high = pad(bounds[:, :, :pages.num_keys // PAGE].to(wide), (
        0, 0, 0, 0, 0, pages.num_pages - pages.num_keys // PAGE))[:, :, None, None].unbind(5)
    mass = _bound(queries, low, high, torch.tensor(PAGE))
    permitted = grid.permitted(query.device)
    edge = permitted & ~grid.full(query.device)
    ids = edge.flatten(0, 2).any(0).nonzero()[:, 0]
    if len(ids):
        low, high, count = _seen_bounds(key.to(wide), pages, ids)
        part = _bound(queries, low, high, count[:, None, None].clamp(min=1))
        mass[..., ids] = torch.where(edge[:, :, None][..., ids], part, mass[..., ids])
    mass = mass.masked_fill(~permitted[:, :, None], -torch.inf)
    some = permitted.any(-1, keepdim=True)[:, :, None]
    shares = mass.masked_fill(~some, 0).log_softmax(-1).masked_fill(~permitted[:, :, None], -torch.inf)
    return share_in_group(shares.flatten(1, 2), groups)


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
    groups, wide, grid = key.shape[2], torch.promote_types(query.dtype, torch.float32), pages.grid
    padding = ~grid.real_keys(key.device)[..., None, None]  # a weight of 0 does not silence a NaN
    keys, values = (tensor.to(wide).masked_fill(padding, 0).permute(0, 2, 3, 1)[:, :, None] for tensor in (key, value))
    queries = (query.to(wide) * scale).transpose(1, 2).unflatten(1, (groups, -1))
    positions = torch.arange(pages.num_keys, device=key.device)
    seen = grid.pairs((grid.offset + torch.arange(pages.num_queries, device=key.device))[None, :, None],
                      positions[None, None], torch.arange(len(key), device=key.device)[:, None, None])
    seen = (seen[:, None] & kept.repeat_interleave(PAGE, 3)[..., :pages.num_keys])[:, :, None]
    some = seen.any(-1, keepdim=True)
    scores = (queries @ keys).masked_fill(~seen & some, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~some, 0)
    output = weights @ values.transpose(-1, -2)
    return output.flatten(1, 2).transpose(1, 2).to(query.dtype), kept


def _bound(queries, low, high, count):
    """The most a key between low and high can score, times how many there are: [B, G, P, R, pages]."""
    return torch.maximum(queries * low, queries * high).sum(-1) + count.to(queries.dtype).log()


def _seen_bounds(key, pages, ids):
    """Of some pages, by number, what each row sees: lowest, highest [B, G, 1, R, S, D] and how many [B, R, S]."""
    positions = ids[:, None] * PAGE + torch.arange(PAGE, device=ids.device)
    rows = pages.grid.offset + torch.arange(pages.num_queries, device=ids.device)
    within = torch.where(positions < pages.num_keys, positions, -1)
    seen = pages.grid.pairs(rows[None, :, None, None], within[None, None],
                            torch.arange(len(key), device=ids.device)[:, None, None, None])  # [B, R, S, PAGE]
    keys = key.transpose(1, 2)[:, :, positions.clamp(max=pages.num_keys - 1)][:, :, None]  # [B, G, 1, S, PAGE, D]
    hidden = ~seen[:, None, ..., None]
    low, high = keys.masked_fill(hidden, torch.inf).amin(-2), keys.masked_fill(hidden, -torch.inf).amax(-2)
    nothing = hidden.all(-2)
    return (low.masked_fill(nothing, 0)[:, :, None], high.masked_fill(nothing, 0)[:, :, None], seen.sum(-1))
