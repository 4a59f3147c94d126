"""A decoder layer's few rows in two native calls: all that stands before its attention, and all that stands after it.

    before:  query, key, value = heads(norm(x))
    after:   h = x + linear(attended),   h + gated(norm(h))

For one to eight rows on the CPU, in the plain case alone (`fused_cpp.is_plain`, while `fused_cpp.is_quiet`); every
other case is left to the layer's own forward: `before` answers None, and `takes` False. Results are those of `rows` and
`fused_cpp`, to the bit: what is between two of their calls is rounded to the dtype here, too.
"""

import struct
from typing import NamedTuple

import torch

from sentei.core.errors import ShapeError
from sentei.kernels import native
from sentei.kernels.linear import fused_cpp
from sentei.kernels.linear.layers import Layer, Turn
from sentei.kernels.linear.rows import gated_fits, heads_fit, heads_of

# The structs of native/linear.cpp: pointers, sizes and parameters, twice.
_BEFORE, _AFTER = struct.Struct("=12Q 7q 2f Q 3q 2f"), struct.Struct("=8Q 5q 5Q 4q 2f")


class Norm(NamedTuple):
    """An RMS norm: x / √(mean(x²) + ε) · (shift + weight), weight [I]."""

    weight: torch.Tensor
    epsilon: float
    shift: float


def before(x: torch.Tensor, norm: Norm, query: Layer, key: Layer, value: Layer, turn: Turn
           ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """What `rows.heads` makes of the normed rows, or None.

    Args:
        x: [B, T, I], one to eight rows.
        norm: before the heads; the rest as of `rows.heads`.
    Raises:
        ResourceError: memory ran out.
    """
    if not _plain(x, norm.weight, *query, *key, *value, *turn[:4]):
        return None
    if not _few(x) or norm.weight.shape != x.shape[-1:] or not heads_fit(x, *query, *key, *value, *turn[:4]):
        return None
    batch, tokens, width = x.shape
    sizes = [layer[0].shape[0] for layer in (query, key, value)]
    output, head = x.new_empty((batch, tokens, sum(sizes))), turn.cosine.shape[-1]
    given = (x, query[0], key[0], value[0], query[1], key[1], value[1], turn.query_norm, turn.key_norm, turn.cosine,
             turn.sine, output)
    fused_cpp.checked(native.load().sentei_before(_BEFORE.pack(
        *_pointers(given), batch * tokens, width, *sizes, head, turn.cosine.numel() // head, turn.epsilon, turn.shift,
        norm.weight.data_ptr(), x.dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE, *norm[1:])),
        "before")
    return heads_of(output, sizes, head)


def takes(residual: torch.Tensor, layer: Layer, norm: Norm, gate: Layer, up: Layer, down: Layer, activation: str
          ) -> bool:
    """Whether `after` takes these rows and layers, whatever attention gives of the width that `layer` reads."""
    (weight, bias), width = layer, residual.shape[-1]
    return _plain(residual, norm.weight, *layer, *gate, *up, *down) and _few(residual) and weight.dim() == 2 and (
        weight.shape[0] == width and (bias is None or bias.shape == (width,)) and norm.weight.shape == (width,)
        and gated_fits(residual, *gate, *up, *down) and down[0].shape[0] == width)


def after(attended: torch.Tensor, residual: torch.Tensor, layer: Layer, norm: Norm,
          gate: Layer, up: Layer, down: Layer, activation: str) -> torch.Tensor:
    """The layer's output [B, T, I], of what `takes` has let pass.

    Args:
        attended: [B, T, H], what attention gave.
        residual: [B, T, I], what the layer was given.
        layer: [I, H] and [I] or None.
        norm: of what both are together.
        gate, up, down, activation: as of `rows.gated`.
    Raises:
        ShapeError: attention gave something else than as many rows, of a layer's width and dtype.
        ResourceError: memory ran out.
    """
    (weight, bias), width = layer, residual.shape[-1]
    if attended.shape != (*residual.shape[:-1], weight.shape[1]) or attended.dtype is not residual.dtype:
        raise ShapeError("after", expected=f"{residual.dtype} {[*residual.shape[:-1], weight.shape[1]]}",
                         got=f"{attended.dtype} {list(attended.shape)}", do="give what attention makes of these rows")
    output, hidden, attended = torch.empty_like(residual), gate[0].shape[0], attended.contiguous()
    given = residual, gate[0], up[0], down[0], gate[1], up[1], down[1], output
    fused_cpp.checked(native.load().sentei_after(_AFTER.pack(
        *_pointers(given), residual.numel() // width, width, hidden, width, activation == "gelu_tanh",
        *_pointers((attended, residual, weight, bias, norm.weight)), weight.shape[1],
        residual.dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE, *norm[1:])), "after")
    return output


def _plain(x: torch.Tensor, *parts: torch.Tensor | None) -> bool:
    """Whether all of these are nothing but memory, of one dtype, and the call is about nothing else."""
    if not fused_cpp.is_quiet() or not fused_cpp.is_plain(x):
        return False
    dtype = x.dtype
    for part in parts:
        if part is not None and not (fused_cpp.is_plain(part) and part.dtype is dtype):
            return False
    return True


def _few(x: torch.Tensor) -> bool:
    return x.dim() == 3 and 0 < x.numel() <= fused_cpp.FEW_ROWS * x.shape[-1]


def _pointers(given: tuple[torch.Tensor | None, ...]) -> list[int]:
    return [0 if part is None else part.data_ptr() for part in given]
