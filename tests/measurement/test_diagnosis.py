"""One call that tells everything of the experts of a model, also of what it generates."""

import pytest
import torch

from sentei.axes import depth, experts
from sentei.axes.experts.gates import Renormalised, Soft
from sentei.core.errors import ShapeError
from sentei.core.rules import TopK
from sentei.core.tracing import trace
from sentei.geometry.subspaces import linear_cka, overlap, subspace
from sentei.measurement.diagnosis import PROBES, diagnose
from sentei.measurement.specialisation import coactivation, loads, specialisation
from sentei.model import Config, Routed, Transformer

ROOM = experts.Config(rule=TopK(2), gate=Renormalised(), unit=3)
TOKENS = torch.arange(24).view(2, 12)


def model_of(**more) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocabulary": 40, "width": 16, "layers": 2, "heads": (2, 1)}
    return Transformer(Config(**{**shape, "feed_forward": Routed(neurons=12, room=ROOM), **more})).eval()


def test_a_trace_of_generation_has_the_load_of_its_experts_alone():
    """Connections choose among more tokens at every step: their records have other sizes."""
    model = model_of(depth=depth.Config())
    with trace(model) as records:
        model.generate(TOKENS, 4)
    assert {record.room for record in records} == {"connections", "experts", "depth"}
    found = loads(records)
    assert list(found) == [f"blocks.{layer}.block.feed_forward.experts" for layer in range(2)]
    assert all(load.tokens == 2 * (12 + 3) and sum(load.counts) == 2 * load.tokens for load in found.values())
    assert diagnose(model, records, draws=1).keys() == found.keys()


def test_it_is_what_its_parts_say():
    model, domains = model_of(), torch.tensor([0, 1])
    with torch.no_grad(), trace(model) as records:
        model(TOKENS)
        model(TOKENS.flip(1))
    labels = {"domain": [domains, domains], "vocabulary": [TOKENS, TOKENS.flip(1)]}
    found = diagnose(model, records, labels, draws=3, seed=5)
    for path, load in loads(records).items():
        one, own = found[path], records.at(path)
        assert one.load == load and torch.equal(one.together, coactivation(own))
        for name, given in labels.items():
            alone = specialisation(own, given, seed=5)
            assert one.labels[name].information == alone.information > 0
            assert torch.equal(one.labels[name].by_chance, alone.by_chance)
        layer = model.get_submodule(path.removesuffix(".experts"))
        rows = torch.cat([*layer.up.chunk(2, 1), layer.down.mT], -1).detach()
        assert one.weights.observed[0, 1] == pytest.approx(overlap(subspace(rows[0]), subspace(rows[1])))
        x = torch.randn(PROBES, 16, generator=torch.Generator().manual_seed(5))
        stack = layer.experts.stack(layer.up, layer.down)
        with torch.no_grad():
            alike = linear_cka(stack[0](x), stack[1](x))
        assert one.answers.observed[0, 1] == pytest.approx(alike, rel=1e-4) and alike < 0.99
        assert len(one.weights.random) == len(one.answers.shuffled) == 3 and one.answers.chance("random") >= 1 / 4
    assert not diagnose(model, records, draws=1)["blocks.0.block.feed_forward.experts"].labels


def test_copies_are_alike_and_random_experts_are_not():
    layer = experts.MixtureOfExperts(ROOM, width=16, neurons=12, gated=False)
    with torch.no_grad(), trace(layer) as records:
        layer(torch.randn(9, 16))
        apart = diagnose(layer, records, draws=1)["experts"]
        for weight in (layer.up, layer.down):
            weight.copy_(weight[:1].expand_as(weight).clone())
        alike = diagnose(layer, records, draws=1)["experts"]
    assert alike.weights.mean == pytest.approx(1) == pytest.approx(alike.answers.mean)
    assert apart.weights.mean < 0.5 and apart.answers.mean < 0.9


def test_one_expert_is_like_nobody_and_labels_must_fit():
    room = experts.Config(gate=Soft(2), unit=4)
    layer = experts.MixtureOfExperts(room, width=16, neurons=4, causal=False)
    with trace(layer) as records:
        layer(torch.randn(2, 9, 16))
    one = diagnose(layer, records)["experts"]
    assert one.weights is one.answers is None and one.load.counts == (18, 18)
    with pytest.raises(ShapeError, match="give one label a token or a sequence"):
        diagnose(layer, records, {"domain": [torch.zeros(3, dtype=torch.int64)]})
