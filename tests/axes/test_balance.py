"""The balance losses against their papers, in fp64 loops; and parts, padding and capacity, which must not matter."""

import math

import pytest
import torch
from torch import nn

from sentei.axes.experts import Config, Experts, MixtureOfExperts
from sentei.axes.experts.balance import LOSSES, Balance, Noise, Sums, balancing, switch_loss
from sentei.axes.experts.gates import Noisy, Renormalised, Sigmoid, Softmax
from sentei.core.errors import RuleError
from sentei.core.rules import TopK
from sentei.core.tracing import trace

WIDTH, UNIT, E, K = 6, 2, 5, 2
GATES = {"noisy": Noisy(), "renormalised": Renormalised(), "sigmoid": Sigmoid(), "switch": Softmax()}
ALONE = {"sequence": torch.tensor(0.0), "sequences": torch.tensor(1.0)}
ALL = {"switch": 0.3, "importance": 0.7, "load": 0.9, "z": 0.2, "sequence": 0.4}


def layer(gate="renormalised", rule=None) -> MixtureOfExperts:
    made = MixtureOfExperts(Config(rule=rule or TopK(K), gate=GATES.get(gate, gate), unit=UNIT), width=WIDTH,
                            neurons=E * UNIT).double()
    with torch.no_grad():
        made.router.weight.normal_()
    return made


def data(rows: int = 4, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.rand(rows, tokens) < 0.7
    mask[:, 0] = True
    return torch.randn(rows, tokens, WIDTH, dtype=torch.float64), mask


def variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def of_sequence(scores: list[list[float]], shares: list[list[float]]) -> float:
    """DeepSeek-V3, eq. 17-20, from scores and shares, a list a token."""
    loss = 0.0
    for i in range(E):
        among_the_best = [sum(other > h[i] for other in h) < K for h in scores]
        f = E / (K * len(scores)) * sum(among_the_best)
        loss += f * sum(s[i] for s in shares) / len(shares)
    return loss


def normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / 2**0.5))


def test_the_losses_are_those_of_the_papers():
    """Shazeer 2017 eq. 6-11 and appendix A, Fedus 2021 eq. 4-6, Zoph 2022 eq. 5: token by token."""
    made, (x, mask) = layer("noisy"), data()
    with torch.no_grad():
        made.router.noise_weight.normal_()
        torch.manual_seed(1)
        noisy, noise = made.router(x)
        torch.manual_seed(1)
        with balancing(made) as balance:
            made(x, mask)
    chosen, probabilities, importance, load, squares = [0.0] * E, [0.0] * E, [0.0] * E, [0.0] * E, 0.0
    of_sequences = []
    for h, z in zip(noisy.split(1), noise.clean.split(1), strict=True):
        real = mask[len(of_sequences)]
        of_sequences.append(of_sequence(h[0][real].tolist(), z[0][real].softmax(-1).tolist()))
    for h, z, spread in zip(noisy[mask].tolist(), noise.clean[mask].tolist(), noise.spread[mask].tolist(), strict=True):
        best = sorted(range(E), key=lambda i: -h[i])[:K]
        total, kept = sum(math.exp(value) for value in z), sum(math.exp(h[i]) for i in best)
        squares += math.log(total) ** 2
        for i in range(E):
            probabilities[i] += math.exp(z[i]) / total
            kth_of_others = sorted((h[j] for j in range(E) if j != i), reverse=True)[K - 1]
            load[i] += normal((z[i] - kth_of_others) / spread[i])
            if i in best:
                chosen[i] += 1
                importance[i] += math.exp(h[i]) / kept
    tokens = int(mask.sum())
    expected = {"switch": E * sum(c / (K * tokens) * p / tokens for c, p in zip(chosen, probabilities, strict=True)),
                "importance": variation(importance), "load": variation(load), "z": squares / tokens,
                "sequence": sum(of_sequences) / len(of_sequences)}
    for name, value in expected.items():
        assert balance.loss(**{name: 1.0}).item() == pytest.approx(value, rel=1e-9), name
    assert balance.loss(**ALL).item() == pytest.approx(sum(ALL[name] * value for name, value in expected.items()))


def test_the_smooth_load_is_the_chance_to_be_chosen_with_new_noise():
    """Against a count: one expert's noise drawn 20,000 times, the others' left; three standard errors of the count."""
    made, x = layer("noisy"), torch.randn(1, WIDTH, dtype=torch.float64)
    with torch.no_grad(), balancing(made) as balance:
        torch.manual_seed(2)
        made(x)
        torch.manual_seed(2)
        noisy, noise = made.router(x)
    for i in range(E):
        drawn = noise.clean[0, i] + torch.randn(20_000, dtype=torch.float64) * noise.spread[0, i]
        rival = noisy[0][torch.arange(E) != i].sort(descending=True).values[K - 1]
        chance = (drawn > rival).double().mean()
        assert abs(chance - balance["experts"].load[i]) < 3 * (0.25 / 20_000) ** 0.5


def test_a_call_without_a_real_token_has_a_smooth_load_of_0():
    made, x = layer("noisy").train(), torch.randn(2, 4, WIDTH, dtype=torch.float64)
    for given, mask in ((x, torch.zeros(2, 4, dtype=torch.bool)), (x[:, :0], None), (x[:0], None)):
        with balancing(made) as balance:
            made(given, mask)
        loss = balance.loss(**ALL)
        loss.backward()
        assert loss.item() == 0 and balance["experts"].load.tolist() == [0.0] * E
        assert made.router.weight.grad.eq(0).all()


def test_a_token_that_may_choose_among_fewer_than_k_has_a_finite_smooth_load():
    """A token that may have none, one, two = k, three, or all of five experts; those beyond k are told by hand."""
    made = Experts(Config(rule=TopK(K), gate=Noisy(), unit=UNIT), E).double().train()
    clean, spread = torch.randn(1, 5, E, dtype=torch.float64), torch.rand(1, 5, E, dtype=torch.float64) + 0.5
    forbidden = torch.tensor([[0, 1, 1, 1, 1], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0] * 5]).bool()
    forbidden = torch.cat([torch.ones(1, E, dtype=torch.bool), forbidden])[None]
    clean.requires_grad_()
    logits = (clean + torch.randn_like(clean) * spread).masked_fill(forbidden, -torch.inf)
    hidden, up = torch.randn(1, 5, WIDTH, dtype=torch.float64), torch.randn(E, UNIT, WIDTH, dtype=torch.float64)
    with balancing(made) as balance:
        made(hidden, logits, up, up.mT.contiguous(), None, Noise(clean.masked_fill(forbidden, -torch.inf), spread))
    expected = [0.0] * E
    for row in range(1, 5):
        permitted = [i for i in range(E) if not forbidden[0, row, i]]
        for i in permitted:
            others = sorted((logits[0, row, j].item() for j in permitted if j != i), reverse=True)
            ahead = clean[0, row, i].item() - others[K - 1] if len(others) >= K else math.inf
            expected[i] += normal(ahead / spread[0, row, i].item())
    load = balance[""].load
    assert load.tolist() == pytest.approx(expected, rel=1e-9)
    (load * torch.arange(E)).sum().backward()
    assert clean.grad.isfinite().all() and clean.grad.any()


@pytest.mark.parametrize("gate", GATES)
def test_the_gradients_are_those_of_finite_differences(gate):
    made, (x, mask) = layer(gate), data(2, 3)
    weights = {name: weight for name, weight in ALL.items() if name != "load" or gate == "noisy"}

    def loss(x, *_):
        torch.manual_seed(5)
        with balancing(made) as balance:
            made(x, mask)
        return balance.loss(**weights)

    leaves = (x.requires_grad_(), *made.router.parameters())
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    if gate == "sigmoid":
        shares = made.router(x)[0].sigmoid()[mask]
        shares = (shares / shares.sum(-1, keepdim=True)).sum(0)
        with balancing(made) as balance:
            made(x, mask)
        torch.testing.assert_close(balance["experts"].shares, shares)


@pytest.mark.parametrize("gate", ["renormalised", "sigmoid", "switch"])
def test_parts_of_a_batch_are_the_batch(gate):
    """The loss and its gradients, whether the step comes whole, in parts with one backward, or with one a part."""
    made, (x, mask) = layer(gate), data()
    weights, parts = {"switch": 0.3, "importance": 0.7, "z": 0.2, "sequence": 0.4}, ([0], [1, 2], [3])
    with balancing(made) as whole:
        made(x, mask)
    expected = torch.autograd.grad(whole.loss(**weights), made.router.weight)[0]
    with balancing(made) as sums:
        for rows in parts:
            made(x[rows], mask[rows])
    torch.testing.assert_close(sums.loss(**weights), whole.loss(**weights), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sums.loss(**weights), made.router.weight)[0], expected, rtol=1e-10,
                               atol=1e-12)
    with torch.no_grad(), balancing(made) as step:
        for rows in parts:
            made(x[rows], mask[rows])
    for rows in parts:
        with balancing(made) as part:
            made(x[rows], mask[rows])
        part.part(step, **weights).backward()
    torch.testing.assert_close(made.router.weight.grad, expected, rtol=1e-10, atol=1e-12)


def test_a_sequence_s_loss_is_of_the_affinities_without_bias_or_groups():
    """DeepSeek-V3 chooses by s + b among the best groups, and balances a sequence by the best s of all."""
    config = Config(rule=TopK(K), gate=Sigmoid(groups=E, kept_groups=3), unit=UNIT)
    made, (x, mask) = MixtureOfExperts(config, width=WIDTH, neurons=E * UNIT).double(), data()
    mask[2] = False  # a sequence without a token is none
    with torch.no_grad():
        made.router.weight.normal_()
        made.experts.bias.copy_(torch.tensor([0.0, 9, 0, 0, 9]))
    with balancing(made) as balance:
        made(x, mask)
    sizes, expected = made.router(x)[0].sigmoid(), []
    for row in (0, 1, 3):
        s = sizes[row][mask[row]]
        expected.append(of_sequence(s.tolist(), (s / s.sum(-1, keepdim=True)).tolist()))
    assert balance.loss(sequence=1.0).item() == pytest.approx(sum(expected) / 3, rel=1e-9)
    assert balance["experts"].counts[[0, 2, 3]].sum() == 0, "the bias chose"


def one_expert_each():
    """A layer, and two sequences of which each wants an expert of its own and no other."""
    made = layer("switch", TopK(1))
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[0, 0], made.router.weight[1, 0], made.router.weight[2:, 1] = 1, -1, -1
    x = torch.zeros(2, 8, WIDTH, dtype=torch.float64)
    x[0, :, 0], x[1, :, 0], x[..., 1] = 9, -9, 9
    return made, x


def test_a_batch_may_be_even_and_its_sequences_not():
    """Together the loads are even, and each of them is as uneven as can be."""
    made, x = one_expert_each()
    with balancing(made) as balance:
        made(x)
    assert balance.loss(sequence=1).item() == pytest.approx(E, rel=1e-2)
    assert balance.loss(switch=1).item() == pytest.approx(E / 2, rel=1e-2)


def test_a_mean_of_the_parts_own_losses_is_another_loss():
    """What the sums are for: two parts that want one expert each are balanced together and not apart."""
    made, x = one_expert_each()
    with balancing(made) as together:
        made(x)
    apart = []
    for row in range(2):
        with balancing(made) as balance:
            made(x[row:row + 1])
        apart.append(balance.loss(switch=1).item())
    assert together.loss(switch=1).item() == pytest.approx(E / 2, rel=1e-2)
    assert sum(apart) / 2 == pytest.approx(E, rel=1e-2)


@pytest.mark.parametrize("gate", GATES)
def test_padding_does_not_count(gate):
    made, (x, mask) = layer(gate).eval(), data()
    names = {"switch": 1.0, "importance": 1.0, "z": 1.0}
    with balancing(made) as padded:
        made(torch.where(mask.unsqueeze(-1), x, 100.0), mask)
    with balancing(made) as bare:
        made(x[mask])
    torch.testing.assert_close(padded.loss(**names), bare.loss(**names), rtol=1e-12, atol=1e-12)
    assert padded["experts"].tokens == mask.sum()
    padded.loss(**names).backward()
    assert made.router.weight.grad.isfinite().all()


def test_what_a_capacity_drops_still_counts_as_wanted():
    """Else a full expert would look balanced, and the loss be constant."""
    x = torch.randn(1, 40, WIDTH, dtype=torch.float64)
    counts = []
    for gate in (Softmax(), Softmax(0.5)):
        torch.manual_seed(0)
        made = layer(gate, TopK(1))
        with balancing(made) as balance, trace(made) as records:
            made(x)
        counts.append(balance["experts"].counts)
    assert records[0].selection.count().sum() < 40
    assert torch.equal(*counts) and counts[0].sum() == 40


def test_layers_are_summed_and_not_pooled():
    """Two layers, each collapsed on another expert, are two collapses; counts pooled over layers would look even."""
    def collapsed(e: int) -> Sums:
        one = torch.nn.functional.one_hot(torch.tensor(e), 2).double() * 10
        return Sums(tokens=torch.tensor(10.0), counts=one, shares=one, importance=one, z=torch.tensor(0.0), **ALONE)

    balance = Balance({"a": collapsed(0), "b": collapsed(1)})
    assert balance.loss(switch=1).item() == 4 and switch_loss(collapsed(0) + collapsed(1)).item() == 1


def test_an_even_router_has_loss_1_whatever_k_and_one_expert_has_no_variation():
    even = torch.full((E,), 8.0)
    sums = Sums(tokens=torch.tensor(20.0), counts=even, shares=even / 2, importance=even, z=torch.tensor(0.0), **ALONE)
    assert switch_loss(sums).item() == pytest.approx(1) and LOSSES["importance"](sums) == 0
    lone = Sums(tokens=torch.tensor(3.0), counts=torch.tensor([3.0]), shares=torch.tensor([3.0]),
                importance=torch.tensor([3.0]), z=torch.tensor(1.0), **ALONE, load=torch.tensor([3.0]))
    assert [LOSSES[name](lone).item() for name in ("importance", "load")] == [0, 0]


def test_nothing_routed_is_0_and_not_nan():
    made = layer()
    with balancing(made) as balance:
        made(torch.zeros(2, 0, WIDTH, dtype=torch.float64))
        made(torch.zeros(1, 3, WIDTH, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.bool))
    assert balance.loss(switch=1, importance=1, z=1).item() == 0


def test_each_layer_is_listened_to_by_its_path_and_only_inside_the_block():
    model, x = nn.Sequential(layer(), nn.Identity(), layer("sigmoid")), data()[0]
    with balancing(model) as balance:
        y = model(x)
    assert list(balance) == ["0.experts", "2.experts"]
    before = balance["0.experts"].tokens.clone()
    assert torch.equal(model(x), y) and balance["0.experts"].tokens == before
    with balancing(model, into=balance):
        model(x)
    assert balance["0.experts"].tokens == 2 * before
    with pytest.raises(ZeroDivisionError), balancing(model):
        raise ZeroDivisionError
    assert not any(part.is_heard for part in model.modules() if hasattr(part, "is_heard"))


@pytest.mark.parametrize("weights", [{}, {"swich": 1.0}, {"switch": 1.0, "entropy": 1.0}], ids=str)
def test_an_unknown_loss_is_refused(weights):
    with balancing(made := layer()) as balance:
        made(data()[0])
    with pytest.raises(RuleError, match="balance: expected weights of switch, importance, load, z, sequence"):
        balance.loss(**weights)


def test_a_balance_without_layers_and_a_load_without_noise_are_refused():
    with pytest.raises(RuleError, match="0 layers"):
        Balance().loss(switch=1)
    with balancing(made := layer()) as balance:
        made(data()[0])
    with pytest.raises(RuleError, match="expected a Noisy gate in training"):
        balance.loss(load=1)
