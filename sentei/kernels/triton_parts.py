"""What the Triton kernels share: how a tensor is passed, how a tile is read, multiplied and stored.

Triton reads the variable TRITON_INTERPRET when it is first imported: with it every kernel runs on the CPU, slowly, for
the tests. Only modules called triton_… import triton, and they are imported when they are called.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


class Rows(NamedTuple):
    """A tensor [B, T, H, D] whose last dimension is contiguous: where it is, and its strides."""

    data: torch.Tensor
    batch: int
    token: int
    head: int


class Launch(NamedTuple):
    """The tile of a program, its warps, and how many tiles are loaded ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """left · right + total in float32."""
    if PRECISION == "widened":  # Triton's interpreter would multiply the bits of bfloat16; the casts are exact
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def tanh(x):
    """The hyperbolic tangent in float32, as exact for small numbers as for large ones.

    Up to 0.7 by a continued fraction, cut where its next term is below half a unit in the last place; above by
    (1 - e) / (1 + e) with e = exp(-2 |x|), which for small numbers would be a difference of near ones.
    """
    size = tl.abs(x)
    square = size * size
    small = size < 0.7
    power = tl.exp2(size * (-2.0 * LOG2E))
    above = tl.where(small, size * (945.0 + square * (105.0 + square)), 1.0 - power)
    below = tl.where(small, 945.0 + square * (420.0 + 15.0 * square), 1.0 + power)
    share = above / below
    return tl.where(x < 0, -share, share)


@triton.jit
def start_of(rows, batch, head):
    """Where the rows of one (batch, head) start."""
    return rows.data + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head


@triton.jit
def load_rows(data, stride, first, low, high, SHAPE: tl.constexpr, CUT: tl.constexpr):
    """Rows first, first + 1, … as [N, wide]; 0 beyond the width and, where CUT, outside low ≤ row < high.

    SHAPE: N, width, wide.
    """
    row, column = tl.arange(0, SHAPE[0]), tl.arange(0, SHAPE[2])
    places = data + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if CUT:
        inside = ((first + row >= low) & (first + row < high))[:, None] & (column < SHAPE[1])[None, :]
        found = tl.load(places, mask=inside, other=0.0)
    elif SHAPE[1] != SHAPE[2]:
        found = tl.load(places, mask=(column < SHAPE[1])[None, :], other=0.0)
    else:
        found = tl.load(places)
    return found


@triton.jit
def store_rows(rows, batch, head, first, high, found, SHAPE: tl.constexpr):
    """Stores what was found at rows first ≤ row < high."""
    row, column = tl.arange(0, SHAPE[0]), tl.arange(0, SHAPE[2])
    places = start_of(rows, batch, head) + tl.cast(first, tl.int64) * rows.token + row[:, None] * rows.token
    tl.store(places + column[None, :], found.to(rows.data.dtype.element_ty),
             mask=(first + row < high)[:, None] & (column < SHAPE[1])[None, :])


def interpreted() -> bool:
    """True where the kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(dot, triton.JITFunction)


def precision(dtype: torch.dtype) -> str:
    """How operands of the dtype are multiplied: fp32 by three products of TensorFloat32, as exact as fp32."""
    if dtype == torch.bfloat16 and interpreted():
        return "widened"
    return "tf32x3" if dtype == torch.float32 else "ieee"


def rows_of(tensor: torch.Tensor) -> Rows:
    """The tensor as the kernels take it."""
    return Rows(tensor, *tensor.stride()[:3])


def options(start: Launch) -> dict:
    """What Triton is told of a launch; a product and a sum may become one instruction."""
    return {"num_warps": start.warps, "num_stages": start.stages, "enable_fp_fusion": True}


def contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def wide(tensor: torch.Tensor) -> int:
    """The power of two from 16 that holds a row."""
    return power(tensor.shape[-1])


def power(size: int) -> int:
    """The least power of two that is no less, and no less than 16: the smallest tile of a product."""
    return max(16, 1 << (size - 1).bit_length())
