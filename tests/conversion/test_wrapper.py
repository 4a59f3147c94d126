"""Rooms in tiny models of every family: keep-all changes nothing, and nothing looks ahead."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.axes.connections import Config, Connections
from sentei.conversion import wrapper
from sentei.conversion.families import FAMILIES, MIXTURES
from sentei.conversion.plan import Entry, Plan, convert, prunable_layers
from sentei.core.errors import RuleError, SenteiError, UnsupportedError
from sentei.core.rules import All, Mass, Threshold
from sentei.core.tracing import trace
from sentei.kernels.attention import Tiles

ALL = Config(rule=All(), tile=(8, 4), window=4)
PRUNED = Config(rule=Mass(0.3), tile=(8, 4), window=2)
# Of the mixtures those whose attention is another than Llama's.
every_family = pytest.mark.parametrize("family", [*FAMILIES, *sorted(MIXTURES.keys() & {"mixtral", "olmoe"})])


def converted(family: str, config: Config, **overrides) -> nn.Module:
    model = tiny_model(family, **overrides)
    return convert(model, Plan.everywhere(prunable_layers(model), "connections", config))


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    """One whole row, or rows padded at the left by 0, 5 and 13 tokens."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    for row, padding in zip(range(1, batch), (5, 13), strict=False):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask} if batch > 1 else {"input_ids": ids}


@torch.no_grad()
def logits(model: nn.Module, **arguments) -> torch.Tensor:
    return model(**arguments).logits


@pytest.fixture
def tile_by_tile(monkeypatch):
    """Keep-all rooms name every tile, so that the kernel for pruned plans runs and not the dense one."""
    def tiles(self, selection, query, key, lengths=None):
        return Tiles.from_mask(selection.mask(), self.grid(query, key, lengths))

    monkeypatch.setattr(Connections, "tiles", tiles)


@every_family
@pytest.mark.parametrize("batch", [1, 3], ids=["one row", "three padded rows"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
class TestKeepAll:
    def test_logits_are_those_of_the_unconverted_model(self, family, batch, use_cache, tile_by_tile):
        data = inputs(batch, 45)
        expected = logits(tiny_model(family), **data, use_cache=use_cache)
        got = logits(converted(family, ALL), **data, use_cache=use_cache)
        real = data.get("attention_mask", torch.ones_like(data["input_ids"])).bool()
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-4)

    def test_greedy_continuations_are_identical(self, family, batch, use_cache):
        arguments = {**inputs(batch, 21), "use_cache": use_cache, "max_new_tokens": 64, "min_new_tokens": 64,
                     "do_sample": False, "pad_token_id": 0}
        expected = tiny_model(family).generate(**arguments)
        assert expected.shape == (batch, 21 + 64)
        assert torch.equal(converted(family, ALL).generate(**arguments), expected)


@every_family
def test_the_dense_tiles_of_a_mass_of_1_change_nothing(family, tile_by_tile):
    data = inputs(3, 45)
    real = data["attention_mask"].bool()
    got = logits(converted(family, replace(ALL, rule=Mass(1.0))), **data)
    torch.testing.assert_close(got[real], logits(tiny_model(family), **data)[real], rtol=0, atol=1e-4)


@every_family
@pytest.mark.parametrize("compensate", [False, True], ids=["dropped", "compensated"])
def test_no_later_token_is_permitted(family, compensate):
    """A token in the last query block changes neither the choice nor the logits of an earlier block."""
    model = converted(family, replace(PRUNED, compensate=compensate))
    ids = tokens(1, 64)
    changed = ids.clone()
    changed[0, 56:] = tokens(1, 8, seed=1)
    expected, got = logits(model, input_ids=ids), logits(model, input_ids=changed)
    torch.testing.assert_close(got[:, :56], expected[:, :56], rtol=0, atol=1e-5)
    assert not torch.allclose(got[:, 56:], expected[:, 56:])


@every_family
def test_a_future_token_changes_no_earlier_logit_when_all_is_kept(family, tile_by_tile):
    model, ids = converted(family, ALL), tokens(1, 40)
    for position in (39, 21, 8):
        changed = ids.clone()
        changed[0, position] = 3 + (ids[0, position] - 2) % 317
        got, expected = logits(model, input_ids=changed), logits(model, input_ids=ids)
        torch.testing.assert_close(got[:, :position], expected[:, :position], rtol=0, atol=1e-5)
        assert not torch.allclose(got[:, position], expected[:, position])


@every_family
@pytest.mark.parametrize("criterion", ["mass", "peak", "output"])
@pytest.mark.parametrize("batch", [1, 3], ids=["one row", "three padded rows"])
def test_a_prefix_is_treated_alike_whatever_follows(family, criterion, batch):
    """At query-block boundaries; the last block of a call is whole, so the blocks before it are compared."""
    model = converted(family, replace(PRUNED, criterion=criterion))
    whole = inputs(batch, 88)
    other = {**whole, "input_ids": torch.cat([whole["input_ids"][:, :48], tokens(batch, 40, seed=2)], 1)}
    prefix = {name: tensor[:, :48] for name, tensor in whole.items()}
    blocks, results = 40 // 8, []
    for data in (prefix, whole, other):
        with trace(model) as records:
            out = logits(model, **data)
        real = data.get("attention_mask", torch.ones_like(data["input_ids"]))[:, :40].bool()
        masks = [record.selection.mask()[:, :, :blocks, :10] for record in records]
        results.append((out[:, :40][real], masks, records.density()))
    for got, masks, density in results[1:]:
        assert all(map(torch.equal, masks, results[0][1]))
        torch.testing.assert_close(got, results[0][0], rtol=0, atol=1e-4)
        assert density < 0.95, "the rule must drop something for this to mean anything"
    dense = logits(tiny_model(family), **prefix)[:, :40][real]
    assert not torch.allclose(results[0][0], dense, atol=1e-3)


@every_family
def test_the_slot_in_the_batch_does_not_matter(family):
    model, data = converted(family, PRUNED), inputs(3, 72)
    together = logits(model, **data)
    swapped = logits(model, **{name: tensor.flip(0) for name, tensor in data.items()}).flip(0)
    real = data["attention_mask"].bool()
    torch.testing.assert_close(swapped[real], together[real], rtol=0, atol=1e-4)
    alone = logits(model, input_ids=data["input_ids"][:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-4)


@every_family
def test_padding_by_whole_blocks_moves_no_logit(family):
    """Blocks are cut at absolute positions: padding that is no multiple of the tile is another cut, another choice."""
    model, ids = converted(family, PRUNED), tokens(1, 64)
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.int64), ids], 1)
    mask = (torch.arange(72) >= 8).long()[None]
    shifted = logits(model, input_ids=padded, attention_mask=mask)[:, 8:]
    torch.testing.assert_close(shifted, logits(model, input_ids=ids), rtol=0, atol=1e-4)


@every_family
def test_a_pruned_prompt_is_the_same_with_a_cache_and_decoding_keeps_all(family):
    model, data = converted(family, PRUNED), inputs(1, 70)
    torch.testing.assert_close(logits(model, **data, use_cache=True), logits(model, **data, use_cache=False),
                               rtol=0, atol=1e-5)
    with torch.no_grad(), trace(model) as records:
        cache = model(**data, use_cache=True).past_key_values
        prompt = len(records)
        model(input_ids=tokens(1, 1), past_key_values=cache, use_cache=True)
    assert [record.selection.density() for record in records[prompt:]] == [1.0] * len(prunable_layers(model))
    assert records[-1].selection.num_candidates == 18


@every_family
def test_the_trace_names_every_room_with_its_cost(family):
    model = converted(family, PRUNED)
    with trace(model) as records:
        logits(model, input_ids=tokens(1, 70))
    assert records.paths() == [f"model.layers.{layer}.self_attn.connections" for layer in prunable_layers(model)]
    for record in records:
        assert 0 < record.cost.multiply_adds < record.cost.dense_multiply_adds
        assert record.cost.choosing > 0 and record.cost.bytes > 0 and record.impl and record.reason
        assert record.selection.ids.shape[:3] == (1, 4, 9)
        assert record.cost.density() == pytest.approx(record.selection.density())


def test_sliding_layers_of_gemma_carry_no_room_and_run_as_before():
    model = converted("gemma3_text", ALL)
    assert list(wrapper.rooms(model)) == ["model.layers.1.self_attn"]
    assert [hasattr(layer.self_attn, "connections") for layer in model.model.layers] == [False, True, False]
    longer = inputs(3, 60)  # the window is 24
    real = longer["attention_mask"].bool()
    torch.testing.assert_close(logits(model, **longer)[real], logits(tiny_model("gemma3_text"), **longer)[real],
                               rtol=0, atol=1e-4)


@every_family
def test_a_room_takes_the_scale_of_its_layer(family):
    overrides = {"query_pre_attn_scalar": 100} if family == "gemma3_text" else {}
    model, data = converted(family, ALL, **overrides), inputs(1, 30)
    for path, room in wrapper.rooms(model).items():
        assert room.scale == model.get_submodule(path).scaling
    torch.testing.assert_close(logits(model, **data), logits(tiny_model(family, **overrides), **data), rtol=0,
                               atol=1e-4)


@pytest.mark.parametrize("shape", ["holes", "4-D"])
def test_a_mask_the_room_cannot_read_falls_back_to_the_dense_layer(shape):
    ids = tokens(1, 24)
    mask = torch.ones_like(ids)
    mask[0, 7:12] = 0
    if shape == "4-D":
        mask = torch.ones(24, 24, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    expected = logits(tiny_model("llama"), input_ids=ids, attention_mask=mask)
    model = converted("llama", PRUNED)
    with trace(model) as records:
        got = logits(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not records and {bypass.reason for bypass in records.bypasses} == {
        "a mask that is not causal with padding at the ends"}
    assert [bypass.path for bypass in records.bypasses] == [f"{path}.connections" for path in wrapper.rooms(model)]


def test_dropout_in_training_runs_dense_and_the_trace_says_so():
    model = converted("llama", PRUNED, attention_dropout=0.5).train()
    with trace(model) as records:
        model(input_ids=tokens(1, 24))
    assert not records and {bypass.reason for bypass in records.bypasses} == {"attention dropout"}
    with pytest.raises(SenteiError, match="because of attention dropout"):
        records.density()


def test_a_static_cache_gives_the_same_continuation():
    arguments = {**inputs(3, 13), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
                 "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(converted("llama", ALL).generate(**arguments), tiny_model("llama").generate(**arguments))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("length, room", [(100, 128), (20, 64), (5, 6), (100, 100)])
def test_a_static_cache_with_room_behind_its_keys_shows_no_later_token(family, length, room):
    """Unpadded, so that nothing but the room behind asks for a mask; then one token more."""
    from transformers import StaticCache

    ids, found = tokens(1, length), []
    for model in (converted(family, ALL), tiny_model(family)):
        held = StaticCache(config=model.config, max_cache_len=room)
        parts = (ids, ids[:, :1]) if room > length else (ids,)
        found.append(torch.cat([model(part, past_key_values=held, use_cache=True).logits for part in parts], 1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_a_prompt_in_two_calls_continues_the_cache():
    model, ids = converted("llama", ALL), tokens(1, 40)
    with torch.no_grad():
        first = model(input_ids=ids[:, :17], use_cache=True)
        second = model(input_ids=ids[:, 17:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, logits(tiny_model("llama"), input_ids=ids)[:, 17:], rtol=0, atol=1e-4)


def test_gradients_reach_the_weights_of_a_pruned_model():
    model = converted("llama", PRUNED)
    model(input_ids=tokens(1, 40), labels=tokens(1, 40)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_a_layer_with_its_own_attention_is_refused_and_the_model_is_as_it_was():
    model, data = tiny_model("llama"), inputs(1, 9)
    original = model.model.layers[1].self_attn.forward

    def foreign(hidden_states, **extra):
        return torch.zeros_like(hidden_states), None

    model.model.layers[1].self_attn.forward = foreign
    expected = logits(model, **data)
    plan = Plan(tuple(Entry(layer=layer, room="connections", config=ALL) for layer in range(3)))
    with pytest.raises(UnsupportedError, match="1 of 3 layers that do not, e.g. model.layers.1.self_attn"):
        convert(model, plan)
    assert wrapper.rooms(model) == {} and model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, **data), expected)
    model.model.layers[1].self_attn.forward = original
    convert(model, plan)
    assert len(wrapper.rooms(model)) == 3


def test_a_model_that_does_not_switch_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UnsupportedError, match="transformers' attention interface"):
        convert(model, Plan((Entry(layer=0, room="connections", config=ALL),)))
    assert wrapper.rooms(model) == {}


class Stopped(BaseException):
    """Ctrl-C."""


@pytest.mark.parametrize("earlier", [None, PRUNED], ids=["dense", "converted before"])
@pytest.mark.parametrize("failure", ["ratios of other heads", "stopped", "not reached"])
def test_a_conversion_that_fails_leaves_the_model_as_it_was(monkeypatch, earlier, failure):
    model = tiny_model("llama", attention_dropout=0.5)
    model.set_attn_implementation("eager")
    if earlier is not None:
        convert(model, Plan((Entry(layer=1, room="connections", config=earlier),)))
    model.train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    rooms, implementation = wrapper.rooms(model), model.config._attn_implementation
    rule = Threshold((0.1, 0.2)) if failure == "ratios of other heads" else Mass(0.5)

    def stopped(*_, **__):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises((RuleError, Stopped, UnsupportedError)):
        if failure == "stopped":
            patch.setattr(model.model.layers[2], "forward", stopped)
        elif failure == "not reached":
            patch.setattr(model.model.layers[0].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
        convert(model, Plan((Entry(layer=0, room="connections", config=replace(PRUNED, rule=rule)),)))
    assert wrapper.rooms(model) == rooms and model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()][:len(modes)] == modes
    assert convert(model, Plan()).config._attn_implementation == "eager"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_empty_plan_gives_the_attention_back_that_the_model_had(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    convert(model, Plan())
    assert model.config._attn_implementation == implementation
    for layer in (0, 1):
        convert(model, Plan((Entry(layer=layer, room="connections", config=PRUNED),)))
    wrapper.use(model, "sdpa")
    convert(model, Plan())
    assert model.config._attn_implementation == implementation


def test_a_model_in_training_with_dropout_is_converted_and_stays_in_training():
    model = tiny_model("llama", attention_dropout=0.1).train()
    model.model.layers[2].eval()
    convert(model, Plan((Entry(layer=0, room="connections", config=PRUNED),)))
    assert model.training and not model.model.layers[2].mlp.training and len(wrapper.rooms(model)) == 1


def test_switching_to_sdpa_and_back_keeps_the_rooms():
    model, data = converted("llama", PRUNED), inputs(1, 64)
    pruned, dense = logits(model, **data), logits(tiny_model("llama"), **data)
    wrapper.use(model, "sdpa")
    torch.testing.assert_close(logits(model, **data), dense)  # up to what runs natively
    wrapper.use(model, wrapper.IMPLEMENTATION)
    assert torch.equal(logits(model, **data), pruned) and not torch.allclose(pruned, dense)


@pytest.mark.parametrize(("given", "pruned"), [
    ({}, False), ({"attention_mask": torch.ones(1, 40, dtype=torch.int64)}, True)], ids=["no mask", "mask"])
@torch.no_grad()
def test_a_compiled_model_is_pruned_or_says_that_it_is_not(given, pruned, recwarn):
    """Without a cache and a mask transformers asks a graph for the mask of packed sequences."""
    model = converted("llama", PRUNED, num_hidden_layers=1)
    expected = model(tokens(1, 40), use_cache=False, **given).logits
    torch.compiler.reset()
    found = torch.compile(model, backend="eager")(tokens(1, 40), use_cache=False, **given).logits
    told = [str(warning.message) for warning in recwarn if "dense in the compiled model" in str(warning.message)]
    assert ((found - expected).abs().max() < 1e-4) == pruned == (not told)
