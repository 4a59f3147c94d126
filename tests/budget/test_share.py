"""What each room has part in, told of a plan."""

from dataclasses import replace

import pytest
from tiny import tiny_model

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.axes.experts import Config as Experts
from sentei.axes.experts.gates import Renormalised
from sentei.axes.weights import Config as Weights
from sentei.budget.judge import Judgement
from sentei.budget.proof import Proof
from sentei.budget.share import Foreseen, kept_of, rooms_of
from sentei.budget.solver import Candidate
from sentei.conversion.plan import Entry, Plan, convert
from sentei.core.rules import Fixed, Threshold, TopK
from sentei.measurement.latency import Comparison
from sentei.measurement.quality import Quality

CHOOSING = Entry(layer=1, room="connections", config=Connections(rule=Threshold(0.1)))
THIN = Entry(layer=1, room="weights", config=Weights(rule=TopK(64), saliency="magnitude"))
GONE = Entry(layer=2, room="depth", config=Depth(rule=Fixed(()), part="attention"))
JUDGED = Judgement(quality=Quality(value=1.0, low=1.0, high=1.0, dense=1.0, pruned=1.0, tokens=1), density={})


def proof_of(entries: tuple, saved: dict) -> Proof:
    candidate = Candidate(name="", plan=Plan(entries), seconds=1.0, density=1.0, saved=saved)
    return Proof(candidate=candidate, judgement=None, strict=None, looked=(), reason="",
                 comparison=Comparison(dense=[10.0], pruned=[6.0], date=""))


def told(entries: tuple, saved: dict, whole: float, plan: float, dense: float = 10.0) -> dict:
    """Layers and seconds by room, of 10 s dense and 6 with the plan, as measured; foreseen was what is given."""
    found = rooms_of(proof_of(entries, saved), Foreseen(dense=dense, whole=whole, plan=plan))
    assert not found or sum(each["share"] for each in found.values()) == pytest.approx(1)
    assert all(each["share"] == pytest.approx(each["seconds"] / 4.0) for each in found.values())
    return {room: (each["layers"], pytest.approx(each["seconds"])) for room, each in found.items()}


@pytest.mark.parametrize("slower", [1.0, 0.5], ids=["the same hour", "an hour in which all took half as long"])
def test_each_room_has_what_was_foreseen_of_it_and_none_what_was_not(slower):
    """Of 10 s all kept takes 9.5 and the plan 6.2, of 3.3 the other rooms save 3; measured are 6 s."""
    saved = {"weights": slower, "depth": 2.0 * slower}
    assert told((CHOOSING, THIN, GONE), saved, 9.5 * slower, 6.2 * slower, 10.0 * slower) == {
        "connections": (1, 0.3), "depth": (1, 2.0), "native": (2, 0.5), "weights": (1, 1.0), "unforeseen": (0, 0.2)}


@pytest.mark.parametrize("kept", [Connections(), Connections(decode=Threshold(0.0))], ids=["prompts", "decoding"])
def test_where_connections_drop_nothing_they_have_no_part(kept):
    every = Entry(layer=3, room="connections", config=kept)
    assert told((every, THIN, GONE), {"weights": 1.0, "depth": 2.0}, 9.0, 6.0) == {
        "depth": (1, 2.0), "native": (3, 1.0), "weights": (1, 1.0), "unforeseen": (0, 0.0)}
    assert told((every,), {}, 5.0, 5.0) == {"native": (1, 5.0), "unforeseen": (0, -1.0)}
    assert told((), {}, 9.0, 10.0) == {}


@pytest.mark.parametrize("config, share", [(Experts(rule=TopK(24), unit=1), 24 / 96),
                                           (Experts(rule=TopK(2), unit=16, shared=1), 48 / 96)])
def test_of_experts_it_is_told_what_a_token_computes(config, share):
    entry = Entry(layer=0, room="experts", config=config)
    assert kept_of(tiny_model("llama"), entry, JUDGED) == pytest.approx(share)


def test_of_connections_and_of_a_mixtures_own_experts_it_is_told_what_was_judged():
    judged = replace(JUDGED, density={1: [0.2, 0.4]}, experts={1: 0.7})
    skipping = Experts(rule=Threshold(0.5), gate=Renormalised(), unit=40)
    for room, config, share in (("connections", CHOOSING.config, 0.3), ("experts", skipping, 0.7)):
        entry = Entry(layer=1, room=room, config=config)
        assert kept_of(tiny_model("qwen3_moe"), entry, judged) == pytest.approx(share)


def test_what_is_left_of_a_part_is_told_by_its_weights():
    model = convert(tiny_model("llama"), Plan((THIN, GONE)))
    assert kept_of(model, THIN, JUDGED) == pytest.approx(64 / 96) and kept_of(model, GONE, JUDGED) == 0
