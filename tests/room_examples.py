"""What the contract of the rooms (axes/test_contract.py) needs to know of each: one row a room."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from sentei.axes import channels, connections, depth, experts, heads, rank, weights
from sentei.axes.axis import Axis
from sentei.core.rules import All, Capacity, Fixed, Mass, Rule, Threshold, TopK
from sentei.core.tracing import trace

# Each list from dearest to cheapest.
LADDERS = {"top_k": [TopK(20), TopK(5), TopK(3), TopK(1), TopK(0)],
           "mass": [All(), Mass(1.0), Mass(0.6), Mass(0.2), Mass(0)],
           "threshold": [Threshold(0), Threshold(0.1), Threshold(0.5), Threshold(1)]}


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the battery needs to know of a room.

    Args:
        config: from a rule to a small configuration with as few forced candidates as the room allows.
        axis: from a configuration to the room.
        inputs: fp32 tensors the room takes.
        output: the shape it returns.
        dense: a dense layer, and what it computes from x.
        x: the input of the dense layer.
        reach: from (axis, inputs) to the gradients, by bool mask, of what was kept and of what was not.
        rules: All, or what stands for it, and some that keep a part.
        strict: TopK(4), or a Capacity where a query has fewer candidates, that keeps a part.
        whole: rules that keep everything.
        ladders: lists of rules, each from dearest to cheapest; none where the room does not choose.
        mixed: which inputs autocast may hand in bf16 while the others are fp32.
        weighs_by_score: the score is also the weight, and so on the path of the gradient.
    """

    config: Callable[[Rule], object]
    axis: Callable[[object], Axis]
    inputs: Callable[[], list[torch.Tensor]]
    output: tuple[int, ...]
    dense: Callable[[], tuple[nn.Module, Callable]]
    x: Callable[[], torch.Tensor]
    reach: Callable[[Axis, list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
    rules: tuple[Rule, ...] = (All(), TopK(4), Mass(0.5), Threshold(0.5))
    strict: Rule = TopK(4)
    whole: tuple[Rule, ...] = (All(), Mass(1.0), Threshold(0), TopK(10**6))
    ladders: dict[str, list[Rule]] = field(default_factory=lambda: LADDERS)
    mixed: tuple[int, ...] = ()
    weighs_by_score: bool = False


def attention_layer() -> tuple[nn.Module, Callable]:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    mask = torch.ones(20, 20, dtype=torch.bool).triu(1)
    return layer, lambda x: layer(x, x, x, attn_mask=mask, need_weights=False)[0]


def reach_of_connections(axis, inputs):
    """Query block 3 alone is asked; the values of a tile get a gradient where a head of the group keeps the tile."""
    query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
    with trace(axis) as records:
        output = axis(query, key, value)
    gradients = torch.autograd.grad(output[:, 12:16].sum(), (key, value))
    kept = records[0].selection.mask()[:, :, 3].unflatten(1, (2, -1)).any(2).transpose(1, 2)
    kept = kept.repeat_interleave(2, 1)[:, :20]
    # One's own block is cut by causality, and a key that is alone in its softmax has no say: look at whole tiles.
    values = gradients[1].abs().amax(-1)
    assert ((gradients[0].abs().amax(-1) > 0) <= kept).all()
    seen = kept.clone()
    seen[:, 16:] = False
    return values[seen], values[~kept]


def reach_of_experts(axis, inputs):
    """One token is asked; the weights of an expert get a gradient where the token keeps it."""
    up, down = (tensor.clone().requires_grad_() for tensor in inputs[2:])
    with trace(axis) as records:
        output = axis(*inputs[:2], up, down)
    gradients = torch.autograd.grad(output[1, 3].sum(), (up, down))
    kept = records[0].selection.mask()[1, 3]
    sizes = torch.stack([gradient.abs().amax((1, 2)) for gradient in gradients])
    return sizes[:, kept], sizes[:, ~kept]


def reach_of_heads(axis, inputs):
    """Query head 3 alone is asked, which shares the second of four heads."""
    value = inputs[2].clone().requires_grad_()
    with trace(axis) as records:
        output = axis(*inputs[:2], value)
    gradient, = torch.autograd.grad(output[:, -1, 3].sum(), value)
    kept = records[0].selection.mask()[:, 3]
    sizes = gradient.abs().amin((1, 3)), gradient.abs().amax((1, 3))
    return sizes[0][kept], sizes[1][~kept]


def reach_of_rank(axis, inputs):
    """The first token alone is asked; a direction it keeps moves its row of a and its column of b."""
    x, a, b = (tensor.clone().requires_grad_() for tensor in inputs)
    with trace(axis) as records:
        output = axis(x, a, b)
    gradients = torch.autograd.grad(output[0, 0].sum(), (a, b))
    kept = records[0].selection.mask()[0, 0]
    sizes = torch.stack([gradients[0].abs().amax(1), gradients[1].abs().amax(0)], 1)
    return sizes[kept], sizes[~kept]


def adapted_layer() -> tuple[nn.Module, Callable]:
    layer = rank.from_dense(nn.Linear(16, 10), rank.Config(rank=6))
    nn.init.normal_(layer.b)
    return layer, lambda x: nn.functional.linear(x, layer.weight + layer.rank.scale * layer.b @ layer.a, layer.bias)


def reach_of_channels(axis, inputs):
    """A map that is kept moves with its pixels, its logit and its slice of the weight."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    with trace(axis) as records:
        output = axis(*inputs)
    maps, logits, weight = torch.autograd.grad(output.square().sum(), inputs)
    kept = records[0].selection.mask()[0, 0]
    sizes = torch.stack([maps[0].abs().amax((1, 2)), logits[0].abs(), weight.abs().amax((0, 2, 3))], 1)
    return sizes[kept], sizes[~kept]


def gated_layer() -> tuple[nn.Module, Callable]:
    layer = nn.Sequential(channels.SqueezeExcitation(8, reduction=2), nn.Conv2d(8, 3, 3))
    return layer, lambda x: layer(x)


def transformer_layer() -> tuple[nn.Module, Callable]:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    mask = torch.ones(20, 20, dtype=torch.bool).triu(1)
    return layer, lambda x: layer(x, src_mask=mask)


def depth_room(config: depth.Config) -> depth.Depth:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        block = depth.Transformer(width=16, num_heads=4, hidden=32, rotary=100.0)
        return depth.Depth(config, block, width=16, work=block.work)


def reach_of_depth(axis, inputs):
    """The gradient into a token beyond the residual's: of those kept through the block, of the others none."""
    x = inputs[0].clone().requires_grad_()
    with trace(axis) as records:
        output = axis(x)
    gradient, = torch.autograd.grad(output.square().sum(), x)
    kept = records[0].selection.mask()[..., 0]
    through = (gradient - 2 * output).detach().abs().amax(-1)
    return through[kept], through[~kept] if (~kept).any() else through[:0]


def weights_room(config: weights.Config) -> weights.Weights:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return weights.from_dense(nn.Linear(16, 12), config)


def reach_of_weights(axis, inputs):
    """The gradient into the columns of the weight."""
    with trace(axis) as records:
        output = axis(*inputs)
    gradient, = torch.autograd.grad(output.square().sum(), axis.layer.weight)
    kept, columns = records[0].selection.mask()[0], gradient.abs().amax(0)
    return columns[kept], columns[~kept]


def linear_layer() -> tuple[nn.Module, Callable]:
    layer = nn.Linear(16, 12)
    return layer, layer


ROOMS = {
    "connections": Example(
        config=lambda rule: connections.Config(rule=rule, tile=(4, 2), window=0),
        axis=connections.Connections,
        inputs=lambda: [torch.randn(2, 20, 4, 8) * 2, torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2, 6)],
        output=(2, 20, 4, 6),
        dense=attention_layer,
        x=lambda: torch.randn(2, 20, 16),
        reach=reach_of_connections,
    ),
    "experts": Example(
        config=lambda rule: experts.Config(rule=rule, unit=4),
        axis=lambda config: experts.Experts(config, 6),
        inputs=lambda: [torch.randn(2, 20, 16), torch.randn(2, 20, 6), torch.randn(6, 8, 16), torch.randn(6, 5, 4)],
        output=(2, 20, 5),
        dense=lambda: (layer := nn.Sequential(nn.Linear(16, 24, bias=False), nn.SiLU(), nn.Linear(24, 16)), layer),
        x=lambda: torch.randn(2, 20, 16),
        reach=reach_of_experts,
        mixed=(0,),
    ),
    "heads": Example(
        config=lambda rule: heads.Config(),
        axis=heads.Heads,
        inputs=lambda: [torch.randn(2, 20, 8, 8), torch.randn(2, 20, 4, 8), torch.randn(2, 20, 4, 6)],
        output=(2, 20, 8, 6),
        dense=attention_layer,
        x=lambda: torch.randn(2, 20, 16),
        reach=reach_of_heads,
        rules=(heads.Shared(),),
        whole=(heads.Shared(),),
        strict=heads.Shared(),
        ladders={},
    ),
    "rank": Example(
        config=lambda rule: rank.Config(rule=rule, rank=6),
        axis=rank.Rank,
        inputs=lambda: [torch.randn(2, 20, 16), torch.randn(6, 16), torch.randn(10, 6)],
        output=(2, 20, 10),
        dense=adapted_layer,
        x=lambda: torch.randn(2, 20, 16),
        reach=reach_of_rank,
        mixed=(0,),
    ),
    "channels": Example(
        config=lambda rule: channels.Config(rule=rule),
        axis=channels.Channels,
        # One image: a batch of several that choose for themselves saves nothing, and says so.
        inputs=lambda: [torch.randn(1, 8, 6, 5), torch.randn(1, 8) * 2, torch.randn(3, 8, 3, 3)],
        output=(1, 3, 4, 3),
        dense=gated_layer,
        x=lambda: torch.randn(2, 8, 6, 5),
        reach=reach_of_channels,
        mixed=(0, 1),
    ),
    "depth": Example(
        config=lambda rule: depth.Config(rule=rule),
        axis=depth_room,
        inputs=lambda: [torch.randn(2, 20, 16)],
        output=(2, 20, 16),
        dense=transformer_layer,
        x=lambda: torch.randn(2, 20, 16),
        reach=reach_of_depth,
        mixed=(0,),
        rules=(All(), Capacity(0.5), Capacity(0.25)),
        strict=Capacity(0.3),
        # A lone candidate's share is always 1, so that no threshold drops it.
        whole=(All(), Mass(1.0), Threshold(0), Threshold(1), TopK(10**6), Capacity(1.0)),
        ladders={"capacity": [All(), Capacity(1.0), Capacity(0.5), Capacity(0.2), Capacity(0)],
                 "top_k": [TopK(2), TopK(1), TopK(0)]},
        weighs_by_score=True,
    ),
    "weights": Example(
        config=lambda rule: weights.Config(rule=rule),
        axis=weights_room,
        inputs=lambda: [torch.randn(2, 20, 16)],
        output=(2, 20, 12),
        dense=linear_layer,
        x=lambda: torch.randn(2, 20, 16),
        reach=reach_of_weights,
        mixed=(0,),
        rules=(All(), TopK(4), Capacity(0.5), Fixed((0, 2))),
        whole=(All(), TopK(10**6), Capacity(1.0), Fixed(tuple(range(16)))),
        ladders={"capacity": [All(), Capacity(1.0), Capacity(0.5), Capacity(0.2), Capacity(0)],
                 "top_k": LADDERS["top_k"]},
    ),
}
