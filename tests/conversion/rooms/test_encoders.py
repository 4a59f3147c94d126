"""The rooms' ways into an encoder: the same rooms, other names, norms behind the sums, and biases everywhere."""

from functools import cache

import pytest
import torch
import transformers
from tiny import tiny_encoder
from torch import nn

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.axes.experts import Config as Experts
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.budget.calibration import calibrate, wanted_by_rooms
from sentei.conversion import export, wrapper
from sentei.conversion.attended import Attended
from sentei.conversion.layers import layer_of, layers_of, originals
from sentei.conversion.plan import Entry, Plan, convert, place
from sentei.conversion.rooms import WAYS
from sentei.conversion.rungs import rung_of
from sentei.core.errors import RuleError, UnsupportedError
from sentei.core.rules import All, Fixed, Mass, TopK
from sentei.core.tracing import trace

SIZES = {"initializer_range": 0.2, "intermediate_size": 256}
IDS = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(6))
TEXT = torch.randint(3, 320, (8, 64), generator=torch.Generator().manual_seed(5))
INSIDE = [room for room, way in WAYS.items() if way.stands == "in"]
every_room = pytest.mark.parametrize("room", INSIDE)


def made(**overrides):
    return tiny_encoder(**SIZES | overrides)


@torch.no_grad()
def states(model: nn.Module, ids=IDS, **more) -> torch.Tensor:
    return model(input_ids=ids, **more).last_hidden_state


@cache
def statistics():
    model = made()
    return calibrate(model, TEXT, wanted_by_rooms(model, INSIDE, "rule"))


def plan_of(model: nn.Module, room: str, choice: int) -> Plan:
    return Plan(tuple(Entry(layer=layer.index, room=room, config=WAYS[room].options(layer, "rule")[choice])
                      for layer in layers_of(model)))


def everywhere(room: str, config: object) -> Plan:
    return Plan.everywhere((0, 1), room, config)


@every_room
def test_keeping_all_is_the_dense_encoder_bit_for_bit(room):
    model, modules = made(), dict(made().named_modules()).keys()
    place(model, plan_of(model, room, 0), statistics())
    assert torch.equal(states(model), states(made())) and dict(model.named_modules()).keys() == modules
    assert not originals(model)


@every_room
def test_an_option_changes_the_states_and_the_empty_plan_gives_them_back(room):
    model = made()
    modules = dict(model.named_modules())
    convert(model, plan_of(model, room, -1), statistics())
    assert not torch.allclose(states(model), states(made()), atol=1e-3)
    assert dict(convert(model, Plan()).named_modules()) == modules
    assert torch.equal(states(model), states(made()))


@every_room
def test_a_folder_gives_the_states_it_was_written_with(room, tmp_path):
    """Rung A where transformers has a model of these shapes, which it loads without us."""
    model = made()
    plan = plan_of(model, room, -1)
    convert(model, plan, statistics())
    rung = {"weights": "A", "experts": "B", "heads": "B", "depth": "B"}[room]
    assert rung_of(model, plan) == rung
    export.export(model, None, plan, tmp_path, tokens=IDS[0], facts={})
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    found = export.check(tmp_path)
    assert found["met"] and found["generated"] == []
    assert export.read_receipt(tmp_path)[1].shape == (8, 32)
    if rung == "A":
        plain = transformers.AutoModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(states(plain, IDS[:1])[0, -8:], export.read_receipt(tmp_path)[1])
    else:
        with pytest.raises(ValueError, match="sentei_bert"):
            transformers.AutoModel.from_pretrained(tmp_path)


def test_an_encoder_without_a_layer_is_an_ordinary_one(tmp_path):
    model, plan = made(), Plan((Entry(layer=0, room="depth", config=Depth(rule=Fixed(()))),))
    convert(model, plan)
    plain = made()
    del plain.encoder.layer[0]
    assert torch.equal(states(model), states(plain)) and rung_of(model, plan) == "A"
    export.export(model, None, plan, tmp_path, tokens=IDS[0], facts={})
    assert torch.equal(states(transformers.AutoModel.from_pretrained(tmp_path).eval()), states(plain))


@pytest.mark.parametrize("part", ["attention", "network"])
def test_a_part_that_is_left_out_leaves_the_stream_as_it_is(part):
    model, given = made(), []
    block = model.encoder.layer[1]
    convert(model, Plan((Entry(layer=1, room="depth", config=Depth(rule=Fixed(()), part=part)),)))
    handle = block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    found = states(model)
    handle.remove()
    x = given[0]
    own = made().encoder.layer[1]
    with torch.no_grad():
        expected = own.feed_forward_chunk(x) if part == "attention" else own.attention(x)[0]
    torch.testing.assert_close(found, expected)


def test_a_narrower_network_is_refitted_to_what_it_computed():
    model, text = made(), TEXT.flatten()[None, :64]
    layer = layer_of(model, 1)
    intermediate, output = WAYS["weights"].build(layer, "network", Weights(rule=TopK(192), saliency="obs"),
                                                 statistics().of(1))
    assert intermediate.dense.weight.shape == (192, 32) and output.dense.weight.shape == (32, 192)
    assert type(output) is type(layer.block.output) and output.LayerNorm is layer.block.output.LayerNorm
    given = []
    handle = layer.block.intermediate.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    states(model, text)
    handle.remove()
    own = layer.block
    places = [int((own.intermediate.dense.weight == row).all(1).nonzero()) for row in intermediate.dense.weight]
    with torch.no_grad():
        whole = own.output.dense(own.intermediate(given[0]))
        fitted = output.dense(intermediate(given[0]))
        cut = nn.functional.linear(intermediate(given[0]), own.output.dense.weight[:, places], own.output.dense.bias)
    assert (fitted - whole).norm() < 0.9 * (cut - whole).norm()


def test_all_experts_together_are_the_network_with_its_biases():
    model = made()
    convert(model, everywhere("experts", Experts(rule=TopK(3), unit=64, shared=1)), statistics())
    torch.testing.assert_close(states(model), states(made()), rtol=1e-4, atol=1e-4)
    convert(model, everywhere("experts", Experts(rule=TopK(1), unit=64, shared=1)), statistics())
    with trace(model) as records:
        states(model)
    assert {record.selection.density() for record in records if record.room == "experts"} == {1 / 3}


def test_single_neurons_without_gates_are_not_offered_and_refused():
    assert {config.unit for config in WAYS["experts"].options(layer_of(made(), 0), "rule")[1:]} == {64}
    assert len(WAYS["experts"].options(layer_of(made(intermediate_size=48), 0), "rule")) == 1
    with pytest.raises(UnsupportedError, match="experts: expected .* single neurons"):
        WAYS["experts"].build(layer_of(made(), 0), "network", Experts(rule=TopK(9), unit=1), {})


@pytest.mark.parametrize("config", [Heads(num_kv_heads=2, merge="joint"), Heads(num_kv_heads=2)], ids=["joint", "mean"])
def test_heads_that_are_equal_are_merged_without_loss(config):
    def equal():
        model = made()
        with torch.no_grad():
            for layer in model.encoder.layer:
                for linear in (layer.attention.self.key, layer.attention.self.value):
                    for parameter in linear.parameters():
                        rows = parameter.unflatten(0, (2, 2, 8))
                        rows[:, 1] = rows[:, 0]
        return model

    model = equal()
    seen = calibrate(model, TEXT, wanted_by_rooms(model, ["heads"], "rule"))
    convert(model, everywhere("heads", config), seen)
    assert model.encoder.layer[0].attention.self.key.weight.shape == (16, 32)
    torch.testing.assert_close(states(model), states(equal()), rtol=1e-3, atol=1e-3)


EXACT = Connections(rule=All(), tile=(8, 4), window=2)
SPARSE = Connections(rule=Mass(0.3), tile=(8, 4), window=0)


@pytest.mark.parametrize("padding", [None, "behind", "before"])
def test_connections_that_keep_all_are_the_dense_attention(padding):
    mask = torch.ones_like(IDS)
    if padding is not None:
        mask[1, 30:], mask[2, 11:] = 0, 0
        mask = mask.flip(1) if padding == "before" else mask
    real = mask.bool()
    for config in (EXACT, Connections(rule=Mass(1.0), tile=(8, 4), window=0)):
        model = convert(made(), everywhere("connections", config))
        with trace(model) as records:
            found = states(model, attention_mask=mask)
        assert len(records.paths()) == 2 and not records.bypasses
        torch.testing.assert_close(found[real], states(made(), attention_mask=mask)[real], rtol=1e-4, atol=1e-4)


def test_what_is_dropped_lies_on_both_sides():
    model = convert(made(), everywhere("connections", SPARSE))
    assert all(not room.causal for room in wrapper.rooms(model).values())
    with trace(model) as records:
        found = states(model)
    assert not torch.allclose(found, states(made()), atol=1e-3)
    selection = records[0].selection
    assert selection.permitted.min() == selection.permitted.max() == 10 and 0 < selection.density() < 1
    kept = selection.mask()[0].any(0)
    assert kept.triu(3).any() and kept.tril(-1).any()


def test_a_mask_of_another_pattern_is_transformers_own_to_compute():
    model = convert(made(), everywhere("connections", SPARSE))
    mask = torch.ones(3, 1, 40, 40, dtype=torch.bool).tril()
    torch.testing.assert_close(states(model, attention_mask=mask), states(made(), attention_mask=mask))


def test_one_room_in_each_place():
    model = made()
    thin = everywhere("weights", Weights(rule=TopK(192), saliency="obs"))
    gone = Entry(layer=1, room="depth", config=Depth(rule=Fixed(()), part="network"))
    with pytest.raises(RuleError, match="one room in each place"):
        convert(model, Plan((*thin.entries, gone)), statistics())
    assert torch.equal(states(model), states(made()))


@pytest.mark.parametrize("hole", [slice(30, 40), slice(7, 20)], ids=["behind", "in the middle"])
def test_layers_without_a_room_see_both_ways_too(hole):
    mask = torch.ones_like(IDS)
    mask[1:, hole] = 0
    model = convert(made(), Plan((Entry(layer=1, room="connections", config=EXACT),)))
    found, expected = (states(each, attention_mask=mask)[mask.bool()] for each in (model, made()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_heads_are_watched_with_all_that_they_see():
    model = made()
    seen = calibrate(model, TEXT[:1], {0: {"attention_heads"}})[0, "attention_heads"]
    own = model.encoder.layer[0].attention.self
    query, key, value = (linear(model.embeddings(TEXT[:1])).unflatten(-1, (4, 8)).transpose(1, 2)
                         for linear in (own.query, own.key, own.value))
    expected = Attended(4, 4, 8)
    expected.see(query, key, value, torch.ones(1, 1, 64, 64, dtype=torch.bool), 8 ** -0.5)
    torch.testing.assert_close(seen.values, expected.values, rtol=1e-4, atol=1e-4)
    assert seen.rows == 64 and bool((seen.values != 0).any())


@torch.no_grad()
def test_a_row_of_neurons_counts_as_much_as_it_is_small_beside_the_sum_that_is_normed():
    model, block = made(), made().encoder.layer[0]
    gram = calibrate(model, TEXT[:1], {0: {"network_hidden"}})[0, "network_hidden"].gram
    x = block.attention(model.embeddings(TEXT[:1]))[0][0]
    neurons = block.intermediate(x)
    size = (x + block.output.dense(neurons)).square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(gram, (neurons / size).double().T @ (neurons / size).double(), rtol=1e-4, atol=1e-4)
