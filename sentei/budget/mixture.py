"""From offers of every room to plans: at each price of a second, the best choice for every part of every layer.

With a price λ, in nats a second, each attention and each network takes the option with the least nats − λ · seconds
saved (the Lagrangian of a knapsack with one choice a part); sweeping λ gives plans from dense to leanest. Connections
take part with their errors times a rate, nats an error, read off plans of theirs that were judged on the real model.
Neither costs nor savings quite add up, so whole plans are judged and timed on the real model, as those of one room are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sentei.axes.connections import Config
from sentei.budget.even import PARTS, evenly
from sentei.budget.goal import Goal
from sentei.budget.judge import Judgement, takes_attention
from sentei.budget.offers import Offer
from sentei.budget.slack import LayerSlack
from sentei.budget.solver import Candidate, Choice, Solution, Timed, choice_at, dense_of, fit, search
from sentei.budget.workload import Workload
from sentei.conversion.plan import Entry, Plan

PRICES = 40
# Prices from and to, as shares of the nats that may be lost ÷ the seconds of the dense workload.
RANGE = 0.02, 200.0
# Plans foreseen to cost more than so many times what may be lost are not judged.
HOPELESS = 3.0
# A single room's plans are tried where they are foreseen to be so many times as fast as the best: no forecast is exact.
NEAR = 0.95
# What a plan for a speed is foreseen to lose, about, where no bound says it.
SPEED_NATS = 0.1

Ladders = list[list[Candidate]]
Seen = Callable[[Candidate], Judgement]
Speed = Callable[[Candidate], float]


@dataclass(frozen=True, kw_only=True)
class Market:
    """Everything a plan can be made of.

    Args:
        slack: the connections' options by layer.
        offers: the other rooms' options.
        config: of the connections, without the rule.
        workload: what is to become faster.
        rate: nats an error of connections.
        dense: seconds of the dense workload.
        plain: whether a plan's shapes must fit an ordinary checkpoint, see `even`.
    """

    slack: list[LayerSlack]
    offers: list[Offer]
    config: Config
    workload: Workload
    rate: float
    dense: float
    plain: bool = False

    def plans(self, nats: float, rooms: set[str], hopeless: float = HOPELESS) -> list[Candidate]:
        """The plans of these rooms for growing prices, dense first and leanest last, without repetitions.

        Args:
            nats: what may be lost, about.
            rooms: which may take part. Connections that keep all always do: all is then run natively.
            hopeless: plans that are foreseen to lose so many times as much are left out.
        """
        low, high = (share * nats / self.dense for share in RANGE)
        found = [dense_of(fit(self.slack))]
        for number in range(PRICES):
            candidate, cost = self._at(low * (high / low) ** (number / (PRICES - 1)), rooms)
            if candidate.plan != found[-1].plan and cost <= hopeless * nats:
                found.append(candidate)
        return found

    def _at(self, price: float, rooms: set[str]) -> tuple[Candidate, float]:
        """The plan at one price, and the nats it is foreseen to cost."""
        timed = {layer.slack.layer: layer for layer in fit(self.slack)}
        entries, saved, seconds, densities, nats = [], {}, 0.0, [], 0.0
        layers = sorted({offer.entry.layer for offer in self.offers} | set(timed))
        choices = {number: self._connections(timed.get(number), price, rooms) for number in layers}

        def worth(offer: Offer) -> float:
            return self._worth(offer, price, choices[offer.entry.layer], timed.get(offer.entry.layer))

        chosen = self._chosen(rooms, layers, worth)
        for number, choice in choices.items():
            taken = chosen.get(number, [])
            gone = any(takes_attention(offer.entry) for offer in taken)
            for offer in taken:
                saved[offer.entry.room] = saved.get(offer.entry.room, 0.0) + offer.seconds
                nats += offer.nats
            if choice is not None:
                seconds += timed[number].whole_seconds if gone else choice.seconds
                densities.append(0.0 if gone else choice.density)
                nats += 0.0 if gone else self.rate * choice.error
                entries += [] if gone else [choice.entry]
            entries += _merged([offer.entry for offer in taken])
        plan = Plan(tuple(entries))
        return Candidate(name=f"{' and '.join(sorted(rooms))}, price {price:.3g}", plan=plan, saved=saved,
                         seconds=seconds - sum(saved.values()) / self.workload.timed_runs,
                         density=sum(densities) / max(len(densities), 1)), nats

    def _connections(self, layer: Timed | None, price: float, rooms: set[str]) -> Choice | None:
        """The layer's choice; at price 0, where connections do not take part, all is kept."""
        if layer is None:
            return None
        taking = price if "connections" in rooms else 0.0
        return choice_at(layer, self.config, self.workload,
                         max(taking * self.workload.timed_runs / max(self.rate, 1e-12), 1e-12))

    def _worth(self, offer: Offer, price: float, choice: Choice | None, timed: Timed | None) -> float:
        """Nats that an offer is worth at a price; what connections would save of attention it leaves out is lost."""
        spared = 0.0
        if choice is not None and takes_attention(offer.entry):
            saved = timed.whole_seconds - choice.seconds
            spared = self.rate * choice.error - price * self.workload.timed_runs * saved
        return price * offer.seconds - offer.nats + spared

    def _chosen(self, rooms: set[str], layers: list[int], worth: Callable[[Offer], float]) -> dict[int, list[Offer]]:
        """The offers that are worth more than none: the best for each part by itself, or those of layers alike."""
        offers = [offer for offer in self.offers if offer.pays and offer.entry.room in rooms]
        if self.plain:
            return evenly(offers, layers, worth)
        best: dict[tuple[int, str], Offer] = {}
        for offer in offers:
            place = offer.entry.layer, offer.part
            if worth(offer) > (worth(best[place]) if place in best else 0.0):
                best[place] = offer
        return {layer: [best[layer, part] for part in PARTS if (layer, part) in best] for layer in layers}


def _merged(entries: list[Entry]) -> list[Entry]:
    """A layer that loses both parts has one entry for the whole block."""
    if len(entries) == 2 and all(entry.room == "depth" for entry in entries):
        first = entries[0]
        return [Entry(layer=first.layer, room="depth", config=type(first.config)(rule=first.config.rule))]
    return entries


def rate_of(judged: list[tuple[Candidate, Judgement]], slack: list[LayerSlack]) -> float:
    """Nats an error of connections: least squares of −ln quality over the error foreseen, through no error no loss.

    The errors of a plan are looked up in the options its rules came from; a plan of other rules tells nothing.
    """
    points = []
    options = {layer.layer: layer.options for layer in slack}
    for candidate, judgement in judged:
        error = sum(_error(options[entry.layer], entry) for entry in candidate.plan.entries)
        if 0 < error < math.inf:
            points.append((error, max(0.0, judgement.quality.nats)))
    total = sum(error * error for error, _ in points)
    return max(sum(error * nats for error, nats in points) / total, 1e-6) if total else 1.0


def _error(options: list, entry: Entry) -> float:
    """What the entry's rule was measured to change, all heads together; infinity where it was not."""
    rule = entry.config.decode if hasattr(entry.config.decode, "ratio") else entry.config.rule
    heads = range(len(options[0].error))
    ratio = getattr(rule, "ratio", 0.0)  # All has none
    ratios = ratio if isinstance(ratio, tuple) else (ratio,) * len(heads)
    by_ratio = {getattr(option.rule, "ratio", 0.0): option for option in options}
    return sum(by_ratio[ratio].error[head] if ratio in by_ratio else math.inf
               for head, ratio in zip(heads, ratios, strict=True))


def solve_all(goal: Goal, market: Market, alone: Solution, judge: Seen, forecast: Speed) -> Solution:
    """The plans to try over all rooms and of every single one, beside those of connections, which `solve` has found.

    The best plan of all rooms is sought on the real model, and so is that of each single room where it may come out as
    fast (NEAR); of a room where it cannot, the plan that is foreseen to keep the bound is judged once, for the report.

    Returns:
        a Solution whose ladder is the best one as foreseen, with those of single rooms as `rivals`, and all that was
        judged. Where nothing of another room is worth its time, that of connections.
    """
    rooms = sorted({offer.entry.room for offer in market.offers if offer.pays})
    if not rooms:
        return alone
    judged = list(alone.judged)

    def seen(candidate: Candidate) -> Judgement:
        judged.append((candidate, judge(candidate)))
        return judged[-1][1]

    chosen = _for_speed if goal.speed is not None else _for_quality
    ladder, *rivals = chosen(goal, market, rooms, alone, seen, forecast)
    return Solution(ladder=ladder, judged=judged, rivals=rivals)


def _for_quality(goal: Goal, market: Market, rooms: list[str], alone: Solution, seen: Seen, forecast: Speed
                 ) -> Ladders:
    """The ladder whose first plan is foreseen to be the fastest, then those of single rooms that come near it."""
    def good(candidate: Candidate) -> bool:
        return goal.is_good(seen(candidate))

    nats = max(-math.log(goal.quality), 1e-4)
    plans, found = market.plans(nats, {"connections", *rooms}), [alone.ladder]
    together = plans[:search(plans, good) + 1][::-1]
    if together[0].saved and forecast(together[0]) > forecast(alone.ladder[0]):
        found.insert(0, together)
    for room in rooms:
        single = [plan for plan in market.plans(nats, {room}) if plan.saved]
        near = [plan for plan in single if forecast(plan) >= NEAR * forecast(found[0][0])]
        last = search([alone.ladder[-1], *near], good)
        if last:
            found.append(near[:last][::-1])
        elif not near:
            for plan in [plan for plan in market.plans(nats / HOPELESS, {room}) if plan.saved][-1:]:
                seen(plan)
    return _distinct(sorted(found, key=lambda ladder: -forecast(ladder[0])))


def _for_speed(goal: Goal, market: Market, rooms: list[str], alone: Solution, seen: Seen, forecast: Speed
               ) -> Ladders:
    """Of the ladders that are foreseen to reach the speed the best one, then the best of a single room.

    Where none reaches it, the one that comes nearest.
    """
    told = {id(candidate): judgement for candidate, judgement in alone.judged}
    every = {"connections", *rooms}
    families = [(every, market.plans(SPEED_NATS, every, math.inf)), ({"connections"}, alone.ladder),
                *(({room}, market.plans(SPEED_NATS, {room}, math.inf)) for room in rooms)]
    reaching = [(taking, [plan for plan in plans if forecast(plan) >= goal.speed]) for taking, plans in families]
    reaching = [(taking, ladder) for taking, ladder in reaching if ladder]
    if not reaching:
        reaching = [(every, [max((plan for _, plans in families for plan in plans), key=forecast)])]
    values = [(told.get(id(ladder[0])) or seen(ladder[0])).quality.value for _, ladder in reaching]
    ranked = [reaching[place] for place in sorted(range(len(values)), key=lambda place: -values[place])]
    singles = [ladder for taking, ladder in ranked if len(taking) == 1]
    return _distinct([ranked[0][1], *singles[:1]])


def _distinct(ladders: Ladders) -> Ladders:
    """Without those that begin with the plan of an earlier one."""
    return [ladder for place, ladder in enumerate(ladders)
            if all(ladder[0].plan != other[0].plan for other in ladders[:place])]
