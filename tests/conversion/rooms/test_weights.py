"""weights in pretrained layers: narrower networks, refitted by least squares."""

import pytest
import torch
from tiny import tiny_model

from sentei.axes.weights import Config
from sentei.budget.calibration import calibrate, wanted_by_rooms
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Entry, Plan, convert
from sentei.conversion.rooms import weights
from sentei.core.errors import UnsupportedError
from sentei.core.rules import Capacity, TopK

TEXT = torch.randint(3, 320, (4, 400), generator=torch.Generator().manual_seed(5))
MODEL = tiny_model("llama")
SEEN = calibrate(MODEL, TEXT, wanted_by_rooms(MODEL, ["weights"], "rule"))


def built(**settings):
    return weights.build(layer_of(MODEL, 1), "network", Config(**{"saliency": "obs", **settings}), SEEN.of(1))[0]


@pytest.fixture(scope="module")
def rows():
    """What the network of layer 1 is given on the calibration text, and what an error counts in each row."""
    found, layer = [], MODEL.model.layers[1]
    handles = [layer.mlp.register_forward_hook(lambda _, inputs, output: found.append((inputs[0][0], output[0]))),
               layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0][0]))]
    streams = []
    with torch.no_grad():
        for row in TEXT:
            MODEL(input_ids=row[None])
    for handle in handles:
        handle.remove()
    given, added = map(torch.cat, zip(*found, strict=True))
    return given.double(), 1 / (torch.cat(streams) + added).double().square().mean(-1, keepdim=True)


def loss(network, rows) -> float:
    given, counts = rows
    with torch.no_grad():
        error = (network.double()(given) - MODEL.model.layers[1].mlp.double()(given)).square()
    return float((counts * error).sum())


def test_the_kept_neurons_are_refitted_to_the_least_squares_on_the_text(rows):
    network = built(rule=TopK(48), damp=0.0)
    try:
        least = loss(network, rows)
        for seed in range(3):
            other = built(rule=TopK(48), damp=0.0).double()
            noise = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            with torch.no_grad():
                other.down_proj.weight += 1e-2 * noise
            assert loss(other, rows) > least
        plain = built(rule=TopK(48), saliency="magnitude")
        assert loss(plain, rows) > 1.2 * least, "without the statistics nothing is refitted"
    finally:
        MODEL.float()


def test_a_network_is_of_the_same_class_and_narrower_and_shares_its_activation():
    own, network = MODEL.model.layers[1].mlp, built(rule=TopK(64))
    assert type(network) is type(own) and network.act_fn is own.act_fn and network.intermediate_size == 64
    assert [tuple(part.weight.shape) for part in (network.gate_proj, network.up_proj, network.down_proj)] == [
        (64, 64), (64, 64), (64, 64)]
    assert own.intermediate_size == 96 and own.down_proj.weight.shape == (64, 96)
    kept = [any(torch.equal(row, other) for other in own.gate_proj.weight) for row in network.gate_proj.weight]
    assert all(kept)


def test_widths_are_multiples_of_32_and_fall():
    widths = [config.rule.k for config in weights.options(layer_of(MODEL, 0), "rule")[1:]]
    assert widths == sorted(widths, reverse=True) and all(width % 32 == 0 and 0 < width < 96 for width in widths)


@pytest.mark.parametrize("settings", [{"rule": Capacity(0.5), "among": "row"}], ids=str)
def test_weights_that_are_no_neurons_are_refused(settings):
    with pytest.raises(UnsupportedError, match="weights: expected whole neurons"):
        convert(tiny_model("llama"), Plan((Entry(layer=1, room="weights", config=Config(**settings)),)))
