"""experts: they begin like a dense layer of as many neurons as a token keeps, whatever makes an expert."""

import pytest
import torch
from torch import nn

from sentei.axes.experts import Config, MixtureOfExperts
from sentei.axes.experts.dense import FeedForward
from sentei.axes.experts.gates import Noisy, Renormalised, Sigmoid, Soft, Softmax, Task, Unit
from sentei.core.rules import All, Mass, TopK
from sentei.core.tracing import trace
from sentei.model import Config as Shape
from sentei.model import Routed, Transformer
from sentei.model.slots import GatedFeedForward

WIDTH, NEURONS, DRAWS = 64, 512, 8
EXPERTS = [(8, TopK(1), Softmax()), (64, TopK(1), Softmax()), (256, TopK(1), Softmax()), (16, TopK(4), Softmax()),
           (64, TopK(2), Renormalised()), (16, TopK(6), Renormalised()), (64, TopK(2), Sigmoid(scale=2.5)),
           (64, TopK(2), Noisy()), (64, TopK(2), Task(3)), (32, TopK(3), Unit()), (64, All(), Unit()),
           (32, Mass(0.4), Softmax())]


def states(width: int = WIDTH) -> torch.Tensor:
    return torch.randn(2, 128, width)


def size_of(make, x: torch.Tensor) -> float:
    """The mean square of the answers of fresh layers."""
    with torch.no_grad():
        return torch.stack([make()(x, None, torch.arange(2)).square().mean() for _ in range(DRAWS)]).mean().item()


class Twin(FeedForward):
    def forward(self, x, mask, tasks):
        return super().forward(x)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("unit, rule, gate", EXPERTS, ids=str)
def test_the_kept_neurons_of_a_new_mixture_are_as_large_as_a_dense_layer_of_so_many(unit, rule, gate, shared):
    """Where weights add up to one number the answers are as large; else each kept neuron, before it is weighed."""
    shared, x = shared if NEURONS // unit > 2 else 0, states()
    config = Config(rule=rule, gate=gate, unit=unit, shared=shared)

    def make() -> MixtureOfExperts:
        return MixtureOfExperts(config, width=WIDTH, neurons=NEURONS)

    made = make()
    with trace(made) as records:
        made(x, None, torch.arange(2))
    chosen = records[0].selection
    count = chosen.count().float().mean().item()
    counted = count if gate.adds_up else chosen.weights.square().sum(-1).mean().item()
    dense = size_of(lambda: Twin(WIDTH, round(unit * (count + shared))), x)
    assert size_of(make, x) == pytest.approx(dense * (counted + shared) / (count + shared), rel=0.25)


@pytest.mark.parametrize("unit, k, gate", [(96, 2, Renormalised()), (24, 8, Renormalised()), (48, 4, Sigmoid()),
                                           (96, 2, Noisy()), (24, 8, Unit())], ids=str)
def test_in_the_model_it_begins_as_the_dense_slot_does(unit, k, gate):
    """All of 192 kept neurons, in experts of other widths, under gates that weigh by 1 and by 1/k."""
    shape = {"width": WIDTH, "layers": 3}
    routed = Routed(neurons=16 * unit, room=Config(rule=TopK(k), gate=gate, unit=unit))
    x = states()

    def layer(feed_forward: object) -> nn.Module:
        return Transformer(Shape(**shape, feed_forward=feed_forward)).blocks[0].block.feed_forward

    assert type(layer(192)) is GatedFeedForward
    ours, dense = (size_of(lambda given=given: WithoutTasks(layer(given)), x) for given in (routed, 192))
    assert ours == pytest.approx(dense, rel=0.25)


class WithoutTasks(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask, tasks):
        return self.inner(x, mask)


def test_the_spread_of_a_neuron_does_not_depend_on_the_width_of_an_expert():
    found = [MixtureOfExperts(Config(gate=Unit(), unit=unit), width=WIDTH, neurons=NEURONS) for unit in (4, 32, 256)]
    for name in ("up", "down"):
        spreads = [getattr(made, name).std().item() for made in found]
        assert spreads == pytest.approx([spreads[0]] * 3, rel=0.03), name
    assert found[0].down.std().item() == pytest.approx((3 * NEURONS) ** -0.5, rel=0.03)


def test_what_may_count_up_to_1_later_begins_with_the_spreads_as_they_are():
    for config in (Config(gate=Soft(2), metric="cosine", unit=64), Config(rule=TopK(0), gate=Softmax(), unit=64),
                   Config(rule=TopK(1), gate=Softmax(), unit=64), Config(rule=TopK(0), gate=Renormalised(), unit=64)):
        made = MixtureOfExperts(config, width=WIDTH, neurons=NEURONS, causal=False)
        made.draw(up=0.1, down=0.2)
        assert made.up.std().item() == pytest.approx(0.1, rel=0.03)
        assert made.down.std().item() == pytest.approx(0.2, rel=0.03)


def test_an_expert_of_slots_begins_as_a_dense_layer_of_its_own_width():
    made = MixtureOfExperts(Config(gate=Soft(4), metric="cosine", unit=64), width=WIDTH, neurons=NEURONS, causal=False)
    assert made.down.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.03)


def test_a_layer_is_made_where_nothing_is_computed():
    with torch.device("meta"):
        made = MixtureOfExperts(Config(rule=TopK(2), gate=Softmax(), unit=8), width=WIDTH, neurons=NEURONS)
    assert made.up.is_meta and made.down.shape == (64, WIDTH, 8)
