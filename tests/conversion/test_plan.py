"""Plans: written, read back, refused, installed and taken out again."""

import json

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.axes import AXES
from sentei.axes.connections import Config
from sentei.conversion import wrapper
from sentei.conversion.families import FAMILIES
from sentei.conversion.plan import Entry, Plan, attention_path, convert, prunable_layers
from sentei.core.errors import FileError, RuleError, UnsupportedError
from sentei.core.rules import All, Mass, Threshold, TopK
from sentei.kernels.attention.select import ESTIMATORS

IDS = torch.arange(3, 67)[None]


def entry(layer: int = 0, **settings) -> Entry:
    return Entry(layer=layer, room="connections", config=Config(**{"tile": (8, 4), "window": 2, **settings}))


PLAN = Plan((
    entry(0, rule=Mass((0.5, 0.25, 1.0, 0.0)), share="head", criterion="output"),
    entry(1, rule=TopK(3), compensate=True, share="group"),
    *(entry(2 + i, rule=Threshold(0.1), estimator=estimator(), decode=Mass(0.5))
      for i, estimator in enumerate(ESTIMATORS.values())),
))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("plan", [PLAN, Plan()], ids=["entries", "empty"])
def test_a_plan_is_the_same_after_json(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


GOOD = entry().to_json()


@pytest.mark.parametrize("value", [
    None, {}, "plan", {"entries": []}, [None], [[]], ["entry"], [{}], [{**GOOD, "extra": 1}],
    [{key: GOOD[key] for key in ("layer", "room")}], [{**GOOD, "layer": -1}], [{**GOOD, "layer": 1000}],
    [{**GOOD, "layer": True}], [{**GOOD, "layer": 0.0}], [{**GOOD, "layer": "0"}], [{**GOOD, "room": "attic"}],
    [{**GOOD, "room": None}], [{**GOOD, "room": []}], [{**GOOD, "config": None}], [{**GOOD, "config": {}}],
    [{**GOOD, "config": {**GOOD["config"], "extra": 1}}],
    [{**GOOD, "config": {**GOOD["config"], "rule": {"name": "x"}}}],
    [{**GOOD, "config": {**GOOD["config"], "rule": {"name": "mass", "mass": 2}}}],
    [{**GOOD, "config": {**GOOD["config"], "tile": [0, 4]}}], [{**GOOD, "config": {**GOOD["config"], "tile": "ab"}}],
    [{**GOOD, "config": {**GOOD["config"], "window": "wide"}}], [{**GOOD, "config": {**GOOD["config"], "share": 1}}],
    [{**GOOD, "config": {**GOOD["config"], "share": []}}], [GOOD, GOOD],
], ids=lambda value: str(value)[-70:])
def test_what_is_not_a_plan_is_refused_as_a_bad_file(value):
    with pytest.raises(FileError):
        Plan.from_json(value)


def test_two_entries_for_one_place_are_refused():
    with pytest.raises(RuleError, match="at most one entry a layer and room"):
        Plan((entry(0), entry(0, rule=TopK(2))))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_empty_plan_gives_the_dense_model_back(family):
    model = tiny_model(family)
    expected, modules = logits(model), [name for name, _ in model.named_modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = Plan(tuple(entry(layer, rule=Mass(0.2)) for layer in prunable_layers(model)))
    assert convert(model, pruned) is model
    assert model.config._attn_implementation == "sentei"
    assert not torch.allclose(logits(model), expected)
    assert convert(model, Plan()) is model
    assert model.config._attn_implementation == "sdpa" and wrapper.rooms(model) == {}
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(logits(model), expected)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_rooms_add_nothing_to_the_state_dict():
    model = tiny_model("llama")
    keys = list(model.state_dict())
    convert(model, Plan((entry(1, rule=Mass(0.2)),)))
    assert list(model.state_dict()) == keys


def test_a_second_plan_replaces_the_first():
    model = convert(tiny_model("llama"), Plan((entry(0), entry(1))))
    convert(model, Plan((entry(2, rule=TopK(2)),)))
    rooms = wrapper.rooms(model)
    assert list(rooms) == ["model.layers.2.self_attn"] and rooms["model.layers.2.self_attn"].rule == TopK(2)
    fresh = convert(tiny_model("llama"), Plan((entry(2, rule=TopK(2)),)))
    assert torch.equal(logits(model), logits(fresh))


@pytest.mark.parametrize("decode", [All(), Mass(0.5)], ids=["prompts only", "with pages"])
def test_a_rule_for_other_heads_is_refused_though_two_tokens_are_few_enough_to_read_pages(decode):
    model = tiny_model("llama")
    with pytest.raises(RuleError, match=r"expected scores \[\.\.\., H=3, Q, C\]"):
        convert(model, Plan((entry(0), entry(1, rule=Mass((0.5, 0.5, 0.5)), decode=decode))))
    assert wrapper.rooms(model) == {} and model.config._attn_implementation == "sdpa"
    fits = entry(1, rule=Mass((0.5, 0.5, 0.5, 0.5)), decode=decode)
    assert wrapper.rooms(convert(model, Plan((fits,))))["model.layers.1.self_attn"].config == fits.config


@pytest.mark.parametrize("family, layers, refused", [
    ("llama", [0, 1, 2], [3]), ("smollm3", [0, 1, 2], [5]), ("gemma3_text", [1], [0, 2]),
], ids=["beyond the last", "beyond the last, smollm3", "sliding"])
def test_a_layer_that_cannot_be_pruned_is_refused_and_nothing_is_touched(family, layers, refused):
    model = tiny_model(family)
    listed = ", ".join(map(str, layers))
    message = rf"convert: expected layers of full attention: \[{listed}\], got layers \[{refused[0]}"
    with pytest.raises(UnsupportedError, match=message):
        convert(model, Plan(tuple(entry(layer) for layer in (layers[0], *refused))))
    assert wrapper.rooms(model) == {} and model.config._attn_implementation == "sdpa"


def test_a_model_whose_every_layer_slides_has_nothing_to_prune():
    model = tiny_model("mistral", sliding_window=8)
    assert prunable_layers(model) == ()
    with pytest.raises(UnsupportedError, match=r"expected layers of full attention: \[\], got layers \[0\]"):
        convert(model, Plan((entry(0),)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))


class Stranger(nn.Module):
    """Says that it is a Llama."""

    def __init__(self):
        super().__init__()
        self.config = tiny_model("llama").config


@pytest.mark.parametrize("build, name", [(gpt2, "GPT2LMHeadModel: .*'gpt2'"), (Stranger, "Stranger: .*'llama'"),
                                         (lambda: tiny_model("llama").model, "LlamaModel: .*'llama'")],
                         ids=["another family", "another class", "without a head"])
def test_an_unknown_model_is_refused_with_the_list_of_what_is_supported(build, name):
    with pytest.raises(UnsupportedError, match=name) as caught:
        convert(build(), Plan((entry(0),)))
    assert all(family.architecture in str(caught.value) for family in FAMILIES.values())


@pytest.mark.parametrize("foreign, name", [(nn.Identity(), "Identity"), (None, "nothing")], ids=["another", "none"])
def test_a_foreign_attention_module_is_refused(foreign, name):
    model = tiny_model("llama")
    if foreign is None:
        del model.model.layers[1].self_attn
    else:
        model.model.layers[1].self_attn = foreign
    with pytest.raises(UnsupportedError, match=f"expected LlamaAttention at model.layers.1.self_attn, got {name}"):
        convert(model, Plan((entry(1),)))


def test_a_room_that_is_not_for_pretrained_models_is_refused():
    plan = Plan((entry(0), Entry(layer=1, room="channels", config=AXES["channels"].config())))
    with pytest.raises(UnsupportedError, match="convert: expected the rooms connections, .*, got channels"):
        convert(tiny_model("llama"), plan)


def test_the_path_of_a_layer():
    assert attention_path(tiny_model("qwen3"), 2) == "model.layers.2.self_attn"


def test_every_room_has_a_name_a_plan_can_say():
    assert all(Entry.from_json(Entry(layer=0, room=name, config=room.config()).to_json()).config == room.config()
               for name, room in AXES.items())


@pytest.mark.parametrize("settings", [{"layer": -1}, {"layer": "0"}, {"room": "heads"}, {"config": {}}], ids=str)
def test_an_entry_that_names_no_room_or_another_s_configuration_is_refused(settings):
    with pytest.raises(RuleError, match="Entry: expected a layer from 0, a room"):
        Entry(**{"layer": 0, "room": "connections", "config": Config(), **settings})


def test_the_same_room_everywhere_is_one_entry_a_layer():
    assert Plan.everywhere((0, 2), "connections", Config()) == Plan(
        (Entry(layer=0, room="connections", config=Config()), Entry(layer=2, room="connections", config=Config())))
