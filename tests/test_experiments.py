"""The experiments' harness: equal FLOPs, runs that go on, and differences that say how sure they are."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.experiments import harness
from benchmarks.experiments.harness import (
    Experiment,
    Place,
    Variant,
    difference,
    forward_flops,
    trained,
    training_flops,
)
from benchmarks.experiments.parts import mixture, transformer
from benchmarks.experiments.rank import TARGETS
from benchmarks.experiments.soft import FillsIn
from sentei.axes import depth
from sentei.axes.experts import MixtureOfExperts
from sentei.axes.experts.gates import Sigmoid
from sentei.axes.rank import Config as Rank
from sentei.conversion.adapters import adapters_of, add
from sentei.core.rules import Capacity
from sentei.model import Transformer
from sentei.training.loop import METRICS
from sentei.training.loop import Config as Training
from sentei.training.losses import Weights

SHAPE = {"width": 16, "layers": 2, "heads": (2, 2)}
ROUTED = mixture(4, 2, 8, Sigmoid(speed=0.1))


def small(**variants: Variant) -> Experiment:
    return Experiment(name="small", text=("words",), flops=3e7, seeds=2, context=16, held_out=3, variants=variants,
                      training=Training(batch=2, evaluate=4, save=4))


@pytest.fixture
def place(tmp_path) -> Place:
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return Place(texts=tmp_path, out=tmp_path / "out")


def test_every_variant_spends_the_same_flops(place):
    experiment = small(dense=Variant(make=lambda: transformer(**SHAPE, feed_forward=16)),
                       wide=Variant(make=lambda: transformer(**SHAPE, feed_forward=64)),
                       frozen=Variant(make=lambda: adapted(transformer(**SHAPE, feed_forward=64))))
    runs = {name: trained(experiment, name, 0, place)[1] for name in experiment.variants}
    for run in runs.values():
        a_step = run["flops_a_token"] * run["tokens"] / run["steps"]
        assert abs(run["flops_a_token"] * run["tokens"] - experiment.flops) <= a_step / 2
        assert len(run["losses"]) == 3 and run["curve"][-1]["step"] == run["steps"] and run["curve"][0]["step"] == 0
    assert runs["dense"]["flops_a_token"] < runs["frozen"]["flops_a_token"] < runs["wide"]["flops_a_token"]
    assert runs["dense"]["steps"] > runs["wide"]["steps"]


def adapted(model: Transformer) -> Transformer:
    """With factors of rank 2 in every linear layer."""
    add(model, TARGETS, Rank(rank=2))
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_training_step_is_charged_what_torch_counts(lora):
    """One tile of 64, of which torch counts the whole square too. Nothing is trained below the first layer's factors:
    torch spares the gradients of the input of its query, key and value."""
    model = transformer(**SHAPE, feed_forward=64).double()
    model = adapted(model) if lora else model
    tokens = torch.randint(0, 256, (3, 64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(tokens).sum().backward()
    spared = sum(layer.weight.numel() + layer.a.numel() for name, layer in adapters_of(model).items()
                 if name.startswith("blocks.0.") and name.endswith(("query", "key", "value")))
    assert counter.get_total_flops() == tokens.numel() * (training_flops(model, 64) - 2 * spared)
    if lora:
        assert spared and training_flops(model, 64) > 2 * forward_flops(model, 64)


def test_flops_are_twice_the_multiply_adds_with_the_router(place):
    dense, routed = (transformer(**SHAPE, feed_forward=given) for given in (16, ROUTED))
    layers = 2 * (4 * 16 * 16 + 3 * 16 * 16) + 257 * 16
    pairs = 2 * 2 * 64 * 64 * 16  # two layers, q·k and the sum over v, for a tile, which is counted whole
    assert forward_flops(dense, 64) == pytest.approx(2 * (layers + pairs / 64))
    assert forward_flops(routed, 64) == pytest.approx(forward_flops(dense, 64) + 2 * 2 * 4 * 16)


def test_a_run_that_is_done_is_not_done_again(place, monkeypatch):
    experiment = small(dense=Variant(make=lambda: transformer(**SHAPE, feed_forward=16)))
    model, run = trained(experiment, "dense", 0, place)
    monkeypatch.setattr(harness, "window_losses", lambda *given: pytest.fail("measured again"))
    again, same = trained(experiment, "dense", 0, place)
    assert same == run and json.loads(json.dumps(run)) == run and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_difference_is_paired_and_has_both_margins():
    found = difference([[1.0, 3.0], [2.0, 4.0], [1.5, 3.5]], [[1.1, 3.1], [2.3, 4.3], [1.7, 3.7]])
    assert found.mean == pytest.approx(-0.2) and found.seeds == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert found.text == pytest.approx(0, abs=1e-12) and found.verdict == "open"  # 0.248 over the seeds
    assert replace(found, seeds=0.1).verdict == "lower" and replace(found, mean=0.2, seeds=0.1).verdict == "higher"
    one = difference([[1.0, 2.0, 3.0, 4.0]], [[0.0, 1.5, 2.0, 3.5]])
    assert one.seeds == math.inf and one.text == pytest.approx(1.96 * 0.288675 / 2, rel=1e-4)
    assert "one seed" in str(one) and one.verdict == "higher, of one seed"
    assert replace(one, text=2.0).verdict == "open"


def test_what_a_variant_needs_is_trained_too(place):
    experiment = small(
        experts=Variant(make=lambda: transformer(**SHAPE, feed_forward=ROUTED), balance=Weights(switch=0.01)),
        depth=Variant(make=lambda: transformer(**SHAPE, feed_forward=16, depth=depth.Config(rule=Capacity(0.5)))))
    routed, _ = trained(experiment, "experts", 0, place)
    layers = [module for module in routed.modules() if isinstance(module, MixtureOfExperts)]
    assert all(layer.experts.bias.abs().max() >= 0.1 for layer in layers)
    rows = [json.loads(line) for line in (place.out / "small" / "experts-0" / METRICS).read_text().splitlines()]
    assert all(row["added"] > 0.009 for row in rows[1:])
    deep, _ = trained(experiment, "depth", 0, place)
    assert all(room.predictor.weight.abs().max() > 0 for room in deep.blocks)


def test_what_fills_in_sees_no_hidden_byte_and_knows_the_others():
    model = FillsIn(transformer(vocabulary=258, **SHAPE, feed_forward=16, causal=False)).eval()
    tokens = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        logits = model(tokens)
    given = logits.amax(-1) == 30
    assert torch.equal(logits.argmax(-1)[:, :-1][given[:, :-1]], tokens[:, 1:][given[:, :-1]])
    assert 0.1 < (~given).float().mean() < 0.5 and not given[:, -1].any()
    hidden = first_hidden(given)
    other = tokens.clone()
    other[0, hidden + 1] = (other[0, hidden + 1] + 1) % 256
    with torch.no_grad():
        changed = model(other)
    assert torch.equal(changed[0], logits[0])


def first_hidden(given: torch.Tensor) -> int:
    return int((~given[0, :-1]).nonzero()[0])
