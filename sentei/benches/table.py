"""The benches an installed sentei can run on its user's machine, and how a row of one is read."""

import importlib
import math
from collections.abc import Callable, Iterator

from sentei.core.errors import SenteiError

# Each is a module beside this one, which has CASES, a table by name, and rows(names, runs, absent).
BENCHES = ("attention", "decode", "linear", "memory", "prompt", "rooms", "topk")
# What the whole of a bench measures besides: attention of few tokens, its best keys, its linear layers and its memory.
PARTS = {"attention": ("topk", "linear", "decode", "memory")}
WIDTHS = 60, 30
# What a row may hold besides seconds, and how it is written.
MORE = {"gflops": "{:,.0f} GFLOP/s", "gb_s": "{:,.1f} GB/s", "bandwidth": "{:.2f} of read bandwidth",
        "a_call": "{:.2f} of reading one a call",
        "ours_mib": "ours {:,.1f} MiB", "peer_mib": "peer {:,.1f} MiB",
        "share": "{:.1%} of the peer's work or bytes", "over": "{:+.1%} time over that share"}


def rows(bench: str, cases: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """The rows of a bench, each as soon as it is measured: bench, case, peer, ours_s, peer_s, ratio, machine, and MORE.

    Args:
        cases: of the bench; none for all, and for those of its PARTS.
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
    module = importlib.import_module(f"sentei.benches.{bench}")
    unknown = [case for case in cases if case not in module.CASES]
    if unknown:
        raise SenteiError(f"bench {bench}", expected=f"cases of {', '.join(module.CASES)}", got=", ".join(unknown),
                          do="choose some of these, or none for all")
    yield from module.rows(cases or list(module.CASES), runs, absent)
    for part in () if cases else PARTS.get(bench, ()):
        yield from rows(part, [], runs, absent)


def head() -> str:
    """The first line of a bench's table."""
    return _columns("case", "peer", "ours ms", "peer ms", "peer / ours", "range")


def line(row: dict) -> str:
    """A row of the table, and at its end what a bench measures besides seconds."""
    return f"{_columns(*cells(row))} {more(row)}".rstrip()


def cells(row: dict) -> list[str]:
    """A row's case, peer, milliseconds of both, ratio and its range."""
    seconds = (_three_digits(1000 * row[key]) for key in ("ours_s", "peer_s"))
    return [row["case"], row["peer"], *seconds, f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"]


def more(row: dict) -> str:
    """What it holds besides."""
    return ", ".join(form.format(row[key]) for key, form in MORE.items() if key in row)


def _three_digits(value: float) -> str:
    """1,234, 12.3 and 0.0123."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _columns(case: str, peer: str, *numbers: str) -> str:
    return f"{case:<{WIDTHS[0]}} {peer:<{WIDTHS[1]}} " + " ".join(f"{number:>14}" for number in numbers)
