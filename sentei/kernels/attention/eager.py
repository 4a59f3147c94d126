"""Attention over chosen tiles in plain torch: gather the kept key blocks, dense products on them.

Query blocks that keep about as many key blocks are batched, so that a call is a few large products. Autograd gives
the backward. The dense plan is torch's own scaled_dot_product_attention.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from sentei.kernels.attention.tiles import Grid, Tiles

# Scores held at once; a batch of query blocks is cut to stay near it (8 MB in fp32, about the last-level cache).
SCORES_AT_ONCE = 1 << 21


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
    """See `sentei.kernels.attention.attend`."""
    if tiles.is_everything and not return_lse and not softcap:
        return _dense(query, key, value, tiles.grid, scale)
    tiles = tiles.listed(query.shape[0], key.shape[2], query.device)
    return _gathered(query * scale, key, value, tiles, softcap, return_lse)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
    """Torch's own kernel on everything; a mask only where causality is not the plain square one.

    The heads of a group that come with one query each are rows of one product: torch would read their shared keys and
    values once a head, which at a token decoded takes MHA's time whatever the cache saves.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if scale <= 0:  # torch's causal kernel multiplies minus infinity by it
        query, scale = query * scale, 1.0
    heads = query.shape[1]
    if grid.num_queries == 1:
        query = query.reshape(query.shape[0], key.shape[1], heads // key.shape[1], query.shape[-1])
    mask = None
    is_cut = grid.causal and (grid.window is not None or (grid.offset and grid.num_queries > 1))
    if grid.lengths is not None or is_cut:
        positions = torch.arange(grid.num_queries, device=query.device)[:, None] + grid.offset
        rows = torch.arange(query.shape[0], device=query.device).view(-1, 1, 1)
        mask = grid.pairs(positions, torch.arange(grid.num_keys, device=query.device), rows)[:, None]
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        is_causal=grid.causal and mask is None and grid.num_queries > 1)
    if mask is not None:
        # A query that may see nothing gives 0, whatever the kernel made of it.
        output = torch.where(mask.any(-1, keepdim=True), output, torch.zeros_like(output))
    return output.reshape(len(output), heads, grid.num_queries, value.shape[-1]).transpose(1, 2)


def _gathered(query, key, value, tiles, softcap, return_lse):
    """The kept tiles only, for a query that was scaled."""
    batch, num_queries, heads, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    if not batch * num_queries * heads:
        output = value.new_zeros(batch, num_queries, heads, value.shape[-1])
        return (output, query.new_zeros(query.shape[:-1], dtype=wide)) if return_lse else output
    grid, plan = tiles.grid, _Plan(tiles, heads, key.shape[2])
    query_blocks = _blocks(query, grid.query_block)
    key_blocks, value_blocks = _blocks(key, grid.key_block), _blocks(value, grid.key_block)
    outputs, lses = [], []
    for items in plan.batches():
        scores = _scores(query_blocks[items], key_blocks, plan, items, softcap)
        shares = scores.softmax(-1, dtype=wide).to(value.dtype)
        if plan.fewest(items) == 0:
            shares = shares.masked_fill(torch.isneginf(scores).all(-1, keepdim=True), 0)
        values = value_blocks[plan.slots(items)].flatten(1, 2)
        outputs.append(torch.bmm(shares, values))
        if return_lse:
            lses.append(scores.to(wide).logsumexp(-1, keepdim=True))
    output = _restore(outputs, plan, batch, heads, value.shape[-1])[:, :num_queries]
    return (output, _restore(lses, plan, batch, heads, 1)[:, :num_queries, :, 0]) if return_lse else output


class _Plan:
    """The tiles as one list of items, one a (batch, head, query block), sorted by how much they keep."""

    def __init__(self, tiles: Tiles, heads: int, kv_heads: int):
        self.grid = grid = tiles.grid
        per_head = heads // tiles.full_count.shape[1]
        batch = tiles.full_count.shape[0]
        ids = [ids.repeat_interleave(per_head, 1).flatten(0, 2).long() for ids in (tiles.partial_ids, tiles.full_ids)]
        self.num_partial = ids[0].shape[-1]
        device = ids[0].device
        item = torch.arange(len(ids[0]), device=device)
        self.block = item % grid.num_query_blocks
        head = item // grid.num_query_blocks
        self.row = head // heads
        group = self.row * kv_heads + head % heads // (heads // kv_heads)
        self.ids = torch.cat(ids, 1)
        # Key blocks are numbered over the whole batch; an empty slot reads a block of its own row and head, so that
        # a NaN of another row cannot reach it through a weight of 0.
        self.places = self.ids.clamp(min=0) + group[:, None] * grid.num_key_blocks
        self.count = tiles.full_count.repeat_interleave(per_head, 1).flatten().long()
        self.order = torch.argsort(self.count, descending=True, stable=True)
        assert len(self.count) == batch * heads * grid.num_query_blocks

    def batches(self):
        """Runs of items, most kept first; the scores of a run fit SCORES_AT_ONCE (one item always runs)."""
        counts = self.count[self.order].tolist()
        start = 0
        while start < len(counts):
            width = (self.num_partial + counts[start]) * self.grid.key_block
            size = max(1, SCORES_AT_ONCE // max(1, width * self.grid.query_block))
            yield self.order[start:start + size]
            start += size

    def fewest(self, items: torch.Tensor) -> int:
        """How many full blocks every item of the run keeps; where it is 0 a query may see nothing."""
        return int(self.count[items[-1]])

    def slots(self, items: torch.Tensor) -> torch.Tensor:
        """Int64 [N, slots]: partial then full key blocks of these items; some block where an item has fewer."""
        return self.places[items, :self.num_partial + int(self.count[items[0]])]


def _scores(queries, key_blocks, plan, items, softcap):
    """Float [N, query_block, slots · key_block]: scores, -inf where a pair is not permitted."""
    grid, slots = plan.grid, plan.slots(items)
    keys = key_blocks[slots].flatten(1, 2)
    scores = torch.bmm(queries, keys.transpose(1, 2))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if plan.num_partial:
        ids = plan.ids[items, :plan.num_partial]
        within = torch.arange(grid.key_block, device=ids.device)
        key_positions = torch.where(ids[..., None] < 0, -1, ids[..., None] * grid.key_block + within).flatten(1)
        rows = torch.arange(grid.query_block, device=ids.device)
        positions = grid.offset + plan.block[items, None] * grid.query_block + rows
        seen = grid.pairs(positions[..., None], key_positions[:, None], plan.row[items].view(-1, 1, 1))
        scores[:, :, :plan.num_partial * grid.key_block].masked_fill_(~seen, -torch.inf)
    fewest = plan.num_partial + plan.fewest(items)
    if fewest < slots.shape[1]:
        absent = (plan.ids[items, fewest:slots.shape[1]] < 0).repeat_interleave(grid.key_block, 1)[:, None]
        scores[:, :, fewest * grid.key_block:].masked_fill_(absent, -torch.inf)
    return scores


def _blocks(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, H, D] → [B · H · blocks, size, D], the ragged block filled up with zeros."""
    tensor = pad(tensor, (0, 0, 0, 0, 0, -tensor.shape[1] % size))
    return tensor.transpose(1, 2).unflatten(2, (-1, size)).flatten(0, 2)


def _restore(parts: list[torch.Tensor], plan: _Plan, batch: int, heads: int, width: int) -> torch.Tensor:
    """The items' results [N, query_block, width] in their places, as [B, QB · query_block, H, width]."""
    joined = torch.cat(parts)[torch.argsort(plan.order)]
    return joined.view(batch, heads, -1, width).transpose(1, 2)
