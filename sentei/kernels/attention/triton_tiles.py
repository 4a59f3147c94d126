"""Attention over chosen tiles on a GPU, in Triton: the kernels behind `fused_triton`, and how they are started.

A program owns one tile of the output and walks the tiles that its list names, those without a mask first. The scores
are kept in powers of two: `scale` is multiplied by log2(e) once, and exp2 is one instruction.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sentei.kernels.attention.tiles import Grid, Tiles
from sentei.kernels.triton_parts import (
    LN2,
    LOG2E,
    Launch,
    contiguous_rows,
    dot,
    load_rows,
    options,
    power,
    precision,
    rows_of,
    start_of,
    store_rows,
    tanh,
    wide,
)


class Listed(NamedTuple):
    """One of the two lists of a plan: count int32 [B, H, blocks] and ids int32 [B, H, blocks, slots]."""

    count: torch.Tensor | None
    ids: torch.Tensor | None
    slots: int


class Call(NamedTuple):
    """What is known when a kernel starts. `scale` and `cap` are in powers of two and positive or 0."""

    queries: int
    keys: int
    heads: int
    window: int
    scale: float
    cap: float


class Sizes(NamedTuple):
    """What is known when a kernel is compiled.

    Args:
        rows, columns: of the tile a program computes at once; they divide query_block and key_block.
        query_block, key_block: of the plan.
        width, value_width: D and Dv; wide, value_wide: the powers of two from 16 that hold them.
        per_group: query heads of a KV head; per_list: query heads of a list, 0 for the dense plan.
        causal, padded, windowed: whether the grid is causal, has lengths, has a window.
        capped: whether the scores have a soft cap.
        ragged: whether there are queries that do not fill the last tile.
        precision: of the products, as `tl.dot` names it; "widened" turns the operands into float32 first.
    """

    rows: int
    columns: int
    query_block: int
    key_block: int
    width: int
    value_width: int
    wide: int
    value_wide: int
    per_group: int
    per_list: int
    causal: bool
    padded: bool
    windowed: bool
    capped: bool
    ragged: bool
    precision: str


@triton.jit
def _first(ids, step, BLOCK: tl.constexpr, SIZE: tl.constexpr, LISTED: tl.constexpr):
    """The first row of the step's tile: of the blocks in order, or of those that `ids` names, SIZE rows a step."""
    if LISTED:
        parts: tl.constexpr = BLOCK // SIZE
        first = tl.load(ids + step // parts) * BLOCK + step % parts * SIZE
    else:
        first = step * SIZE
    return first


@triton.jit
def _read(listed, place, PARTS: tl.constexpr):
    """One list: where its ids are, and how many steps it has."""
    return listed.ids + place.to(tl.int64) * listed.slots, tl.load(listed.count + place) * PARTS


@triton.jit
def _bounds(lengths, batch, call, sizes: tl.constexpr):
    """Start and stop of the real keys."""
    if sizes.padded:
        low, high = tl.load(lengths + 2 * batch).to(tl.int32), tl.load(lengths + 2 * batch + 1).to(tl.int32)
        high = tl.minimum(high, call.keys)
    else:
        low, high = call.keys * 0, call.keys
    return low, high


@triton.jit
def _key_spans(plan, where, bounds, call, sizes: tl.constexpr):
    """The steps of a query tile: cut ones from a to b of `ids`, whole ones from b to c of `full_ids`, cut from c to d.

    For a plan the three are (0, partial), (0, full) and nothing; without one they follow one another.

    Args:
        where: batch, head and first row of the tile.
    """
    batch, head, first = where
    low, high = bounds
    if sizes.per_list:
        blocks = tl.cdiv(call.queries, sizes.query_block)
        place = (batch * (call.heads // sizes.per_list) + head // sizes.per_list) * blocks + first // sizes.query_block
        parts: tl.constexpr = sizes.key_block // sizes.columns
        full_ids, full = _read(plan[0], place, parts)
        ids, partial = _read(plan[1], place, parts)
        steps = (partial * 0, partial, full * 0, full, full, full)
    else:
        ids, full_ids = None, None
        whole, seen_by_all = high, low
        if sizes.causal:
            position = first + call.keys - call.queries
            high = tl.minimum(high, position + tl.minimum(sizes.rows, call.queries - first))
            whole = tl.minimum(whole, position + 1)
        if sizes.windowed:
            seen_by_all = tl.maximum(low, position + sizes.rows - call.window)
            low = tl.maximum(low, position - call.window + 1)
        end = tl.cdiv(tl.maximum(high, 0), sizes.columns)
        b = tl.cdiv(seen_by_all, sizes.columns)
        c = tl.maximum(tl.maximum(whole, 0) // sizes.columns, b)
        steps = (low // sizes.columns, tl.minimum(b, end), b, c, c, end)
    return ids, full_ids, steps


@triton.jit
def _seen(positions, first, bounds, call, sizes: tl.constexpr):
    """Bool [rows, columns]: may the query at each position see the key?"""
    at = first + tl.arange(0, sizes.columns)
    seen = ((at >= bounds[0]) & (at < bounds[1]))[None, :]
    if sizes.causal:
        seen = seen & (at[None, :] <= positions[:, None])
    if sizes.windowed:
        seen = seen & (at[None, :] > positions[:, None] - call.window)
    return seen


@triton.jit
def _scores(products, call, sizes: tl.constexpr):
    """The scores in powers of two: scaled, and soft-capped where there is a cap."""
    scores = products * call.scale
    if sizes.capped:
        scores = call.cap * tanh(scores * (1.0 / call.cap))
    return scores


@triton.jit
def _uncapped(slope, scores, call, sizes: tl.constexpr):
    """The gradient of the scaled products, from that of the capped scores."""
    if sizes.capped:
        share = scores * (1.0 / call.cap)
        slope *= 1.0 - share * share
    return slope


@triton.jit
def _attend(state, query, pages, span, where, call, sizes: tl.constexpr, CUT: tl.constexpr):
    """The output's sum, the sum of the shares and the largest score, with the tiles of one span added.

    Args:
        pages: where keys and values start, and their strides.
        span: ids, first and last step.
        where: positions of the rows, and the bounds.
    """
    total, weight, top = state
    for step in range(span[1], span[2]):
        first = _first(span[0], step, sizes.key_block, sizes.columns, sizes.per_list > 0)
        keys = load_rows(pages[0], pages[1], first, where[1][0], where[1][1],
                         (sizes.columns, sizes.width, sizes.wide), CUT)
        nothing = tl.zeros([sizes.rows, sizes.columns], tl.float32)
        scores = _scores(dot(query, tl.trans(keys), nothing, sizes.precision), call, sizes)
        if CUT:
            scores = tl.where(_seen(where[0], first, where[1], call, sizes), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        shares, shrink = tl.exp2(scores - safe[:, None]), tl.exp2(top - safe)
        values = load_rows(pages[2], pages[3], first, where[1][0], where[1][1],
                           (sizes.columns, sizes.value_width, sizes.value_wide), CUT)
        total = dot(shares.to(values.dtype), values, total * shrink[:, None], sizes.precision)
        weight = weight * shrink + tl.sum(shares, 1)
        top = higher
    return total, weight, top


@triton.jit
def forward_kernel(given, results, plan, lengths, call, sizes: tl.constexpr):
    """One query tile of one head. given: query, key, value; results: output, and lse and softmax, contiguous."""
    query, key, value = given
    output, lse, softmax = results
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * sizes.rows  # the longest causal rows start first
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = first + tl.arange(0, sizes.rows)
    group = head // sizes.per_group
    bounds = _bounds(lengths, batch, call, sizes)
    ids, full_ids, steps = _key_spans(plan, (batch, head, first), bounds, call, sizes)
    tile = load_rows(start_of(query, batch, head), query.token, first, 0, call.queries,
                 (sizes.rows, sizes.width, sizes.wide), True)
    pages = start_of(key, batch, group), key.token, start_of(value, batch, group), value.token
    where = rows + call.keys - call.queries, bounds
    state = (tl.zeros([sizes.rows, sizes.value_wide], tl.float32), tl.zeros([sizes.rows], tl.float32),
             tl.full([sizes.rows], float("-inf"), tl.float32))
    state = _attend(state, tile, pages, (full_ids, steps[2], steps[3]), where, call, sizes, False)
    if sizes.per_list or sizes.padded or sizes.windowed:
        state = _attend(state, tile, pages, (ids, steps[0], steps[1]), where, call, sizes, True)
    if not sizes.per_list:
        state = _attend(state, tile, pages, (ids, steps[4], steps[5]), where, call, sizes, True)
    total, weight, top = state
    empty = weight == 0
    inverse = 1 / tl.where(empty, 1.0, weight)
    store_rows(output, batch, head, first, call.queries, total * inverse[:, None],
         (sizes.rows, sizes.value_width, sizes.value_wide))
    place = (batch.to(tl.int64) * call.queries + rows) * call.heads + head
    real = rows < call.queries
    tl.store(lse + place, tl.where(empty, float("-inf"), (top - tl.log2(inverse)) * LN2), mask=real)
    tl.store(softmax + place, tl.where(empty, 0.0, top), mask=real)
    half = tl.num_programs(2).to(tl.int64) * call.queries * call.heads
    tl.store(softmax + half + place, inverse, mask=real)


@triton.jit
def _query_gradient(total, tiles, pages, span, where, call, sizes: tl.constexpr, CUT: tl.constexpr):
    """The gradient of a query tile, with the tiles of one span added.

    Args:
        tiles: the query, the output's gradient, and top, inverse and delta of its rows.
        pages, span, where: as in `_attend`.
    """
    query, gradient, top, inverse, delta = tiles
    for step in range(span[1], span[2]):
        first = _first(span[0], step, sizes.key_block, sizes.columns, sizes.per_list > 0)
        keys = load_rows(pages[0], pages[1], first, where[1][0], where[1][1],
                         (sizes.columns, sizes.width, sizes.wide), CUT)
        values = load_rows(pages[2], pages[3], first, where[1][0], where[1][1],
                           (sizes.columns, sizes.value_width, sizes.value_wide), CUT)
        nothing = tl.zeros([sizes.rows, sizes.columns], tl.float32)
        scores = _scores(dot(query, tl.trans(keys), nothing, sizes.precision), call, sizes)
        slope = dot(gradient, tl.trans(values), nothing, sizes.precision) - delta[:, None]
        slope = _uncapped(slope * tl.exp2(scores - top[:, None]) * inverse[:, None], scores, call, sizes)
        if CUT:
            slope = tl.where(_seen(where[0], first, where[1], call, sizes), slope, 0.0)
        total = dot(slope.to(keys.dtype), keys, total, sizes.precision)
    return total


@triton.jit
def query_gradient_kernel(given, results, plan, lengths, call, sizes: tl.constexpr):
    """The gradient of one query tile of one head, and its delta for `key_gradient_kernel`.

    given: query, key, value, output, its gradient, softmax, the lse's gradient; results: the query's gradient, delta.
    """
    query, key, value, output, gradient, softmax, lse_gradient = given
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * sizes.rows
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = first + tl.arange(0, sizes.rows)
    group = head // sizes.per_group
    bounds = _bounds(lengths, batch, call, sizes)
    ids, full_ids, steps = _key_spans(plan, (batch, head, first), bounds, call, sizes)
    wide: tl.constexpr = (sizes.rows, sizes.value_width, sizes.value_wide)
    tile = load_rows(start_of(query, batch, head), query.token, first, 0, call.queries,
                 (sizes.rows, sizes.width, sizes.wide), True)
    slopes = load_rows(start_of(gradient, batch, head), gradient.token, first, 0, call.queries, wide, True)
    found = load_rows(start_of(output, batch, head), output.token, first, 0, call.queries, wide, True)
    place = (batch.to(tl.int64) * call.queries + rows) * call.heads + head
    real = rows < call.queries
    half = tl.num_programs(2).to(tl.int64) * call.queries * call.heads
    top = tl.load(softmax + place, mask=real, other=0.0)
    inverse = tl.load(softmax + half + place, mask=real, other=0.0)
    delta = tl.sum(slopes.to(tl.float32) * found.to(tl.float32), 1)
    delta -= tl.load(lse_gradient + place, mask=real, other=0.0)
    tl.store(results[1] + place, delta, mask=real)
    pages = start_of(key, batch, group), key.token, start_of(value, batch, group), value.token
    where = rows + call.keys - call.queries, bounds
    tiles = tile, slopes, top, inverse, delta
    total = tl.zeros([sizes.rows, sizes.wide], tl.float32)
    total = _query_gradient(total, tiles, pages, (full_ids, steps[2], steps[3]), where, call, sizes, False)
    if sizes.per_list or sizes.padded or sizes.windowed:
        total = _query_gradient(total, tiles, pages, (ids, steps[0], steps[1]), where, call, sizes, True)
    if not sizes.per_list:
        total = _query_gradient(total, tiles, pages, (ids, steps[4], steps[5]), where, call, sizes, True)
    store_rows(results[0], batch, head, first, call.queries, total * (call.scale / LOG2E),
         (sizes.rows, sizes.width, sizes.wide))


@triton.jit
def _query_spans(plan, where, bounds, call, sizes: tl.constexpr):
    """The steps of a key tile, as `_key_spans` has those of a query tile."""
    batch, head, first = where
    if sizes.per_list:
        blocks = tl.cdiv(call.keys, sizes.key_block)
        place = (batch * (call.heads // sizes.per_list) + head // sizes.per_list) * blocks + first // sizes.key_block
        parts: tl.constexpr = sizes.query_block // sizes.rows
        full_ids, full = _read(plan[0], place, parts)
        ids, partial = _read(plan[1], place, parts)
        steps = (partial * 0, partial, full * 0, full, full, full)
    else:
        ids, full_ids = None, None
        end = tl.cdiv(call.queries, sizes.rows)
        begin, whole, seen_by_all = end * 0, end * 0, end
        if sizes.causal:
            row = first - (call.keys - call.queries)  # the first query that sees the tile's first key
            if sizes.windowed:
                end = tl.minimum(end, tl.cdiv(tl.maximum(row + sizes.columns - 1 + call.window, 0), sizes.rows))
                seen_by_all = tl.minimum(end, tl.maximum(row + call.window, 0) // sizes.rows)
            begin = tl.minimum(tl.maximum(row, 0) // sizes.rows, end)
            whole = tl.minimum(tl.cdiv(tl.maximum(row + sizes.columns - 1, 0), sizes.rows), end)
        whole = tl.where((first >= bounds[0]) & (first + sizes.columns <= bounds[1]), whole, end)
        begin = tl.where((first < bounds[1]) & (first + sizes.columns > bounds[0]), begin, whole)
        seen_by_all = tl.maximum(seen_by_all, whole)
        steps = (begin, whole, whole, seen_by_all, seen_by_all, end)
    return ids, full_ids, steps


@triton.jit
def _key_gradients(totals, tiles, heads, span, where, call, sizes: tl.constexpr, CUT: tl.constexpr):
    """The gradients of a key tile and its values, with the tiles of one span of one query head added.

    Args:
        tiles: keys and values.
        heads: where the head's queries and gradients start, their strides, and top, inverse and delta of query 0.
        span: ids, first and last step.
        where: the first key, and the bounds.
    """
    key_total, value_total = totals
    keys, values = tiles
    queries, stride, gradients, gradient_stride, top, inverse, delta = heads
    for step in range(span[1], span[2]):
        first = _first(span[0], step, sizes.query_block, sizes.rows, sizes.per_list > 0)
        query = load_rows(queries, stride, first, 0, call.queries, (sizes.rows, sizes.width, sizes.wide), sizes.ragged)
        gradient = load_rows(gradients, gradient_stride, first, 0, call.queries,
                         (sizes.rows, sizes.value_width, sizes.value_wide), sizes.ragged)
        rows = first + tl.arange(0, sizes.rows)
        real, place = rows < call.queries, rows.to(tl.int64) * call.heads
        nothing = tl.zeros([sizes.columns, sizes.rows], tl.float32)
        scores = _scores(dot(keys, tl.trans(query), nothing, sizes.precision), call, sizes)
        shares = tl.exp2(scores - tl.load(top + place, mask=real, other=0.0)[None, :])
        shares *= tl.load(inverse + place, mask=real, other=0.0)[None, :]
        if CUT:
            positions = rows + call.keys - call.queries
            seen = tl.trans(_seen(positions, where[0], where[1], call, sizes) & real[:, None])
            shares = tl.where(seen, shares, 0.0)
        value_total = dot(shares.to(gradient.dtype), gradient, value_total, sizes.precision)
        slope = dot(values, tl.trans(gradient), nothing, sizes.precision)
        slope = shares * (slope - tl.load(delta + place, mask=real, other=0.0)[None, :])
        slope = _uncapped(slope, scores, call, sizes)
        if CUT:
            slope = tl.where(seen, slope, 0.0)
        key_total = dot(slope.to(query.dtype), query, key_total, sizes.precision)
    return key_total, value_total


@triton.jit
def key_gradient_kernel(given, results, plan, lengths, call, sizes: tl.constexpr):
    """The gradients of one key tile of one KV head, over all its query heads.

    given: query, key, value, the output's gradient, softmax, delta; results: the gradients of key and value.
    """
    query, key, value, gradient, softmax, delta = given
    first = tl.program_id(0) * sizes.columns
    group, batch = tl.program_id(1), tl.program_id(2)
    bounds = _bounds(lengths, batch, call, sizes)
    shape: tl.constexpr = (sizes.columns, sizes.width, sizes.wide)
    value_shape: tl.constexpr = (sizes.columns, sizes.value_width, sizes.value_wide)
    tiles = (load_rows(start_of(key, batch, group), key.token, first, bounds[0], bounds[1], shape, True),
             load_rows(start_of(value, batch, group), value.token, first, bounds[0], bounds[1], value_shape, True))
    totals = (tl.zeros([sizes.columns, sizes.wide], tl.float32),
              tl.zeros([sizes.columns, sizes.value_wide], tl.float32))
    half = tl.num_programs(2).to(tl.int64) * call.queries * call.heads
    for member in range(sizes.per_group):
        head = group * sizes.per_group + member
        ids, full_ids, steps = _query_spans(plan, (batch, head, first), bounds, call, sizes)
        place = batch.to(tl.int64) * call.queries * call.heads + head
        heads = (start_of(query, batch, head), query.token, start_of(gradient, batch, head), gradient.token,
                 softmax + place, softmax + half + place, delta + place)
        where = first, bounds
        totals = _key_gradients(totals, tiles, heads, (full_ids, steps[2], steps[3]), where, call, sizes, False)
        totals = _key_gradients(totals, tiles, heads, (ids, steps[0], steps[1]), where, call, sizes, True)
        if sizes.windowed and not sizes.per_list:
            totals = _key_gradients(totals, tiles, heads, (ids, steps[4], steps[5]), where, call, sizes, True)
    store_rows(results[0], batch, group, first, call.keys, totals[0] * (call.scale / LOG2E), shape)
    store_rows(results[1], batch, group, first, call.keys, totals[1], value_shape)




PLAN = ("full_count", "full_ids", "partial_count", "partial_ids")

# (rows, columns, warps, stages) by the power of two that holds the wider of D and Dv; a plan's blocks cut them down.
_HALF = {"forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
         "query": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
         "key": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)}}
_SINGLE = {"forward": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1)},
           "query": {64: (32, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
           "key": {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)}}


def launch(kernel: str, query: torch.Tensor, value: torch.Tensor) -> Launch:
    """How to start "forward", "query" or "key" (the two halves of the backward) for these tensors."""
    table = (_SINGLE if query.dtype == torch.float32 else _HALF)[kernel]
    return Launch(*table[max(64, wide(query), wide(value))])


def forward(
    given: tuple[torch.Tensor, ...],
    plan: list[torch.Tensor],
    grid: Grid,
    scale: float,
    softcap: float,
    start: Launch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, Tq, H, Dv], lse [B, Tq, H] and softmax [2, B, Tq, H]: the largest score in powers of two, 1 ÷ the sum.

    Args:
        given: query, key and value, as `attend` has them.
        plan: full counts and ids, partial counts and ids of `Tiles`; empty for the dense plan.
        scale, softcap: from 0.
        start: how.
    """
    query, key, value = given = tuple(map(contiguous_rows, given))
    shape = query.shape[:3]
    output = query.new_empty(*shape, value.shape[3])
    lse, softmax = (query.new_empty(size, dtype=torch.float32) for size in (shape, (2, *shape)))
    if lse.numel():
        sizes = _sizes((query, key, value), plan, grid, softcap, start)
        blocks = -(-grid.num_queries // sizes.rows), query.shape[2], query.shape[0]
        with torch.cuda.device_of(query):
            forward_kernel[blocks](tuple(map(rows_of, given)), (rows_of(output), lse, softmax), _lists(plan),
                                   _lengths(grid), _call(query, grid, scale, softcap), sizes, **options(start))
    return output, lse, softmax


def backward(
    given: tuple[torch.Tensor, ...],
    plan: list[torch.Tensor],
    grid: Grid,
    scale: float,
    softcap: float,
    starts: tuple[Launch, Launch],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value.

    Args:
        given: query, key, value, output, softmax, and the gradients of output and lse.
        plan, grid, scale, softcap: as in `forward`.
        starts: how, for queries and for keys.
    """
    query, key, value, output, softmax, gradient, lse_gradient = given
    query, key, value, output, gradient = map(contiguous_rows, (query, key, value, output, gradient))
    gradients = tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))
    if not (query.numel() and key.numel() and value.numel()):
        return gradients
    softmax, lse_gradient = softmax.contiguous(), lse_gradient.contiguous()
    delta = torch.empty_like(lse_gradient)
    lengths, call = _lengths(grid), _call(query, grid, scale, softcap)
    turned = list(Tiles(grid=grid, **dict(zip(PLAN, plan, strict=True))).by_key()) if plan else []
    with torch.cuda.device_of(query):
        sizes = _sizes((query, key, value), plan, grid, softcap, starts[0])
        blocks = -(-grid.num_queries // sizes.rows), query.shape[2], query.shape[0]
        query_gradient_kernel[blocks](
            (*map(rows_of, (query, key, value, output, gradient)), softmax, lse_gradient),
            (rows_of(gradients[0]), delta), _lists(plan), lengths, call, sizes, **options(starts[0]))
        sizes = _sizes((query, key, value), plan, grid, softcap, starts[1])
        blocks = -(-grid.num_keys // sizes.columns), key.shape[2], query.shape[0]
        key_gradient_kernel[blocks](
            (*map(rows_of, (query, key, value, gradient)), softmax, delta), tuple(map(rows_of, gradients[1:])),
            _lists(turned), lengths, call, sizes, **options(starts[1]))
    return gradients


def _sizes(given: tuple[torch.Tensor, ...], plan: list[torch.Tensor], grid: Grid, softcap: float,
           start: Launch) -> Sizes:
    """What the kernels are compiled for."""
    query, key, value = given
    rows, columns = ((min(start.rows, grid.query_block), min(start.columns, grid.key_block)) if plan else
                     (min(start.rows, power(grid.num_queries)), min(start.columns, power(grid.num_keys))))
    return Sizes(
        rows=rows, columns=columns, query_block=grid.query_block if plan else 0,
        key_block=grid.key_block if plan else 0, width=query.shape[3], value_width=value.shape[3], wide=wide(query),
        value_wide=wide(value),
        per_group=query.shape[2] // key.shape[2], per_list=query.shape[2] // plan[0].shape[1] if plan else 0,
        causal=grid.causal, padded=grid.lengths is not None, windowed=grid.window is not None, capped=softcap > 0,
        ragged=grid.num_queries % (grid.query_block if plan else rows) != 0, precision=precision(query.dtype))


def _call(query: torch.Tensor, grid: Grid, scale: float, softcap: float) -> Call:
    return Call(queries=grid.num_queries, keys=grid.num_keys, heads=query.shape[2], window=grid.window or 0,
                scale=scale * LOG2E.value, cap=softcap * LOG2E.value)


def _lists(plan: list[torch.Tensor]) -> tuple[Listed, Listed]:
    """The full and the partial list."""
    if not plan:
        return Listed(None, None, 0), Listed(None, None, 0)
    plan = [tensor.contiguous() for tensor in plan]
    return Listed(*plan[:2], plan[1].shape[-1]), Listed(*plan[2:], plan[3].shape[-1])


def _lengths(grid: Grid) -> torch.Tensor | None:
    return None if grid.lengths is None else grid.lengths.contiguous()
