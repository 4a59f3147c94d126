"""Attention of a few rows to chosen pages of a cache on a GPU, in Triton: one pass over the kept keys, cut in parts.

A program takes the heads of one KV group of one row, which share its pages, and one part of them; a second kernel
merges the parts by their lse. Nothing waits for the GPU, so that the calls can be captured in a graph.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels.triton_parts import (
    LN2,
    LOG2E,
    Launch,
    contiguous_rows,
    dot,
    options,
    power,
    precision,
    rows_of,
    wide,
)

_LAUNCH = Launch(rows=16, columns=64, warps=4, stages=3)
PROGRAMS = 4  # a multiprocessor: enough to hide the loads of one behind those of the others


class Cached(NamedTuple):
    """What is known when the kernels start: sizes, the scale in powers of two, and the steps of a part."""

    queries: int
    keys: int
    groups: int
    slots: int
    scale: float
    steps: int


class Shape(NamedTuple):
    """What is known when the kernels are compiled: see `triton_tiles.Sizes`; `heads` is a power of two."""

    heads: int
    columns: int
    page: int
    width: int
    value_width: int
    wide: int
    value_wide: int
    per_group: int
    causal: bool
    padded: bool
    precision: str


def attend_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    *,
    page: int,
    scale: float,
    causal: bool = True,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every row to the keys of its pages.

    Args:
        query: [B, R, H, D], a few rows that end the text: row r stands at position Tk - R + r.
        key, value: [B, Tk, G, D] and [B, Tk, G, Dv], any strides, of the query's dtype.
        pages: int32 [B, G, R, slots], the pages kept, each once and in any order; -1 where a slot is empty. A page
            that the keys do not have counts as empty.
        page: keys a page; page p holds the positions from p · page on.
        scale: on the scores, from 0.
        causal, lengths: as in Grid.
    Returns:
        output [B, R, H, Dv] and lse float32 [B, R, H]: 0 and -inf for a row without keys. A key that a row may not see
        is not read.
    Raises:
        ShapeError: shapes, dtypes or scale do not fit.
        ImplError: a width above 256.
    Cost: the kept keys and values, read once for a KV group.
    """
    _check(query, key, value, pages, page, scale)
    batch, rows, heads, _ = query.shape
    groups, slots, value_width = key.shape[2], pages.shape[-1], value.shape[-1]
    output = query.new_zeros(batch, rows, heads, value_width)
    lse = query.new_full((batch, rows, heads), -torch.inf, dtype=torch.float32)
    if not (output.numel() and slots and key.shape[1]):
        return output, lse
    steps = -(-slots * page // _LAUNCH.columns)
    parts = min(steps, -(-_programs(query.device) // (batch * rows * groups)))
    each = -(-steps // parts)
    parts = -(-steps // each)
    shape = Shape(heads=power(heads // groups), columns=_LAUNCH.columns, page=page, width=query.shape[-1],
                  value_width=value_width, wide=wide(query), value_wide=wide(value), per_group=heads // groups,
                  causal=causal, padded=lengths is not None, precision=precision(query.dtype))
    sums = query.new_empty(parts, batch, rows, heads, value_width, dtype=torch.float32)
    weights = query.new_empty(parts, batch, rows, heads, dtype=torch.float32)
    cached = Cached(queries=rows, keys=key.shape[1], groups=groups, slots=slots, scale=scale * LOG2E.value, steps=each)
    with torch.cuda.device_of(query):
        part_kernel[parts, groups, batch * rows](
            tuple(rows_of(contiguous_rows(tensor)) for tensor in (query, key, value)), pages.contiguous(), sums,
            weights, lengths if lengths is None else lengths.contiguous(), cached, shape, **options(_LAUNCH))
        merge_kernel[(lse.numel(),)](sums, weights, output, lse, (parts, value_width), (power(parts), wide(value)),
                                   **options(_LAUNCH))
    return output, lse


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, page: int,
           scale: float) -> None:
    fits = (query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]
            and key.shape[1:3] == value.shape[1:3] and query.shape[3] == key.shape[3] and key.shape[2] > 0
            and query.shape[2] % key.shape[2] == 0 and query.dtype == key.dtype == value.dtype)
    if not fits or pages.dtype != torch.int32 or pages.shape[:-1] != (*key.shape[::2][:2], query.shape[1]):
        raise ShapeError("attend_pages", expected="query [B, R, H, D], key [B, Tk, G, D] and value [B, Tk, G, Dv] of "
                         "one dtype, pages int32 [B, G, R, slots]", got=", ".join(
                             f"{x.dtype} {list(x.shape)}" for x in (query, key, value, pages)),
                         do="bring the heads to dimension 2")
    if page < 1 or not scale >= 0:
        raise ShapeError("attend_pages", expected="pages from 1 key and a scale from 0", got=f"{page} and {scale}",
                         do="negate the query for a negative scale")
    if max(query.shape[3], value.shape[3]) > 256:
        raise ImplError("attend_pages", expected="heads up to 256 wide", do="use another implementation",
                        got=f"{query.shape[3]} and {value.shape[3]}")


def _programs(device: torch.device) -> int:
    """How many programs keep the device busy; where there is no GPU, enough that every merge has parts."""
    if device.type != "cuda":
        return 16
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def part_kernel(given, pages, sums, weights, lengths, cached, shape: tl.constexpr):
    """One part of the keys of one row, for the heads of one KV group: their mean value, and its lse base 2."""
    query, key, value = given
    part, group = tl.program_id(0), tl.program_id(1)
    batch, row = tl.program_id(2) // cached.queries, tl.program_id(2) % cached.queries
    low, high = cached.keys * 0, cached.keys
    if shape.padded:
        low = tl.load(lengths + 2 * batch).to(tl.int32)
        high = tl.minimum(tl.load(lengths + 2 * batch + 1).to(tl.int32), high)
    if shape.causal:
        high = tl.minimum(high, cached.keys - cached.queries + row + 1)
    member = tl.arange(0, shape.heads)
    real = member < shape.per_group
    head = group * shape.per_group + member
    wide, value_wide = tl.arange(0, shape.wide), tl.arange(0, shape.value_wide)
    begin = query.data + batch.to(tl.int64) * query.batch + row.to(tl.int64) * query.token
    tile = tl.load(begin + head[:, None] * query.head + wide[None, :],
                   mask=real[:, None] & (wide < shape.width)[None, :], other=0.0)
    keys = key.data + batch.to(tl.int64) * key.batch + group.to(tl.int64) * key.head
    values = value.data + batch.to(tl.int64) * value.batch + group.to(tl.int64) * value.head
    ids = pages + ((batch * cached.groups + group) * cached.queries + row).to(tl.int64) * cached.slots
    total = tl.zeros([shape.heads, shape.value_wide], tl.float32)
    weight = tl.zeros([shape.heads], tl.float32)
    top = tl.full([shape.heads], float("-inf"), tl.float32)
    for step in range(part * cached.steps, (part + 1) * cached.steps):
        column = step * shape.columns + tl.arange(0, shape.columns)
        slot = column // shape.page
        name = tl.load(ids + slot, mask=slot < cached.slots, other=-1)
        at = name.to(tl.int64) * shape.page + column % shape.page
        seen = (name >= 0) & (at >= low) & (at < high)
        found = tl.load(keys + at[:, None] * key.token + wide[None, :],
                        mask=seen[:, None] & (wide < shape.width)[None, :], other=0.0)
        scores = dot(tile, tl.trans(found), tl.zeros([shape.heads, shape.columns], tl.float32), shape.precision)
        scores = tl.where(seen[None, :], scores * cached.scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shares, shrink = tl.exp2(scores - safe[:, None]), tl.exp2(top - safe)
        found = tl.load(values + at[:, None] * value.token + value_wide[None, :],
                        mask=seen[:, None] & (value_wide < shape.value_width)[None, :], other=0.0)
        total = dot(shares.to(found.dtype), found, total * shrink[:, None], shape.precision)
        weight = weight * shrink + tl.sum(shares, 1)
        top = higher
    empty = weight == 0
    weight = tl.where(empty, 1.0, weight)
    place = (part * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * (cached.groups * shape.per_group) + head
    tl.store(weights + place, tl.where(empty, float("-inf"), top + tl.log2(weight)), mask=real)
    tl.store(sums + place[:, None] * shape.value_width + value_wide[None, :], total / weight[:, None],
             mask=real[:, None] & (value_wide < shape.value_width)[None, :])


@triton.jit
def merge_kernel(sums, weights, output, lse, sizes, SHAPE: tl.constexpr):
    """The parts of one head of one row as one. sizes: parts, Dv; SHAPE: the powers of two that hold them."""
    place = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, SHAPE[0]), tl.arange(0, SHAPE[1])
    at = part * tl.num_programs(0).to(tl.int64) + place
    each = tl.load(weights + at, mask=part < sizes[0], other=float("-inf"))
    top = tl.max(each, 0)
    empty = top == float("-inf")
    shares = tl.exp2(each - tl.where(empty, 0.0, top))
    weight = tl.where(empty, 1.0, tl.sum(shares, 0))
    found = tl.load(sums + at[:, None] * sizes[1] + column[None, :],
                    mask=(part < sizes[0])[:, None] & (column < sizes[1])[None, :], other=0.0)
    total = tl.sum(found * (shares / weight)[:, None], 0)
    tl.store(output + place * sizes[1] + column, total.to(output.dtype.element_ty), mask=column < sizes[1])
    tl.store(lse + place, tl.where(empty, float("-inf"), (top + tl.log2(weight)) * LN2))
