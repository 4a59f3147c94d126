"""Experts of transformers by our kernel: proven, switched, taken back, and never where they are something else."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

from sentei.axes.depth import Config as Depth
from sentei.conversion import native as conversion
from sentei.conversion import stacks
from sentei.conversion.families import MIXTURES
from sentei.conversion.native import is_installed, removed
from sentei.conversion.plan import Entry, Plan, convert, place
from sentei.conversion.rows import NativeHeads
from sentei.conversion.stacks import NativeExperts
from sentei.core.rules import Fixed
from sentei.kernels import native

pytestmark = [pytest.mark.skipif(bool(native.missing()), reason=native.missing()), pytest.mark.usefixtures("always")]
GONE = Plan((Entry(layer=2, room="depth", config=Depth(rule=Fixed(()), part="network")),))
every_family = pytest.mark.parametrize("family", MIXTURES)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The tokens of every call of ours."""
    made, right = [], stacks.run_experts
    monkeypatch.setattr(stacks, "run_experts", lambda module, x, *more: made.append(len(x)) or right(module, x, *more))
    return made


@torch.no_grad()
def logits(model, tokens: int = 12) -> torch.Tensor:
    return model(torch.arange(tokens)[None] * 7 + 3).logits


def experts_of(model) -> list:
    return [module for module in model.modules() if isinstance(module, NativeExperts)]


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_run_natively_and_are_taken_back(family, dtype, calls):
    model = tiny_model(family).to(dtype)
    dense, expected = logits(model), logits(place(model, GONE))
    assert not experts_of(model)
    convert(model, GONE)
    assert len(experts_of(model)) == 2, "of the layer whose network is gone none are left"
    calls.clear()
    found = logits(model)
    assert calls == [12, 12]
    gap = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert gap.max() < 1e-4 if dtype == torch.float32 else gap.median() < 0.05
    with removed(model):
        assert torch.equal(logits(model), expected) and not is_installed(model)
    assert torch.equal(logits(convert(model, Plan())), dense) and not is_installed(model)


def test_the_heads_of_olmoe_whose_norm_is_over_all_of_them_are_left_alone():
    heads = {family: sum(isinstance(module, NativeHeads) for module in convert(tiny_model(family), GONE).modules())
             for family in MIXTURES}
    assert heads == {"mixtral": 3, "olmoe": 0, "qwen2_moe": 3, "qwen3_moe": 3}


def test_numbers_of_tokens_that_were_not_faster_take_the_models_own_way(calls):
    model = convert(tiny_model("mixtral"), GONE)
    for module in experts_of(model):
        module.native_rows = replace(module.native_rows, many_rows=0)
    calls.clear()
    logits(model, 12)
    assert not calls
    logits(model, 8)
    assert calls == [8, 8]


@pytest.mark.parametrize("change", [
    lambda module: setattr(module, "_apply_gate", lambda joint: joint[..., :96]),
    lambda module: setattr(module, "act_fn", torch.nn.Tanh()),
    lambda module: setattr(module, "forward", lambda *inputs: inputs[0]),
    lambda module: setattr(module, "_is_expert_parallel", True),
], ids=["another gate", "an activation unknown", "a forward of its own", "experts elsewhere"])
def test_other_experts_are_left_alone(change):
    model = tiny_model("mixtral")
    change(model.model.layers[1].mlp.experts)
    assert len(experts_of(convert(model, GONE))) == 1


def test_experts_that_compute_something_else_are_found_out():
    """Made of the same parts, and answering twice as much."""
    model = tiny_model("mixtral")
    module = model.model.layers[1].mlp.experts
    own = type(module)

    class Doubled(own):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * own.forward(self, hidden_states, top_k_index, top_k_weights)

    module.__class__ = Doubled
    choices = {choice.path: choice for choice in conversion.install(model)}
    assert "another result" in choices["model.layers.1.mlp.experts"].reason and len(experts_of(model)) == 2


def test_gradients_reach_the_experts_and_their_weights():
    models = [tiny_model("qwen2_moe"), convert(tiny_model("qwen2_moe"), GONE)]
    place(models[0], GONE)
    for model in models:
        model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    for name in ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.gate.weight"):
        own, found = (model.get_parameter(name).grad for model in models)
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))
