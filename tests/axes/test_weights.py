"""weights: the saliencies, who competes with whom, what is really removed, and what makes up for it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.weights import AMONG, SALIENCIES, Config, Network, Weights, from_dense
from sentei.core.definition import apply
from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import All, Capacity, Fixed, Mass, TopK
from sentei.core.tracing import trace
from sentei.kernels.linear.calibration import Calibration, calibrate

D, OUT = 12, 6


def linear(bias: bool = True, width: int = D, outputs: int = OUT) -> nn.Linear:
    return nn.Linear(width, outputs, bias=bias, dtype=torch.float64)


def network(gated: bool = True, bias: bool = True, neurons: int = D) -> Network:
    gate = linear(bias, 5, neurons) if gated else None
    return Network(linear(bias, 5, neurons), linear(bias, neurons, OUT), gate, F.silu if gated else F.relu)


def correlated(rows: int = 400, width: int = D, seed: int = 3) -> torch.Tensor:
    """Inputs that lie near few directions, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, width // 3, generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(width // 3, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (mixed + 0.3 * noise) * torch.logspace(-0.7, 0.7, width, dtype=torch.float64)[torch.randperm(
        width, generator=generator)]


def seen(layer: nn.Linear, x: torch.Tensor) -> Calibration:
    calibration = Calibration(layer.in_features, layer.out_features)
    calibration.see(x)
    return calibration


def loss_of(weight: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ((weight - other) @ x.T).square().sum()


def selection_of(room: Weights, x):
    with trace(room) as records:
        room(x)
    return records[0].selection


# The definition


@pytest.mark.parametrize("among", AMONG)
@pytest.mark.parametrize("rule", [All(), TopK(2), TopK(0), Capacity(0.5), Fixed((0, 3, 4))], ids=str)
def test_a_linear_layer_is_the_sum_of_what_is_kept(among, rule):
    layer, x = linear(), torch.randn(2, 3, D, dtype=torch.float64)
    room = from_dense(layer, Config(rule=rule, among=among))
    selection = selection_of(room, x)
    assert selection.ids.shape[0] == 1 and selection.num_candidates == (D if among == "columns" else D * OUT)
    rows = x.flatten(0, 1)
    parts = torch.einsum("od,td->dto", layer.weight, rows)
    if among != "columns":
        parts = parts[None] * torch.eye(OUT, dtype=torch.float64)[:, None, None]
        parts = parts.flatten(0, 1)
    expected = layer.bias + apply(selection, parts.flatten(1)).view(2, 3, OUT)
    output = room(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(y.sin().sum(), [layer.weight, layer.bias], materialize_grads=True)
                 for y in (output, expected))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rule", [All(), TopK(3), Capacity(0.5), TopK(0)], ids=str)
def test_a_network_is_the_sum_of_the_neurons_kept(rule, bias, gated):
    layer, x = network(gated, bias), torch.randn(7, 5, dtype=torch.float64)
    room = from_dense(layer, Config(rule=rule))
    neurons = [lambda row, f=f: layer.neurons(row)[f] * layer.down.weight[:, f] for f in range(D)]
    selection = selection_of(room, x)
    each = [apply(selection, neurons, row[None])[0] for row in x]
    expected = torch.stack(each) + (layer.down.bias if bias else 0)
    torch.testing.assert_close(room(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(room.fix()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("among", [*AMONG, "network"])
@pytest.mark.parametrize("rule", [All(), TopK(10**6), Capacity(1.0)], ids=str)
def test_keep_all_changes_nothing_bit_for_bit(rule, among, dtype):
    layer = (network() if among == "network" else linear()).to(dtype)
    x = torch.randn(9, 5 if among == "network" else D).to(dtype)
    room = from_dense(layer, Config(rule=rule, among="columns" if among == "network" else among))
    assert torch.equal(room(x), layer(x))
    last = layer.down if among == "network" else layer
    assert torch.equal(room.fix(seen(last, correlated()))(x), layer(x))


@pytest.mark.parametrize("among", ["row", "columns"])
def test_gradients_are_those_of_finite_differences(among):
    layer, x = linear(), torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    room = from_dense(layer, Config(rule=Capacity(0.5), among=among))

    def call(x, weight, bias):
        return torch.func.functional_call(room, {"layer.weight": weight, "layer.bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias))


# The saliencies against the losses they stand for


def test_obd_is_the_loss_of_removing_a_weight_and_on_a_diagonal_quadratic_of_removing_many():
    layer, x = linear(), correlated()
    for inputs, many in ((x, False), (torch.linalg.qr(x).Q * torch.arange(1, D + 1), True)):
        room = from_dense(layer, Config(saliency="obd", among="layer"), seen(layer, inputs))
        saliency, weight = room.saliency.view(OUT, D), layer.weight.detach()
        for i, j in ((0, 0), (3, 7), (5, 11)):
            without = weight.clone()
            without[i, j] = 0
            torch.testing.assert_close(saliency[i, j], loss_of(weight, without, inputs), rtol=1e-10, atol=0)
        dropped = torch.rand(OUT, D) < 0.5
        total = loss_of(weight, weight.masked_fill(dropped, 0), inputs)
        assert torch.allclose(saliency[dropped].sum(), total, rtol=1e-9) == many


def test_obs_is_the_least_loss_of_removing_a_weight_when_the_others_may_move():
    """By brute force: the others of the row are fitted anew for each weight in turn."""
    layer, x = linear(bias=False, width=6, outputs=2), correlated(width=6)
    config = Config(saliency="obs", among="layer", damp=0)
    room, weight = from_dense(layer, config, seen(layer, x)), layer.weight.detach()
    least = torch.empty(2, 6, dtype=torch.float64)
    for i in range(2):
        for j in range(6):
            others = [k for k in range(6) if k != j]
            fitted = torch.linalg.lstsq(x[:, others], x @ weight[i]).solution
            least[i, j] = (x @ weight[i] - x[:, others] @ fitted).square().sum()
    torch.testing.assert_close(room.saliency.view(2, 6), least, rtol=1e-8, atol=1e-10)
    room.rule = TopK(11)
    assert not room.choose(room.saliency).flatten()[least.argmin()]


def test_wanda_squared_is_obd_and_magnitude_is_magnitude():
    layer, calibration = linear(), seen(linear(), correlated())
    of = {kind: from_dense(layer, Config(saliency=kind, among="row"), calibration).saliency.view(OUT, D)
          for kind in ("magnitude", "wanda", "obd")}
    torch.testing.assert_close(of["magnitude"], layer.weight.detach().abs())
    torch.testing.assert_close(of["wanda"], layer.weight.detach().abs() * correlated().norm(dim=0))
    torch.testing.assert_close(of["wanda"].square(), of["obd"])


def test_fisher_is_half_the_mean_curvature_along_each_weight():
    layer, x, target = linear(), correlated(20), torch.randn(20, OUT, dtype=torch.float64)
    with calibrate({"it": layer}) as found:
        (layer(x) - target).pow(4).sum().backward()
    squares = torch.zeros(OUT, D, dtype=torch.float64)
    for row, goal in zip(x, target, strict=True):
        squares += torch.autograd.grad((layer(row) - goal).pow(4).sum(), layer.weight)[0].square()
    torch.testing.assert_close(found["it"].fisher, squares, rtol=1e-10, atol=1e-12)
    room = from_dense(layer, Config(saliency="fisher", among="row"), found["it"])
    torch.testing.assert_close(room.saliency.view(OUT, D), squares * layer.weight.detach().square() / 2)


@pytest.mark.parametrize("kind", SALIENCIES)
def test_a_columns_saliency_is_that_of_its_weights_together(kind):
    layer, x = linear(), correlated()
    with calibrate({"it": layer}) as found:
        layer(x).square().sum().backward()
    weights, columns = (from_dense(layer, Config(saliency=kind, among=among), found["it"]).saliency
                        for among in ("row", "columns"))
    power = 2 if kind in ("magnitude", "wanda") else 1
    torch.testing.assert_close(columns[0] ** power, weights.view(OUT, D).pow(power).sum(0))


def test_a_neurons_magnitude_does_not_depend_on_where_its_scale_stands():
    layer = network(gated=False, bias=False)
    scaled = copy.deepcopy(layer)
    factors = torch.logspace(-3, 3, D, dtype=torch.float64)
    with torch.no_grad():
        scaled.up.weight.mul_(factors[:, None])
        scaled.down.weight.div_(factors)
    torch.testing.assert_close(*(from_dense(one, Config()).saliency for one in (layer, scaled)))


# Who competes with whom


@pytest.mark.parametrize("kind", SALIENCIES)
def test_two_of_four_and_shares_of_rows(kind):
    layer, x = linear(), correlated()
    with calibrate({"it": layer}) as found:
        layer(x).square().sum().backward()
    for fix in (False, True):
        fours, rows = (from_dense(layer, Config(rule=rule, saliency=kind, among=among), found["it"])
                       for rule, among in ((TopK(2), "four"), (Capacity(0.4), "row")))
        if fix:
            fours.fix(found["it"]), rows.fix(found["it"])
        assert (selection_of(fours, x).mask().view(OUT, D // 4, 4).sum(-1) == 2).all()
        assert (selection_of(rows, x).mask().view(OUT, D).sum(-1) == 5).all()


def test_equal_saliencies_keep_the_first():
    layer = linear()
    nn.init.ones_(layer.weight)
    room = from_dense(layer, Config(rule=TopK(3), among="row"))
    assert selection_of(room, torch.zeros(1, D, dtype=torch.float64)).mask().view(OUT, D).nonzero()[:, 1].tolist() == (
        [0, 1, 2] * OUT)


@pytest.mark.parametrize("value", [torch.nan, 1e300], ids=["nan", "overflow"])
def test_saliencies_that_are_no_numbers_are_refused(value):
    layer = linear()
    nn.init.constant_(layer.weight, value)
    with pytest.raises(RuleError, match="finite scores"):
        from_dense(layer, Config(rule=TopK(2)))(torch.zeros(1, D, dtype=torch.float64))


# What is really removed


@pytest.mark.parametrize("among", [*AMONG, "network", "network without gate"])
@pytest.mark.parametrize("calibrated", [True, False], ids=["refitted", "as they were"])
def test_a_choice_that_is_fixed_is_a_plain_pruned_layer(among, calibrated):
    layer = network(among == "network") if among.startswith("network") else linear()
    last = layer.down if among.startswith("network") else layer
    config = Config(rule=Capacity(0.5), among="columns" if among.startswith("network") else among)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 5 if last is not layer else D, dtype=torch.float64)
    room = from_dense(layer, config)
    output, selection = room(x), selection_of(room, x)
    room.fix(seen(last, correlated()) if calibrated else None)
    with trace(room) as records:
        fixed = room(x)
    assert torch.allclose(fixed, output) != calibrated
    assert torch.equal(records[0].selection.ids, selection.ids) and isinstance(room.rule, Fixed)
    assert room.rule.ids == tuple(selection.ids[0].tolist())
    assert all(torch.equal(part, layer.state_dict()[name]) for name, part in before.items()), "the layer given is left"
    if config.among == "columns":
        inner = room.layer.down if last is not layer else room.layer
        assert inner.weight.shape == (OUT, 6)
        assert last is layer or room.layer.up.weight.shape == (6, 5)
    else:
        assert (room.layer.weight != 0).sum() == OUT * D / 2 and room.layer.weight.shape == (OUT, D)


def test_zeros_are_said_to_save_nothing_and_columns_what_they_do():
    x = torch.randn(2, 7, D, dtype=torch.float64)
    for among, rule in (("row", Capacity(0.5)), ("layer", TopK(3)), ("four", TopK(2))):
        for room in (from_dense(linear(), Config(rule=rule, among=among)),
                     from_dense(linear(), Config(rule=rule, among=among)).fix()):
            with trace(room) as records:
                room(x)
            assert records.density() == 1 > records[0].selection.density()
            assert "save no time" in records[0].reason and records[0].cost.multiply_adds == 14 * OUT * D
    for room in (from_dense(linear(), Config(rule=TopK(3))), from_dense(linear(), Config(rule=TopK(3))).fix()):
        with trace(room) as records:
            room(x)
        assert (records[0].cost.multiply_adds, records[0].cost.dense_multiply_adds) == (14 * OUT * 3, 14 * OUT * D)
        assert "smaller matrices" in records[0].reason
    for gated, matrices in ((True, 2), (False, 1)):
        room = from_dense(network(gated), Config(rule=TopK(3))).fix()
        with trace(room) as records:
            room(x[..., :5])
        cost = records[0].cost
        assert (cost.multiply_adds, cost.dense_multiply_adds) == (14 * 3 * (OUT + 5 * matrices),
                                                                  14 * D * (OUT + 5 * matrices))


@pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 0, D)], ids=str)
@pytest.mark.parametrize("among", AMONG)
def test_no_rows_and_one(shape, among):
    layer, x = linear(), torch.randn(*shape, dtype=torch.float64)
    room = from_dense(layer, Config(rule=Capacity(0.5), among=among))
    assert room(x).shape == (*shape[:-1], OUT) and torch.allclose(room.fix()(x), from_dense(
        layer, Config(rule=Capacity(0.5), among=among))(x))


@pytest.mark.parametrize("among", AMONG)
def test_bfloat16_is_as_near_as_plain_torch(among):
    layer, x = linear().bfloat16(), torch.randn(50, D).bfloat16()
    room = from_dense(layer, Config(rule=Capacity(0.5), among=among))
    kept = selection_of(room, x).mask()
    pruned = layer.weight.where(kept if among == "columns" else kept.view(OUT, D), 0)
    exact = F.linear(x.double(), pruned.double(), layer.bias.double())
    ours, plain = (y.double() - exact for y in (room(x), F.linear(x, pruned, layer.bias)))
    assert 0 < ours.square().mean() ** 0.5 <= 2 * plain.square().mean() ** 0.5


# What makes up for it


def pruned_loss(kind: str, among: str, rule, *, moved: bool, width: int = 64, refit=None) -> float:
    """The loss on the calibration's own inputs, relative to the size of the outputs."""
    torch.manual_seed(5)
    layer, x = linear(bias=False, width=width, outputs=16), correlated(2000, width)
    calibration = seen(layer, x)
    room = from_dense(layer, Config(rule=rule, saliency=kind, among=among), calibration)
    room.fix(calibration if moved else None)
    return ((room(x) - layer(x)).square().sum() / layer(x).square().sum()).item()


@pytest.mark.parametrize("among, rule", [("row", Capacity(0.5)), ("four", TopK(2)), ("row", TopK(32)),
                                         ("layer", Capacity(0.5)), ("columns", Capacity(0.5))], ids=str)
def test_moving_beats_wanda_and_wanda_beats_magnitude(among, rule):
    swept = pruned_loss("obs", among, rule, moved=True)
    wanda, magnitude = (pruned_loss(kind, among, rule, moved=False) for kind in ("wanda", "magnitude"))
    assert swept < 0.6 * wanda < wanda < 0.7 * magnitude


@pytest.mark.parametrize("among, rule", [("row", Capacity(0.5)), ("four", TopK(2)), ("columns", TopK(20))], ids=str)
@pytest.mark.parametrize("kind", ["magnitude", "wanda"])
def test_moving_helps_whatever_chose(kind, among, rule):
    assert pruned_loss(kind, among, rule, moved=True) < 0.7 * pruned_loss(kind, among, rule, moved=False)


@pytest.mark.parametrize("among, rule", [("row", Capacity(0.5)), ("four", TopK(2)), ("layer", TopK(20))], ids=str)
def test_a_sweep_that_chose_anew_is_what_is_fixed_and_traced(among, rule):
    layer, x = linear(), correlated()
    room = from_dense(layer, Config(rule=rule, saliency="obs", among=among), seen(layer, x))
    first = selection_of(room, x).mask()
    chosen = selection_of(room.fix(seen(layer, x)), x).mask()
    assert torch.equal(chosen.view(OUT, D), room.layer.weight != 0) and chosen.sum() == first.sum()
    assert not torch.equal(chosen, first)
    assert room.rule == Fixed(tuple(chosen[0].nonzero()[:, 0].tolist()))


def test_columns_are_refitted_as_least_squares_would():
    layer, x = linear(bias=False), correlated()
    room = from_dense(layer, Config(rule=TopK(5), saliency="obs", damp=0), seen(layer, x))
    ids = selection_of(room, x).ids[0]
    expected = torch.linalg.lstsq(x[:, ids], x @ layer.weight.detach().T).solution.T
    torch.testing.assert_close(room.fix(seen(layer, x)).layer.weight.detach(), expected, rtol=1e-7, atol=1e-8)


# Doors


@pytest.mark.parametrize("kind", SALIENCIES[1:])
def test_a_saliency_without_its_calibration_is_refused(kind):
    for calibration in (None, Calibration(D, OUT)):
        with pytest.raises(RuleError, match=f"a calibration.* for {kind}"):
            from_dense(linear(), Config(saliency=kind), calibration)


def test_a_calibration_of_forward_passes_knows_no_gradients():
    with pytest.raises(RuleError, match="a calibration with gradients for fisher"):
        from_dense(linear(), Config(saliency="fisher"), seen(linear(), correlated()))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"a calibration of \[6, 12\], got \[6, 8\]"):
        from_dense(linear(), Config(), Calibration(8, OUT))
    with pytest.raises(ShapeError, match="among 'columns' for a network"):
        from_dense(network(), Config(among="row"))
    with pytest.raises(ShapeError, match="inputs in fours"):
        from_dense(linear(width=10), Config(among="four"))


@pytest.mark.parametrize("settings, expected", [
    ({"rule": "all"}, "rule All, TopK, Capacity or Fixed"), ({"rule": Mass(0.5)}, "rule All, TopK, Capacity or Fixed"),
    ({"rule": TopK((1, 2))}, "of one number"), ({"rule": Capacity((0.5, 0.5))}, "of one number"),
    ({"saliency": "taylor"}, "saliency one of"), ({"among": "heads"}, "among one of"),
    ({"damp": -1}, "damp from 0 to 1"), ({"damp": True}, "damp from 0 to 1"), ({"damp": "x"}, "damp from 0 to 1"),
], ids=str)
def test_a_bad_field_is_named(settings, expected):
    with pytest.raises(RuleError, match=f"weights.Config: expected .*{expected}.*change that field"):
        Config(**settings)
