"""Gates against transformers' routers with the same weights, and their doors."""

import json
import math

import pytest
import torch

from sentei.axes.experts import Config, MixtureOfExperts
from sentei.axes.experts.gates import GATES, Choice, Renormalised, Sigmoid, Soft, Softmax, Task, gate_from_json
from sentei.core.errors import FileError, RuleError
from sentei.core.rules import Capacity, TopK
from sentei.core.selection import Selection
from sentei.core.tracing import trace

WIDTH, UNIT, E = 16, 8, 8


def copied(theirs, config: Config) -> MixtureOfExperts:
    """A mixture with the weights of a block of transformers."""
    ours = MixtureOfExperts(config, width=WIDTH, neurons=(E + config.shared) * UNIT)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        ours.router.weight.copy_(theirs.gate.weight)
        ours.up.copy_(theirs.experts.gate_up_proj)
        ours.down.copy_(theirs.experts.down_proj)
    return ours


def compare(theirs, ours: MixtureOfExperts) -> None:
    """The same experts, weights, outputs and gradients of x and of the router, in fp32."""
    x = torch.randn(2, 10, WIDTH, requires_grad=True)
    _, weights, ids = theirs.gate(x)
    with trace(ours) as records:
        y = ours(x)
    ids, order = ids.sort(-1)
    assert torch.equal(records[0].selection.ids.flatten(0, 1), ids)
    torch.testing.assert_close(records[0].selection.weights.flatten(0, 1), weights.gather(-1, order))
    expected = theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y.square().sum(), (x, ours.router.weight, ours.up, ours.down))
    want = torch.autograd.grad(expected.square().sum(), (x, theirs.gate.weight, theirs.experts.gate_up_proj,
                                                         theirs.experts.down_proj))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_renormalised_top_2_is_the_block_of_mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    theirs = MixtralSparseMoeBlock(MixtralConfig(hidden_size=WIDTH, intermediate_size=UNIT, num_local_experts=E,
                                                 num_experts_per_tok=2, experts_implementation="eager"))
    compare(theirs, copied(theirs, Config(rule=TopK(2), gate=Renormalised(), unit=UNIT)))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("groups, kept_groups", [(1, 1), (4, 2), (4, 3)])
def test_sigmoid_with_bias_and_groups_is_the_block_of_deepseek_v3(groups, kept_groups, shared):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    theirs = DeepseekV3MoE(DeepseekV3Config(
        hidden_size=WIDTH, moe_intermediate_size=UNIT, n_routed_experts=E, num_experts_per_tok=3, n_group=groups,
        topk_group=kept_groups, n_shared_experts=shared, routed_scaling_factor=2.5, experts_implementation="eager"))
    gate = Sigmoid(scale=2.5, groups=groups, kept_groups=kept_groups)
    ours = copied(theirs, Config(rule=TopK(3), gate=gate, unit=UNIT, shared=shared))
    with torch.no_grad():
        theirs.gate.e_score_correction_bias.normal_(std=0.2)
        ours.experts.bias.copy_(theirs.gate.e_score_correction_bias)
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(ours.shared, name).weight.copy_(getattr(theirs.shared_experts, name).weight)
    compare(theirs, ours)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.25, 2.0])
def test_a_capacity_is_that_of_switch_transformers(capacity):
    """Fedus et al. 2021, eq. 3, token by token: the best expert, if it has had fewer than tokens ÷ experts x factor."""
    tokens, sequences = 20, 3
    ours = MixtureOfExperts(Config(rule=TopK(1), gate=Softmax(capacity), unit=UNIT), width=WIDTH, neurons=E * UNIT)
    with torch.no_grad():
        ours.router.weight.normal_()
    x = torch.randn(sequences, tokens, WIDTH)
    with trace(ours) as records:
        ours(x)
    weights, dropped = records[0].selection.dense_weights(), 0
    for b in range(sequences):
        taken = [0] * E
        for t in range(tokens):
            probabilities = (ours.router.weight @ x[b, t]).softmax(0)
            best = int(probabilities.argmax())
            expected = torch.zeros(E)
            if taken[best] < math.ceil(tokens / E * capacity):
                expected[best] = probabilities[best]
            else:
                dropped += 1
            taken[best] += 1
            torch.testing.assert_close(weights[b, t], expected)
    assert dropped or capacity == 2


@pytest.mark.parametrize("gate", [*(kind() for kind in GATES.values()), Softmax(1.25), Task(7), Soft(3),
                                  Sigmoid(2.5, 8, 4, 0.0)], ids=str)
def test_a_gate_is_the_same_after_json(gate):
    assert gate_from_json(json.loads(json.dumps(gate.to_json()))) == gate


@pytest.mark.parametrize("value", [
    None, [], "unit", {}, {"name": "sharp"}, {"name": ["unit"]}, {"name": "unit", "extra": 1}, {"name": "task"},
    {"name": "softmax", "capacity": -1}, {"name": "softmax", "capacity": True}, {"name": "soft", "slots": 0},
    {"name": "sigmoid", "scale": 1, "groups": 2, "kept_groups": 3, "speed": 0}], ids=str)
def test_what_is_no_gate_is_refused(value):
    with pytest.raises(FileError):
        gate_from_json(value)


@pytest.mark.parametrize("make", [
    lambda: Softmax(0), lambda: Softmax(float("inf")), lambda: Softmax(float("nan")), lambda: Softmax("1"),
    lambda: Soft(0), lambda: Soft(1.5), lambda: Task(0), lambda: Task(True), lambda: Sigmoid(scale=0),
    lambda: Sigmoid(groups=2, kept_groups=3), lambda: Sigmoid(groups=1.0), lambda: Sigmoid(speed=-1e-3),
    lambda: Sigmoid(kept_groups=0), lambda: Choice(speed=0), lambda: Choice(speed=True),
    lambda: Config(rule=TopK(2), gate=Choice()), lambda: Config(rule=Capacity((0.5, 0.2)), gate=Choice())])
def test_a_parameter_outside_its_range_is_refused(make):
    with pytest.raises(RuleError):
        make()


def test_groups_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(RuleError, match="expected experts in 3 equal groups, got 8"):
        MixtureOfExperts(Config(rule=TopK(2), gate=Sigmoid(groups=3, kept_groups=2), unit=UNIT), width=WIDTH,
                         neurons=E * UNIT)


def test_a_group_of_one_expert_is_worth_that_expert():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    assert Sigmoid(groups=4, kept_groups=2).shortlist(scores).tolist() == [[3.0, -torch.inf, 2.0, -torch.inf]]


def test_a_group_with_one_permitted_expert_is_worth_that_one_and_one_without_is_never_kept():
    none = -torch.inf
    scores = torch.tensor([[0.9, none, 0.3, 0.4, none, none, -0.5, none]])
    kept = Sigmoid(groups=4, kept_groups=3).shortlist(scores)
    assert torch.equal(kept, scores)
    kept = Sigmoid(groups=4, kept_groups=1).shortlist(scores)
    assert kept[0].isfinite().nonzero().flatten().tolist() == [0]  # 0.9 alone is more than 0.3 + 0.4


def test_soft_weights_are_softmax_and_never_too_small_to_be_fast():
    """What softmax makes smaller than 1e-20 is 0: no sum can tell, and denormal numbers are slow."""
    logits = 40 * torch.randn(1, 50, 30, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(1, 50, 30, dtype=torch.bool)
    gate = Soft(slots=3)
    combined = gate.weigh(Selection.from_mask(everything, everything), logits).dense_weights()
    for found, dim in ((gate.dispatch(logits, everything), -2), (combined, -1)):
        expected = logits.double().softmax(dim)
        assert 0 < expected[expected > 0].min() < 1e-38
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-19)
        assert (found == 0).any() and found[found > 0].min() > 1e-25
