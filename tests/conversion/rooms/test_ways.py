"""What holds for every room's way into a pretrained layer, in tiny models of every family."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.axes.weights import Config as Weights
from sentei.budget.calibration import calibrate, wanted_by_rooms
from sentei.conversion import native, wrapper
from sentei.conversion.families import FAMILIES, MIXTURES
from sentei.conversion.layers import layer_of, layers_of, originals
from sentei.conversion.plan import Entry, Plan, convert, place, prunable_layers, wanted
from sentei.conversion.rooms import WAYS
from sentei.conversion.statistics import Statistics
from sentei.core.errors import RuleError, UnsupportedError
from sentei.core.rules import Fixed, Mass, TopK

INSIDE = [room for room, way in WAYS.items() if way.stands == "in"]
# OLMoE's one norm over all keys leaves its heads no other option than to keep all.
everywhere = pytest.mark.parametrize("family, room", [
    (family, room) for family in FAMILIES | MIXTURES for room in INSIDE if (family, room) != ("olmoe", "heads")])
every_room = pytest.mark.parametrize("room", INSIDE)
TEXT = torch.randint(3, 320, (2, 200), generator=torch.Generator().manual_seed(5))


def tokens(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **more) -> torch.Tensor:
    return model(input_ids=ids, **more).logits


@cache
def statistics(family: str) -> Statistics:
    model = tiny_model(family)
    return calibrate(model, TEXT, wanted_by_rooms(model, INSIDE, "rule"))


def options_of(model: nn.Module, room: str, layer: int, lever: str = "rule") -> list:
    return WAYS[room].options(layer_of(model, layer), lever)


def plan_of(model: nn.Module, room: str, choice: int) -> Plan:
    """The option `choice` (0 keeps all, -1 is the cheapest) of a room in every layer."""
    return Plan(tuple(Entry(layer=layer.index, room=room, config=options_of(model, room, layer.index)[choice])
                      for layer in layers_of(model)))


@everywhere
def test_keeping_all_is_the_dense_model_bit_for_bit(family, room):
    model, ids = tiny_model(family), tokens(40)
    expected, modules = logits(model, ids), dict(model.named_modules())
    place(model, plan_of(model, room, 0), statistics(family))
    assert torch.equal(logits(model, ids), expected)
    assert dict(model.named_modules()) == modules, "the original itself stands where all is kept"


@everywhere
def test_the_empty_plan_gives_the_same_modules_and_weights_back(family, room):
    model, ids = tiny_model(family), tokens(40)
    expected, modules = logits(model, ids), dict(model.named_modules())
    weights = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    convert(model, plan_of(model, room, -1), statistics(family))
    assert not torch.allclose(logits(model, ids), expected, atol=1e-3)
    assert convert(model, Plan()) is model and not originals(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, ids), expected)
    for name, tensor in model.state_dict().items():
        before, copy = weights[name]
        assert tensor.data_ptr() == before.data_ptr() and torch.equal(tensor, copy), name


@everywhere
def test_a_later_token_changes_no_earlier_logit(family, room):
    model, ids = tiny_model(family), tokens(48)
    convert(model, plan_of(model, room, -1), statistics(family))
    changed = ids.clone()
    changed[0, 30:] = tokens(18, seed=1)
    got, expected = logits(model, changed), logits(model, ids)
    torch.testing.assert_close(got[:, :30], expected[:, :30], rtol=0, atol=1e-5)
    assert not torch.allclose(got[:, 30:], expected[:, 30:])


@everywhere
def test_with_a_cache_the_model_writes_what_it_writes_without(family, room):
    """Three rows, two of them padded, and a window that some layers of gemma leave."""
    model, ids = tiny_model(family), tokens(31, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :13] = 0, 0
    convert(model, plan_of(model, room, -1), statistics(family))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0,
                "attention_mask": mask}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
    with torch.no_grad():
        first = model(input_ids=ids[:1, :17], use_cache=True)
        second = model(input_ids=ids[:1, 17:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), logits(model, ids[:1]), rtol=0, atol=1e-4)


@every_room
def test_options_begin_with_keeping_all_and_can_be_written_and_read(room):
    model = tiny_model("llama")
    for lever in ("rule", "decode"):
        found = options_of(model, room, 1, lever)
        assert len(found) == len(set(found)) > 1
        plans = [Plan((Entry(layer=1, room=room, config=config),)) for config in found]
        assert [Plan.from_json(json.loads(json.dumps(plan.to_json()))) for plan in plans] == plans


@every_room
def test_a_room_without_its_statistics_is_refused_and_the_model_is_as_it_was(room):
    model = tiny_model("llama")
    plan, ids = plan_of(model, room, -1), tokens(20)
    if not wanted(plan):
        assert room == "depth"
        return
    expected = logits(model, ids)
    with pytest.raises(UnsupportedError, match="expected statistics of layer 0: .*got none; do|calibrate"):
        convert(model, plan)
    assert torch.equal(logits(model, ids), expected) and not originals(model)


def drop(layer: int, part: str) -> Entry:
    return Entry(layer=layer, room="depth", config=Depth(rule=Fixed(()), part=part))


CHOOSING = Entry(layer=1, room="connections", config=Connections(rule=Mass(0.3), tile=(8, 4), window=2))
THIN = Entry(layer=1, room="weights", config=Weights(rule=TopK(32), saliency="obs"))


@pytest.mark.parametrize("clash", [(drop(1, "network"), THIN), (drop(1, "attention"), CHOOSING)],
                         ids=["two in one place", "one under what is gone"])
def test_rooms_that_cannot_both_be_there_are_refused_and_the_model_keeps_its_plan(clash):
    model, ids = tiny_model("llama"), tokens(40)
    earlier = Plan((CHOOSING, THIN, drop(2, "block")))
    convert(model, earlier, statistics("llama"))
    expected, rooms, standing = logits(model, ids), wrapper.rooms(model), set(originals(model))
    with pytest.raises(RuleError, match="convert: expected"):
        convert(model, Plan(clash), statistics("llama"))
    assert wrapper.rooms(model) == rooms and set(originals(model)) == standing
    assert torch.equal(logits(model, ids), expected)


def test_rooms_of_several_kinds_stand_together_and_follow_one_another():
    model, ids = tiny_model("llama"), tokens(40)
    dense = logits(model, ids)
    plans = [Plan((CHOOSING, THIN, drop(2, "attention"))), Plan((THIN, drop(2, "network"))), Plan((CHOOSING,))]
    found = [logits(convert(model, plan, statistics("llama")), ids) for plan in plans]
    fresh = [logits(convert(tiny_model("llama"), plan, statistics("llama")), ids) for plan in plans]
    assert all(map(torch.equal, found, fresh))
    assert not any(torch.allclose(one, two, atol=1e-3) for one, two in zip(found, [*found[1:], dense], strict=True))
    assert torch.equal(logits(convert(model, Plan()), ids), dense)


def test_a_layer_beyond_the_last_is_refused():
    with pytest.raises(UnsupportedError, match=r"expected layers: \[0, 1, 2\], got layers \[3\]"):
        convert(tiny_model("llama"), Plan((drop(3, "network"),)))


def test_sliding_layers_take_every_room_but_connections():
    model = tiny_model("gemma3_text")
    assert prunable_layers(model) == (1,)
    convert(model, Plan((drop(0, "network"), replace(THIN, layer=2))), statistics("gemma3_text"))
    assert len(originals(model)) == 4


def test_what_was_built_once_is_used_again():
    model, seen = tiny_model("llama"), statistics("llama")
    convert(model, Plan((THIN,)), seen)
    first = model.get_submodule("model.layers.1.mlp")
    convert(model, Plan())
    convert(model, Plan((THIN, drop(2, "network"))), seen)
    assert model.get_submodule("model.layers.1.mlp") is first


@every_room
@pytest.mark.parametrize("before", [Plan(), Plan.everywhere((0, 1, 2), "connections", Connections(decode=Mass(0.9)))],
                         ids=["native rows", "rooms that decode"])
def test_what_is_built_is_made_of_plain_modules(room, before):
    """Modules that are switched to native rows, or hold a room, are plain again before others are made of them."""
    model, ids = convert(tiny_model("llama"), before), tokens(40)
    native.install(model, most_rows=8, many_rows=0)
    lean, fresh = plan_of(model, room, -1), tiny_model("llama")
    place(model, lean, calibrate(tiny_model("llama"), TEXT, wanted_by_rooms(model, INSIDE, "rule")))
    place(fresh, lean, statistics("llama"))
    assert torch.equal(logits(model, ids), logits(fresh, ids))
    assert not wrapper.rooms(model) and not any(hasattr(module, "native_rows") for module in model.modules())
    convert(model, Plan())
    assert not wrapper.rooms(model)
