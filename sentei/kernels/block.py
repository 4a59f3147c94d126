"""A decoder layer whose few rows go through it in one native call, attention to the pages of a cache included.

    query, key, value = heads(norm(x)),   appended to the cache
    h = x + linear(attention to pages),   h + gated(norm(h))

For one to eight rows on the CPU, in the plain case alone (`fused_cpp.is_plain`, while `fused_cpp.is_quiet`); every
other case is answered None: for it the layer's own forward is there. Results are those of `linear.rows`,
`linear.fused_cpp` and `paging`, to the bit: what is between two of their calls is rounded to the dtype here, too.
"""

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

# The struct of native/block.cpp: pointers, sizes and parameters.
_BLOCK = struct.Struct("=26Q 19q 8d")


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


def decoder_layer(x: torch.Tensor, before: Before, buffers: Buffers, choice: PageChoice, after: After
                  ) -> torch.Tensor | None:
    """Returns the layer's output [B, T, I], or None where it is left to the layer.

    Args:
        x: [B, T, I], one to eight rows: the tokens that come after those in the buffers, each of which sees what is
            before it, and itself.
        buffers: written to, behind what they hold: after the call T tokens more stand there.
    Raises:
        RuleError: NaN or infinity among the scores.
        ResourceError: memory ran out.
    Cost: reading the layer's weights once, and what `paging.attend` reads.
    """
    if not _takes(x, before, buffers, choice, after):
        return None
    output, (batch, tokens, width) = torch.empty_like(x), x.shape
    groups, room, head = buffers.keys.shape[1:]
    value_head, turn, (rule, parameter) = buffers.values.shape[3], before.turn, numbers_of(choice.rule)
    checked(native.load().sentei_block(_BLOCK.pack(
        *_pointers(x, before.norm.weight, choice.lengths, before.query[0], before.key[0], before.value[0],
                   before.query[1], before.key[1], before.value[1], turn.query_norm, turn.key_norm, turn.cosine,
                   turn.sine, *buffers[:3], *after.layer, after.norm.weight, after.gate[0], after.up[0], after.down[0],
                   after.gate[1], after.up[1], after.down[1], output),
        batch, tokens, width, before.query[0].shape[0] // head, groups, head, value_head,
        turn.cosine.numel() // head, after.gate[0].shape[0], after.activation == "gelu_tanh",
        room, buffers.length, PAGE, min(choice.window, room), rule, x.dtype is torch.bfloat16,
        buffers.keys.dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE,
        *before.norm[1:], turn.epsilon, turn.shift, *after.norm[1:], parameter, choice.scale)), "decoder_layer")
    return output


def _takes(x: torch.Tensor, before: Before, buffers: Buffers, choice: PageChoice, after: After) -> bool:
    """Whether all of these are nothing but memory, fit one another, and the call is about nothing else."""
    if not fused_cpp.is_quiet() or x.dim() != 3 or not 0 < x.numel() <= fused_cpp.FEW_ROWS * x.shape[-1]:
        return False
    norm, query, key, value, turn = before
    layer, second, gate, up, down, activation = after
    layers = query, key, value, layer, gate, up, down
    if not (_plain(x.dtype, x, norm.weight, second.weight, *turn[:2], *(weight for weight, _ in layers))
            and _plain(x.dtype, *(part for part in (*turn[2:4], *(bias for _, bias in layers)) if part is not None))
            and _plain(buffers.keys.dtype, *buffers[:3])):
        return False
    gated, gain = (*gate, *up, *down), x.shape[-1:]
    return (norm.weight.shape == second.weight.shape == gain and heads_fit(x, *query, *key, *value, *turn[:4])
            and _buffers_fit(buffers, x, before) and _choice_fits(choice, len(x)) and activation in ACTIVATIONS
            and layer[0].shape == (*gain, query[0].shape[0] // buffers.keys.shape[3] * buffers.values.shape[3])
            and (layer[1] is None or layer[1].shape == gain) and gated_fits(x, *gated) and down[0].shape[:1] == gain)


def _buffers_fit(buffers: Buffers, x: torch.Tensor, before: Before) -> bool:
    """Whether the buffers are those of such heads, and have room for the rows."""
    if buffers.keys.dim() != 4:
        return False
    head, room = before.turn.cosine.shape[-1], buffers.keys.shape[2]
    heads, groups = before.query[0].shape[0] // head, before.key[0].shape[0] // head
    place = x.shape[0], groups, room
    return (buffers.keys.shape == (*place, head)
            and buffers.values.shape == (*place, before.value[0].shape[0] // groups)
            and buffers.bounds.shape == (*place[:2], room // PAGE, 2, head) and room % PAGE == 0
            and heads > 0 and heads % groups == 0 and 0 <= buffers.length <= room - x.shape[1])


def _choice_fits(choice: PageChoice, batch: int) -> bool:
    """Whether the library knows the rule, and the lengths are of so many rows."""
    lengths = choice.lengths
    return can_choose(choice.rule) and choice.window >= 0 and (lengths is None or (
        lengths.shape == (batch, 2) and lengths.dtype is torch.int64 and lengths.is_cpu and lengths.is_contiguous()))


def _plain(dtype: torch.dtype, *parts: torch.Tensor) -> bool:
    return all([fused_cpp.is_plain(part) and part.dtype is dtype for part in parts])


def _pointers(*given: torch.Tensor | None) -> list[int]:
    return [0 if part is None else part.data_ptr() for part in given]
