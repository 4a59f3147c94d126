"""Attention over chosen tiles by torch's own FlexAttention, from the same plan.

Always compiled: FlexAttention that is not compiled makes the whole score matrix and does not look at the tiles. So the
first call for a shape takes as long as `torch.compile`; on the CPU it needs a C++ compiler and gives neither gradients
nor the lse.
"""

from functools import cache

import torch
from torch.autograd.forward_ad import unpack_dual

from sentei.core.errors import ImplError
from sentei.kernels.attention.tiles import Grid, Tiles


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
    """See `sentei.kernels.attention.attend`.

    Raises:
        ImplError: `refusal` has a reason, the lse is wanted on the CPU, or too many shapes were compiled.
    """
    reason = refusal(query, key, value)
    if not reason and query.is_cpu and return_lse:
        reason = "a call for the lse on the CPU"
    if reason:
        raise ImplError("flex", expected="a call it can take", got=reason, do="use impl='auto'")
    tiles = tiles.listed(query.shape[0], key.shape[2], query.device)
    seen = _seen(tiles, query.shape[2])
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    found = _run(query, key, value, capped(softcap), block_mask(tiles, query.shape[1]), scale=scale,
                 enable_gqa=query.shape[1] != key.shape[1], return_lse=return_lse)
    output, lse = found if return_lse else (found, None)
    output = output.masked_fill(~seen[..., None], 0).transpose(1, 2)
    return (output, lse.masked_fill(~seen, -torch.inf).transpose(1, 2)) if return_lse else output


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Why this implementation cannot take these tensors; empty when it can."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16) or query.device.type not in ("cpu", "cuda"):
        return f"{query.dtype} on {query.device}"
    if not (query.numel() and key.numel() and value.numel()):
        return "tensors without elements"
    if any(unpack_dual(tensor).tangent is not None for tensor in (query, key, value)):
        return "tensors that carry a forward gradient"
    if query.is_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "tensors that want gradients, on the CPU"
    return ""


def block_mask(tiles: Tiles, heads: int):
    """The plan as FlexAttention's BlockMask: the same lists, as wide as there are blocks, one for each query head.

    Args:
        tiles: a plan that names its tiles.
        heads: H.
    """
    from torch.nn.attention.flex_attention import BlockMask

    grid = tiles.grid

    def wide(count: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = ids.new_zeros(*ids.shape[:3], grid.num_key_blocks)
        found[..., :ids.shape[-1]] = ids.clamp(min=0)
        return tuple(part.repeat_interleave(heads // ids.shape[1], 1) for part in (count, found))

    return BlockMask.from_kv_blocks(
        *wide(tiles.partial_count, tiles.partial_ids), *wide(tiles.full_count, tiles.full_ids),
        BLOCK_SIZE=(grid.query_block, grid.key_block), mask_mod=_permitted(grid, tiles.full_ids.device),
        seq_lengths=(grid.num_queries, grid.num_keys))


def _permitted(grid: Grid, device: torch.device):
    """The pairs that a partial tile may compute, as FlexAttention asks for them."""
    offset = grid.offset
    bounds = None if grid.lengths is None else grid.lengths.to(device)

    window = grid.window

    def causal(batch, head, row, column):
        return column <= row + offset

    def near(batch, head, row, column):
        return (column <= row + offset) & (column > row + offset - window)

    def everything(batch, head, row, column):
        return column >= 0

    permitted = everything if not grid.causal else causal if window is None else near

    def real(batch, head, row, column):
        inside = (column >= bounds[batch, 0]) & (column < bounds[batch, 1])
        return permitted(batch, head, row, column) & inside

    return permitted if bounds is None else real


def capped(softcap: float):
    """The soft cap, as FlexAttention asks for it; None for 0, where there is none."""
    def score_mod(score, batch, head, row, column):
        return softcap * torch.tanh(score / softcap)

    return score_mod if softcap else None


def _seen(tiles: Tiles, heads: int) -> torch.Tensor:
    """Bool [B, H, Tq]: the rows that see a key. FlexAttention makes of the others what it happens to.

    A row sees one where the last key that is kept, real and not later than it lies in its window.
    """
    grid, device = tiles.grid, tiles.full_ids.device
    none = grid.num_key_blocks
    ids = torch.cat([tiles.full_ids, tiles.partial_ids, torch.full_like(tiles.full_count, none)[..., None]], -1)
    ids = torch.where(ids < 0, none, ids).sort(-1).values.long()
    rows = torch.arange(grid.num_query_blocks * grid.query_block, device=device) + grid.offset
    start, stop = grid.bounds(device)
    last = stop - 1
    if grid.causal:
        last = torch.minimum(rows.view(1, 1, -1, grid.query_block), last)
    last = last.expand(*ids.shape[:3], grid.query_block).contiguous()
    place = torch.searchsorted(ids, last.div(grid.key_block, rounding_mode="floor"), right=True) - 1
    block = ids.gather(-1, place.clamp(min=0))
    last = torch.minimum(last, (block + 1) * grid.key_block - 1)
    lowest = start if grid.window is None else torch.maximum(
        start, rows.view(1, 1, -1, grid.query_block) - grid.window + 1)
    seen = ((place >= 0) & (last >= lowest)).flatten(2)[..., :grid.num_queries]
    return seen.repeat_interleave(heads // seen.shape[1], 1)


def _run(*given, **options):
    """FlexAttention, compiled or not at all."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        return compiled()(*given, **options)
    except FailOnRecompileLimitHit:
        raise ImplError("flex", expected="a shape that is compiled already", do="call torch.compiler.reset() first",
                        got=f"one more than torch's limit of {torch._dynamo.config.recompile_limit}") from None


@cache
def compiled():
    """FlexAttention as torch compiles it; it raises where torch would go on without compiling."""
    from torch.nn.attention.flex_attention import flex_attention

    # Past its limit of shapes torch goes on without compiling, and so without the tiles: with fullgraph it raises.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
