"""What else a decoding step is made of, in one native call each: a gated MLP, an RMS norm, an attention's heads.

For few rows on the CPU. No ops of torch: they take the plain case (`fused_cpp.is_plain`, while `fused_cpp.is_quiet`)
and answer None to every other, for which the module's own forward is there. fp32 and bfloat16; what is between the
first number read and the last one written is fp32, so that bfloat16 is rounded once where torch rounds at every step.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from sentei.kernels import native
from sentei.kernels.linear import fused_cpp

ACTIVATIONS = {"silu": nn.functional.silu, "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh")}
MOST_NUMBERS = 1 << 17  # of a norm, which is made by one thread

Layer = tuple[torch.Tensor, torch.Tensor | None]


class Turn(NamedTuple):
    """What a query and a key go through after their linear layers: an RMS norm, and the rotary embedding.

    Args:
        cosine, sine: [N, D] or with ones before; row r is turned by row r mod N, number j together with j + D / 2.
        query_norm, key_norm: [D] or None.
        epsilon, shift: as of `norm`.
    """

    cosine: torch.Tensor
    sine: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0
    shift: float = 0.0


def gated(x: torch.Tensor, gate: Layer, up: Layer, down: Layer, activation: str) -> torch.Tensor | None:
    """Returns down(act(gate(x)) · up(x)), or None where this is not the plain case.

    Args:
        x: [..., I], one to eight rows.
        gate, up, down: weight and bias, or None: [F, I] and [F], the same, [O, F] and [O]; of the input's dtype.
        activation: one of ACTIVATIONS.
    Raises:
        ResourceError: memory ran out.
    Cost: reading the weights once. A row depends neither on the other rows nor on the number of threads.
    """
    if not (fused_cpp.is_quiet() and fused_cpp.is_plain(x)):
        return None
    dtype, shape = x.dtype, x.shape
    width = shape[-1] if shape else 0
    hidden, outputs = len(gate[0]), len(down[0])
    rows = x.numel() // (width or 1)
    if not 1 <= rows <= fused_cpp.MOST_ROWS or not (
            _fits(gate, hidden, width, dtype) and _fits(up, hidden, width, dtype)
            and _fits(down, outputs, hidden, dtype)):
        return None
    output = x.new_empty((*shape[:-1], outputs))
    biases = [None if bias is None else bias.data_ptr() for _, bias in (gate, up, down)]
    fused_cpp.checked(_gated()(
        x.data_ptr(), gate[0].data_ptr(), up[0].data_ptr(), down[0].data_ptr(), *biases, output.data_ptr(), rows, width,
        hidden, outputs, activation == "gelu_tanh", dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE))
    return output


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, shift: float) -> torch.Tensor | None:
    """Returns x / √(mean(x²) + ε) · (shift + weight), or None where this is not the plain case.

    Args:
        x: [..., I], up to MOST_NUMBERS numbers.
        weight: [I], of the input's dtype.
        epsilon: ε.
        shift: 1 where the weights are kept less one, as Gemma's; else 0.
    """
    if not (fused_cpp.is_quiet() and fused_cpp.is_plain(x) and fused_cpp.is_plain(weight)):
        return None
    dtype, shape, numbers = x.dtype, x.shape, x.numel()
    width = shape[-1] if shape else 0
    if not 1 <= numbers <= MOST_NUMBERS or weight.dtype is not dtype or weight.shape != (width,):
        return None
    output = torch.empty_like(x)
    _norm()(x.data_ptr(), weight.data_ptr(), output.data_ptr(), numbers // width, width, epsilon, shift,
            dtype is torch.bfloat16, native.MACHINE)
    return output


def heads(x: torch.Tensor, query: Layer, key: Layer, value: Layer, turn: Turn
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Returns query [B, H, T, D], key [B, G, T, D] and value [B, G, T, Dv], or None where this is not the plain case.

        turn(norm(q_proj(x))), turn(norm(k_proj(x))), v_proj(x);   turn(u)_j = u_j cos_j ∓ u_(j ± D/2) sin_j

    Args:
        x: [B, T, I], one to eight rows.
        query, key, value: weight and bias, or None: [H·D, I], [G·D, I] and [G·Dv, I].
        turn: of the input's dtype.
    Raises:
        ResourceError: memory ran out.
    Cost: as `gated`; the results are views of one tensor.
    """
    if not (fused_cpp.is_quiet() and fused_cpp.is_plain(x)) or x.dim() != 3:
        return None
    (batch, tokens, width), dtype = x.shape, x.dtype
    count, sizes = batch * tokens, [len(weight) for weight, _ in (query, key, value)]
    head = turn.cosine.shape[-1] if turn.cosine.dim() else 0
    if not 1 <= count <= fused_cpp.MOST_ROWS or head < 2 or head % 2 or sizes[0] % head or not sizes[1] or (
            sizes[1] % head) or sizes[2] % (sizes[1] // head) or not sizes[2]:
        return None
    if not all(_fits(layer, size, width, dtype) for layer, size in zip((query, key, value), sizes, strict=True)):
        return None
    turns = turn.cosine.numel() // head
    if turn.sine.shape != turn.cosine.shape or turns not in (count, tokens) or not all(
            fused_cpp.is_plain(part) and part.dtype is dtype for part in turn[:2]) or not all(
            norm is None or fused_cpp.is_plain(norm) and norm.dtype is dtype and norm.shape == (head,)
            for norm in turn[2:4]):
        return None
    total = sum(sizes)
    output = x.new_empty((batch, tokens, total))
    pointers = [None if part is None else part.data_ptr() for part in (
        x, query[0], key[0], value[0], query[1], key[1], value[1], turn.query_norm, turn.key_norm, turn.cosine,
        turn.sine, output)]
    fused_cpp.checked(_heads()(
        *pointers, count, width, *sizes, head, turns, turn.epsilon, turn.shift, dtype is torch.bfloat16,
        torch.get_num_threads(), native.MACHINE))
    groups, strides, before = sizes[1] // head, (tokens * total, total), 0
    made = []
    for size, each in zip(sizes, (head, head, sizes[2] // groups), strict=True):
        made.append(output.as_strided((batch, size // each, tokens, each), (strides[0], each, strides[1], 1), before))
        before += size
    return tuple(made)


def _fits(layer: Layer, outputs: int, width: int, dtype: torch.dtype) -> bool:
    weight, bias = layer
    return (fused_cpp.is_plain(weight) and weight.dtype is dtype and weight.shape == (outputs, width)
            and (bias is None or fused_cpp.is_plain(bias) and bias.dtype is dtype and bias.shape == (outputs,)))


@cache
def _gated():
    """The function of the library; its arguments are pointers and 64-bit integers."""
    function = native.load().sentei_gated
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 8
    return function


@cache
def _norm():
    function = native.load().sentei_norm
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_double] * 2 + [ctypes.c_int64] * 2
    function.restype = None
    return function


@cache
def _heads():
    function = native.load().sentei_heads
    function.argtypes = [ctypes.c_void_p] * 12 + [ctypes.c_int64] * 7 + [ctypes.c_double] * 2 + [ctypes.c_int64] * 3
    return function
