"""Attention over the best keys of each query, as the definition reads: one query at a time.

    o_i = Σ over j ∈ K_i of  softmax_j(s_ij) v_j      s_ij = scale · q_i·k_j,   K_i the k largest permitted s_ij

Any floating dtype, differentiable by autograd, for reading and for tests.
"""

import torch

from sentei.kernels.attention.tiles import Grid
from sentei.kernels.topk.choice import Choice


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
    (batch, num_queries, heads, _), kv_heads, dtype = query.shape, key.shape[2], query.dtype
    # Sums over queries (the gradients of keys and values) need more than half precision.
    query, key, value = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (query, key, value))
    outputs, lses = [], []
    ids = torch.full((batch, num_queries, heads, choice.slots(grid.num_keys)), -1, dtype=torch.int32)
    for b in range(batch):
        for i in range(num_queries):
            permitted = _permitted(grid, b, i)
            for h in range(heads):
                keys, values = key[b, :, h // (heads // kv_heads)], value[b, :, h // (heads // kv_heads)]
                scores = scale * (keys[permitted] @ query[b, i, h])
                broken = bool((scores.isnan() | scores.isposinf()).any()) and ids.shape[-1] > 0
                first = choice.forced(torch.tensor([grid.offset + i]), grid).expand(batch, -1, -1)[b, 0]
                kept = [] if broken else _best(scores.tolist(), permitted, first.tolist(), choice.k)
                ids[b, i, h, :len(kept)] = torch.tensor(kept, dtype=torch.int32)
                chosen = scale * (keys[kept] @ query[b, i, h])
                output, lse = chosen.softmax(0) @ values[kept], chosen.logsumexp(0)
                outputs.append(torch.full_like(output, torch.nan) if broken else output)
                lses.append(torch.full_like(lse, torch.nan) if broken else lse)
    shape = batch, num_queries, heads
    output = torch.stack(outputs).view(*shape, -1) if outputs else value.new_zeros(*shape, value.shape[-1])
    return output.to(dtype), torch.stack(lses).view(shape) if lses else query.new_zeros(shape), ids


def _permitted(grid: Grid, b: int, i: int) -> list[int]:
    """The keys query `i` may read, ascending."""
    keys = torch.arange(grid.num_keys)
    return keys[grid.pairs(torch.tensor(grid.offset + i), keys, torch.tensor(b))].tolist()


def _best(scores: list[float], permitted: list[int], forced: list[bool], k: int) -> list[int]:
    """The keys kept, ascending: forced ones, then by score, then by number; of a score of minus infinity none."""
    finite = [(not forced[j], -score, j) for score, j in zip(scores, permitted, strict=True) if score > -torch.inf]
    return sorted(j for place, (late, _, j) in enumerate(sorted(finite)) if place < k or not late)
