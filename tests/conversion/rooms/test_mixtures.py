"""Models that are mixtures of experts already: a token skips experts of its router's choice, or some are dropped."""

from functools import cache

import pytest
import torch
from tiny import tiny_model

from sentei.axes import weights as axis
from sentei.axes.experts import Config as Experts
from sentei.axes.experts.gates import Renormalised, Softmax
from sentei.axes.heads import Config as Heads
from sentei.axes.weights import Config as Weights
from sentei.budget.calibration import calibrate
from sentei.conversion.experts import function_of, run_experts
from sentei.conversion.families import MIXTURES
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Entry, Plan, convert, place, wanted
from sentei.conversion.rooms import WAYS
from sentei.conversion.sparing import SparingExperts, gate_of
from sentei.conversion.statistics import Contributions, Statistics
from sentei.core.errors import RuleError, ShapeError, UnsupportedError
from sentei.core.rules import All, Capacity, Rule, Threshold, TopK
from sentei.core.tracing import trace
from sentei.measurement.specialisation import loads

TEXT = torch.randint(3, 320, (3, 60), generator=torch.Generator().manual_seed(5))
UNITS = {"mixtral": 96, "olmoe": 96, "qwen2_moe": 40, "qwen3_moe": 40}
GATES = {"mixtral": Renormalised(), "olmoe": Softmax(), "qwen2_moe": Softmax(), "qwen3_moe": Renormalised()}
X = torch.randn(2, 15, 64, generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", MIXTURES)


def skipping(family: str, rule: Rule) -> Experts:
    return Experts(rule=rule, gate=GATES[family], unit=UNITS[family])


def fewer(number: int) -> Weights:
    return Weights(rule=TopK(number), saliency="reap", among="experts")


def everywhere(room: str, config) -> Plan:
    return Plan.everywhere(range(3), room, config)


@cache
def statistics(family: str) -> Statistics:
    return calibrate(tiny_model(family), TEXT, {layer: {"network_experts"} for layer in range(3)})


def built(family: str, room: str, config, seen: dict):
    return WAYS[room].build(layer_of(tiny_model(family), 1), "network", config, seen)[0]


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    return model(**inputs).logits


@every_family
def test_a_token_skips_the_experts_that_weigh_little_beside_its_largest(family):
    """Against loops in float64: shares of the router's logits, the largest few, those above the ratio; made to add up
    where the model's own do."""
    own, made = tiny_model(family).model.layers[1].mlp, built(family, "experts", skipping(family, Threshold(0.5)), {})
    numbers = set()
    with torch.no_grad():
        found, shared = made(X).flatten(0, 1), X.flatten(0, 1).double()
        for t, x in enumerate(X.flatten(0, 1)):
            shares = (own.gate.weight.double() @ x.double()).softmax(-1)
            chosen = shares.topk(own.gate.top_k)
            kept = [(float(share), int(e)) for share, e in zip(*chosen, strict=True) if share >= 0.5 * chosen[0][0]]
            numbers.add(len(kept))
            total = sum(share for share, _ in kept) if GATES[family] == Renormalised() else 1.0
            expected = sum(share / total * function_of(own.experts, e)(x[None])[0].double() for share, e in kept)
            if family == "qwen2_moe":
                gate = (own.shared_expert_gate.weight.double() @ shared[t]).sigmoid()
                expected = expected + gate * own.shared_expert(x[None])[0].double()
            torch.testing.assert_close(found[t].double(), expected, rtol=1e-4, atol=1e-5)
    assert len(numbers) > 1, "tokens keep unlike numbers"


@every_family
@pytest.mark.parametrize("rule", [Threshold(0.5), TopK(2)], ids=str)
def test_a_trace_changes_nothing(family, rule):
    made = built(family, "experts", skipping(family, rule), {}).eval()
    with torch.no_grad():
        expected = made(X)
        with trace(made):
            assert torch.equal(made(X), expected)


@every_family
def test_what_skips_nothing_is_the_same_kernel_on_the_same_choice(family):
    """Bit for bit, whatever the kernel; keep-all is the model's own module."""
    layer = layer_of(tiny_model(family), 1)
    own, x = layer.member("experts"), X.flatten(0, 1)
    made = built(family, "experts", skipping(family, Threshold(0.0)), {}).experts
    with torch.no_grad():
        _, weights, ids = layer.member("router")(x)
        order = ids.argsort(-1)  # as selections have them
        assert torch.equal(made(x, ids, weights), run_experts(own, x, ids.gather(1, order), weights.gather(1, order)))
    assert isinstance(made, SparingExperts) and made.down_proj is not None
    assert WAYS["experts"].build(layer, "network", skipping(family, All()), {}) == layer.places["network"]
    assert WAYS["weights"].build(layer, "network", Weights(saliency="reap", among="experts"), {}) == (
        layer.places["network"])


@every_family
@pytest.mark.parametrize("room, choice", [("experts", 3), ("weights", 2)])
def test_neither_the_batch_nor_padding_decides_what_a_token_keeps(family, room, choice):
    model = tiny_model(family)
    config = WAYS[room].options(layer_of(model, 0), "rule")[choice]
    place(model, everywhere(room, config), statistics(family))
    ids = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :13] = 0, 0
    together, real = logits(model, input_ids=ids, attention_mask=mask), mask.bool()
    other = ids.clone()
    other[0] = 7
    torch.testing.assert_close(logits(model, input_ids=other, attention_mask=mask)[1:][real[1:]],
                               together[1:][real[1:]], rtol=0, atol=1e-5)
    alone = logits(model, input_ids=ids[2:, 13:])
    torch.testing.assert_close(together[2:, 13:], alone, rtol=0, atol=1e-4)


@every_family
def test_a_trace_says_what_was_kept_of_the_routers_choice(family):
    model = place(tiny_model(family), everywhere("experts", skipping(family, Threshold(0.5))))
    with trace(model) as records:
        logits(model, input_ids=TEXT)
    assert [record.path for record in records] == [f"model.layers.{n}.mlp.experts.choice" for n in range(3)]
    top_k = model.model.layers[0].mlp.gate.top_k
    for record in records:
        assert (record.selection.permitted == top_k).all() and (record.selection.count() >= 1).all()
        assert 0.3 < record.selection.density() < 1
    told = loads(records)
    assert [sum(load.counts) for load in told.values()] == [int(each.selection.count().sum()) for each in records]


@every_family
def test_experts_that_add_least_are_dropped_with_their_rows_of_the_router(family):
    """Saliency against loops over the text, by the mean over the tokens that keep an expert."""
    model, state = tiny_model(family), statistics(family).of(1)["network_experts"]
    mlp, calls = model.model.layers[1].mlp, []
    handle = mlp.experts.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    for row in TEXT:
        logits(model, input_ids=row[None])
    handle.remove()
    sizes = {e: [] for e in range(6)}
    with torch.no_grad():
        for hidden, ids, weights in calls:
            for t, k in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1])).tolist():
                answer = function_of(mlp.experts, int(ids[t, k]))(hidden[t][None])
                sizes[int(ids[t, k])].append(float(weights[t, k] * answer.norm()))
    means = torch.tensor([sum(each) / max(len(each), 1) for each in sizes.values()], dtype=torch.float64)
    torch.testing.assert_close(state.saliency, means, rtol=1e-4, atol=0)
    assert state.kept.tolist() == [len(each) for each in sizes.values()]
    made = built(family, "weights", fewer(4), {"network_experts": state})
    kept = means.topk(4).indices.sort().values
    for name, own in mlp.experts.named_parameters():
        assert torch.equal(made.experts.get_parameter(name), own[kept])
    assert torch.equal(made.gate.weight, mlp.gate.weight[kept])
    assert type(made) is type(mlp) and type(made.experts) is type(mlp.experts)
    assert mlp.gate.weight.shape[0] == len(mlp.experts.down_proj) == 6, "the original is as it was"
    assert sum(w.numel() for w in made.experts.parameters()) * 6 == sum(w.numel() for w in mlp.experts.parameters()) * 4


def test_the_sums_do_not_depend_on_the_order_or_on_who_saw_which_rows():
    model, names = tiny_model("olmoe"), {layer: {"network_experts"} for layer in range(3)}
    whole, backwards = statistics("olmoe"), calibrate(model, TEXT.flip(0), names)
    shares = [calibrate(model, TEXT, names, share=(number, 2)) for number in range(2)]
    shares[0].merge(shares[1])
    for place_, state in whole.items():
        for other in (backwards, shares[0]):
            torch.testing.assert_close(other[place_].sizes, state.sizes, rtol=1e-12, atol=0)
            assert torch.equal(other[place_].kept, state.kept)
    never = Contributions(2)
    never.see(1, torch.ones(3), torch.ones(3, 4))
    assert never.saliency.tolist() == [0.0, 2.0]


@every_family
def test_dropping_what_no_token_keeps_changes_nothing(family):
    """Two experts whose logits are far below all others'."""
    layer, x, seen = layer_of(tiny_model(family), 1), X.clone(), Contributions(6)
    with torch.no_grad():
        x[..., 0] = 5.0
        layer.member("router").weight[[1, 4], 0] -= 6.0
        _, weights, ids = layer.member("router")(x)
        for e in (0, 2, 3, 5):
            assert (ids == e).any()
            seen.see(e, torch.ones(1), torch.ones(1, 4))
        assert not torch.isin(ids, torch.tensor([1, 4])).any()
        made, = WAYS["weights"].build(layer, "network", fewer(4), {"network_experts": seen})
        torch.testing.assert_close(made(x), layer.network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config, told", [
    (Experts(rule=Threshold(0.5), gate=Softmax(), unit=40), "the gate Renormalised"),
    (Experts(rule=Threshold(0.5), unit=40), "the gate Renormalised"),
    (Experts(rule=Threshold(0.5), gate=Renormalised(), unit=96), "the unit 40"),
    (Experts(rule=Threshold(0.5), gate=Renormalised(), unit=40, shared=1), "nothing shared"),
    (Experts(rule=Threshold(0.5), gate=Renormalised(), unit=40, metric="l2"), "choose the rule alone"),
], ids=str)
def test_what_the_router_does_not_mean_is_refused(config, told):
    for make in (built, lambda *given: WAYS["experts"].blank(layer_of(tiny_model(given[0]), 1), "network", config)):
        with pytest.raises(UnsupportedError, match=told):
            make("qwen3_moe", "experts", config, {})


def test_experts_of_another_kind_are_refused():
    model = tiny_model("mixtral")
    layer = layer_of(model, 1)
    layer.member("experts").act_fn = torch.nn.Tanh()
    with pytest.raises(UnsupportedError, match="a stack of gated networks of a known activation"):
        WAYS["experts"].build(layer, "network", skipping("mixtral", Threshold(0.5)), {})
    with pytest.raises(RuleError, match="looks at no later token"):
        built("mixtral", "experts", skipping("mixtral", Capacity(0.5)), {})


@pytest.mark.parametrize("family, config, told", [
    ("mixtral", Weights(rule=TopK(3), saliency="magnitude"), r"whole experts \(among 'experts'\), got 'columns'"),
    ("llama", fewer(3), r"whole neurons \(among 'columns'\), got 'experts'"),
    ("olmoe", fewer(2), "the rule TopK of 3 to 6 experts"), ("olmoe", fewer(7), "the rule TopK of 3 to 6 experts"),
    ("olmoe", Weights(rule=Capacity(0.5), saliency="reap", among="experts"), "the rule TopK of 3 to 6 experts"),
], ids=str)
def test_experts_that_cannot_be_dropped_so_are_refused(family, config, told):
    seen = {"network_experts": Contributions(6)}
    for make in (lambda layer: WAYS["weights"].build(layer, "network", config, seen),
                 lambda layer: WAYS["weights"].blank(layer, "network", config)):
        with pytest.raises(UnsupportedError, match=told):
            make(layer_of(tiny_model(family), 1))


def test_a_layer_by_itself_has_no_experts_to_drop():
    with pytest.raises(ShapeError, match="among one of layer, row, four, columns for a layer, got 'experts'"):
        axis.from_dense(torch.nn.Linear(8, 8), fewer(2))
    for mixed in ({"saliency": "reap"}, {"among": "experts"}, {"saliency": "obs", "among": "experts"}):
        with pytest.raises(RuleError, match="weights.Config"):
            Weights(**mixed)


def test_statistics_of_another_kind_of_layer_are_refused():
    for family, plan in (("qwen3_moe", everywhere("experts", Experts(rule=TopK(9), unit=1))),
                         ("llama", everywhere("weights", fewer(3)))):
        with pytest.raises(UnsupportedError, match="calibrate: expected a layer with"):
            calibrate(tiny_model(family), TEXT, wanted(plan))


def test_heads_under_one_norm_are_not_merged():
    layer = layer_of(tiny_model("olmoe"), 1)
    assert WAYS["heads"].options(layer, "rule") == [Heads(merge="joint")]
    with pytest.raises(UnsupportedError, match="keys without a norm over all heads, got OlmoeAttention"):
        WAYS["heads"].build(layer, "attention", Heads(num_kv_heads=1), {})


@every_family
def test_the_gate_is_the_models_own(family):
    assert gate_of(layer_of(tiny_model(family), 0)) == GATES[family]


def test_a_layer_that_is_no_mixture_in_a_family_of_mixtures_is_refused():
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(UnsupportedError, match="Qwen3MoeSparseMoeBlock at model.layers.1.mlp, got Qwen3MoeMLP"):
        convert(model, Plan((Entry(layer=1, room="weights", config=fewer(3)),)))
