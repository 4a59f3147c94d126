"""One pass collects what rooms want: the sums of their definitions, whoever reads which window in which order."""

import pytest
import torch
from tiny import tiny_model

from sentei.axes.depth import Config as Depth
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.budget import calibration
from sentei.budget.calibration import Library, calibrate, wanted_by_rooms
from sentei.conversion.families import FAMILIES
from sentei.conversion.layers import layers_of
from sentei.conversion.plan import Entry, Plan, convert
from sentei.conversion.rooms import WAYS
from sentei.conversion.statistics import KINDS, Statistics, bytes_of
from sentei.core.errors import ResourceError
from sentei.core.rules import Fixed, TopK

TEXT = torch.randint(3, 320, (4, 60), generator=torch.Generator().manual_seed(3))
DENSE = set(KINDS) - {"network_experts"}  # which mixtures alone have, see rooms/test_mixtures
EVERYTHING = {layer: DENSE for layer in range(3)}


def numbers(seen: Statistics) -> dict[tuple, torch.Tensor]:
    """Every state as one vector of its sums."""
    return {place: torch.cat([torch.as_tensor(value, dtype=torch.float64).flatten() for value in vars(state).values()
                              if isinstance(value, torch.Tensor | float | int)]) for place, state in seen.items()}


def assert_same(one: Statistics, two: Statistics) -> None:
    first, second = numbers(one), numbers(two)
    assert first.keys() == second.keys()
    for place, vector in first.items():
        torch.testing.assert_close(vector, second[place], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_share_the_windows_have_the_sums_of_one(processes):
    whole = calibrate(tiny_model("llama"), TEXT, EVERYTHING)
    first, *others = (calibrate(tiny_model("llama"), TEXT, EVERYTHING, share=(number, processes))
                      for number in range(processes))
    assert sum(state.rows for state in first.values()) * processes == sum(state.rows for state in whole.values())
    for other in others:
        first.merge(other)
    assert_same(first, whole)


def test_the_order_of_the_windows_does_not_matter():
    assert_same(calibrate(tiny_model("llama"), TEXT.flip(0), EVERYTHING),
                calibrate(tiny_model("llama"), TEXT, EVERYTHING))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sums_are_those_of_the_definitions(family):
    """Against what a forward pass with all hidden states shows of the second layer."""
    model = tiny_model(family)
    seen = calibrate(model, TEXT[:1], EVERYTHING)
    layer, kept = model.model.layers[1], {}
    handles = [layer.get_submodule(name).register_forward_hook(
        lambda _, inputs, output, name=name: kept.update({name: (inputs[0] if inputs else None, output)}))
        for name in ("mlp.down_proj", "self_attn.o_proj", "mlp.up_proj", "self_attn.q_proj")]
    with torch.no_grad():
        stream = model(input_ids=TEXT[:1], output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for name, linear in (("network_input", "mlp.up_proj"), ("attention_input", "self_attn.q_proj")):
        x = kept[linear][0][0].double()
        torch.testing.assert_close(seen[1, name].gram, x.T @ x, rtol=1e-4, atol=1e-3)
        assert seen[1, name].rows == 60
    update = kept["self_attn.o_proj"][1]
    if family == "gemma3_text":
        with torch.no_grad():
            update = layer.post_attention_layernorm(update)
    before, after = stream[1][0].double(), stream[2][0].double()
    middle = before + update[0].double()
    for name, linear, stream in (("network_hidden", "mlp.down_proj", middle),
                                 ("attention_hidden", "self_attn.o_proj", before)):
        x, added = (part[0].double() for part in (kept[linear][0], kept[linear][1]))
        x = x / (stream + added).square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(seen[1, name].gram, x.T @ x, rtol=1e-4, atol=1e-3)
    for name, x, y in (("attention_influence", before, middle), ("network_influence", middle, after)):
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
        assert seen[1, name].influence == pytest.approx(float(1 - cosine), abs=1e-6)
        move = ((y - x).square().sum(-1) / x.square().sum(-1)).mean()
        assert seen[1, name].move == pytest.approx(float(move), rel=1e-4)


def test_a_long_window_is_read_in_pieces_and_nothing_is_left_behind(monkeypatch):
    from sentei.budget import calibration

    monkeypatch.setattr(calibration, "AT_ONCE", 25)
    model, steps = tiny_model("llama"), []
    seen = calibrate(model, TEXT, {1: {"network_hidden"}}, step=lambda: steps.append(1))
    assert len(steps) == 4 * 3 and seen[1, "network_hidden"].rows == 240
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rooms_say_what_they_want():
    model = tiny_model("llama")
    assert wanted_by_rooms(model, ["connections", "depth"], "rule") == {}
    assert wanted_by_rooms(model, ["weights"], "rule") == {layer: {"network_hidden"} for layer in range(3)}
    assert {name for names in wanted_by_rooms(model, list(WAYS), "decode").values() for name in names} <= set(KINDS)


LEAN = Plan((*Plan.everywhere(range(3), "weights", Weights(rule=TopK(64), saliency="obs")).entries,
             *Plan.everywhere((2, 0), "heads", Heads(num_kv_heads=1, merge="joint")).entries,
             Entry(layer=1, room="depth", config=Depth(rule=Fixed(()), part="attention"))))


@pytest.fixture
def library(monkeypatch):
    """A library of the tiny model on a machine with memory for so many layers; and the layers of each pass."""
    passes = []

    def read(model, windows, names):
        passes.append(sorted(names))
        return calibrate(model, windows, names)

    def made(layers: float) -> tuple[Library, list]:
        found = Library(tiny_model("llama"), TEXT, "rule")
        names = wanted_by_rooms(found.model, list(WAYS), "rule")
        least = max(calibration.USED * bytes_of(layer, names[layer.index]) for layer in layers_of(found.model))
        for module in ("sentei.budget.calibration", "sentei.conversion.memory"):
            monkeypatch.setattr(f"{module}.available_memory", lambda: int(layers * least / calibration.HALF) + 2)
        monkeypatch.setattr(calibration, "calibrate", read)
        passes.clear()
        return found, passes

    return made


@pytest.mark.parametrize("layers, groups", [(2, {(0, 1), (2,)}), (1, {(0,), (1,), (2,)}), (0.6, {(0,), (1,), (2,)})])
def test_layers_that_do_not_fit_together_are_read_in_groups_with_the_same_result(library, layers, groups):
    whole, passes = library(3)
    expected = {name: weight.clone() for name, weight in convert(
        whole.model, LEAN, whole(LEAN)).state_dict().items()}
    assert passes == [[0, 1, 2]]
    one, passes = library(layers)
    assert not one.statistics.keys() and one(Plan()) is None
    found = convert(one.model, LEAN, one(LEAN)).state_dict()
    assert {tuple(read) for read in passes} == groups and {index for index, _ in one.statistics} in map(set, groups)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    count = len(passes)
    convert(convert(one.model, Plan()), LEAN, one(LEAN))
    assert len(passes) == count, "what is built is built once"


def test_without_memory_for_one_layer_nothing_is_allocated(library, monkeypatch):
    one, passes = library(0.4)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    with pytest.raises(ResourceError, match="calibration: expected .* GB of memory for the statistics of one layer"):
        convert(one.model, LEAN, one(LEAN))
    assert not passes and not one.statistics.keys()
    after = one.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_bytes_are_told_without_taking_them():
    layer = layers_of(tiny_model("llama"))[1]
    found = calibrate(tiny_model("llama"), TEXT[:1], {1: DENSE})
    assert bytes_of(layer, DENSE) == sum(value.nbytes for state in found.values() for value in vars(state).values()
                                         if isinstance(value, torch.Tensor))
    assert bytes_of(layer, {"network_hidden"}) == 8 * (96 ** 2 + 96 * 64)
