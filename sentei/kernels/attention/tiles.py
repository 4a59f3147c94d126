"""The plan every attention kernel reads: which tiles of the score matrix to compute.

A tile is `query_block` rows by `key_block` columns. Tiles whose every pair is permitted are *full*; those that
causality, padding or a ragged end cuts are *partial* and need an element mask. The layout (a count and ascending
int32 indices, full and partial apart) is the one FlexAttention's BlockMask and FlashAttention 4 use.
"""

from dataclasses import dataclass, replace

import torch

from sentei.core.errors import ShapeError
from sentei.core.rules import MAX_K
from sentei.core.selection import Selection

# Larger blocks choose nothing, and a kernel's scratch grows with their square.
MAX_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How queries and keys are cut into tiles, and which pairs are permitted at all.

    Query row i stands at position `num_keys - num_queries + i` (bottom-right causal).

    Args:
        num_queries, num_keys: tokens; the last block of either may be ragged.
        query_block, key_block: tokens a block.
        causal: a query sees no later position.
        window: how many keys a query sees, up to its own position (a sliding window), MAX_K at most; None for all.
            Causal only.
        lengths: int64 [B, 2] or None; the real keys of each row are positions start ≤ j < stop.
    Raises:
        ShapeError: a size below 0, a block outside 1 … MAX_BLOCK, a window outside 1 … MAX_K or without causality,
            lengths of another shape or dtype.
    """

    num_queries: int
    num_keys: int
    query_block: int
    key_block: int
    causal: bool = True
    window: int | None = None
    lengths: torch.Tensor | None = None

    def __post_init__(self):
        if min(self.num_queries, self.num_keys) < 0 or not all(
                1 <= block <= MAX_BLOCK for block in (self.query_block, self.key_block)):
            raise ShapeError("Grid", expected=f"sizes from 0 and blocks from 1 to {MAX_BLOCK}",
                             got=f"{self.num_queries} queries by {self.query_block}, {self.num_keys} keys by "
                             f"{self.key_block}", do="choose other blocks")
        if self.window is not None and not (self.causal and 1 <= self.window <= MAX_K):
            raise ShapeError("Grid", expected=f"a causal grid for a window, and 1 to {MAX_K} keys in it",
                             got=f"causal {self.causal}, window {self.window}", do="leave the window out")
        if self.lengths is not None and (self.lengths.dim() != 2 or self.lengths.shape[1] != 2
                                         or self.lengths.dtype != torch.int64):
            raise ShapeError("Grid", expected="lengths int64 [B, 2]",
                             got=f"{self.lengths.dtype} {list(self.lengths.shape)}",
                             do="give one (start, stop) a row of the batch")

    def check(self, where: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raises ShapeError unless the tensors fit one another and are what this grid was made for."""
        fits = (query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]
                and key.shape[1:3] == value.shape[1:3] and query.shape[3] == key.shape[3]
                and key.shape[2] > 0 and query.shape[2] % key.shape[2] == 0)
        if not fits:
            raise ShapeError(where,
                             expected="query [B, Tq, H, D], key [B, Tk, G, D], value [B, Tk, G, Dv], G dividing H",
                             got=f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}",
                             do="bring the heads to dimension 2")
        if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
            raise ShapeError(where, expected="one floating dtype", got=f"{query.dtype}, {key.dtype}, {value.dtype}",
                             do="convert them to the same dtype")
        if not query.device == key.device == value.device:
            raise ShapeError(where, expected="one device", got=f"{query.device}, {key.device}, {value.device}",
                             do="move them to the same device")
        if (self.num_queries, self.num_keys) != (query.shape[1], key.shape[1]):
            raise ShapeError(where, expected=f"a grid of {query.shape[1]} queries and {key.shape[1]} keys",
                             got=f"{self.num_queries} and {self.num_keys}", do="build the tiles for these tensors")
        if self.lengths is not None and len(self.lengths) != query.shape[0]:
            raise ShapeError(where, expected=f"lengths [{query.shape[0]}, 2]", got=str(list(self.lengths.shape)),
                             do="give one (start, stop) a row of the batch")

    @property
    def num_query_blocks(self) -> int:
        """QB, the ragged one included."""
        return -(-self.num_queries // self.query_block)

    @property
    def num_key_blocks(self) -> int:
        """KB, the ragged one included."""
        return -(-self.num_keys // self.key_block)

    @property
    def offset(self) -> int:
        """The position of the first query."""
        return self.num_keys - self.num_queries

    def query_span(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Int64 [QB]: the positions of the first and last real query of each block."""
        first = torch.arange(self.num_query_blocks, device=device) * self.query_block
        last = (first + self.query_block).clamp(max=self.num_queries) - 1
        return first + self.offset, last + self.offset

    def key_span(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Int64 [KB]: the first and last position of each key block, as if none were ragged."""
        first = torch.arange(self.num_key_blocks, device=device) * self.key_block
        return first, first + self.key_block - 1

    def bounds(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Int64 [B or 1, 1, 1, 1]: start and stop of the real keys."""
        if self.lengths is None:
            stop = torch.tensor(self.num_keys, device=device).view(1, 1, 1, 1)
            return torch.zeros_like(stop), stop
        start, stop = self.lengths.to(device).clamp(0, self.num_keys).unbind(-1)
        return start.view(-1, 1, 1, 1), stop.view(-1, 1, 1, 1)

    def real_keys(self, device: torch.device) -> torch.Tensor:
        """Bool [B or 1, Tk]: the keys that are no padding."""
        start, stop = (bound.flatten(1) for bound in self.bounds(device))
        positions = torch.arange(self.num_keys, device=device)
        return (start <= positions) & (positions < stop)

    def without_padding(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with zeros in padding: no weight of 0 and no score of -inf silences a NaN in every kernel."""
        if self.lengths is None:
            return key, value
        padding = ~self.real_keys(key.device)[..., None, None]
        return key.masked_fill(padding, 0), value.masked_fill(padding, 0)

    def permitted(self, device: torch.device) -> torch.Tensor:
        """Bool [B or 1, 1, QB, KB]: tiles that hold at least one permitted pair."""
        start, stop = self.bounds(device)
        query_first, query_last = self.query_span(device)
        key_first, key_last = self.key_span(device)
        lowest = torch.maximum(key_first, start)
        some_key = ((lowest <= key_last) & (lowest < stop)).expand(-1, -1, self.num_query_blocks, -1)
        if not self.causal:
            return some_key
        permitted = some_key & (lowest <= query_last[:, None])
        if self.window is None:
            return permitted
        highest = torch.minimum(torch.minimum(key_last, stop - 1), query_last[:, None])
        return permitted & (highest > query_first[:, None] - self.window)

    def full(self, device: torch.device) -> torch.Tensor:
        """Bool [B or 1, 1, QB, KB]: tiles whose every pair is permitted."""
        start, stop = self.bounds(device)
        query_first, query_last = self.query_span(device)
        key_first, key_last = self.key_span(device)
        every_key = ((key_first >= start) & (key_last < stop)).expand(-1, -1, self.num_query_blocks, -1)
        if not self.causal:
            return every_key
        full = every_key & (key_last <= query_first[:, None])
        return full if self.window is None else full & (key_first > query_last[:, None] - self.window)

    def pairs(self, positions: torch.Tensor, key_positions: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Bool, broadcast of the arguments: may the query at `positions` see the key at `key_positions`?

        Args:
            positions, key_positions: int64 token positions; a key position below 0 is never permitted.
            batch: int64 row of the batch each pair belongs to.
        """
        start, stop = (bound.flatten() for bound in self.bounds(positions.device))
        batch = batch if self.lengths is not None else torch.zeros_like(batch)
        seen = (key_positions >= start[batch]) & (key_positions < stop[batch])
        if not self.causal:
            return seen
        seen = seen & (key_positions <= positions)
        return seen if self.window is None else seen & (key_positions > positions - self.window)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles to compute.

    Args:
        grid: the cut and what is permitted.
        full_count, partial_count: int32 [B, H, QB]; H query heads, or G when a KV group shares its choice.
            None: everything that is permitted, the dense plan.
        full_ids, partial_ids: int32 [B, H, QB, slots]; ascending key blocks, -1 beyond the count.
    Raises:
        ShapeError: shapes or dtypes that are not these, or parts on several devices.
    """

    grid: Grid
    full_count: torch.Tensor | None = None
    full_ids: torch.Tensor | None = None
    partial_count: torch.Tensor | None = None
    partial_ids: torch.Tensor | None = None

    def __post_init__(self):
        parts = (self.full_count, self.full_ids, self.partial_count, self.partial_ids)
        if all(part is None for part in parts):
            return
        good = all(part is not None and part.dtype == torch.int32 for part in parts) and (
            self.full_count.shape == self.partial_count.shape == self.full_ids.shape[:-1] == self.partial_ids.shape[:-1]
            and self.full_count.dim() == 3 and self.full_count.shape[2] == self.grid.num_query_blocks
            and len({part.device for part in parts}) == 1)
        if not good:
            raise ShapeError("Tiles", expected=f"int32 counts [B, H, {self.grid.num_query_blocks}] and ids of that "
                             "and slots, full and partial, on one device", got=", ".join(
                                 "none" if part is None else f"{part.dtype} {list(part.shape)} on {part.device}"
                                 for part in parts),
                             do="build plans with Tiles.from_mask")

    @classmethod
    def from_mask(cls, keep: torch.Tensor, grid: Grid) -> "Tiles":
        """The plan that computes the permitted tiles of `keep`, bool [B, H, QB, KB].

        Raises:
            ShapeError: `keep` does not have the grid's blocks.
        """
        if keep.dim() != 4 or keep.shape[2:] != (grid.num_query_blocks, grid.num_key_blocks):
            raise ShapeError("Tiles", expected=f"keep [B, H, {grid.num_query_blocks}, {grid.num_key_blocks}]",
                             got=str(list(keep.shape)), do="build keep from the same grid")
        keep = keep & grid.permitted(keep.device)
        full = grid.full(keep.device)
        full_count, full_ids = _pack(keep & full)
        partial_count, partial_ids = _pack(keep & ~full)
        return cls(grid=grid, full_count=full_count, full_ids=full_ids,
                   partial_count=partial_count, partial_ids=partial_ids)

    @classmethod
    def from_selection(cls, selection: Selection, grid: Grid) -> "Tiles":
        """The plan of what a selection over [B, H, QB, KB] keeps; keeping everything is the dense plan."""
        if bool((selection.count() == selection.permitted).all()):
            return cls(grid=grid)
        return cls.from_mask(selection.mask(), grid)

    @property
    def is_everything(self) -> bool:
        """True for the dense plan, which names no tile."""
        return self.full_count is None

    def listed(self, batch: int, heads: int, device: torch.device) -> "Tiles":
        """The same plan with every tile named, for kernels that need the list."""
        if not self.is_everything:
            return self
        shape = (batch, heads, self.grid.num_query_blocks, self.grid.num_key_blocks)
        return Tiles.from_mask(torch.ones(shape, dtype=torch.bool, device=device), self.grid)

    def to(self, device: torch.device) -> "Tiles":
        """The same plan on another device."""
        if self.is_everything:
            return self
        return replace(self, full_count=self.full_count.to(device), full_ids=self.full_ids.to(device),
                       partial_count=self.partial_count.to(device), partial_ids=self.partial_ids.to(device))

    def mask(self) -> torch.Tensor:
        """Bool [B, H, QB, KB]: the tiles that are named."""
        return _unpack(self.full_ids, self.grid.num_key_blocks) | _unpack(self.partial_ids, self.grid.num_key_blocks)

    def by_key(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same list turned around: full counts [B, H, KB] and ids of query blocks, then the partial ones."""
        full, partial = (_unpack(ids, self.grid.num_key_blocks) for ids in (self.full_ids, self.partial_ids))
        return *_pack(full.transpose(-1, -2)), *_pack(partial.transpose(-1, -2))


def _pack(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and ascending indices of the true entries along the last dimension."""
    count = keep.sum(-1, dtype=torch.int32)
    slots = int(count.max()) if count.numel() else 0
    ids = torch.sort(~keep, dim=-1, stable=True).indices[..., :slots].int()
    return count, torch.where(torch.arange(slots, device=keep.device) < count.unsqueeze(-1), ids, -1)


def _unpack(ids: torch.Tensor, blocks: int) -> torch.Tensor:
    """Bool [..., blocks] with the named ones true; -1 names none."""
    mask = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, torch.where(ids < 0, blocks, ids).long(), True)[..., :-1]
