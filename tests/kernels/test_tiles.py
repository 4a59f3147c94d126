"""Grid and Tiles against every pair written out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CASES

from sentei.core.errors import ShapeError
from sentei.core.rules import MAX_K
from sentei.kernels.attention import Grid, Tiles

CPU = torch.device("cpu")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def pairs_of(grid: Grid, batch: int) -> torch.Tensor:
    """Bool [B, Tq, Tk]: the permitted pairs, one by one."""
    pairs = torch.zeros(batch, grid.num_queries, grid.num_keys, dtype=torch.bool)
    for b in range(batch):
        start, stop = (0, grid.num_keys) if grid.lengths is None else grid.lengths[b].tolist()
        for i in range(grid.num_queries):
            for j in range(start, stop):
                behind = i + grid.num_keys - grid.num_queries - j
                pairs[b, i, j] = not grid.causal or 0 <= behind < (grid.window or grid.num_keys)
    return pairs


def blocks_of(grid: Grid, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [B, 1, QB, KB] twice: some pair permitted, and every pair of a whole key block permitted."""
    some = torch.zeros(len(pairs), 1, grid.num_query_blocks, grid.num_key_blocks, dtype=torch.bool)
    every = some.clone()
    for qb in range(grid.num_query_blocks):
        for kb in range(grid.num_key_blocks):
            tile = pairs[:, qb * grid.query_block:(qb + 1) * grid.query_block,
                         kb * grid.key_block:(kb + 1) * grid.key_block].flatten(1)
            some[:, 0, qb, kb] = tile.any(-1)
            every[:, 0, qb, kb] = tile.all(-1) & ((kb + 1) * grid.key_block <= grid.num_keys)
    return some, every


def check_grid(grid: Grid) -> None:
    batch = 1 if grid.lengths is None else len(grid.lengths)
    pairs = pairs_of(grid, batch)
    some, every = blocks_of(grid, pairs)
    assert torch.equal(grid.permitted(CPU).expand_as(some), some)
    assert torch.equal(grid.full(CPU).expand_as(every) & some, every & some)
    assert not (grid.full(CPU) & ~grid.permitted(CPU)).any()
    positions = torch.arange(grid.num_queries)[:, None] + grid.offset
    seen = grid.pairs(positions, torch.arange(grid.num_keys), torch.arange(batch).view(-1, 1, 1))
    assert torch.equal(seen.expand_as(pairs), pairs)


@every_case
def test_permitted_full_and_pairs_are_what_they_say(case):
    check_grid(case.grid())


@st.composite
def grids(draw) -> Grid:
    keys = draw(st.integers(1, 10))
    span = st.tuples(st.integers(0, keys), st.integers(0, keys)).map(sorted)
    lengths = draw(st.none() | st.lists(span, min_size=1, max_size=3).map(torch.tensor))
    causal = draw(st.booleans())
    return Grid(num_queries=draw(st.integers(0, 10)), num_keys=keys, query_block=draw(st.integers(1, 5)),
                key_block=draw(st.integers(1, 5)), causal=causal, lengths=lengths,
                window=draw(st.none() | st.integers(1, 12)) if causal else None)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(grid=grids())
def test_permitted_full_and_pairs_whatever_the_sizes(grid):
    check_grid(grid)


def test_spans_are_positions_and_the_ragged_query_block_ends_early():
    grid = Grid(num_queries=5, num_keys=9, query_block=2, key_block=4)
    assert (grid.num_query_blocks, grid.num_key_blocks, grid.offset) == (3, 3, 4)
    assert [span.tolist() for span in grid.query_span(CPU)] == [[4, 6, 8], [5, 7, 8]]
    assert [span.tolist() for span in grid.key_span(CPU)] == [[0, 4, 8], [3, 7, 11]]


def test_a_key_position_below_0_is_never_permitted():
    grid = Grid(num_queries=2, num_keys=2, query_block=1, key_block=1, causal=False)
    assert grid.pairs(torch.tensor(1), torch.tensor([-1, 0]), torch.tensor(0)).tolist() == [False, True]


@every_case
def test_tiles_name_the_permitted_kept_blocks_once_in_order_full_and_partial_apart(case):
    grid, keep = case.grid(), case.keep()
    tiles = Tiles.from_mask(keep, grid)
    some, every = blocks_of(grid, pairs_of(grid, case.batch))
    for count, ids, wanted in ((tiles.full_count, tiles.full_ids, keep & some & every),
                               (tiles.partial_count, tiles.partial_ids, keep & some & ~every)):
        assert count.dtype == ids.dtype == torch.int32
        assert torch.equal(count, wanted.sum(-1))
        assert ids.shape[-1] == (int(count.max()) if count.numel() else 0)
        for row, n, mask in zip(ids.flatten(0, 2), count.flatten(), wanted.flatten(0, 2), strict=True):
            assert row.tolist() == mask.nonzero()[:, 0].tolist() + [-1] * (len(row) - n)
    assert torch.equal(tiles.mask(), keep & some)
    assert not tiles.is_everything


@every_case
def test_listing_the_dense_plan_names_every_permitted_tile(case):
    dense = Tiles(grid=case.grid())
    assert dense.is_everything
    listed = dense.listed(case.batch, case.groups, CPU)
    assert not listed.is_everything
    assert torch.equal(listed.mask(), case.grid().permitted(CPU).expand_as(listed.mask()))
    assert listed.listed(case.batch, case.groups, CPU) is listed


def test_a_plan_moves_to_a_device_with_all_its_parts():
    tiles = CASES[0].tiles()
    moved = tiles.to(torch.device("meta"))
    parts = (moved.full_count, moved.full_ids, moved.partial_count, moved.partial_ids)
    assert all(part.is_meta for part in parts) and moved.grid is tiles.grid
    dense = Tiles(grid=tiles.grid)
    assert dense.to(torch.device("meta")) is dense


@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (1, 2, 4, 4), (2, 3, 4)], ids=["keys", "queries", "dimensions"])
def test_a_mask_of_another_grid_is_refused(shape):
    grid = replace(CASES[0].grid(), lengths=None)
    message = r"Tiles: expected keep \[B, H, 3, 4\], got \[.*\]; build keep from the same grid"
    with pytest.raises(ShapeError, match=message):
        Tiles.from_mask(torch.ones(shape, dtype=torch.bool), grid)


@pytest.mark.parametrize("settings", [{"num_queries": -1}, {"num_keys": -1}, {"query_block": 0}, {"key_block": -4},
                                      {"key_block": 2**32 + 16}], ids=str)
def test_a_grid_of_impossible_sizes_is_refused(settings):
    with pytest.raises(ShapeError, match="Grid: expected sizes from 0 and blocks from 1 to 4096"):
        Grid(**{"num_queries": 8, "num_keys": 8, "query_block": 4, "key_block": 4, **settings})


@pytest.mark.parametrize("window", [-1, 0, MAX_K + 1, 2**63 - 1, 2**64 + 1])
def test_an_impossible_window_is_refused(window):
    """A position below 0 less a window of 2^63 - 1 is beyond 64 bits, and would forbid what the row may see."""
    message = "Grid: expected a causal grid for a window, and 1 to 2147483647 keys in it"
    with pytest.raises(ShapeError, match=message):
        Grid(num_queries=8, num_keys=4, query_block=4, key_block=4, window=window)
    with pytest.raises(ShapeError, match=message):
        Grid(num_queries=8, num_keys=8, query_block=4, key_block=4, window=3, causal=False)


@pytest.mark.parametrize("lengths", [torch.zeros(2), torch.zeros(2, dtype=torch.int64),
                                     torch.zeros(2, 3, dtype=torch.int64)], ids=["floats", "one dimension", "three"])
def test_lengths_of_another_shape_or_dtype_are_refused(lengths):
    with pytest.raises(ShapeError, match=r"Grid: expected lengths int64 \[B, 2\]"):
        Grid(num_queries=8, num_keys=8, query_block=4, key_block=4, lengths=lengths)


@pytest.mark.parametrize("change", [
    lambda tiles: {"full_ids": tiles.full_ids.long()}, lambda tiles: {"full_count": tiles.full_count[..., :1]},
    lambda tiles: {"partial_ids": None}, lambda tiles: {"partial_count": tiles.partial_count[:, :1]},
    lambda tiles: {"grid": replace(tiles.grid, query_block=2)},
], ids=["int64", "fewer blocks", "half a plan", "fewer heads", "another grid"])
def test_a_plan_whose_parts_do_not_fit_is_refused(change):
    tiles = CASES[0].tiles()
    with pytest.raises(ShapeError, match=r"Tiles: expected int32 counts \[B, H, "):
        replace(tiles, **change(tiles))
