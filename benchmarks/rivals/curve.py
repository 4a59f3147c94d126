"""What a rival costs at a speed: its measured points, those no faster one of which is as good, and between them a line.

Between two points of one rival the nats it loses are taken to be linear in the time it takes; the dense model, with
no nats lost at speed 1, is one of everybody's points. Nothing is guessed beyond the fastest point.
"""

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Point:
    """A speed, times dense, and the ratio of perplexities there, with its 95 % interval."""

    speed: float
    ratio: float
    low: float
    high: float


DENSE = Point(speed=1.0, ratio=1.0, low=1.0, high=1.0)


def front(points: list[Point]) -> list[Point]:
    """The dense model and the points for which none that is as fast is better; slowest first."""
    left: list[Point] = []
    for point in sorted(points, key=lambda point: -point.speed):
        if point.speed > 1 and (not left or point.ratio < left[-1].ratio):
            left.append(point)
    return [DENSE, *reversed([point for point in left if point.ratio > 1])]


def at(points: list[Point], speed: float) -> Point | None:
    """What a rival is at a speed; None where none of its points is as fast."""
    for slow, fast in pairwise(front(points)):
        if slow.speed <= speed <= fast.speed:
            share = (1 / slow.speed - 1 / speed) / (1 / slow.speed - 1 / fast.speed)
            ratio, low, high = (math.exp((1 - share) * math.log(one) + share * math.log(other)) for one, other in (
                (slow.ratio, fast.ratio), (slow.low, fast.low), (slow.high, fast.high)))
            return Point(speed=speed, ratio=ratio, low=low, high=high)
    return None
