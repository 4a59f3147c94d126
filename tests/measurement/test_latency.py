"""Two ways of doing the same work take turns, and their times are compared pair by pair."""

import pytest

from sentei.measurement.latency import Comparison, interleave
from sentei.measurement.outcome import today


def test_the_order_alternates_and_the_first_run_of_each_is_not_timed():
    calls = []
    found = interleave(lambda: calls.append("d"), lambda: calls.append("p"), runs=3)
    assert "".join(calls) == "pddppddp"
    assert len(found.dense) == len(found.pruned) == 3


def test_short_calls_are_timed_until_they_took_long_enough(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def takes_one():
        now[0] += 1

    pairs = [len(interleave(takes_one, takes_one, runs=2, least=least).dense) for least in (0.0, 4.0, 9.0)]
    assert pairs == [2, 2, 5]


def test_before_is_called_before_every_run_of_its_own_and_step_after():
    calls = []
    interleave(lambda: calls.append("d"), lambda: calls.append("p"), runs=1, step=lambda: calls.append("."),
               before=(lambda: calls.append("D"), lambda: calls.append("P")))
    assert "".join(calls) == "Pp.Dd.Dd.Pp."


def test_the_work_alone_is_timed_and_told_as_dense_and_pruned(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def takes(seconds: float):
        return lambda: now.__setitem__(0, now[0] + seconds)

    found = interleave(takes(3.0), takes(2.0), runs=2, before=(takes(10.0), takes(10.0)), step=takes(10.0))
    assert found == Comparison(dense=[3.0, 3.0], pruned=[2.0, 2.0], date=today())


def test_the_speed_up_is_the_median_of_the_pairs_not_of_the_sides():
    found = Comparison(dense=[1.0, 4.0, 3.0], pruned=[1.0, 1.0, 2.0], date="")
    assert found.ratios() == [1.0, 4.0, 1.5]
    assert found.speedup() == 1.5 and found.seconds() == (3.0, 1.0)


def test_sides_of_different_length_are_no_comparison():
    with pytest.raises(ValueError, match="zip"):
        Comparison(dense=[1.0], pruned=[1.0, 2.0], date="").ratios()
