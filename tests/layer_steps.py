"""A decoder layer by one call, and by the smaller calls one after another, with which it is compared."""

import torch

from sentei.kernels import block, paging
from sentei.kernels.block import Buffers, Step
from sentei.kernels.linear import fused_cpp, rows
from sentei.kernels.paging import PAGE, bounds_of


def decoder_layer(x, before, buffers, choice, after) -> torch.Tensor | None:
    """The output by one call, or None where its weights or itself are not taken."""
    prepared = block.prepare(x, before, after)
    outputs = () if prepared is None else block.decoder_layers(x, before.turn[:2], [Step(prepared, buffers, choice)])
    return outputs[0] if outputs else None


def in_steps(x, before, buffers, choice, after) -> tuple[torch.Tensor, Buffers]:
    """The output by the smaller calls, and the cache after it; takes what `block.decoder_layer` does."""
    query, *states = rows.heads(rows.norm(x, *before.norm), *before[1:])
    first, end = buffers.length, buffers.length + x.shape[1]
    keys, values, bounds = (part.clone() for part in buffers[:3])
    for kept, new in zip((keys, values), states, strict=True):
        kept[:, :, first:end] = new
    pages = slice(first // PAGE, end // PAGE)
    bounds[:, :, pages] = bounds_of(keys[:, :, pages.start * PAGE:pages.stop * PAGE])
    pages = paging.Pages(num_queries=x.shape[1], num_keys=end, rule=choice.rule, window=choice.window, bounds=bounds,
                         lengths=choice.lengths)
    attended, _ = paging.attend(query.transpose(1, 2), keys[:, :, :end].transpose(1, 2),
                                values[:, :, :end].transpose(1, 2), pages, scale=choice.scale, impl="fused_cpp")
    hidden = x + fused_cpp.linear(attended.flatten(2), *after.layer)
    return (hidden + rows.gated(rows.norm(hidden, *after.norm), *after[2:5], after.activation),
            Buffers(keys, values, bounds, first))
