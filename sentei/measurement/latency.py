"""Seconds, dense against pruned, in one interleaved run."""

import statistics
import time
from dataclasses import dataclass

from sentei.core.machine import processor
from sentei.core.turns import Action, in_turn
from sentei.measurement.outcome import today

LEAST = 1.0  # seconds that a bench times a pair of calls for, however short they are


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two ways of doing the same work, timed in turn.

    Args:
        dense, pruned: seconds of every run, in order.
        date: of the runs.
    """

    dense: list[float]
    pruned: list[float]
    date: str

    def per_call(self, dense: int, pruned: int) -> "Comparison":
        """The same a call, of runs that made so many."""
        return Comparison(dense=[spent / dense for spent in self.dense],
                          pruned=[spent / pruned for spent in self.pruned], date=self.date)

    def seconds(self) -> tuple[float, float]:
        """The two medians."""
        return statistics.median(self.dense), statistics.median(self.pruned)

    def speedup(self) -> float:
        """The median of the pair-by-pair ratios dense ÷ pruned."""
        return statistics.median(self.ratios())

    def ratios(self) -> list[float]:
        """Dense ÷ pruned, pair by pair: neighbours in time, so a machine that drifts cancels."""
        return [dense / pruned for dense, pruned in zip(self.dense, self.pruned, strict=True)]


def interleave(dense: Action, pruned: Action, **asked) -> Comparison:
    """Times both in turn, asked as `sentei.core.turns.in_turn` is: runs, and least, before and step."""
    dense_s, pruned_s = in_turn(dense, pruned, **asked)
    return Comparison(dense=dense_s, pruned=pruned_s, date=today())


def measured(bench: str, case: str, peer: str, comparison: Comparison, *, operations: float | None = None) -> dict:
    """A bench's row: the peer stands where `Comparison` has the dense side, and ours where it has the pruned one.

    Args:
        operations: floating-point operations of our call, for GFLOP/s.
    Returns:
        bench, case, peer, ours_s, peer_s (medians), ratio (the median of the pairs' peer ÷ ours), low, high, machine;
        with `operations` also gflops.
    """
    peer_s, ours_s = comparison.seconds()
    ratios = comparison.ratios()
    return {"bench": bench, "case": case, "peer": peer, "ours_s": ours_s, "peer_s": peer_s,
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "machine": processor(),
            **({} if operations is None else {"gflops": operations / ours_s / 1e9})}


def turns(named: dict[str, Action], *, runs: int) -> dict[str, list[float]]:
    """Seconds of several ways of doing the same work, by name, timed in turn after one untimed run of each.

    Args:
        named: does the work once, by name.
        runs: timed runs of each, at least 1; every other turn goes backwards, so that neither always comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for number in range(runs + 1):
        for name in named if number % 2 else reversed(named):
            start = time.perf_counter()
            named[name]()
            seconds[name] += [time.perf_counter() - start] if number else []
    return seconds
