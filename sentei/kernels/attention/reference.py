"""Attention over chosen tiles, as the definition reads: one query at a time.

    o_i = Σ_j softmax_j(s_ij) v_j      over the permitted keys j of the tiles kept for i
    s_ij = scale · q_i·k_j, or softcap · tanh(scale · q_i·k_j / softcap)

Any floating dtype, differentiable by autograd, for reading and for tests.
Reference: Vaswani et al. 2017, arXiv 1706.03762, eq. 1.
"""

import torch

from sentei.kernels.attention.tiles import Tiles


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
    batch, num_queries, heads, _ = query.shape
    kv_heads, dtype = key.shape[2], query.dtype
    # Sums over queries (the gradients of keys and values) need more than half precision.
    query, key, value = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (query, key, value))
    tiles = tiles.listed(batch, kv_heads, query.device)
    outputs, lses = [], []
    for b in range(batch):
        for i in range(num_queries):
            for h in range(heads):
                g = h // (heads // kv_heads)
                keys = _kept_keys(tiles, b, h * tiles.full_count.shape[1] // heads, i)
                scores = scale * (key[b, keys, g] @ query[b, i, h])
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                lses.append(scores.logsumexp(0))
                outputs.append(scores.softmax(0) @ value[b, keys, g])
    output = torch.stack(outputs).view(batch, num_queries, heads, -1) if outputs else value.new_zeros(
        batch, num_queries, heads, value.shape[-1])
    output = output.to(dtype)
    if not return_lse:
        return output
    lse = torch.stack(lses).view(batch, num_queries, heads) if lses else query.new_zeros(query.shape[:-1])
    return output, lse


def _kept_keys(tiles: Tiles, b: int, h: int, i: int) -> torch.Tensor:
    """Int64 positions of the keys query `i` may read."""
    grid, block = tiles.grid, i // tiles.grid.query_block
    kept = tiles.full_ids[b, h, block].tolist() + tiles.partial_ids[b, h, block].tolist()
    keys = [j for c in sorted(kept) if c >= 0
            for j in range(c * grid.key_block, min((c + 1) * grid.key_block, grid.num_keys))]
    keys = torch.tensor(keys, dtype=torch.int64, device=tiles.full_ids.device)
    position = torch.tensor(grid.offset + i, device=keys.device)
    return keys[grid.pairs(position, keys, torch.tensor(b, device=keys.device))]
