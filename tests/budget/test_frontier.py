"""The points of quality against speed: what is foreseen is called so, what is measured too."""

from sentei.axes.connections import Config as Connections
from sentei.axes.depth import Config as Depth
from sentei.budget import frontier
from sentei.budget.judge import Judgement
from sentei.budget.proof import Proof
from sentei.budget.solver import Candidate
from sentei.conversion.plan import Entry, Plan
from sentei.core.rules import Fixed, Threshold
from sentei.measurement.latency import Comparison
from sentei.measurement.quality import Quality

WHOLE = Entry(layer=0, room="connections", config=Connections())
CHOOSING = Entry(layer=1, room="connections", config=Connections(rule=Threshold(0.1)))
GONE = Entry(layer=1, room="depth", config=Depth(rule=Fixed(()), part="network"))
PLANS = {"dense": Plan(), "both": Plan((WHOLE, CHOOSING, GONE)), "whole": Plan((WHOLE, GONE))}


def told(name: str, value: float) -> tuple[Candidate, Judgement]:
    quality = Quality(value=value, low=0.0, high=2.0, dense=1.0, pruned=1.0, tokens=1)
    return (Candidate(name=name, plan=PLANS[name], seconds=1.0, density=1.0),
            Judgement(quality=quality, density={1: [0.5, 0.7]}))


def proof_of(name: str, value: float, speedup: float) -> Proof:
    candidate, judgement = told(name, value)
    return Proof(candidate=candidate, judgement=judgement, strict=None, looked=(), reason="",
                 comparison=Comparison(dense=[speedup], pruned=[1.0], date=""))


def test_what_was_judged_has_a_foreseen_speed_up():
    points = frontier.foreseen([told("dense", 1.0), told("both", 0.9)], PLANS["both"], (0, 1), lambda each: 1.25)
    assert points == [
        {"name": name, "rooms": rooms, "quality": quality, "density": 0.8, "text": "choose", "speedup": 1.25,
         "speed": "foreseen", "chosen": name == "both"}
        for name, rooms, quality in (("dense", [], 1.0), ("both", ["connections", "depth"], 0.9))]


def test_what_was_proved_has_a_measured_one_and_connections_that_keep_all_are_no_room_of_a_plan():
    taken, other = proof_of("whole", 0.98, 2.0), proof_of("both", 0.9, 3.0)
    first, second = frontier.measured((taken, other), taken, (0, 1))
    assert first == {"name": "whole", "rooms": ["depth"], "quality": 0.98, "density": 0.8, "text": "verify",
                     "speedup": 2.0, "speed": "measured", "chosen": True}
    assert (second["speedup"], second["chosen"], second["rooms"]) == (3.0, False, ["connections", "depth"])
