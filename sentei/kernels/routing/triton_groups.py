"""Products of each expert with its own rows, in Triton: the kernels behind `fused_triton`, and how they are started.

Rows stand sorted by expert. A program owns one tile of one expert's product; which tile, a schedule says that is made
on the device, of as many programs as there could be at most, so that no number ever comes back to the host. Rows that
are gathered are gathered as they are read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sentei.kernels.routing.order import Order
from sentei.kernels.triton_parts import Launch, dot, options, power, precision

BLOCK = 64  # rows of a tile
DEPTH = 32  # of a step of a product


class Schedule(NamedTuple):
    """Which rows a program owns.

    Args:
        start: int32 [E + 1]; where each expert's rows begin, and the end of the last.
        expert, first: int32 [programs]; of each program, the expert (-1 for nothing to do) and its first row.
        rows: of a tile.
    """

    start: torch.Tensor
    expert: torch.Tensor
    first: torch.Tensor
    rows: int


def schedule(order: Order, rows: int = BLOCK) -> Schedule:
    """The tiles of `rows` rows of each expert."""
    counts, pairs = order.counts[1:], order.token.numel()
    tiles = (counts + rows - 1) // rows
    end, begin = tiles.cumsum(0), order.counts.cumsum(0)
    programs = torch.arange(min(pairs, len(counts)) + pairs // rows, device=counts.device)
    expert = torch.searchsorted(end, programs, right=True)
    busy, own = expert < len(counts), expert.clamp(max=len(counts) - 1)
    first = begin[own] + (programs - end[own] + tiles[own]) * rows
    return Schedule(begin.int(), own.where(busy, -1).int(), first.int(), rows)


class Factor(NamedTuple):
    """Rows [N, D] as a kernel reads them: `index` int64 [N] names them, or is None where they stand in order."""

    data: torch.Tensor
    stride: int
    index: torch.Tensor | None


class Weight(NamedTuple):
    """Weights [E, depth, columns] and their strides, which may be those of the weights turned."""

    data: torch.Tensor
    expert: int
    depth: int
    column: int


class Sizes(NamedTuple):
    """What is known when a kernel is compiled: the tile, the step, whether to add, and the products' precision."""

    rows: int
    columns: int
    depth: int
    add: bool
    precision: str


@triton.jit
def _places(factor, row, inside):
    """Where the rows begin."""
    if factor.index is None:
        source = row.to(tl.int64)
    else:
        source = tl.load(factor.index + row, mask=inside, other=0)
    return factor.data + source * factor.stride


@triton.jit
def rows_kernel(left, weight, output, stride, plan, depth, columns, sizes: tl.constexpr):
    """A tile of output[n] = (add ? output[n] : 0) + left[n] · weight[e], over the rows n of expert e.

    plan: start, expert and first of a `Schedule`.
    """
    program = tl.program_id(0)
    expert = tl.load(plan[1] + program)
    if expert >= 0:
        row = tl.load(plan[2] + program) + tl.arange(0, sizes.rows)
        column = tl.program_id(1) * sizes.columns + tl.arange(0, sizes.columns)
        inside, wanted = row < tl.load(plan[0] + expert + 1), column < columns
        places = _places(left, row, inside)
        own = weight.data + expert.to(tl.int64) * weight.expert
        total = tl.zeros([sizes.rows, sizes.columns], tl.float32)
        for step in range(0, depth, sizes.depth):
            deep = step + tl.arange(0, sizes.depth)
            real = deep < depth
            one = tl.load(places[:, None] + deep[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            two = tl.load(own + deep[:, None].to(tl.int64) * weight.depth + column[None, :] * weight.column,
                          mask=real[:, None] & wanted[None, :], other=0.0)
            total = dot(one, two, total, sizes.precision)
        to = output + row[:, None].to(tl.int64) * stride + column[None, :]
        mask = inside[:, None] & wanted[None, :]
        if sizes.add:
            total += tl.load(to, mask=mask, other=0.0).to(tl.float32)
        tl.store(to, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def weights_kernel(left, right, output, start, lines, columns, sizes: tl.constexpr):
    """A tile of output[e, i, j] = Σ over the rows n of expert e of left[n, i] · right[n, j]; 0 without rows."""
    expert = tl.program_id(0)
    line = tl.program_id(1) * sizes.rows + tl.arange(0, sizes.rows)
    column = tl.program_id(2) * sizes.columns + tl.arange(0, sizes.columns)
    low, high = tl.load(start + expert), tl.load(start + expert + 1)
    total = tl.zeros([sizes.rows, sizes.columns], tl.float32)
    for step in range(low, high, sizes.depth):
        row = step + tl.arange(0, sizes.depth)
        inside = row < high
        one = tl.load(_places(left, row, inside)[None, :] + line[:, None],
                      mask=inside[None, :] & (line < lines)[:, None], other=0.0)
        two = tl.load(_places(right, row, inside)[:, None] + column[None, :],
                      mask=inside[:, None] & (column < columns)[None, :], other=0.0)
        total = dot(one, two, total, sizes.precision)
    to = output + expert.to(tl.int64) * lines * columns + line[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(to, total.to(output.dtype.element_ty), mask=(line < lines)[:, None] & (column < columns)[None, :])


_HALF, _SINGLE = Launch(BLOCK, 128, 4, 3), Launch(BLOCK, 64, 4, 2)


def launch(tensor: torch.Tensor) -> Launch:
    """How to start either kernel for numbers of the tensor's dtype."""
    return _SINGLE if tensor.dtype == torch.float32 else _HALF


def factor(rows: torch.Tensor, index: torch.Tensor | None = None) -> Factor:
    """Rows whose numbers are contiguous, all of them in order or those that `index` names."""
    return Factor(rows, rows.stride(0), index)


def rows_product(left: Factor, weights: torch.Tensor, output: torch.Tensor, plan: Schedule, *, turned: bool = False,
                 add: bool = False) -> None:
    """Writes, or adds, each row's product with its expert's weights.

    Args:
        left: [N, D] of the weights' dtype.
        weights: [E, columns, D], or where `turned` [E, D, columns].
        output: [N, columns], rows contiguous; rows of no expert are left as they are.
        plan: of the rows.
    """
    depth, columns = weights.shape[1:] if turned else weights.shape[:0:-1]
    deep, across = weights.stride()[1:] if turned else weights.stride()[:0:-1]
    start = launch(weights)
    sizes = Sizes(plan.rows, min(start.columns, power(columns)), DEPTH, add, precision(weights.dtype))
    grid = len(plan.expert), triton.cdiv(columns, sizes.columns)
    with torch.cuda.device_of(output):
        rows_kernel[grid](left, Weight(weights, weights.stride(0), deep, across), output, output.stride(0), plan[:3],
                          depth, columns, sizes, **options(start))


def weights_product(left: Factor, right: Factor, output: torch.Tensor, plan: Schedule) -> None:
    """Writes output [E, lines, columns], contiguous: sums over each expert's rows of left [N, lines] times right."""
    start = launch(left.data)
    experts, lines, columns = output.shape
    sizes = Sizes(min(start.rows, power(lines)), min(start.columns, power(columns)), DEPTH, False,
                  precision(left.data.dtype))
    grid = experts, triton.cdiv(lines, sizes.rows), triton.cdiv(columns, sizes.columns)
    with torch.cuda.device_of(output):
        weights_kernel[grid](left, right, output, plan.start, lines, columns, sizes, **options(start))
