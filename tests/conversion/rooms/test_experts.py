"""experts in pretrained layers: tokens keep neurons by what their gates say."""

from functools import partial

import pytest
import torch
from tiny import tiny_model

from sentei.axes.experts import Config
from sentei.axes.experts.gates import Renormalised
from sentei.budget.calibration import calibrate
from sentei.conversion.grouping import group
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Plan, convert
from sentei.conversion.rooms import experts
from sentei.core.errors import ShapeError, UnsupportedError
from sentei.core.rules import All, Mass, TopK
from sentei.core.tracing import trace

TEXT = torch.randint(3, 320, (2, 100), generator=torch.Generator().manual_seed(5))
MODEL = tiny_model("llama")
SEEN = calibrate(MODEL, TEXT, {layer: {"network_neurons", "network_amplitudes"} for layer in range(3)})
ROUTED = Config(rule=TopK(2), unit=16, shared=1)
X = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(1))
built = partial(experts.build, layer_of(MODEL, 1), "network", seen=SEEN.of(1))


def test_a_neuron_scores_by_its_gate_and_by_what_it_is_usually_multiplied_with():
    """Against loops over the weights, which stay the model's own."""
    own, (network,) = MODEL.model.layers[1].mlp, built(config=Config(rule=TopK(20), unit=1))
    ups = []
    handle = own.up_proj.register_forward_hook(lambda _, inputs, output: ups.append(output[0].double()))
    with torch.no_grad():
        for row in TEXT:
            MODEL(input_ids=row[None])
        handle.remove()
        found, ups = network(X), torch.cat(ups)
        gate, up, down = (getattr(own, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        scale = [float(ups[:, f].square().mean().sqrt() * down[:, f].norm()) for f in range(96)]
        for t in range(30):
            acts = own.act_fn(gate @ X[0, t])
            kept = sorted(range(96), key=lambda f, acts=acts: abs(float(acts[f])) * scale[f])[-20:]
            expected = sum(acts[f] * (up[f] @ X[0, t]) * down[:, f] for f in kept)
            torch.testing.assert_close(found[0, t], expected, rtol=1e-4, atol=1e-4)
    assert network.up_proj is own.up_proj and network.gate_proj is own.gate_proj
    assert not {name for name, _ in network.named_parameters()} - {name for name, _ in own.named_parameters()}


def test_one_row_answers_as_many_do():
    (network,) = built(config=Config(rule=TopK(30), unit=1))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([network(X[:, t:t + 1]) for t in range(30)], 1), network(X))


def test_keeping_all_neurons_is_the_network_and_fewer_lose_more():
    own = MODEL.model.layers[1].mlp
    assert built(config=Config(unit=1)) == (own,)
    with torch.no_grad():
        dense = own(X)
        lost = [float((built(config=Config(rule=TopK(k), unit=1))[0](X) - dense).square().mean())
                for k in (96, 72, 48, 24, 0)]
    assert lost == sorted(lost) and lost[0] < 1e-10 and lost[-1] == pytest.approx(float(dense.square().mean()))


def test_a_trace_says_what_was_kept_where():
    plan = Plan.everywhere([0, 2], "experts", Config(rule=Mass(0.7), unit=1))
    model = convert(tiny_model("llama"), plan, SEEN)
    with torch.no_grad(), trace(model) as records:
        model(input_ids=TEXT[:, :20])
    assert [record.path for record in records] == ["model.layers.0.mlp.neurons", "model.layers.2.mlp.neurons"]
    assert all(0.1 < record.selection.density() < 0.7 and record.room == "neurons" for record in records)


def test_a_routed_network_is_its_shared_neurons_and_the_experts_its_router_foretells():
    """Against the sum over neurons, with the foretold sizes of `grouping.group`."""
    own, (network,) = MODEL.model.layers[1].mlp, built(config=ROUTED)
    state = SEEN.of(1)["network_amplitudes"]
    norms = own.down_proj.weight.detach().double().norm(dim=0)
    groups = group(state.inputs, state.neurons * norms, unit=16, shared=1)
    with torch.no_grad():
        found, hidden = network(X), own.act_fn(own.gate_proj(X)) * own.up_proj(X)
        foretold = X[0].double() @ groups.weight.T + groups.bias
        for t in range(30):
            kept = torch.cat([groups.shared, *groups.experts[foretold[t].topk(2).indices]])
            expected = own.down_proj.weight[:, kept] @ hidden[0, t, kept]
            torch.testing.assert_close(found[0, t], expected, rtol=1e-4, atol=1e-4)
        all_of_them, = built(config=Config(rule=TopK(5), unit=16, shared=1))
        torch.testing.assert_close(all_of_them(X), own(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([network(X[:, t:t + 1]) for t in range(30)], 1), found)
    assert type(network.shared) is type(own)


@pytest.mark.parametrize("config", [Config(rule=TopK(9), unit=1, shared=3), Config(rule=TopK(9), unit=16, metric="l2"),
                                    Config(rule=TopK(9), unit=1, gate=Renormalised())], ids=str)
def test_what_a_pretrained_network_does_not_become_is_refused(config):
    with pytest.raises(UnsupportedError, match="experts: expected the gate Unit"):
        built(config=config)


@pytest.mark.parametrize("sizes", [{"unit": 36}, {"unit": 16, "shared": 6}], ids=str)
@pytest.mark.parametrize("make", [built, lambda config: experts.blank(layer_of(MODEL, 1), "network", config)])
def test_neurons_that_make_no_whole_experts_are_refused(make, sizes):
    with pytest.raises(ShapeError, match="a unit that divides 96, and fewer shared than all"):
        make(config=Config(rule=TopK(1), **sizes))


def test_prompts_are_offered_experts_where_the_network_has_enough_neurons():
    wide = layer_of(tiny_model("llama", intermediate_size=512), 0)
    assert [(c.unit, c.shared, c.rule.k) for c in experts.options(wide, "rule")[1:]] == [(64, 2, 4), (64, 2, 2)]
    assert {c.unit for c in experts.options(wide, "decode")} == {1}
    assert {c.unit for c in experts.options(layer_of(MODEL, 0), "rule")} == {1}


def test_networks_with_biases_are_refused():
    model = tiny_model("llama", mlp_bias=True)
    with pytest.raises(UnsupportedError, match="a gated network without biases"):
        experts.build(layer_of(model, 1), "network", Config(rule=TopK(9), unit=1), SEEN.of(1))
    assert experts.wants(Config(rule=All(), unit=1)) == ()
