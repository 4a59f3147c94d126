"""experts: the sum of what is kept, the gates as their papers write them, the balancing bias, and its doors."""


import pytest
import torch
from mixtures import KINDS, LOOKING, UNIT, WIDTH, E, answer, layer, x_of
from torch import nn
from torch.nn import functional as F

from sentei.axes.experts import Config, Experts, MixtureOfExperts, from_dense
from sentei.axes.experts.dense import FeedForward
from sentei.axes.experts.gates import Choice, Gate, Noisy, Renormalised, Sigmoid, Soft, Softmax, Task
from sentei.core.definition import apply
from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import All, Capacity, Mass, TopK
from sentei.core.tracing import trace
from sentei.kernels.routing.stack import ACTIVATIONS

every_kind = pytest.mark.parametrize("kind", KINDS)
any_kind = pytest.mark.parametrize("kind", [*KINDS, *LOOKING])


# the sum of what is kept


@every_kind
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_is_the_definition_of_what_it_selected(kind, gated):
    made, x = layer(kind, gated=gated), x_of(2, 7)
    with trace(made) as records:
        y = answer(made, x)
    stack = made.experts.stack(made.up, made.down)
    expected = apply(records[0].selection, list(stack), x)
    if made.shared is not None:
        expected = expected + made.shared(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert records[0].selection.unit == UNIT and records[0].selection.num_candidates == E


@any_kind
def test_gradients_are_those_of_finite_differences(kind):
    made, x = layer(kind), x_of(1, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: answer(made, x), (x, *made.parameters()), fast_mode=True)


@pytest.mark.parametrize("unit", [1, 4, 8, 32])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_all_experts_with_unit_weights_are_the_dense_layer(gated, activation, unit):
    dense = FeedForward(WIDTH, 32, gated=gated, activation=activation, bias=True).double()
    x = x_of(3, 5)
    for shared in (0, 1) if unit < 32 else (0,):
        split = from_dense(dense, Config(unit=unit, shared=shared))
        torch.testing.assert_close(split(x), dense(x), rtol=1e-12, atol=1e-12)


def test_one_expert_is_the_dense_layer_bit_for_bit_where_the_same_kernel_runs():
    dense, x = FeedForward(WIDTH, 32), x_of(3, 5, dtype=torch.float32)
    layer = from_dense(dense, Config(unit=32))
    for impl in ("reference", "eager"):
        layer.experts.impl = impl
        assert torch.equal(layer(x), dense(x))


def test_from_dense_reads_a_layer_of_llama():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    dense = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=24, num_attention_heads=2)).double()
    x = x_of(2, 5)
    torch.testing.assert_close(from_dense(dense, Config(unit=3))(x), dense(x), rtol=1e-12, atol=1e-12)
    assert from_dense(dense, Config(unit=3)).up.shape == (8, 6, WIDTH)


def test_a_router_row_of_from_dense_is_the_mean_of_its_neurons():
    dense = FeedForward(WIDTH, 24)
    assert torch.equal(from_dense(dense, Config(unit=4)).router.weight[2], dense.gate_proj.weight[8:12].mean(0))


@pytest.mark.parametrize("wrong", [
    nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)), nn.Identity(),
    nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6)),
    nn.Sequential(nn.Conv1d(6, 8, 1, bias=False), nn.SiLU(), nn.Linear(8, 6))], ids=str)
def test_a_layer_that_is_no_feed_forward_is_refused(wrong):
    with pytest.raises(ShapeError, match="experts: expected a feed-forward layer of linear layers"):
        from_dense(wrong, Config(unit=4))


def test_weights_that_are_not_1_are_refused_by_from_dense():
    with pytest.raises(RuleError, match="expected the gate Unit, got Softmax"):
        from_dense(FeedForward(WIDTH, 8), Config(unit=4, gate=Softmax()))


# gates and metrics


def test_the_l2_metric_is_the_search_for_the_nearest_row():
    made, x = layer("l2"), x_of(50)
    with trace(made) as records:
        made(x)
    nearest = torch.cdist(x, made.router.weight).topk(2, largest=False).indices.sort(-1).values
    assert torch.equal(records[0].selection.ids, nearest)


def test_the_cosine_metric_does_not_see_sizes():
    made, x = layer("cosine"), x_of(50)
    logits = made.router(x)[0]
    torch.testing.assert_close(made.router(3 * x)[0], logits)
    expected = 10 * F.cosine_similarity(x[:, None], made.router.weight[None], dim=-1)
    torch.testing.assert_close(logits, expected)


def test_noise_is_added_in_training_alone_and_its_size_is_learned():
    made, x = layer("noisy"), x_of(20)
    assert made.router(x)[1] is None and torch.equal(made.router(x)[0], x @ made.router.weight.T)
    made.train()
    logits, noise = made.router(x)
    assert torch.equal(noise.clean, x @ made.router.weight.T) and not torch.equal(logits, noise.clean)
    torch.testing.assert_close(noise.spread, torch.full_like(logits, F.softplus(torch.tensor(0.0)).item() + 0.01))
    made(x).sum().backward()
    assert made.router.noise_weight.grad.abs().max() > 0
    fresh = MixtureOfExperts(KINDS["noisy"], width=WIDTH, neurons=E * UNIT)
    assert not fresh.router.weight.any() and not fresh.router.noise_weight.any()


def test_a_full_expert_turns_away_what_comes_late():
    """Eight tokens of which six want expert 0 and two expert 3: room for ceil(8 / 4) = 2, rounded from a factor 1."""
    room = Experts(Config(rule=TopK(1), gate=Softmax(1.0), unit=UNIT), 4)
    wants = torch.tensor([0, 0, 3, 0, 0, 3, 0, 0])
    logits = 5.0 * F.one_hot(wants, 4)[None]
    inputs = x_of(1, 8, dtype=torch.float32), logits, torch.randn(4, UNIT, WIDTH), torch.randn(4, WIDTH, UNIT)
    with trace(room) as records:
        y = room(*inputs)
    assert records[0].selection.ids[0, :, 0].tolist() == [0, 0, 3, -1, -1, 3, -1, -1]
    assert (y[0, [3, 4, 6, 7]] == 0).all() and (y[0, [0, 1, 2, 5]] != 0).any(-1).all()
    torch.testing.assert_close(records[0].selection.weights[0, [0, 1, 2, 5], 0], logits.softmax(-1).amax(-1)[0, :4])
    for factor, kept in ((1.25, 5), (0.5, 2), (3.0, 8), (0.76, 4)):
        room = Experts(Config(rule=TopK(1), gate=Softmax(factor), unit=UNIT), 4)
        with trace(room) as records:
            room(*inputs)
        assert int(records[0].selection.count().sum()) == kept


def test_a_task_is_extracted_as_a_dense_layer():
    config = Config(rule=TopK(2), gate=Task(3), unit=UNIT, shared=1)
    made = MixtureOfExperts(config, width=WIDTH, neurons=9 * UNIT, bias=True).double()
    with torch.no_grad():
        made.router.weight.normal_()
        made.bias.normal_()
    x = x_of(3, 5)
    y = made(x, None, torch.tensor([0, 1, 2]))
    for task in range(3):
        small = made.extract(task)
        assert type(small) is FeedForward and small.up_proj.out_features == 3 * UNIT
        torch.testing.assert_close(small(x[task]), y[task], rtol=1e-12, atol=1e-12)
    plain = MixtureOfExperts(config, width=WIDTH, neurons=9 * UNIT, gated=False).double()
    torch.testing.assert_close(plain.extract(1)(x), plain(x, None, torch.ones(3, dtype=torch.int64)))


@pytest.mark.parametrize("tasks", [None, torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])],
                         ids=str)
def test_a_task_that_is_none_is_refused(tasks):
    with pytest.raises(ShapeError, match="expected tasks int64 from 0 to 2"):
        layer("task")(x_of(2, 4), None, tasks)


def test_only_tasks_can_be_extracted():
    with pytest.raises(RuleError, match="extract: expected a Task gate"):
        layer("top-2").extract(0)


# the balancing bias


def test_the_bias_moves_the_choice_and_never_the_weight():
    room = Experts(Config(rule=TopK(2), gate=Sigmoid(scale=2.0), unit=UNIT), 4)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    inputs = x_of(1, dtype=torch.float32), logits, torch.randn(4, UNIT, WIDTH), torch.randn(4, WIDTH, UNIT)
    for bias, expected in (([0.0, 0, 0, 0], [0, 1]), ([0.0, 0, 0, 0.9], [0, 3])):
        room.bias.copy_(torch.tensor(bias))
        with trace(room) as records:
            room(*inputs)
        sizes = logits[0, expected].sigmoid()
        assert records[0].selection.ids[0].tolist() == expected
        torch.testing.assert_close(records[0].selection.weights[0], 2 * sizes / sizes.sum())


def test_the_bias_is_updated_by_the_loads_of_a_whole_step_without_padding():
    x, mask = x_of(4, 6, dtype=torch.float32), torch.rand(4, 6) < 0.7
    whole, parts = layer("sigmoid", dtype=torch.float32).train(), layer("sigmoid", dtype=torch.float32).train()
    parts.load_state_dict(whole.state_dict())
    start = whole.experts.bias.clone()
    with trace(whole) as records:
        whole(x, mask)
    counts = records[0].selection.load().sum(0)
    assert counts.sum() == 2 * mask.sum() and torch.equal(whole.experts.counts, counts)
    for rows in ([0], [1, 2], [3]):
        parts(x[rows], mask[rows])
    for made in (whole, parts):
        made.update_bias()
    torch.testing.assert_close(whole.experts.bias, start + 1e-3 * torch.sign(counts.float().mean() - counts))
    assert torch.equal(whole.experts.bias, parts.experts.bias) and not parts.experts.counts.any()
    whole.eval()(x)
    whole.update_bias()
    assert torch.equal(whole.experts.bias, parts.experts.bias), "no step without training"


def test_the_bias_balances():
    torch.manual_seed(3)
    config = Config(rule=TopK(2), gate=Sigmoid(speed=0.02), unit=UNIT)
    made = MixtureOfExperts(config, width=WIDTH, neurons=E * UNIT).train()
    x = x_of(512, dtype=torch.float32) + 1
    with torch.no_grad():
        made.router.weight.normal_()
        worst = []
        for _ in range(60):
            made(x)
            load = made.experts.counts.double()
            worst.append(float(load.max() / load.mean() - 1))
            made.update_bias()
    assert worst[0] > 0.8 and worst[-1] < 0.2


def test_expert_choice_by_thresholds_keeps_what_reaches_an_even_share_less_the_bias():
    room = Experts(Config(rule=Capacity(0.5), gate=Choice(), unit=UNIT), 4)
    logits = torch.tensor([[0.8, 0.15, 0.03, 0.02], [0.3, 0.26, 0.2, 0.24], [0.1, 0.1, 0.1, 0.7]]).log()
    inputs = x_of(3, dtype=torch.float32), logits, torch.randn(4, UNIT, WIDTH), torch.randn(4, WIDTH, UNIT)
    for bias, expected in (([0.0, 0, 0, 0], [[0], [0, 1], [3]]), ([-1.0, 0.5, 0, -2], [[0, 1], [1], []])):
        room.bias.copy_(torch.tensor(bias))
        with trace(room) as records:
            y = room(*inputs)
        kept = records[0].selection
        assert [[e for e in ids if e >= 0] for ids in kept.ids.tolist()] == expected
        torch.testing.assert_close(kept.dense_weights(), logits.exp() * kept.mask())
    assert (y[2] == 0).all(), "a token that no expert chose"


def test_thresholds_move_to_the_capacity_and_one_update_is_as_said():
    torch.manual_seed(3)
    made = MixtureOfExperts(Config(rule=Capacity(0.25), gate=Choice(), unit=UNIT), width=WIDTH, neurons=E * UNIT)
    x, mask = x_of(8, 64, dtype=torch.float32) + 1, torch.rand(8, 64) < 0.8
    with torch.no_grad():
        made.router.weight.normal_()
        made.train()(x, mask)
        counts, wanted = made.experts.counts.double(), 0.25 * float(mask.sum())
        made.update_bias()
        expected = 0.1 * ((wanted - counts) / wanted).clamp(-1, 1)
        torch.testing.assert_close(made.experts.bias.double(), expected, rtol=1e-6, atol=1e-9)
        for _ in range(200):
            made(x, mask)
            counts = made.experts.counts.double()
            made.update_bias()
    assert counts.sub(wanted).abs().max() < 0.1 * wanted, "of each expert"
    before = made.experts.bias.clone()
    made.experts.rule = All()
    made(x)
    made.update_bias()
    assert torch.equal(made.experts.bias, before), "all tokens are what All asks for"


def test_the_bias_keeps_its_precision_in_a_narrow_model():
    made = layer("sigmoid").to(torch.bfloat16)
    assert made.experts.bias.dtype == torch.float32 and made.up.dtype == torch.bfloat16
    before = made.experts.bias.clone()
    made.experts.counts[0] = 1
    made.update_bias()
    assert (made.experts.bias - before).abs().max() < 2e-3 and not torch.equal(made.experts.bias, before)


def test_a_gate_without_a_bias_has_none_to_update():
    with pytest.raises(RuleError, match="update_bias: expected a Choice gate, or a Sigmoid gate with a speed above 0"):
        layer("top-2").update_bias()
    still = Config(rule=TopK(2), gate=Sigmoid(speed=0.0), unit=UNIT)
    assert MixtureOfExperts(still, width=WIDTH, neurons=E * UNIT).experts.bias is None


# doors


def test_the_cost_is_of_the_kept_and_every_weight_counts_once():
    made, x = layer("top-2", dtype=torch.float32), x_of(3, 1, dtype=torch.float32)
    with trace(made) as records:
        made(x)
    cost, an_expert = records[0].cost, 3 * UNIT * WIDTH
    used = len(set(records[0].selection.ids.flatten().tolist()))
    assert (cost.multiply_adds, cost.dense_multiply_adds) == (2 * 3 * an_expert, 8 * 3 * an_expert)
    assert cost.choosing == 3 * 8 * WIDTH and cost.bytes == 4 * (2 * 3 * WIDTH + used * an_expert) and 2 < used < 6
    assert records[0].impl and records[0].reason


@pytest.mark.parametrize("settings, expected", [
    ({"rule": "all"}, "rule a Rule"), ({"gate": "softmax"}, "rule a Rule, gate a Gate"),
    ({"metric": "l1"}, "metric 'dot'"), ({"unit": 0}, "unit from 1"), ({"unit": 1.5}, "unit from 1"),
    ({"unit": True}, "unit from 1"), ({"unit": 10**30}, "unit from 1"), ({"shared": -1}, "shared"),
    *(({"rule": TopK(1), "gate": gate}, "a gate that fits") for gate in (Renormalised(), Noisy(), Sigmoid(), Task(2))),
    *(({"rule": rule, "gate": Noisy()}, "a gate that fits") for rule in (All(), Mass(0.5), Capacity(0.5))),
    ({"rule": Mass(0.5), "gate": Sigmoid()}, "a gate that fits"),
    ({"rule": Mass(0.5), "gate": Softmax(1.25)}, "a gate that fits"),
    ({"rule": TopK(2), "gate": Soft()}, "a gate that fits"),
], ids=str)
def test_a_bad_field_is_named(settings, expected):
    with pytest.raises(RuleError, match=f"experts.Config: expected .*{expected}.*change that field"):
        Config(**settings)


@pytest.mark.parametrize("changes", [{"neurons": 30}, {"neurons": 4, "config": Config(unit=4, shared=1)},
                                     {"activation": "tanh"}], ids=str)
def test_sizes_that_make_no_experts_are_refused(changes):
    settings = {"config": Config(unit=4), "width": WIDTH, "neurons": 32, **changes}
    with pytest.raises(ShapeError, match="expected neurons a multiple of 4"):
        MixtureOfExperts(settings.pop("config"), **settings)


@pytest.mark.parametrize("change", [
    {"hidden": torch.zeros(WIDTH)}, {"hidden": torch.zeros(2, 4, WIDTH - 1)}, {"logits": torch.zeros(2, 4, 5)},
    {"logits": torch.zeros(2, 3, 4)}, {"up": torch.zeros(4, 3, WIDTH)}, {"up": torch.zeros(5, UNIT, WIDTH)},
    {"down": torch.zeros(4, WIDTH, 3)}, {"mask": torch.ones(2, 3, dtype=torch.bool)}, {"mask": torch.ones(2, 4)}],
    ids=lambda change: f"{next(iter(change))} {list(next(iter(change.values())).shape)}")
def test_inputs_that_do_not_fit_are_refused(change):
    good = {"hidden": torch.zeros(2, 4, WIDTH), "logits": torch.zeros(2, 4, 4), "up": torch.zeros(4, UNIT, WIDTH),
            "down": torch.zeros(4, WIDTH, UNIT), "mask": torch.ones(2, 4, dtype=torch.bool)}
    room = Experts(Config(unit=UNIT), 4)
    room(*good.values())
    with pytest.raises(ShapeError, match="^experts: expected"):
        room(*{**good, **change}.values())


def test_the_gates_of_the_kinds_are_all_gates():
    kinds = {type(config.gate) for config in (*KINDS.values(), *LOOKING.values())}
    assert kinds == set(Gate.__subclasses__()) | set(Renormalised.__subclasses__())
    assert isinstance(Config().rule, All)
