"""Each claim of the lab, small: it holds where it should, and a world in which it is false is told from ours."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model

from sentei.axes.experts import Experts
from sentei.circuit.agreement import ROOMS
from sentei.circuit.capture import capture
from sentei.core.definition import apply
from sentei.core.selection import Selection
from sentei.geometry.neighbours import same_sets
from sentei.geometry.orthogonality import unit_vectors
from sentei.geometry.snr import readouts
from sentei.kernels.routing import route
from sentei.lab import (
    attention_mass,
    contexts,
    dynamic_vs_static,
    expert_cost,
    expert_subspaces,
    fixed_choices,
    one_structure,
    orthogonality,
    routing_neighbours,
    savings,
    snr,
    topk_timing,
)
from sentei.lab.finding import FAILS, HOLDS, OPEN
from sentei.lab.table import CLAIMS
from sentei.lab.trained import Routing, mixture, neurons, routings
from sentei.measurement.charts import draw
from sentei.training.losses import window_losses


def test_random_directions_are_nearly_orthogonal():
    found = orthogonality.measure(dimensions=(64, 256), batches=12)
    assert found.verdict == HOLDS and "within 2 %" in found.sentence
    assert all(abs(row["variance × d"] - 1) < 0.02 for row in found.rows)


@pytest.mark.parametrize("draw", [
    lambda *given: unit_vectors(*given).abs(),  # all in one orthant: the mean is not 0
    lambda number, size, generator: unit_vectors(number, size // 2, generator).repeat(1, 2) / 2**0.5,  # half of them
])
def test_other_directions_are_not(draw):
    found = orthogonality.measure(dimensions=(64,), batches=8, draw=draw)
    assert found.verdict == FAILS and found.sentence.startswith("The claim does not hold: ")


def test_a_dense_readout_drowns_a_signal():
    found = snr.measure(dense=(32, 256), batches=24)
    assert found.verdict == HOLDS
    dense = [row["SNR"] for row in found.rows if row["read-out"] == "dense"]
    assert dense[1] < dense[0] / 10


def test_signal_everywhere_does_not_drown():
    def read(right, wrong, number, generator):
        return readouts(right + wrong // 2, wrong, number, generator)

    assert snr.measure(dense=(32, 256), batches=8, read=read).verdict == FAILS


def test_a_selection_that_lets_noise_in_restores_nothing():
    def read(right, wrong, number, generator):
        signal, noise = readouts(right, wrong, number, generator)
        return signal, noise + torch.randn(number, generator=generator).double() * (wrong == 0)

    found = snr.measure(dense=(32,), batches=8, read=read)
    assert found.verdict == FAILS and "right dimensions" in found.sentence


def test_one_definition_computes_both():
    assert one_structure.measure().verdict == HOLDS


@pytest.mark.parametrize("wrong", [
    lambda selection, *given: apply(selection, *given) * (1 + 1e-9),
    lambda selection, values, *x: apply(Selection.from_mask(selection.mask(), selection.mask()), values, *x),
])
def test_another_definition_does_not(wrong):
    found = one_structure.measure(wrong)
    assert found.verdict == FAILS and "by the definition" in found.sentence


def test_one_structure_is_drawn_by_what_computes():
    rows = one_structure.measure().rows
    first, *others = one_structure.judge([{**rows[0], "largest difference": 0.0}, *rows[1:]]).charts[0].series
    assert first.expected and set(first.y) == {one_structure.ROUNDING}
    assert {part.name: part.x for part in others} == {"attention": (0, 1, 2), "a mixture of experts": (0, 1, 2)}
    assert others[0].y == (one_structure.NONE, rows[2]["largest difference"], rows[3]["largest difference"])


def attention(concentrated: bool):
    """Attention of two heads over each context, on two keys or even."""
    def shares(_, contexts):
        for size in contexts:
            scores = torch.randn(1, 2, 4, size)
            scores[..., :2] += 30 * concentrated
            yield size, (scores * (1 if concentrated else 0.01)).softmax(-1)
    return shares


def test_attention_on_few_keys_is_told_from_even_attention():
    narrow, even = (attention_mass.measure((64, 256), 3, attention(kind)) for kind in (True, False))
    assert narrow.verdict == HOLDS and even.verdict == FAILS
    assert abs(even.checks[0].value - 0.9) < 0.02 and narrow.checks[0].value < 0.02
    assert [len(row) for row in narrow.heat] == [2]


def layer(tokens: int = 2000) -> Routing:
    """A router with rows of unlike lengths, and what it chooses."""
    x, rows = torch.randn(tokens, 12), torch.randn(8, 12) * torch.arange(1, 9)[:, None]
    return Routing(points=x, rows=rows, ids=(x @ rows.T).topk(2).indices)


def test_a_router_is_a_search_for_neighbours():
    found = routing_neighbours.measure(lambda: [layer(5000)])
    assert found.verdict == HOLDS
    other = {(row["choice"], row["search"]): row["agreement"] for row in found.rows if row["judged"] == "no"}
    assert len(other) == 4 and other["the model's choice", "the nearest rows"] < 0.9
    assert other["the same with a balancing bias", "the index without it"] < 0.9


def test_a_router_that_chooses_otherwise_is_not():
    one = layer()
    drawn = Routing(points=one.points, rows=one.rows, ids=torch.rand(len(one.points), 8).topk(2).indices)
    found = routing_neighbours.measure(lambda: [drawn])
    assert found.verdict == FAILS and "the model's choice" in found.sentence


def test_an_index_that_forgets_the_bias_is_found_out():
    found = routing_neighbours.measure(
        lambda: [layer()], lambda points, rows, bias: routing_neighbours.search(points, rows))
    assert found.verdict == FAILS and "power diagram" in found.sentence


class Timed:
    """Two experts of eight that take a share of the dense layer's time and FLOPs."""

    touched = 8

    def __init__(self, time: float, work: float, dense: float = 1.0):
        self.time, self.flops, self.dense = time, (8e9, 8e9 * work), dense

    def timed(self, runs: int) -> dict[str, list[float]]:
        turns = [1 + 0.001 * turn for turn in range(runs)]  # each of them slower than the one before
        return {"dense": [self.dense * turn for turn in turns],
                "mixture": [self.dense * turn * (self.time + 0.003 * place) for place, turn in enumerate(turns)],
                "experts alone": [self.dense * 0.9 * self.time * turn for turn in turns]}


@pytest.mark.parametrize(("time", "work", "verdict"), [
    (0.23, 0.25, HOLDS), (0.23, 0.26, FAILS), (0.285, 0.25, OPEN), (0.5, 0.25, FAILS)])
def test_what_experts_cost(time, work, verdict):
    found = expert_cost.measure((1, 64), lambda _: Timed(time, work))
    assert found.verdict == verdict
    row = found.rows[0]
    assert abs(row["time ÷ dense"] - 0.25 - row["slower products"] - row["choosing"]) < 1e-12


@pytest.mark.parametrize(("first", "work", "verdict"), [
    (1.5, 0.25, OPEN), (1.006, 0.25, HOLDS), (0.7, 0.25, HOLDS), (1.5, 0.26, FAILS)])
def test_the_time_of_experts_on_a_disturbed_machine_is_not_judged(first, work, verdict):
    found = expert_cost.measure((64, 1024), lambda tokens: Timed(0.23, work, first if tokens == 64 else 1.0))
    assert found.verdict == verdict and [bool(check.doubt) for check in found.checks] == [False, first == 1.5]
    assert verdict != OPEN or "disturbed: the dense layer took 1510 ms for 64 tokens and" in found.sentence


def test_the_flops_of_a_real_mixture():
    subject = expert_cost.Subject(64)
    dense, mixed = subject.flops
    assert dense == 2 * 64 * 3 * 512 * 8192 and 0.25 < mixed / dense < 0.251 and subject.touched == 8


def test_what_layers_save(monkeypatch):
    monkeypatch.setattr(savings.heads_bench.cold, "size", lambda: 1 << 20)  # two layers, in a cache
    parts = [*savings.grouped_heads(), *savings.low_rank()]
    for part in parts:
        assert part.left / part.whole == part.formula
    found = savings.measure(lambda: (replace(part, small=None, large=None) for part in parts))
    assert found.verdict == HOLDS


def saving() -> savings.Saving:
    """A layer that saves less than the formula says."""
    return savings.Saving(what="GQA", setting="8/2", formula=0.25, left=26, whole=100, unit="bytes",
                          small=lambda: None, large=lambda: None)


def test_a_layer_that_saves_less_is_found_out():
    found = savings.measure(lambda: iter([saving()]), runs=3)
    assert found.verdict == FAILS and "0.26" in found.sentence and len(found.charts) == 1


def ways(written: float, ours: float, base: float = 1.0) -> dict[str, list[float]]:
    """Seconds of the four ways, as shares of standard attention's."""
    return {name: [(1 + 0.01 * turn) * each * base for turn in range(7)] for name, each in (
        ("standard", 1.0), ("top-k as written", written), ("top-k kernel", ours), ("torch sdpa, all keys", 0.7))}


@pytest.mark.parametrize(("written", "ours", "verdict"), [(3.0, 0.5, HOLDS), (0.5, 0.4, FAILS), (3.0, 2.0, FAILS)])
def test_top_k_is_timed(written, ours, verdict):
    found = topk_timing.measure((256, 512), lambda _: ways(written, ours))
    assert found.verdict == verdict
    assert found.rows[0]["fastest"] == min((("top-k kernel", ours), ("top-k as written", written),
                                            ("torch sdpa, all keys", 0.7)), key=lambda pair: pair[1])[0]


@pytest.mark.parametrize(("standard", "verdict"), [
    ((64, 143, 68), OPEN), ((64, 68, 143), HOLDS), ((64, 62, 143), HOLDS)], ids=str)
@pytest.mark.parametrize("written", [3.0, 0.5])  # on a disturbed machine a speed-up says as little as a slow-down
def test_top_k_on_a_disturbed_machine_is_not_judged(standard, verdict, written):
    base = dict(zip((128, 256, 512), standard, strict=True))
    found = topk_timing.measure(tuple(base), lambda length: ways(written, 0.5, base[length] / 1000))
    assert found.verdict == (FAILS if verdict == HOLDS and written < 1 else verdict)
    assert verdict != OPEN or found.sentence.endswith(
        "not judged, the machine was disturbed: standard attention took 147.3 ms for 256 tokens and 70.04 ms for 512; "
        "0 of 2 checks hold.")


def test_our_top_k_is_the_lectures():
    assert all(len(spent) == 1 for spent in topk_timing.time_all(128, runs=1).values())


def words() -> list[dict]:
    """Words whose circuit is another one in another context."""
    return [{"word": str(n), "contexts": "", "same words": 5, "differences there": 0,
             **{f"{kind}{room}": value + 0.01 * n for room in ROOMS for kind, value in (("", 0.8), ("control ", 0.9))}}
            for n in range(4)]


def test_contexts_of_a_model_that_sees_them():
    rows = words()
    assert contexts.judge(rows).verdict == HOLDS
    leaks = contexts.judge([rows[0] | {"differences there": 3}, *rows[1:]])
    assert leaks.verdict == FAILS and "before the difference" in leaks.sentence
    swapped = [row | {room: row[f"control {room}"] for room in ROOMS}
               | {f"control {room}": row[room] for room in ROOMS} for row in rows]
    assert contexts.judge(swapped).verdict == FAILS
    blind = [row | {name: 1.0 for name in row if name.endswith(ROOMS)} for row in rows]
    assert contexts.judge(blind).verdict == FAILS


def test_contexts_are_read_from_runs_of_a_model():
    def runs(first, second):
        prompts = [[sum(map(ord, word)) % 90 for word in text.split()] for text in (first, second)]
        return capture(tiny_model("llama"), prompts, str).runs

    found = contexts.measure((("In the {} I saw a bat", "cave", "field", "cavern"),) * 2, runs)
    assert [row["same words"] for row in found.rows] == [6, 6] and found.rows[0]["differences there"] == 0
    assert found.rows[0]["connections"] < 1


def likeness(weights: float, after: float) -> expert_subspaces.Values:
    """Experts of a likeness that goes to `after` in training, beside nulls of 0.3."""
    values = {}
    for place in expert_subspaces.PLACES:
        for steps, mean in ((0, 0.3), (10, after)):
            mean = mean if place == "answers" or steps == 0 else weights
            values[place, steps, "observed"] = [mean + 0.001 * n for n in range(6)]
            values |= {(place, steps, null): [0.3 + 0.001 * n for n in range(6)] for null in ("random", "dealt")}
    return values


def test_experts_with_subspaces_of_their_own():
    assert expert_subspaces.judge(likeness(0.01, 0.1)).verdict == HOLDS
    overlapping = expert_subspaces.judge(likeness(0.2, 0.1))
    assert overlapping.verdict == FAILS and "overlap of experts' weights" in overlapping.sentence
    together = expert_subspaces.judge(likeness(0.01, 0.5))
    assert together.verdict == FAILS and "likeness of experts' answers" in together.sentence
    assert any("by their answers, experts grow together" in note.lower() for note in together.notes)


def losses(gap: float) -> dict:
    return {"experts": lambda seed: {"its own": [2.0 + 0.1 * n + 0.01 * seed for n in range(5)],
                                     "all bytes": [1.0] * 5, "worse": [9.0] * 5,
                                     "fixed": [2.0 + 0.1 * n + gap for n in range(5)]}}


@pytest.mark.parametrize(("gap", "verdict"), [(0.1, HOLDS), (-0.1, FAILS), (0.01, OPEN)])
def test_dynamic_against_static(gap, verdict):
    found = dynamic_vs_static.measure((0, 1, 2), losses(gap))
    assert found.verdict == verdict and "(fixed)" in found.sentence


def test_fixed_choices_are_found_and_undone():
    trained = mixture(0, steps=4)
    windows = trained.windows.held_out()[:4]
    before = window_losses(trained.model, windows)
    pairs = fixed_choices.best_pairs(trained.model, windows)
    assert [len(rule.ids) for rule in pairs] == [2, 2]
    fixed = fixed_choices.with_rules(trained.model, Experts, pairs, windows)
    assert not torch.equal(fixed, before) and torch.equal(window_losses(trained.model, windows), before)
    heads = fixed_choices.attention(trained.model, windows)
    assert all(torch.allclose(back.sum(-1), torch.ones(4), atol=1e-4) for back, _ in heads)
    places = fixed_choices.best_places(heads, 8)
    assert all(bool(rule.back[:, 0].all()) and (rule.back.sum(1) + rule.first.sum(1) == 8).all() for rule in places)


def test_training_is_remembered_by_stages():
    trained = mixture(0, steps=4)
    assert list(trained.stages) == [0, 1, 4] and mixture(0, steps=4) is trained
    first, last = (neurons(trained.at(steps))[0] for steps in (0, 4))
    assert first.shape == (8, 48, 288) and not torch.equal(first, last)
    assert torch.equal(last, neurons(trained.model)[0])
    routing = routings(trained.model, trained.windows.held_out()[:2])[0]
    best = (routing.points @ routing.rows.T).topk(2).indices
    assert bool(same_sets(best, routing.ids).all())
    x, layer_of = routing.points[:5], trained.model.blocks[0].block.feed_forward
    alone = route(x, torch.full((5, 1), 3), torch.ones(5, 1), layer_of.experts.stack(layer_of.up, layer_of.down))
    torch.testing.assert_close(expert_subspaces.answers(last, x)[3], alone.detach())


# Every claim, small.
SMALL = {
    "orthogonality": lambda: orthogonality.measure(dimensions=(64,), batches=2),
    "snr": lambda: snr.measure(dense=(32, 256), batches=2),
    "attention-mass": lambda: attention_mass.measure((64, 256), 3, attention(True)),
    "one-structure": one_structure.measure,
    "routing-neighbours": lambda: routing_neighbours.measure(lambda: [layer()]),
    "expert-cost": lambda: expert_cost.measure((1, 64), lambda _: Timed(0.23, 0.25)),
    "expert-subspaces": lambda: expert_subspaces.judge(likeness(0.01, 0.1)),
    "savings": lambda: savings.measure(lambda: iter([saving()]), runs=3),
    "topk-timing": lambda: topk_timing.measure((256, 512), lambda _: ways(3.0, 0.5)),
    "contexts": lambda: contexts.judge(words()),
    "dynamic-vs-static": lambda: dynamic_vs_static.measure((0, 1, 2), losses(0.1)),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_is_drawn(name):
    charts = SMALL[name]().charts
    assert len(charts) > 0
    for chart in charts:
        marks = list(ElementTree.fromstring(draw(chart)).iter())
        assert any(mark.tag == "circle" for mark in marks), chart.title
