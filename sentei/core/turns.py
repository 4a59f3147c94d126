"""Seconds of two ways of doing the same work, timed in turn: neighbours in time, so a machine that drifts cancels."""

import time
from collections.abc import Callable
from itertools import count

Action = Callable[[], object]


def in_turn(
    first: Action, second: Action, *, runs: int, least: float = 0.0,
    before: tuple[Action, Action] = (lambda: None, lambda: None), step: Action = lambda: None
) -> tuple[list[float], list[float]]:
    """Times both in turn, `runs` times each or more, after one untimed run of each.

    Args:
        first, second: do the work once.
        runs: timed runs of each, at least 1; the order alternates, so that neither always goes first.
        least: seconds to have been timed in all: more runs are made of what is short, whose first few are not typical.
        before: called, untimed, before every run of the one and of the other.
        step: called after every run, timed or not (2 · runs + 2 times, or more).
    Returns:
        seconds of every timed run of the one and of the other, in order.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    spent = 0.0
    for number in count():
        if number > runs and spent >= least:
            break
        for which in (0, 1) if number % 2 else (1, 0):
            before[which]()
            start = time.perf_counter()
            (first, second)[which]()
            if number:
                seconds[which].append(time.perf_counter() - start)
                spent += seconds[which][-1]
            step()
    return seconds
