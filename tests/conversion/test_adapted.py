"""Adapters on stacks of experts: what they compute, merged and taken back, to a file and from it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacked_models import TOKENS, logits, stacked
from torch import nn

from sentei.axes.rank import Config, LowRank, LowRankStack
from sentei.conversion.adapted import AdaptedStacks
from sentei.conversion.adapter_files import CONFIG, WEIGHTS, load, write
from sentei.conversion.adapters import adapters_of, add, merge, remove, unmerge
from sentei.core.errors import FileError, RuleError, UnsupportedError
from sentei.core.rules import TopK
from sentei.core.tracing import trace

TARGETS = {"Mixtral": ["experts.gate_up_proj", "experts.down_proj", "q_proj"], "Qwen2Moe": ["experts.down_proj"],
           "sentei": ["feed_forward.up", "feed_forward.down", "query"]}
every_family = pytest.mark.parametrize("family", TARGETS)


def changed(family: str, config: Config | None = None) -> nn.Module:
    """A model with adapters that do something."""
    model = stacked(family)
    add(model, TARGETS[family], config or Config(rank=3))
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.b, std=0.3)
    return model


@every_family
def test_a_new_adapter_changes_nothing_and_alone_is_trained(family):
    model, plain = stacked(family), logits(stacked(family))
    paths = add(model, TARGETS[family], Config(rank=3))
    assert paths == list(adapters_of(model)) and len(paths) == 2 * len(TARGETS[family])
    assert {type(adapter) for adapter in adapters_of(model).values()} == (
        {LowRankStack} if family == "Qwen2Moe" else {LowRank, LowRankStack})
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    trained = [name for name, part in model.named_parameters() if part.requires_grad]
    assert trained == [f"{path}.{factor}" for path in paths for factor in "ab"]


@every_family
def test_every_expert_computes_with_its_own_change(family):
    model, other = changed(family), stacked(family)
    with torch.no_grad():
        for path, adapter in adapters_of(model).items():
            if isinstance(adapter, LowRankStack):
                weight = other.get_parameter(path)
                assert adapter.a.shape == (5, 3, weight.shape[2]) and adapter.b.shape == (5, weight.shape[1], 3)
                for e in range(5):
                    for r in range(3):
                        weight[e] += 16 / 3 * torch.outer(adapter.b[e, :, r], adapter.a[e, r])
            else:
                other.get_submodule(path).weight += 16 / 3 * adapter.b @ adapter.a
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-3, atol=1e-4)
    assert (logits(model) - logits(stacked(family))).abs().max() > 1e-2


@every_family
def test_merged_is_the_same_function_and_unmerged_the_same_bits(family):
    model = changed(family)
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    unmerge(model)
    assert torch.equal(logits(model), before)


@every_family
def test_removed_is_the_model_that_was_and_folded_the_model_that_is(family):
    for fold in (False, True):
        model, base = changed(family), stacked(family)
        adapted = logits(model)
        plain = remove(model, fold=fold)
        assert not adapters_of(plain) and plain.state_dict().keys() == base.state_dict().keys()
        assert not any(isinstance(part, AdaptedStacks) for part in plain.modules())
        torch.testing.assert_close(logits(plain), adapted if fold else logits(base), rtol=1e-3, atol=1e-4)


@every_family
def test_gradients_reach_every_factor(family):
    model = changed(family)
    found = model(TOKENS)
    (found if isinstance(found, torch.Tensor) else found.logits).square().sum().backward()
    assert all(factor.grad.abs().amax((-1, -2)).gt(0).all() for adapter in adapters_of(model).values()
               for factor in (adapter.a, adapter.b))


def test_experts_of_transformers_choose_directions_and_the_trace_knows():
    model = changed("Mixtral", Config(rank=3, rule=TopK(1)))
    with trace(model) as records:
        logits(model)
    assert {f"model.layers.{n}.mlp.experts.{name}.rank" for n in (0, 1) for name in ("gate_up_proj", "down_proj")} <= (
        set(records.paths()))
    assert records.density() == pytest.approx(1 / 3)


def test_merged_experts_run_by_the_models_own_implementation():
    """Once merged, nothing is computed expert by expert here."""
    model = changed("Mixtral")
    merge(model)
    with trace(model) as records:
        logits(model)
    assert not records and {bypass.reason for bypass in records.bypasses} == {"merged weights"}


@pytest.mark.parametrize("family, targets, config, error, expected", [
    ("GptOss", ["experts.down_proj"], Config(), UnsupportedError, "stacked weights .E, O, I."),
    ("sentei", ["feed_forward.down", "query"], Config(rule=TopK(1)), RuleError, "the rule All and no dropout"),
    ("sentei", ["feed_forward.down", "query"], Config(dropout=0.5), RuleError, "the rule All and no dropout"),
    ("Mixtral", ["experts.up_proj"], Config(), UnsupportedError, "'experts.up_proj'"),
    ("Mixtral", ["gate.weight", "q_proj"], Config(), UnsupportedError, "'gate.weight'")], ids=str)
def test_what_cannot_have_an_adapter_is_refused_and_nothing_is_changed(family, targets, config, error, expected):
    model = stacked(family)
    trained = [name for name, part in model.named_parameters() if part.requires_grad]
    with pytest.raises(error, match=expected):
        add(model, targets, config)
    assert not adapters_of(model)
    assert [name for name, part in model.named_parameters() if part.requires_grad] == trained


def test_a_second_adapter_on_a_stack_is_refused():
    model = changed("Mixtral")
    for target in ("experts.down_proj", "base.down_proj", "down_proj.weight"):
        with pytest.raises(UnsupportedError, match="without an adapter"):
            add(model, [target], Config())


@every_family
def test_there_and_back_through_a_file(family, tmp_path):
    model, other = changed(family, Config(rank=3, alpha=5.0, scaling="root")), stacked(family)
    write(model, tmp_path)
    assert set(load(other, tmp_path)) == set(adapters_of(model))
    assert list(adapters_of(other)) == list(adapters_of(model))
    for path, adapter in adapters_of(other).items():
        mine = adapters_of(model)[path]
        assert adapter.config == mine.config and torch.equal(adapter.a, mine.a) and torch.equal(adapter.b, mine.b)
    assert torch.equal(logits(other), logits(model))


def test_a_file_names_stacks_as_peft_does(tmp_path):
    model = changed("Mixtral")
    write(model, tmp_path)
    value, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert value["target_modules"] == ["q_proj"] and value["target_parameters"] == [
        f"model.layers.{n}.mlp.experts.{name}" for n in (0, 1) for name in ("gate_up_proj", "down_proj")]
    inner = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    outer = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    assert tensors[inner].shape == (15, 32) and tensors[outer].shape == (32, 15)
    stack = adapters_of(model)["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(tensors[inner][2 * 3 + 1], stack.a[2, 1])
    stack = adapters_of(model)["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(tensors[outer][:, 2 * 5 + 1], stack.b[1, :, 2])


def test_what_peft_cannot_say_of_stacks_is_not_written(tmp_path):
    alone = nn.Sequential(LowRankStack(torch.zeros(1, 2, 2), Config(rank=1)))
    for model in (changed("Mixtral", Config(dropout=0.1)), alone):
        with pytest.raises(UnsupportedError, match="adapter_files.write"):
            write(model, tmp_path)


@pytest.mark.parametrize("changes, expected", [
    ({"target_parameters": "experts.down_proj"}, "target_parameters a list"),
    ({"target_parameters": [1]}, "target_parameters a list"),
    ({"target_parameters": ["x"] * 1025}, "at most 1,024 names"),
    ({"target_parameters": ["experts.down_proj"]}, "among the target_parameters"),
    ({"target_parameters": None}, "among the target_parameters"), ({"r": 4}, "factors")], ids=str)
def test_a_file_that_does_not_fit_its_stacks_is_refused(changes, expected, tmp_path):
    write(changed("Mixtral"), tmp_path)
    value = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(value | changes))
    model = stacked("Mixtral")
    with pytest.raises(FileError, match=expected):
        load(model, tmp_path)
    assert not adapters_of(model) and all(part.requires_grad for part in model.parameters())


def test_factors_of_other_numbers_of_experts_are_refused(tmp_path):
    write(changed("Mixtral"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if "experts.lora_A" in name)
    save_file(tensors | {name: tensors[name][:12].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(FileError, match="factors"):
        load(stacked("Mixtral"), tmp_path)
