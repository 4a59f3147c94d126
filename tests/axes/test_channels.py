"""channels: gates, what the next convolution reads, and that a batch is what its images are alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.channels import Channels, Config, GatedConv, SmallCNN, SqueezeExcitation, from_dense
from sentei.core.definition import apply
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.rules import All, Capacity, Fixed, Mass, Threshold, TopK
from sentei.core.tracing import trace

RULES = [All(), TopK(0), TopK(3), TopK(9), Mass(0.6), Threshold(0.4), Fixed((1, 4))]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
KINDS = [{}, {"stride": (2, 1), "padding": (1, 2)}, {"dilation": (2, 1), "padding": (2, 0)}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def parts(batch: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Maps, logits, weight and bias: 5 maps to 3."""
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (
        (batch, 5, 6, 7), (batch, 5), (3, 5, 3, 2), (3,))]


def loop(room: Channels, kind: dict, maps, logits, weight, bias) -> torch.Tensor:
    """The definition: an image is a query, and the value of a map is its own convolution."""
    values = torch.stack([F.conv2d(maps[:, c:c + 1], weight[:, c:c + 1], **kind) for c in range(5)], 1)
    selection = room.rule(logits[:, None].detach()).weigh(logits.sigmoid()[:, None])
    summed = apply(selection, values.flatten(2))
    return summed.view(len(maps), *values.shape[2:]) + bias[:, None, None]


def outcome(function, inputs) -> list[torch.Tensor]:
    """The output and the gradients of one fixed loss of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    loss = (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output).cos()).sum()
    return [output, *torch.autograd.grad(loss + sum(leaf.sum() * 0 for leaf in leaves), leaves)]


@every_rule
@every_kind
@pytest.mark.parametrize("batch", [1, 2])
def test_is_the_definition(rule, kind, batch):
    room, inputs = Channels(Config(rule=rule), **kind), parts(batch)
    expected = outcome(lambda *x: loop(room, kind, *x), inputs)
    for got in (outcome(room, inputs), outcome(lambda *x: traced(room, *x)[0], inputs)):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    maps, logits, weight, bias = inputs
    torch.testing.assert_close(room(maps, logits, weight) + bias[:, None, None], expected[0], **CLOSE)


def traced(room: Channels, *inputs):
    with trace(room) as records:
        output = room(*inputs)
    return output, records[0]


@pytest.mark.parametrize("rule", [All(), TopK(2), Mass(0.6)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck(rule, batch):
    inputs = [tensor.requires_grad_() for tensor in parts(batch)]
    assert torch.autograd.gradcheck(Channels(Config(rule=rule)), inputs)


def test_all_is_squeeze_and_excitation_to_the_bit():
    layer, x = nn.Sequential(SqueezeExcitation(8), nn.Conv2d(8, 3, 3, stride=2, padding=1)), torch.randn(2, 8, 6, 7)
    squeeze, excite = layer[0].squeeze, layer[0].excite
    gates = excite(squeeze(x.mean((2, 3))).relu()).sigmoid()
    converted = from_dense(layer, Config())
    assert torch.equal(converted(x), layer[1](x * gates[:, :, None, None])) and torch.equal(converted(x), layer(x))
    with trace(converted):
        assert torch.equal(converted(x), layer(x))
    assert converted.conv.weight is not layer[1].weight and squeeze.out_features == 2


def test_a_batch_is_its_images_alone_whether_gathered_or_masked():
    room, (maps, logits, weight, bias) = Channels(Config(rule=TopK(2))), parts(3)
    together, record = traced(room, maps, logits, weight, bias)
    assert record.impl == "masked"
    for image in range(3):
        alone, own = traced(room, maps[image:image + 1], logits[image:image + 1], weight, bias)
        torch.testing.assert_close(alone[0], together[image], **CLOSE)
        assert own.impl == "gathered" and torch.equal(own.selection.ids[0], record.selection.ids[image])
        assert torch.equal(own.selection.weights[0], record.selection.weights[image])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_next_convolution_reads_the_maps_that_are_kept(monkeypatch, batch):
    seen, real = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda maps, weight, *rest: seen.append((maps.shape[1], weight.shape[1]))
                        or real(maps, weight, *rest))
    for rule in (TopK(2), Fixed((0, 3)), TopK(0), All()):
        Channels(Config(rule=rule))(*parts(batch))
    assert seen == [(2, 2) if batch == 1 else (5, 5), (2, 2), (5, 5)]


def test_the_record_says_what_was_computed():
    for batch, rule, how, done in ((1, TopK(2), "gathered", 2), (2, Fixed((0, 1, 3)), "gathered", 6),
                                   (2, TopK(2), "masked", 10), (2, All(), "everything", 10),
                                   (1, TopK(0), "gathered", 0)):
        maps, logits, weight, bias = parts(batch)
        _, record = traced(Channels(Config(rule=rule)), maps, logits, weight, bias)
        each = 4 * 6 * 3 * 3 * 2
        assert (record.impl, record.cost.multiply_adds) == (how, done * each)
        assert record.cost.dense_multiply_adds == batch * 5 * each and record.cost.choosing == 0
        assert record.cost.bytes == 8 * ((maps.numel() + weight.numel()) * done // (5 * batch) + batch * 3 * 24)
        assert ("nothing is saved" in record.reason) == (how == "masked")


@pytest.mark.parametrize("batch", [1, 2])
def test_what_stands_in_a_dropped_map_reaches_nothing(batch):
    room, (maps, logits, weight, bias) = Channels(Config(rule=TopK(2))), parts(batch)
    before, record = traced(room, maps, logits, weight, bias)
    maps[~record.selection.mask()[:, 0]] = torch.nan
    assert torch.equal(room(maps, logits, weight, bias), before)


def test_ties_go_to_the_lower_map_and_huge_logits_saturate():
    room, (maps, logits, weight, bias) = Channels(Config(rule=TopK(2))), parts(1)
    assert traced(room, maps, torch.zeros_like(logits), weight, bias)[1].selection.ids.tolist() == [[[0, 1]]]
    huge = torch.tensor([[1e5, -1e5, 1e5, 0.0, -1e5]], dtype=torch.float64)
    output, record = traced(room, maps, huge, weight, bias)
    assert record.selection.ids.tolist() == [[[0, 2]]] and record.selection.weights.tolist() == [[[1, 1]]]
    torch.testing.assert_close(output, F.conv2d(maps[:, [0, 2]], weight[:, [0, 2]], bias), **CLOSE)


def test_a_logit_that_is_no_number_is_refused_where_it_chooses():
    maps, logits, weight, bias = parts()
    logits[1, 2] = torch.nan
    with pytest.raises(RuleError, match="finite scores"):
        Channels(Config(rule=TopK(2)))(maps, logits, weight, bias)
    assert not Channels(Config())(maps, logits, weight, bias)[1].isfinite().any()


@every_rule
def test_no_image(rule):
    maps, logits, weight, bias = parts(0)
    assert traced(Channels(Config(rule=rule)), maps, logits, weight, bias)[0].shape == (0, 3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_precision(dtype, batch):
    room, inputs = Channels(Config(rule=TopK(3))), parts(batch, dtype)
    selection = traced(room, *inputs)[1].selection

    def plain(maps, logits, weight, bias):
        gates = torch.where(selection.mask()[:, 0], logits.sigmoid(), 0)
        return F.conv2d(maps * gates[..., None, None], weight, bias)
    exact = plain(*(tensor.double() for tensor in inputs))
    allowed = 2 * (plain(*inputs).double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (room(*inputs).double() - exact).abs().max() <= allowed


def test_tensors_of_any_strides():
    room, inputs = Channels(Config(rule=TopK(2))), parts(1)
    maps, logits, weight, bias = inputs
    strided = [maps.to(memory_format=torch.channels_last), logits.mT.contiguous().mT,
               weight.transpose(0, 1).contiguous().transpose(0, 1), bias]
    torch.testing.assert_close(room(*strided), room(*inputs), **CLOSE)


@pytest.mark.parametrize("config", [None, Config(), Config(rule=TopK(3))], ids=["static", "soft", "top 3"])
def test_a_small_network_learns(config):
    """Which half of the image is brighter, top or bottom."""
    torch.manual_seed(3)
    network = SmallCNN(config, inputs=1, classes=2, width=8)
    x = torch.randn(64, 1, 8, 8)
    labels = torch.randint(2, (64,))
    x[labels == 0, :, :4] += 1.5
    x[labels == 1, :, 4:] += 1.5
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=0.01), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(network(x), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.4 * losses[0] and network(x[:0]).shape == (0, 2)
    with trace(network) as records:
        network(x[:1])
    assert records.paths() == ([] if config is None else ["layers.0.channels", "layers.1.channels"])


@pytest.mark.parametrize("conv", [
    nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(4, 8, 3)], ids=["groups", "circular", "same", "channels"])
def test_a_convolution_that_is_not_plain_is_refused(conv):
    with pytest.raises(ShapeError, match="a convolution in one group"):
        from_dense(nn.Sequential(SqueezeExcitation(8), conv), Config())


@pytest.mark.parametrize("layer", [
    nn.Conv2d(8, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Sequential(nn.Conv2d(8, 8, 3), SqueezeExcitation(8)),
    nn.ModuleList([SqueezeExcitation(8), nn.Conv2d(8, 8, 3)])], ids=["alone", "ungated", "reversed", "list"])
def test_other_layers_are_refused(layer):
    with pytest.raises(ShapeError, match="a SqueezeExcitation and the nn.Conv2d behind it"):
        from_dense(layer, Config())


def test_a_layer_of_the_room_takes_another_rule():
    layer = GatedConv(Config(), SqueezeExcitation(5), nn.Conv2d(5, 3, 3)).eval()
    other, x = from_dense(layer, Config(rule=TopK(2))), torch.randn(1, 5, 6, 7)
    assert not torch.equal(other(x), layer(x)) and not other.training
    assert torch.equal(from_dense(other, Config())(x), layer(x))


@pytest.mark.parametrize("change", [
    lambda m, z, w, b: (m[0], z, w, b), lambda m, z, w, b: (m, z[:, :4], w, b), lambda m, z, w, b: (m, z, w[:, :4], b),
    lambda m, z, w, b: (m, z, w, b[:2]), lambda m, z, w, b: (m.float(), z, w, b),
    lambda m, z, w, b: (m.long(), z.long(), w.long())])
def test_tensors_that_do_not_fit_are_refused(change):
    for rule in (All(), TopK(2)):
        with pytest.raises(ShapeError, match=r"channels: expected maps \[B, C, Y, X\]"):
            Channels(Config(rule=rule))(*change(*parts()))


def test_a_rule_that_looks_along_the_images_is_refused():
    for rule in ("all", Capacity(0.5)):
        with pytest.raises(RuleError, match="channels.Config: expected rule a Rule that looks at each image alone"):
            Config(rule=rule)
    with pytest.raises(FileError, match="each image alone"):
        Config.from_json({"rule": Capacity(0.5).to_json()})
