"""What is dropped, at low resolution: one mean key and one mean value stand for each dropped tile.

    Σ_{j∈J} exp(s_ij) v_j  ≈  n · exp(q_i·k̄_J) · v̄_J

The result is merged with the exact attention over the kept tiles by log-sum-exp.
"""

import torch
from torch.nn.functional import pad

from sentei.kernels.attention.tiles import Tiles


def attend_dropped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns attention over the mean keys of the full tiles that `tiles` does not name, and its log-sum-exp.

    Shapes as in `attend`; a query with nothing dropped gives 0 and -inf.
    Cost: 1 / key_block of dense attention, forward and backward.
    """
    grid, heads = tiles.grid, query.shape[2]
    dropped = grid.full(query.device) & ~tiles.mask()
    dropped = dropped.repeat_interleave(heads // dropped.shape[1], 1)
    means = [
        pad(tensor, (0, 0, 0, 0, 0, -tensor.shape[1] % grid.key_block)).transpose(1, 2)
        .unflatten(2, (-1, grid.key_block)).mean(-2).repeat_interleave(heads // tensor.shape[2], 1)
        for tensor in (key, value)
    ]
    queries = pad(query * scale, (0, 0, 0, 0, 0, -query.shape[1] % grid.query_block)).transpose(1, 2)
    outputs, lses = [], []
    for block, rows in enumerate(queries.split(grid.query_block, 2)):
        scores = rows @ means[0].transpose(-1, -2) + torch.tensor(float(grid.key_block)).log().to(query.dtype)
        scores = scores.masked_fill(~dropped[:, :, block, None], -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        shares = torch.where(torch.isneginf(lse), torch.zeros_like(scores), (scores - lse).exp())
        outputs.append(shares @ means[1])
        lses.append(lse.squeeze(-1))
    output = torch.cat(outputs, 2).transpose(1, 2)[:, :grid.num_queries]
    return output, torch.cat(lses, 2).transpose(1, 2)[:, :grid.num_queries]
