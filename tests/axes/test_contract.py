"""What every room promises, over the table AXES. A new room adds one row to ROOMS and inherits the battery."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from sentei.axes import AXES, channels, connections, experts, heads, rank
from sentei.axes.axis import Axis
from sentei.core.errors import FileError
from sentei.core.rules import All, Mass, Rule, Threshold, TopK
from sentei.core.tracing import Tap, trace

RULES = (All(), TopK(4), Mass(0.5), Threshold(0.5))


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
        rules: that the room takes; a room of other rules than RULES is asked nothing about choosing.
        everything: rules that keep all, the first of them the default.
    """

    config: Callable[[Rule], object]
    axis: Callable[[object], Axis]
    inputs: Callable[[], list[torch.Tensor]]
    output: tuple[int, ...]
    dense: Callable[[], tuple[nn.Module, Callable]]
    x: Callable[[], torch.Tensor]
    reach: Callable[[Axis, list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
    rules: tuple[Rule, ...] = RULES
    everything: tuple[Rule, ...] = (All(), Mass(1.0), Threshold(0), TopK(10**6))


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
        everything=(heads.Shared(),),
    ),
    "rank": Example(
        config=lambda rule: rank.Config(rule=rule, rank=6),
        axis=rank.Rank,
        inputs=lambda: [torch.randn(2, 20, 16), torch.randn(6, 16), torch.randn(10, 6)],
        output=(2, 20, 10),
        dense=adapted_layer,
        x=lambda: torch.randn(2, 20, 16),
        reach=reach_of_rank,
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
    ),
}
# Each list from dearest to cheapest.
LADDERS = {"top_k": [TopK(20), TopK(5), TopK(3), TopK(1), TopK(0)],
           "mass": [All(), Mass(1.0), Mass(0.6), Mass(0.2), Mass(0)],
           "threshold": [Threshold(0), Threshold(0.1), Threshold(0.5), Threshold(1)]}
every_room = pytest.mark.parametrize("room", AXES)
choosing_room = pytest.mark.parametrize("room", [room for room in AXES if ROOMS[room].rules == RULES])
PAIRS = [pytest.param(room, rule, id=f"{room}-{rule}") for room in AXES for rule in ROOMS[room].rules]
every_pair = pytest.mark.parametrize("room, rule", PAIRS)


def build(room: str, rule: Rule) -> tuple[Axis, list[torch.Tensor]]:
    example = ROOMS[room]
    return example.axis(example.config(rule)), example.inputs()


def one_record(axis: Axis, inputs):
    with trace(axis) as records:
        output = axis(*inputs)
    assert len(records) == 1, "a room makes one selection a call"
    return output, records[0]


def test_every_room_has_its_row():
    assert set(ROOMS) == set(AXES)


@every_room
def test_the_table_holds_a_config_an_axis_and_a_conversion(room):
    config, axis, from_dense = AXES[room]
    assert issubclass(axis, Axis) and axis.forward is Axis.forward and callable(from_dense)
    assert config.__dataclass_params__.frozen and all(f.kw_only for f in config.__dataclass_fields__.values())
    assert config() == config() and config().rule == ROOMS[room].everything[0]


@every_pair
def test_a_configuration_is_the_same_after_json(room, rule):
    config = ROOMS[room].config(rule)
    assert AXES[room].config.from_json(json.loads(json.dumps(config.to_json()))) == config


@every_room
def test_a_configuration_with_an_unknown_or_missing_key_is_refused(room):
    value, read = AXES[room].config().to_json(), AXES[room].config.from_json
    shorter = [{k: v for k, v in value.items() if k != key} for key in value]
    for wrong in (None, [], "x", {}, {**value, "extra": 1}, *shorter):
        with pytest.raises(FileError):
            read(wrong)


@every_pair
def test_shape_and_dtype_of_the_output(room, rule):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        axis, inputs = build(room, rule)
        output = axis(*(tensor.to(dtype) for tensor in inputs))
        assert output.shape == ROOMS[room].output and output.dtype == dtype and output.isfinite().all()


@every_pair
def test_ids_are_in_range_ascending_and_unique_and_empty_slots_weigh_nothing(room, rule):
    _, record = one_record(*build(room, rule))
    ids, weights = record.selection.ids, record.selection.weights
    assert ids.dtype == torch.int64 and ids.min() >= -1 and ids.max() < record.selection.num_candidates
    kept, pairs = ids >= 0, (ids[..., 1:] >= 0) & (ids[..., :-1] >= 0)
    assert (ids[..., 1:] > ids[..., :-1])[pairs].all()
    assert not (kept[..., 1:] & ~kept[..., :-1]).any(), "empty slots come last"
    assert (weights[~kept] == 0).all() and weights.isfinite().all()
    assert (record.selection.count() <= record.selection.permitted).all()


@choosing_room
def test_the_density_is_what_the_rule_promises(room):
    axis, inputs = build(room, TopK(4))
    scores, forced = axis.score(*inputs), axis.forced(*inputs)
    forced = torch.zeros_like(scores, dtype=torch.bool) if forced is None else forced.expand_as(scores)
    permitted = ~scores.isneginf()
    selection = one_record(axis, inputs)[1].selection
    least = (forced & permitted).sum(-1)
    assert torch.equal(selection.count(), torch.maximum(permitted.sum(-1).clamp(max=4), least))
    assert torch.equal(selection.permitted, permitted.sum(-1))
    assert (selection.mask() | ~(forced & permitted)).all(), "what is forced is kept"
    assert not (selection.mask() & ~permitted).any()
    assert selection.density() == int(selection.count().sum()) / int(permitted.sum()) < 1
    assert one_record(*build(room, All()))[1].selection.density() == 1


@choosing_room
@pytest.mark.parametrize("ladder", LADDERS)
def test_a_stricter_rule_costs_no_more_and_the_strictest_less(room, ladder):
    inputs = ROOMS[room].inputs()
    costs = [one_record(ROOMS[room].axis(ROOMS[room].config(rule)), inputs)[1].cost for rule in LADDERS[ladder]]
    done = [cost.multiply_adds for cost in costs]
    assert done == sorted(done, reverse=True) and done[-1] < done[0] == costs[0].dense_multiply_adds
    assert len({cost.dense_multiply_adds for cost in costs}) == 1


@every_room
def test_keep_all_by_from_dense_is_the_identity(room):
    layer, dense = ROOMS[room].dense()
    x = ROOMS[room].x()
    for rule in ROOMS[room].everything:
        converted = AXES[room].from_dense(layer, ROOMS[room].config(rule))
        torch.testing.assert_close(converted(x), dense(x), rtol=1e-5, atol=1e-5)


@choosing_room
def test_keep_nothing_is_not(room):
    layer, dense = ROOMS[room].dense()
    x = ROOMS[room].x()
    assert not torch.allclose(AXES[room].from_dense(layer, ROOMS[room].config(TopK(0)))(x), dense(x), atol=1e-3)


@pytest.mark.parametrize("room, rule", [pair for pair in PAIRS if pair.values[1] != All()])
def test_the_gradient_reaches_what_was_kept_and_nothing_else(room, rule):
    kept, dropped = ROOMS[room].reach(*build(room, rule))
    assert kept.numel() and (kept > 0).all()
    assert dropped.numel() and (dropped == 0).all()


@every_room
def test_the_gradient_does_not_flow_through_the_choice(room):
    axis, inputs = build(room, ROOMS[room].rules[-1])
    assert not axis.score(*(tensor.requires_grad_() for tensor in inputs)).requires_grad


@every_pair
def test_the_same_input_gives_the_same_bits(room, rule):
    axis, inputs = build(room, rule)
    (first, one), (second, two) = one_record(axis, inputs), one_record(axis, inputs)
    assert torch.equal(first, second) and torch.equal(one.selection.ids, two.selection.ids) and one.cost == two.cost


@every_pair
def test_listening_changes_nothing(room, rule):
    axis, inputs = build(room, rule)
    assert torch.equal(axis(*inputs), one_record(axis, inputs)[0])


@every_room
def test_there_is_one_tap_in_a_room(room):
    layer, _ = ROOMS[room].dense()
    for module in (build(room, TopK(2))[0], AXES[room].from_dense(layer, ROOMS[room].config(TopK(2)))):
        assert [type(part) for part in module.modules()].count(Tap) == 1
        assert len([part for part in module.modules() if isinstance(part, Axis)]) == 1


@every_room
def test_the_state_dict_goes_around(room):
    layer, _ = ROOMS[room].dense()
    config, x = ROOMS[room].config(TopK(3)), ROOMS[room].x()
    converted = AXES[room].from_dense(layer, config)
    other = AXES[room].from_dense(ROOMS[room].dense()[0], config)
    assert not torch.equal(other(x), converted(x))
    assert other.load_state_dict(converted.state_dict()) == ([], [])
    assert torch.equal(other(x), converted(x))


@choosing_room
def test_a_rule_is_read_when_called(room):
    """The solver tries many rules on one room; what counts is the rule now in place."""
    axis, inputs = build(room, TopK(2))
    axis.rule = All()
    assert one_record(axis, inputs)[1].selection.density() == 1
    example = ROOMS[room]
    assert torch.equal(axis(*inputs), example.axis(replace(example.config(TopK(2)), rule=All()))(*inputs))
