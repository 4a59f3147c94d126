"""Adapters all over a model: where they go, what they leave alone, and how they are taken away."""

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn

from sentei.axes.rank import Config, LowRank, LowRankStack
from sentei.conversion.adapters import adapters_of, add, merge, remove, unmerge
from sentei.core.errors import RuleError, UnsupportedError
from sentei.core.rules import TopK
from sentei.core.tracing import trace

TOKENS = torch.arange(24)[None] % 300


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def changed(model: nn.Module) -> nn.Module:
    """The same model, with adapters that do something."""
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.b, std=0.1)
    return model


def test_targets_are_last_parts_of_paths():
    model = tiny_model("llama")
    before = logits(model)
    paths = add(model, ["q_proj", "layers.1.mlp.down_proj"], Config(rank=4))
    assert paths == [f"model.layers.{n}.{end}" for n, end in (
        (0, "self_attn.q_proj"), (1, "self_attn.q_proj"), (1, "mlp.down_proj"), (2, "self_attn.q_proj"))]
    assert list(adapters_of(model)) == paths and torch.equal(logits(model), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{path}.{factor}" for path in paths for factor in "ab"]
    assert not torch.equal(logits(changed(model)), before)


def test_more_adapters_leave_the_earlier_ones_trainable():
    model = tiny_model("llama")
    add(model, ["q_proj"], Config(rank=2))
    add(model, "v_proj", Config(rank=3))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{path}.{factor}" for path in adapters_of(model) for factor in "ab"}
    assert len(adapters_of(model)) == 6


@pytest.mark.parametrize("targets, got", [
    (["q_proj", "z_proj"], "'z_proj'"), (["proj"], "'proj'"), ([], "no target"), (["embed_tokens"], "embed_tokens"),
    (["layers.0"], "model.layers.0"), ([""], "''")], ids=str)
def test_a_target_that_is_no_linear_layer_is_refused_and_nothing_is_changed(targets, got):
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match=f"adapters.add: expected targets .*{got}"):
        add(model, targets, Config())
    assert not adapters_of(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_on_a_layer_is_refused():
    model = tiny_model("llama")
    add(model, ["q_proj"], Config())
    with pytest.raises(UnsupportedError, match="without an adapter"):
        add(model, ["q_proj"], Config())


def test_a_layer_in_two_places_gets_one_adapter():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": layer, "second": layer})
    assert add(model, ["first", "second"], Config(rank=2)) == ["first"]
    assert model["first"] is model["second"] and isinstance(model["first"], LowRank)
    assert remove(model)["second"].weight is layer.weight and type(model["first"]) is nn.Linear


def test_a_tied_output_layer_leaves_the_embedding_alone():
    model = tiny_model("llama")
    add(model, ["lm_head"], Config(rank=2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.clone()
    adapted = logits(changed(model))
    remove(model, fold=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_merged_is_the_same_function_and_unmerged_the_same_bits():
    model = tiny_model("llama")
    add(model, ["q_proj", "up_proj"], Config(rank=4))
    before = logits(changed(model))
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(model), before)
    unmerge(model)
    assert torch.equal(logits(model), before)


def test_one_adapter_that_cannot_be_merged_leaves_all_as_they_are():
    model = tiny_model("llama")
    add(model, ["q_proj"], Config())
    add(model, ["v_proj"], Config(rule=TopK(2)))
    for action in (merge, lambda m: remove(m, fold=True)):
        with pytest.raises(RuleError, match="adapters.merge model.layers.0.self_attn.v_proj"):
            action(model)
    assert all(adapter.merged is None for adapter in adapters_of(model).values())


def test_removed_is_the_model_that_was_and_folded_the_model_that_is():
    base, model = tiny_model("llama"), tiny_model("llama")
    add(model, ["q_proj", "o_proj"], Config(rank=4))
    adapted = logits(changed(model))
    folded, removed = remove(copy.deepcopy(model), fold=True), remove(model)
    for plain in (folded, removed):
        assert not adapters_of(plain) and plain.state_dict().keys() == base.state_dict().keys()
        assert all(type(plain.get_submodule(path)) is type(layer) for path, layer in base.named_modules())
    assert torch.equal(logits(removed), logits(base)) and not torch.equal(logits(folded), logits(base))
    torch.testing.assert_close(logits(folded), adapted, rtol=1e-4, atol=1e-4)


def test_what_has_no_place_in_a_model_is_not_removed():
    layer = LowRank(nn.Linear(2, 2), Config(rank=1))
    for model in (layer, nn.Sequential(LowRankStack(torch.zeros(1, 2, 2), Config(rank=1)))):
        with pytest.raises(UnsupportedError, match="adapters.remove: expected adapted layers inside a model"):
            remove(model)


def test_the_selections_of_a_model_are_traced_by_path():
    model = tiny_model("llama")
    paths = add(model, ["q_proj"], Config(rank=4, rule=TopK(1)))
    with trace(changed(model)) as records:
        logits(model)
    assert records.paths() == [f"{path}.rank" for path in paths] and records.density() == 0.25
