"""Decoder layers whose few rows go through them in one native call, attention to the pages of a cache included.

    query, key, value = heads(norm(x)),   appended to the cache
    h = x + linear(attention to pages),   h + gated(norm(h))

For one to eight rows on the CPU, in the plain case alone (`fused_cpp.is_plain`, while `fused_cpp.is_quiet`); every
other case is answered None: for it the layer's own forward is there. Results are those of `linear.rows`,
`linear.fused_cpp` and `paging`, to the bit: what is between two of their calls is rounded to the dtype here, too.

Questions about the weights take longer than a token has, so they are asked once: `prepare` answers for as long as the
weights stay where they are, which `place_of` tells.
"""

import ctypes
import math
import struct
from typing import NamedTuple

import torch

from sentei.core.rules import Rule
from sentei.kernels import native
from sentei.kernels.linear import fused_cpp
from sentei.kernels.linear.layers import ACTIVATIONS, Layer, Turn
from sentei.kernels.linear.rows import gated_fits, heads_fit
from sentei.kernels.paging import PAGE, can_choose
from sentei.kernels.paging.fused_cpp import checked, numbers_of

# The structs of native/block.cpp: pointers, sizes and parameters.
_WEIGHTS, _CALL = struct.Struct("=18Q 8q 6d"), struct.Struct("=8Q 11q 2d")


class Norm(NamedTuple):
    """An RMS norm: x / √(mean(x²) + ε) · (shift + weight), weight [I]."""

    weight: torch.Tensor
    epsilon: float
    shift: float


class Before(NamedTuple):
    """What a layer has before its attention: a norm, then as of `rows.heads`."""

    norm: Norm
    query: Layer
    key: Layer
    value: Layer
    turn: Turn


class Buffers(NamedTuple):
    """Those of a cache, contiguous and of one dtype, and how many tokens stand in them.

    Args:
        keys, values: [B, G, room, D] and [B, G, room, Dv]; PAGE divides the room.
        bounds: [B, G, room / PAGE, 2, D], the lowest and the highest key of every whole page.
        length: tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bounds: torch.Tensor
    length: int


class PageChoice(NamedTuple):
    """How pages are chosen, and among which, as in `paging.Pages`; and the factor on the scores."""

    rule: Rule
    window: int
    scale: float
    lengths: torch.Tensor | None = None


class After(NamedTuple):
    """What a layer has after its attention: a linear layer [I, H·Dv], a norm, and as of `rows.gated`."""

    layer: Layer
    norm: Norm
    gate: Layer
    up: Layer
    down: Layer
    activation: str


class Prepared(NamedTuple):
    """Weights that fit one another, as the library is told of them, and what a call must have to fit them.

    Args:
        packed: the library's struct, which holds their places and keeps none of them alive.
        dtype: theirs.
        width: I; heads, groups: H and G; head, value_head: D and Dv.
    """

    packed: bytes
    dtype: torch.dtype
    width: int
    heads: int
    groups: int
    head: int
    value_head: int


def place_of(weight: torch.Tensor | None) -> tuple | None:
    """Where its numbers lie and in which form: as long as that is the same, whoever prepared it may read there.

    None for no weight; of one that is not nothing but memory the place is None.
    """
    return None if weight is None else (weight.data_ptr() if fused_cpp.is_plain(weight) else None, weight.shape,
                                        weight.dtype)


def prepare(x: torch.Tensor, before: Before, after: After) -> Prepared | None:
    """Returns what `decoder_layers` takes for these weights, or None where they are left to the layer.

    Args:
        x: [B, T, I], some rows of it.
        before, after: what they are; `before.turn` has the cosines and sines for these rows.
    """
    if not _weights_fit(x, before, after):
        return None
    norm, query, key, value, turn = before
    head, is_half = turn.cosine.shape[-1], x.dtype is torch.bfloat16
    heads, groups = (layer[0].shape[0] // head for layer in (query, key))
    sizes = x.shape[-1], heads, groups, head, value[0].shape[0] // groups
    packed = _WEIGHTS.pack(
        *_pointers(norm.weight, query[0], key[0], value[0], query[1], key[1], value[1], turn.query_norm, turn.key_norm,
                   *after.layer, after.norm.weight, after.gate[0], after.up[0], after.down[0], after.gate[1],
                   after.up[1], after.down[1]),
        *sizes, after.gate[0].shape[0], after.activation == "gelu_tanh", is_half, *norm[1:], turn.epsilon, turn.shift,
        *after.norm[1:])
    return Prepared(packed, x.dtype, *sizes)


class Step(NamedTuple):
    """One layer of a call: its weights, which lie where they lay, and its cache, written to behind what it holds."""

    layer: Prepared
    buffers: Buffers
    choice: PageChoice


def decoder_layers(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], steps: list[Step]
                   ) -> tuple[torch.Tensor, ...]:
    """Returns the output [B, T, I] of every layer, each of which is the input of the next.

    They end before the first layer that is left to its own forward, or whose scores are not finite: none may be left.

    Args:
        x: [B, T, I], one to eight rows: the tokens that come after those in the buffers, each of which sees what is
            before it, and itself. After the call T tokens more stand in the buffers.
        rotation: cosines and sines, as of `Turn`.
        steps: the layers.
    Raises:
        RuleError: NaN or infinity among the scores of the first.
        ResourceError: memory ran out.
    Cost: reading the layers' weights once, and what `paging.attend` reads. A call from Python costs more than it seems:
        between two layers nothing of Python is left in the processor's caches.
    """
    taken = _how_many(x, rotation, steps)
    if not taken:
        return ()
    rows, done = (x, *(torch.empty_like(x) for _ in range(taken))), ctypes.c_int64()
    status = native.load().sentei_blocks(
        taken, (ctypes.c_char_p * taken)(*(step.layer.packed for step in steps[:taken])),
        b"".join([_packed(rows[i], rows[i + 1], rotation, step) for i, step in enumerate(steps[:taken])]),
        ctypes.byref(done))
    if not done.value:
        checked(status, "decoder_layers")
    return rows[1:done.value + 1]


def _how_many(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], steps: list[Step]) -> int:
    """How many of the layers are taken."""
    if not (fused_cpp.is_quiet() and steps and _rows_fit(x, rotation, steps[0].layer)):
        return 0
    for taken, step in enumerate(steps):
        if step.layer[1:] != steps[0].layer[1:] or not _cache_fits(step, x.shape[0], x.shape[1]):
            return taken
    return len(steps)


def _packed(x: torch.Tensor, output: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], step: Step) -> bytes:
    """The library's struct of a layer's call."""
    layer, (keys, values, bounds, length), choice = step
    rule, parameter = numbers_of(choice.rule)
    return _CALL.pack(
        *_pointers(x, choice.lengths, *rotation, keys, values, bounds, output), x.shape[0], x.shape[1],
        rotation[0].numel() // layer.head, keys.shape[2], length, PAGE, min(choice.window, keys.shape[2]), rule,
        keys.dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE, parameter, choice.scale)


def _weights_fit(x: torch.Tensor, before: Before, after: After) -> bool:
    """Whether all of these are nothing but memory, and fit one another."""
    norm, query, key, value, turn = before
    layer, second, gate, up, down, activation = after
    layers = query, key, value, layer, gate, up, down
    if not (_plain(x.dtype, x, norm.weight, second.weight, *turn[:2], *(weight for weight, _ in layers))
            and _plain(x.dtype, *(part for part in (*turn[2:4], *(bias for _, bias in layers)) if part is not None))):
        return False
    gain = x.shape[-1:]
    if not (heads_fit(x, *query, *key, *value, *turn[:4]) and gated_fits(x, *gate, *up, *down)
            and norm.weight.shape == second.weight.shape == down[0].shape[:1] == gain and activation in ACTIVATIONS):
        return False
    heads, groups = (part[0].shape[0] // turn.cosine.shape[-1] for part in (query, key))
    return (heads > 0 and heads % groups == 0 and layer[0].shape == (*gain, heads * (value[0].shape[0] // groups))
            and (layer[1] is None or layer[1].shape == gain))


def _rows_fit(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], layer: Prepared) -> bool:
    """Whether rows and turns are nothing but memory, and fit the layer."""
    if not (_plain(layer.dtype, x, *rotation) and x.dim() == 3 and x.shape[2] == layer.width
            and 0 < x.numel() <= fused_cpp.FEW_ROWS * layer.width):
        return False
    (batch, tokens, _), (cosine, sine) = x.shape, rotation
    return (cosine.shape == sine.shape and cosine.shape[-1:] == (layer.head,)
            and cosine.numel() // layer.head in (batch * tokens, tokens))


def _cache_fits(step: Step, batch: int, tokens: int) -> bool:
    """Whether the buffers are nothing but memory, of such heads, have room for the rows, and the choice is known."""
    layer, (keys, values, bounds, length), choice = step
    if not _plain(keys.dtype, keys, values, bounds) or keys.dim() != 4:
        return False
    room, place = keys.shape[2], (batch, layer.groups)
    return (keys.shape == (*place, room, layer.head) and values.shape == (*place, room, layer.value_head)
            and bounds.shape == (*place, room // PAGE, 2, layer.head) and room % PAGE == 0
            and 0 <= length <= room - tokens and _choice_fits(choice, batch))


def _choice_fits(choice: PageChoice, batch: int) -> bool:
    """Whether the library knows the rule, the scale is finite, and the lengths are of so many rows."""
    lengths = choice.lengths
    return can_choose(choice.rule) and choice.window >= 0 and math.isfinite(choice.scale) and (lengths is None or (
        lengths.shape == (batch, 2) and lengths.dtype is torch.int64 and lengths.is_cpu and lengths.is_contiguous()))


def _plain(dtype: torch.dtype, *parts: torch.Tensor) -> bool:
    return all([fused_cpp.is_plain(part) and part.dtype is dtype for part in parts])


def _pointers(*given: torch.Tensor | None) -> list[int]:
    return [0 if part is None else part.data_ptr() for part in given]
