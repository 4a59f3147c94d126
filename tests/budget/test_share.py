"""What each room has part in, told of a plan."""

import pytest
from tiny import tiny_model

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.axes.weights import Config as Weights
from sentei.budget.proof import Proof
from sentei.budget.share import kept_of, rooms_of
from sentei.budget.solver import Candidate
from sentei.conversion.plan import Entry, Plan, convert
from sentei.core.rules import Fixed, Threshold, TopK
from sentei.measurement.latency import Comparison

CHOOSING = Entry(layer=1, room="connections", config=Connections(rule=Threshold(0.1)))
THIN = Entry(layer=1, room="weights", config=Weights(rule=TopK(64), saliency="magnitude"))
GONE = Entry(layer=2, room="depth", config=Depth(rule=Fixed(()), part="attention"))


def proof_of(entries: tuple, saved: dict) -> Proof:
    candidate = Candidate(name="", plan=Plan(entries), seconds=1.0, density=1.0, saved=saved)
    return Proof(candidate=candidate, judgement=None, strict=None, looked=(), reason="",
                 comparison=Comparison(dense=[10.0], pruned=[6.0], date=""))


def test_connections_have_what_the_others_leave():
    """Of 10 s dense 6 s are left; keeping all takes 9.5."""
    found = rooms_of(proof_of((CHOOSING, THIN, GONE), {"weights": 1.0, "depth": 2.0}), 0.95)
    assert {room: (told["layers"], told["seconds"]) for room, told in found.items()} == {
        "connections": (1, pytest.approx(0.5)), "depth": (1, 2.0), "native": (2, pytest.approx(0.5)),
        "weights": (1, 1.0)}
    assert sum(told["share"] for told in found.values()) == pytest.approx(1)


@pytest.mark.parametrize("kept", [Connections(), Connections(decode=Threshold(0.0))], ids=["prompts", "decoding"])
def test_where_connections_drop_nothing_the_others_have_all(kept):
    every = Entry(layer=3, room="connections", config=kept)
    found = rooms_of(proof_of((every, THIN, GONE), {"weights": 1.0, "depth": 2.0}), 0.9)
    assert {room: (told["layers"], told["share"]) for room, told in found.items()} == {
        "depth": (1, pytest.approx(0.5)), "native": (3, pytest.approx(0.25)), "weights": (1, pytest.approx(0.25))}
    assert rooms_of(proof_of((every,), {}), 0.9)["native"] == {"layers": 1, "seconds": pytest.approx(4), "share": 1}
    assert rooms_of(proof_of((), {}), 0.9) == {}


def test_what_is_left_of_a_part_is_told_by_its_weights():
    model = convert(tiny_model("llama"), Plan((THIN, GONE)))
    assert kept_of(model, THIN) == pytest.approx(64 / 96) and kept_of(model, GONE) == 0
