"""The benches an installed sentei can run on its user's machine, and how a row of one is read."""

import importlib
from collections.abc import Callable, Iterator

from sentei.core.errors import SenteiError

# Each bench and its module, which has CASES, a table by name, and rows(names, runs, absent).
BENCHES = {
    "attention": "sentei.measurement.attention_bench",
    "memory": "sentei.measurement.memory_bench",
}
WIDTHS = 60, 24


def rows(bench: str, cases: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """The rows of a bench, each as soon as it is measured: bench, case, peer, ours_s, peer_s, ratio, machine, and more.

    Args:
        cases: of the bench; none for all.
        runs: timed pairs a row.
        absent: told why a peer that cannot run here has no row.
    Raises:
        SenteiError: no such bench or case, or no run at all.
        AssertionError: ours and a peer's outputs differ; there is no ratio then.
    """
    if bench not in BENCHES:
        raise SenteiError("bench", expected=f"one of {', '.join(BENCHES)}", got=repr(bench), do="choose one of these")
    if runs < 1:
        raise SenteiError("--runs", expected="1 or more", got=str(runs), do="time at least one pair")
    module = importlib.import_module(BENCHES[bench])
    unknown = [case for case in cases if case not in module.CASES]
    if unknown:
        raise SenteiError(f"bench {bench}", expected=f"cases of {', '.join(module.CASES)}", got=", ".join(unknown),
                          do="choose some of these, or none for all")
    yield from module.rows(cases or list(module.CASES), runs, absent)


def head() -> str:
    """The first line of a bench's table."""
    return _columns("case", "peer", "ours ms", "peer ms", "peer / ours", "range")


def line(row: dict) -> str:
    """A row of the table, and at its end what a bench measures besides seconds."""
    more = [f"{key} {row[key]:,.0f}" for key in ("gflops", "ours_mib", "peer_mib") if key in row]
    return " ".join([_columns(row["case"], row["peer"], f"{1000 * row['ours_s']:,.1f}", f"{1000 * row['peer_s']:,.1f}",
                              f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"), *more])


def _columns(case: str, peer: str, *numbers: str) -> str:
    return f"{case:<{WIDTHS[0]}} {peer:<{WIDTHS[1]}} " + " ".join(f"{number:>14}" for number in numbers)
