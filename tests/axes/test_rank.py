"""rank: the directions a token keeps, plain LoRA, merging, stacks of experts."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.rank import Adapter, Config, LowRank, LowRankStack, Rank, from_dense
from sentei.core.definition import apply
from sentei.core.errors import RuleError, ShapeError, UnsupportedError
from sentei.core.rules import All, Capacity, Fixed, Mass, Threshold, TopK
from sentei.core.tracing import trace
from sentei.kernels.routing import route

RULES = [All(), TopK(0), TopK(2), TopK(5), TopK(9), Mass(0.6), Threshold(0.5), Fixed((1, 3))]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
ROUNDED = {"rtol": 1e-10, "atol": 1e-12}


def parts(*lead: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, a, b and onto: 5 directions from 6 to 4 numbers."""
    return [torch.randn(*lead, *shape, dtype=dtype) for shape in ((7, 6), (5, 6), (4, 5), (7, 4))]


def loop(room: Rank, x, a, b, onto) -> torch.Tensor:
    """The definition, token by token, with sizes and weights written here."""
    rows = []
    for token, start in zip(x, onto, strict=True):
        weights = a @ token
        sizes = weights.abs() * b.square().sum(0).sqrt()
        selection = room.rule(sizes.detach().log()[None]).weigh(room.scale * weights[None])
        rows.append(start + apply(selection, b.mT)[0])
    return torch.stack(rows)


def outcome(function, inputs) -> list[torch.Tensor]:
    """The output and the gradients of one fixed loss of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    loss = (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).sum()
    return [output, *torch.autograd.grad(loss + sum(leaf.sum() * 0 for leaf in leaves), leaves)]


@every_rule
@pytest.mark.parametrize("heard", [False, True], ids=["alone", "traced"])
def test_is_the_definition(rule, heard):
    room, inputs = Rank(Config(rule=rule, rank=5, alpha=3)), parts()
    expected = outcome(lambda *x: loop(room, *x), inputs)
    if heard:
        with trace(room):
            got = outcome(room, inputs)
    else:
        got = outcome(room, inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **ROUNDED)
    x, a, b, onto = inputs
    torch.testing.assert_close(room(x, a, b), got[0] - onto, **ROUNDED)


@every_rule
def test_layers_with_experts_in_front_are_the_layers_one_by_one(rule):
    room, inputs = Rank(Config(rule=rule, rank=5)), parts(3)
    singly = outcome(lambda *x: torch.stack([room(*each) for each in zip(*x, strict=True)]), inputs)
    for one, other in zip(outcome(room, inputs), singly, strict=True):
        torch.testing.assert_close(one, other, **ROUNDED)
    torch.testing.assert_close(room(*inputs[:3]), room(*inputs) - inputs[3], **ROUNDED)


@pytest.mark.parametrize("rule", [All(), TopK(2), Mass(0.6)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,)], ids=["one", "stacked"])
def test_gradcheck(rule, lead):
    inputs = [tensor.requires_grad_() for tensor in parts(*lead)]
    assert torch.autograd.gradcheck(Rank(Config(rule=rule, rank=5)), inputs)


def test_tokens_may_have_any_dimensions_in_front():
    x, a, b, onto = parts()
    for rule in (All(), TopK(2)):
        room = Rank(Config(rule=rule, rank=5))
        flat = room(x, a, b, onto)
        torch.testing.assert_close(room(x.view(7, 1, 1, 6), a, b, onto.view(7, 1, 1, 4)), flat.view(7, 1, 1, 4))
        torch.testing.assert_close(room(x[0], a, b, onto[0]), flat[0])
        strided = [tensor.mT.contiguous().mT for tensor in (x, a, b, onto)]
        torch.testing.assert_close(room(*strided), flat)


def test_mass_speaks_of_shares_of_the_sum_of_sizes():
    x, a = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0], [-2.0], [3.0], [4.0]], dtype=torch.float64)
    b = torch.ones(1, 4, dtype=torch.float64)
    for mass, kept in ((0.35, [3]), (0.5, [2, 3]), (0.75, [1, 2, 3])):
        with trace(room := Rank(Config(rule=Mass(mass), rank=4))) as records:
            room(x, a, b)
        assert records[0].selection.ids[0].tolist() == kept


def test_ties_and_directions_of_no_size():
    x, a, b = torch.ones(2, 3), torch.zeros(4, 3), torch.ones(2, 4)
    a[2] = 1
    with trace(room := Rank(Config(rule=TopK(2), rank=4, alpha=4))) as records:
        output = room(x, a, b)
    assert records[0].selection.ids.tolist() == [[0, 2]] * 2 and records[0].selection.permitted.tolist() == [4, 4]
    assert torch.equal(output, torch.full((2, 2), 3.0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_size_that_is_no_number_is_refused_where_it_chooses(bad):
    x, a, b, onto = parts()
    x[3, 2] = bad
    with pytest.raises(RuleError, match="finite scores"):
        Rank(Config(rule=TopK(2), rank=5))(x, a, b, onto)
    assert not Rank(Config(rank=5))(x, a, b, onto)[3].isfinite().any()


def test_sizes_beyond_the_range_of_their_product_still_choose():
    x, a, b, _ = parts(dtype=torch.float32)
    with trace(room := Rank(Config(rule=TopK(2), rank=5))) as records:
        room(x * 1e18, a * 1e18, b * 1e18)
        room(x, a, b)
    assert torch.equal(records[0].selection.ids, records[1].selection.ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", [All(), Fixed((0, 3))], ids=str)
def test_precision(dtype, rule):
    room, inputs = Rank(Config(rule=rule, rank=5)), parts(dtype=dtype)
    kept = list(range(5)) if isinstance(rule, All) else list(rule.ids)

    def plain(x, a, b, onto):
        return onto + room.scale * ((x @ a[kept].mT) @ b[:, kept].mT)
    exact = plain(*(tensor.double() for tensor in inputs))
    allowed = 2 * (plain(*inputs).double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (room(*inputs).double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("tokens", [0, 1])
@every_rule
def test_no_token_and_one(tokens, rule):
    x, a, b, onto = parts()
    room = Rank(Config(rule=rule, rank=5))
    output = room(x[:tokens], a, b, onto[:tokens])
    assert output.shape == (tokens, 4)
    with trace(room):
        torch.testing.assert_close(room(x, a, b, onto)[:tokens], output, **ROUNDED)


def test_a_token_is_chosen_for_alone():
    x, a, b, onto = parts()
    room, order = Rank(Config(rule=TopK(2), rank=5)), torch.randperm(7)
    torch.testing.assert_close(room(x[order], a, b, onto[order]), room(x, a, b, onto)[order], **ROUNDED)


def test_the_record_says_what_was_done():
    x, a, b, _ = parts()
    for rule, impl, choosing in ((All(), "two_products", 0), (TopK(5), "two_products", 0),
                                 (TopK(2), "kept_rows", 7 * 3 * 6)):
        with trace(room := Rank(Config(rule=rule, rank=5))) as records:
            room(x, a, b)
        kept = 2 if impl == "kept_rows" else 5
        cost = records[0].cost
        assert (records[0].impl, cost.choosing) == (impl, choosing)
        assert cost.multiply_adds == 7 * kept * 10 and cost.dense_multiply_adds == 7 * 5 * 10
        assert cost.bytes == 8 * (7 * 6 + 5 * 6 + 4 * 5 + 7 * 4)


@pytest.mark.parametrize("scaling, scale", [("rank", 4.0), ("root", 8.0)])
def test_the_two_scales(scaling, scale):
    assert Config(rank=4, alpha=16, scaling=scaling).scale == scale


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@every_rule
def test_a_new_adapter_changes_no_bit(rule, bias):
    layer, x = nn.Linear(6, 4, bias=bias), torch.randn(2, 3, 6)
    assert torch.equal(from_dense(layer, Config(rule=rule))(x), layer(x))


def adapted(rule=None, **changes) -> LowRank:
    layer = from_dense(nn.Linear(6, 4), Config(rule=rule or All(), rank=5, **changes))
    nn.init.normal_(layer.b)
    return layer


def test_only_the_factors_are_trained_and_they_learn():
    torch.manual_seed(1)
    layer, x, goal = adapted(), torch.randn(50, 6), torch.randn(50, 6) @ torch.randn(6, 4)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["a", "b"]
    weight, optimizer, losses = layer.weight.clone(), torch.optim.Adam([layer.a, layer.b], lr=0.05), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((layer(x) - goal).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0] and torch.equal(layer.weight, weight) and layer.weight.grad is None


def test_dropout_is_of_the_adapter_alone_and_in_training():
    layer, x = adapted(dropout=0.5), torch.randn(3, 6)
    assert not torch.equal(layer.train()(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))
    torch.manual_seed(5)
    got = layer.train()(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    expected = F.linear(x, layer.weight, layer.bias) + layer.rank.scale * dropped @ layer.a.mT @ layer.b.mT
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_merged_is_the_same_function_and_unmerged_the_same_bits(dtype):
    layer, x = adapted().to(dtype), torch.randn(3, 6, dtype=dtype)
    before, bits = layer(x), {name: part.clone() for name, part in layer.state_dict().items()}
    layer.merge()
    wide = layer.weight.double() + layer.rank.scale * layer.b.double() @ layer.a.double()
    step = torch.finfo(dtype).eps * wide.abs().max()
    assert (layer.merged.double() - wide).abs().max() <= step and layer.merged.dtype == dtype
    assert torch.equal(layer(x), F.linear(x, layer.merged, layer.bias)) and not torch.equal(layer(x), before)
    for held in (layer.state_dict(), (layer.unmerge(), layer.state_dict())[1]):
        assert held.keys() == bits.keys() and all(torch.equal(held[name], bits[name]) for name in bits)
    assert torch.equal(layer(x), before)


def test_a_merged_layer_tells_the_trace_that_nothing_was_chosen():
    layer = adapted()
    layer.merge()
    with trace(layer) as records:
        layer(torch.randn(1, 6))
    assert not records and [bypass.reason for bypass in records.bypasses] == ["merged weights"]


def test_what_depends_on_the_token_cannot_be_merged():
    with pytest.raises(RuleError, match="expected the rule All to merge"):
        adapted(TopK(2)).merge()


def test_from_dense_keeps_an_adapter_under_another_rule():
    layer = adapted()
    other = from_dense(layer.eval(), replace(layer.config, rule=TopK(2)))
    assert torch.equal(other.a, layer.a) and torch.equal(other.b, layer.b) and not other.training
    assert other.a is not layer.a and other.weight is layer.weight
    with pytest.raises(ShapeError, match="an adapter of rank 3"):
        from_dense(layer, Config(rank=3))


def test_what_is_no_plain_layer_is_refused():
    layer = adapted()
    layer.merge()
    for wrong in (nn.Bilinear(2, 2, 2), type("Own", (nn.Linear,), {})(2, 2), layer):
        with pytest.raises(UnsupportedError, match="rank: expected an nn.Linear"):
            from_dense(wrong, Config(rank=5))


def stack(rule=None) -> LowRankStack:
    layers = LowRankStack(torch.randn(3, 4, 6, dtype=torch.float64), Config(rule=rule or All(), rank=5))
    nn.init.normal_(layers.b)
    return layers


@pytest.mark.parametrize("rule", [All(), TopK(2)], ids=str)
def test_a_stack_is_its_experts_whole_routed_and_merged(rule):
    layers, x = stack(rule), torch.randn(7, 6, dtype=torch.float64)
    single = [from_dense(nn.Linear(6, 4, bias=False, dtype=torch.float64), layers.config) for _ in range(3)]
    for e, layer in enumerate(single):
        layer.load_state_dict({name: part[e] for name, part in layers.state_dict().items()})
    expected = torch.stack([layer(x) for layer in single])
    ids, weights = torch.randint(-1, 3, (7, 2)), torch.rand(7, 2, dtype=torch.float64)
    routed = route(x, ids, weights, single)
    for merged in (False, True) if rule == All() else (False,):
        if merged:
            layers.merge()
        torch.testing.assert_close(layers(x.expand(3, 7, 6)), expected, **ROUNDED)
        torch.testing.assert_close(route(x, ids, weights, layers), routed, **ROUNDED)
        torch.testing.assert_close(layers[-1](x), expected[2], **ROUNDED)
    assert len(layers) == 3 and isinstance(layers, Adapter)
    with pytest.raises(IndexError):
        layers[3]


def test_an_expert_nobody_keeps_gets_no_gradient():
    layers = stack()
    ids = torch.tensor([[0], [2]])
    route(torch.randn(2, 6, dtype=torch.float64), ids, torch.ones(2, 1, dtype=torch.float64), layers).sum().backward()
    for factor in (layers.a, layers.b):
        assert (factor.grad.abs().amax((1, 2)) > 0).tolist() == [True, False, True]
    assert layers.weight.grad is None


@pytest.mark.parametrize("shape", [(4, 6), (0, 4, 6), (1, 3, 4, 6)], ids=str)
def test_a_weight_that_is_no_stack_is_refused(shape):
    with pytest.raises(ShapeError, match=r"weight \[E, O, I\]"):
        LowRankStack(torch.zeros(shape), Config())


@pytest.mark.parametrize("change", [
    lambda x, a, b, onto: (x[:, :5], a, b, onto), lambda x, a, b, onto: (x, a[:4], b, onto),
    lambda x, a, b, onto: (x, a, b, onto[:3]), lambda x, a, b, onto: (x, a[None], b[None], onto),
    lambda x, a, b, onto: (x[None], a[None].expand(2, -1, -1), b[None].expand(2, -1, -1), onto[None]),
    lambda x, a, b, onto: (x.float(), a, b, onto), lambda x, a, b, onto: (x.long(), a.long(), b.long())])
def test_tensors_that_do_not_fit_are_refused(change):
    for rule in (All(), TopK(2)):
        with pytest.raises(ShapeError, match="rank: expected"):
            Rank(Config(rule=rule, rank=5))(*change(*parts()))


@pytest.mark.parametrize("settings, expected", [
    ({"rule": "all"}, "rule a Rule"), ({"rule": Capacity(0.5)}, "each token alone"), ({"rank": 0}, "rank a whole"),
    ({"rank": 2.0}, "rank a whole"), ({"rank": True}, "rank a whole"), ({"alpha": float("nan")}, "alpha a finite"),
    ({"alpha": "1"}, "alpha a finite"), ({"scaling": "r"}, "scaling one of"), ({"scaling": []}, "scaling one of"),
    ({"dropout": 1.0}, "dropout from 0"), ({"dropout": -0.1}, "dropout from 0")], ids=str)
def test_a_bad_field_is_named(settings, expected):
    with pytest.raises(RuleError, match=f"rank.Config: expected .*{expected}.*change that field"):
        Config(**settings)
