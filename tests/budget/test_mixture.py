"""Plans over all rooms: what is cheap goes first, and no plan is worse than that of one room."""

import math

import pytest

from sentei.axes.connections import Config
from sentei.axes.depth import Config as Depth
from sentei.axes.weights import Config as Weights
from sentei.budget.goal import Goal
from sentei.budget.judge import Judgement
from sentei.budget.mixture import Market, rate_of, solve_all
from sentei.budget.offers import Offer
from sentei.budget.slack import LayerSlack, Option
from sentei.budget.solver import Candidate, Forecast, family, solve
from sentei.budget.workload import Prefill
from sentei.conversion.plan import Entry, Plan
from sentei.core.rules import All, Fixed, Threshold, TopK
from sentei.measurement.quality import Quality

PREFILL = Prefill(64)
# Of 10 s the attention of two layers is 2 s.
FORECAST = Forecast(dense=10.0, others=8.0, runs=1)
SLACK = [LayerSlack(layer=number, options=[
    Option(rule=All(), density=[1.0, 1.0], error=[0.0, 0.0], seconds=1.0),
    Option(rule=Threshold(0.01), density=[0.6, 0.6], error=[few, few], seconds=0.7),
    Option(rule=Threshold(0.1), density=[0.3, 0.3], error=[many, many], seconds=0.4),
]) for number, (few, many) in enumerate([(1e-6, 1e-5), (1e-3, 1e-1)])]


def judgement(value: float) -> Judgement:
    return Judgement(quality=Quality(value=value, low=value, high=value, dense=1.0, pruned=1.0, tokens=1), density={})


def good_from(least: float):
    """A judge to whom a candidate is good (quality 1, else 0.5) from a density on."""
    def judge(candidate: Candidate) -> Judgement:
        return judgement(1.0 if candidate.density >= least else 0.5)

    return judge


def drop(layer: int, part: str, nats: float, seconds: float) -> Offer:
    return Offer(entry=Entry(layer=layer, room="depth", config=Depth(rule=Fixed(()), part=part)), part=part, nats=nats,
                 seconds=seconds)


def thin(layer: int, kept: int, nats: float, seconds: float) -> Offer:
    return Offer(entry=Entry(layer=layer, room="weights", config=Weights(rule=TopK(kept), saliency="obs")),
                 part="network", nats=nats if seconds > 0 else None, seconds=seconds)


OFFERS = [thin(0, 64, 0.001, 0.5), thin(0, 32, 0.01, 1.0), thin(1, 64, 0.1, 0.5), drop(0, "network", 0.5, 2.0),
          drop(1, "attention", 0.002, 1.0), drop(0, "attention", 5.0, 1.0), thin(1, 32, 1e-9, -0.5)]
EVERY = {"connections", "weights", "depth"}


def market(offers: list[Offer], rate: float = 1.0) -> Market:
    return Market(slack=SLACK, offers=offers, config=Config(), workload=PREFILL, rate=rate, dense=10.0)


def rooms_of(plan: Plan) -> set:
    """Layer, room and part of what is pruned."""
    return {(entry.layer, entry.room, getattr(entry.config, "part", None)) for entry in plan.entries
            if entry.config.rule != All()}


def test_plans_go_from_dense_to_leaner_and_the_cheapest_offer_comes_first():
    plans = market(OFFERS).plans(0.1, EVERY)
    seconds = [plan.seconds for plan in plans]
    assert not plans[0].plan.entries and seconds == sorted(seconds, reverse=True) and len(plans) > 4
    first = next(plan for plan in plans if plan.saved)
    assert rooms_of(first.plan) & {(0, "weights", None), (1, "depth", "attention")}


def test_an_option_that_saves_no_time_is_in_no_plan():
    for plan in market(OFFERS).plans(1.0, EVERY):
        assert not any(entry.room == "weights" and entry.layer == 1 and entry.config.rule == TopK(32)
                       for entry in plan.plan.entries)


def test_a_part_has_one_option_and_attention_that_is_gone_has_no_connections():
    for plan in market(OFFERS).plans(1.0, EVERY)[1:]:
        entries = plan.plan.entries
        assert len({(entry.layer, entry.room) for entry in entries}) == len(entries)
        gone = {layer for layer, room, part in rooms_of(plan.plan) if room == "depth" and part != "network"}
        assert gone ^ {0, 1} == {entry.layer for entry in entries if entry.room == "connections"}
        thinned = {entry.layer for entry in entries if entry.room == "weights"}
        whole = {layer for layer, room, part in rooms_of(plan.plan) if room == "depth" and part != "attention"}
        assert not thinned & whole


def test_a_layer_that_loses_both_parts_has_one_entry_for_the_block():
    offers = [drop(1, "attention", 1e-6, 1.0), drop(1, "network", 1e-6, 1.0)]
    assert rooms_of(market(offers).plans(0.1, EVERY)[-1].plan) >= {(1, "depth", "block")}


def test_rooms_that_do_not_take_part_are_in_no_plan():
    for plan in market(OFFERS).plans(0.1, {"weights"}):
        assert {room for _, room, _ in rooms_of(plan.plan)} <= {"weights"}


def test_what_is_saved_is_taken_off_the_seconds():
    plan = market([thin(0, 64, 1e-6, 0.25)], rate=1e6).plans(0.1, {"weights"})[-1]
    assert plan.saved == {"weights": 0.25} and plan.seconds == pytest.approx(2.0 - 0.25)
    assert FORECAST(plan) == pytest.approx(10 / 9.75)


def test_the_rate_is_read_off_plans_that_were_judged():
    plans = family(SLACK, Config(), PREFILL)[1:]
    errors = [sum(next(option.error[head] for option in layer.options if getattr(option.rule, "ratio", 0.0) == ratio)
                  for layer, entry in ((SLACK[entry.layer], entry) for entry in plan.plan.entries)
                  for head, ratio in enumerate(getattr(entry.config.rule, "ratio", (0.0, 0.0)))) for plan in plans]
    judged = [(plan, judgement(math.exp(-3.0 * error))) for plan, error in zip(plans, errors, strict=True)]
    assert rate_of(judged, SLACK) == pytest.approx(3.0)


@pytest.mark.parametrize("offers, taken", [(OFFERS, True), ([drop(0, "attention", 5.0, 1.0)], False),
                                           ([thin(0, 64, 1e-6, -1.0)], False)], ids=["cheap", "too dear", "no gain"])
def test_the_plan_of_all_rooms_is_tried_only_where_it_is_foreseen_to_be_faster(offers, taken):
    judge = good_from(0.0)
    alone = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(Goal(quality=0.9), market(offers), alone, judge, FORECAST)
    assert bool(found.ladder[0].saved) == taken
    assert found.ladder == alone.ladder or alone.ladder in found.rivals
    assert FORECAST(found.ladder[0]) >= FORECAST(alone.ladder[0])
    assert found.judged[:len(alone.judged)] == alone.judged


def test_plans_that_are_bad_on_the_real_model_are_not_chosen():
    def judge(candidate) -> Judgement:
        return good_from(2.0 if candidate.saved else 0.5)(candidate)

    alone = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(Goal(quality=0.9), market(OFFERS), alone, judge, FORECAST)
    assert found.ladder == alone.ladder and not found.rivals


def test_plans_that_are_foreseen_to_cost_several_times_too_much_are_not_judged():
    """Layer 1 costs 2e-3 nats at its first step: worth its time at these prices, and within three times 1e-3 alone."""
    def pruned(nats: float) -> set:
        return {layer for plan in market([]).plans(nats, {"connections"}) for layer, *_ in rooms_of(plan.plan)}

    assert pruned(1e-3) == {0, 1} and pruned(5e-4) == {0}


def test_never_worse_than_connections_alone():
    """All rooms are good only where connections keep nearly all; alone they may drop most, and are faster so."""
    def judge(candidate) -> Judgement:
        return judgement(1.0 if candidate.density >= (0.99 if candidate.saved else 0.0) else 0.5)

    offers = [thin(0, 64, 1e-6, 0.01)]
    alone = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(Goal(quality=0.9), market(offers, rate=1e9), alone, judge, FORECAST)
    assert found.ladder == alone.ladder and not found.rivals
    assert len(found.judged) > len(alone.judged)


def single(candidate: Candidate) -> str | None:
    """The room, where it is the only one that saves anything."""
    rooms = {room for _, room, _ in rooms_of(candidate.plan)}
    return next(iter(rooms)) if len(rooms) == 1 else None


def test_the_best_plan_of_a_single_room_is_tried_where_it_may_come_out_as_fast():
    """With depth, which all rooms together begin with, nothing is good; weights alone are, and fast."""
    def judge(candidate) -> Judgement:
        return judgement(0.5 if "depth" in candidate.saved or candidate.density < 0.9 else 1.0)

    offers = [thin(0, 64, 1e-3, 1.5), thin(1, 64, 2e-3, 1.5), drop(1, "attention", 1e-9, 0.1)]
    alone = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(Goal(quality=0.9), market(offers, rate=1e9), alone, judge, FORECAST)
    assert single(found.ladder[0]) == "weights" and found.ladder[0].saved == {"weights": 3.0}
    assert alone.ladder in found.rivals
    assert all(FORECAST(other[0]) <= FORECAST(found.ladder[0]) for other in found.rivals)


def test_a_single_room_that_comes_near_is_proven_beside_all_rooms_and_others_are_judged_once():
    """Weights save 3 s and depth 0.1, of 10 s: all rooms together are little faster than weights alone."""
    offers, judge = [thin(0, 64, 1e-3, 1.5), thin(1, 64, 1e-3, 1.5), drop(0, "attention", 1e-3, 0.1)], good_from(0.0)
    alone = solve(Goal(quality=0.9), PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(Goal(quality=0.9), market(offers, rate=1e9), alone, judge, FORECAST)
    firsts = [ladder[0] for ladder in found.rivals]
    assert {"weights"} == {single(first) for first in firsts if first.saved} and alone.ladder[0] in firsts
    told = [candidate for candidate, _ in found.judged[len(alone.judged):] if single(candidate) == "depth"]
    assert len(told) == 1, "depth cannot come near, and is judged for the report"


SPEED = Goal(speed=1.3)  # connections come to 1.14 at most


@pytest.mark.parametrize("value", [0.2, 0.99], ids=["worse", "better"])
def test_a_plan_that_reaches_the_speed_is_taken_though_a_slower_one_of_connections_is_better(value):
    def judge(candidate) -> Judgement:
        return judgement(value if candidate.saved else 0.9)

    alone = solve(SPEED, PREFILL, SLACK, Config(), judge, FORECAST)
    assert FORECAST(alone.ladder[-1]) < SPEED.speed
    found = solve_all(SPEED, market(OFFERS), alone, judge, FORECAST)
    assert all(FORECAST(candidate) >= SPEED.speed for ladder in (found.ladder, *found.rivals) for candidate in ladder)


def test_of_plans_that_reach_the_speed_the_best_is_taken_and_a_single_room_stays_beside_it():
    goal = Goal(speed=1.1)

    def judge(candidate) -> Judgement:
        return judgement({"weights": 0.97, "connections": 0.96}.get(single(candidate), 0.5))

    alone = solve(goal, PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(goal, market(OFFERS), alone, judge, FORECAST)
    assert single(found.ladder[0]) == "weights" and found.rivals == []

    def together(candidate) -> Judgement:
        return judgement({"weights": 0.97, "connections": 0.98}.get(single(candidate), 0.99))

    alone = solve(goal, PREFILL, SLACK, Config(), together, FORECAST)
    found = solve_all(goal, market([thin(0, 64, 1e-3, 0.6), thin(1, 64, 1e-3, 0.3), drop(0, "network", 1e-3, 0.7)]),
                      alone, together, FORECAST)
    assert single(found.ladder[0]) is None and [single(ladder[0]) for ladder in found.rivals] == ["connections"]


def test_plans_that_cost_much_are_tried_where_only_they_reach_the_speed():
    """What costs 2 nats comes to 1.67 alone, and to 2.08 with connections."""
    goal, offers, judge = Goal(speed=1.9), [drop(0, "network", 2.0, 4.0)], good_from(0.0)
    alone = solve(goal, PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(goal, market(offers), alone, judge, FORECAST)
    assert FORECAST(found.ladder[0]) >= goal.speed and found.ladder[0].saved


def test_where_no_plan_reaches_the_speed_the_fastest_is_tried():
    goal, judge = Goal(speed=9.0), good_from(0.0)
    alone = solve(goal, PREFILL, SLACK, Config(), judge, FORECAST)
    found = solve_all(goal, market(OFFERS), alone, judge, FORECAST)
    assert len(found.ladder) == 1 and not found.rivals and FORECAST(found.ladder[0]) > FORECAST(alone.ladder[0])
