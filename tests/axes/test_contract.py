"""What every room promises, over the table AXES. A new room adds one row to room_examples.ROOMS and inherits it all."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import ceil

import pytest
import torch
from room_examples import ROOMS, Example

from sentei.axes import AXES
from sentei.axes.axis import Axis
from sentei.core.errors import FileError
from sentei.core.rules import All, Capacity, Rule, TopK
from sentei.core.tracing import Tap, trace


def over(name: str, choices: Callable[[Example], list]) -> pytest.MarkDecorator:
    """A test for every room and each of its own choices."""
    cases = [pytest.param(room, choice, id=f"{room}-{choice}")
             for room, example in ROOMS.items() for choice in choices(example)]
    return pytest.mark.parametrize(["room", name], cases)


every_room = pytest.mark.parametrize("room", AXES)
choosing_room = pytest.mark.parametrize("room", [room for room, example in ROOMS.items() if example.ladders])
every_rule = over("rule", lambda example: example.rules)


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
    assert config() == config() and config().rule == ROOMS[room].whole[0]


@every_rule
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


@every_rule
def test_shape_and_dtype_of_the_output(room, rule):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        axis, inputs = build(room, rule)
        output = axis.to(dtype)(*(tensor.to(dtype) for tensor in inputs))
        assert output.shape == ROOMS[room].output and output.dtype == dtype and output.isfinite().all()


@every_rule
def test_under_autocast_the_room_takes_what_layers_around_it_give(room, rule):
    axis, inputs = build(room, rule)
    whole, record = one_record(axis, inputs)
    for given in (inputs, *([*inputs[:i], inputs[i].bfloat16(), *inputs[i + 1:]] for i in ROOMS[room].mixed)):
        with torch.autocast("cpu", torch.bfloat16):
            output, narrow = one_record(axis, given)
            assert torch.equal(axis(*given), output)
        assert output.shape == whole.shape and output.isfinite().all()
        if torch.equal(narrow.selection.ids, record.selection.ids):
            torch.testing.assert_close(output.float(), whole, rtol=0.05, atol=0.05 * float(whole.detach().abs().max()))


@every_rule
def test_a_layer_under_autocast_has_gradients_in_fp32(room, rule):
    layer, x = AXES[room].from_dense(ROOMS[room].dense()[0], ROOMS[room].config(rule)).train(), ROOMS[room].x()
    found = []
    for narrow in (True, False):
        x = x.detach().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            output = layer(x)
        output.float().square().sum().backward()
        found.append((output.detach(), x.grad, *(part.grad for part in layer.parameters() if part.requires_grad)))
    (output, *gradients), (whole, *expected) = found
    assert any(gradient is not None for gradient in gradients[1:])
    assert output.shape == whole.shape and output.isfinite().all()
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        assert gradient is None or gradient.dtype == torch.float32 and gradient.isfinite().all()
    if rule in ROOMS[room].whole:
        got, exact = (torch.cat([one.flatten() for one in each if one is not None]) for each in (gradients, expected))
        assert (output - whole).norm() < 0.02 * whole.norm() and (got - exact).norm() < 0.02 * exact.norm()


@every_rule
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
    rule = ROOMS[room].strict
    axis, inputs = build(room, rule)
    scores, forced = axis.score(*inputs), axis.forced(*inputs)
    forced = torch.zeros_like(scores, dtype=torch.bool) if forced is None else forced.expand_as(scores)
    permitted = ~scores.isneginf()
    selection = one_record(axis, inputs)[1].selection
    along = -2 if isinstance(rule, Capacity) else -1
    least, most = (forced & permitted).sum(along), permitted.sum(along)
    wanted = torch.tensor([ceil(rule.capacity * n) for n in most.flatten().tolist()]).view(most.shape) if (
        isinstance(rule, Capacity)) else most.clamp(max=rule.k)
    assert torch.equal(selection.mask().sum(along), torch.maximum(wanted, least))
    assert torch.equal(selection.permitted, permitted.sum(-1))
    assert (selection.mask() | ~(forced & permitted)).all(), "what is forced is kept"
    assert not (selection.mask() & ~permitted).any()
    assert selection.density() == int(selection.count().sum()) / int(permitted.sum()) < 1
    assert one_record(*build(room, All()))[1].selection.density() == 1


@over("ladder", lambda example: list(example.ladders))
def test_a_stricter_rule_costs_no_more_and_the_strictest_less(room, ladder):
    example = ROOMS[room]
    inputs = example.inputs()
    costs = [one_record(example.axis(example.config(rule)), inputs)[1].cost for rule in example.ladders[ladder]]
    done = [cost.multiply_adds for cost in costs]
    assert done == sorted(done, reverse=True) and done[-1] < done[0] == costs[0].dense_multiply_adds
    assert len({cost.dense_multiply_adds for cost in costs}) == 1


@every_room
def test_keep_all_by_from_dense_is_the_identity(room):
    layer, dense = ROOMS[room].dense()
    x = ROOMS[room].x()
    for rule in ROOMS[room].whole:
        converted = AXES[room].from_dense(layer, ROOMS[room].config(rule))
        torch.testing.assert_close(converted(x), dense(x), rtol=1e-5, atol=1e-5)


@choosing_room
def test_keep_nothing_is_not(room):
    layer, dense = ROOMS[room].dense()
    x = ROOMS[room].x()
    assert not torch.allclose(AXES[room].from_dense(layer, ROOMS[room].config(TopK(0)))(x), dense(x), atol=1e-3)


@over("rule", lambda example: example.rules[1:])
def test_the_gradient_reaches_what_was_kept_and_nothing_else(room, rule):
    kept, dropped = ROOMS[room].reach(*build(room, rule))
    assert kept.numel() and (kept > 0).all()
    assert dropped.numel() and (dropped == 0).all()


@pytest.mark.parametrize("room", [room for room, example in ROOMS.items() if not example.weighs_by_score])
def test_the_gradient_does_not_flow_through_the_choice(room):
    axis, inputs = build(room, ROOMS[room].strict)
    assert not axis.score(*(tensor.requires_grad_() for tensor in inputs)).requires_grad


@every_rule
def test_the_same_input_gives_the_same_bits(room, rule):
    axis, inputs = build(room, rule)
    (first, one), (second, two) = one_record(axis, inputs), one_record(axis, inputs)
    assert torch.equal(first, second) and torch.equal(one.selection.ids, two.selection.ids) and one.cost == two.cost


@every_rule
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
