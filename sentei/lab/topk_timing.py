"""Claim 9: top-k attention as first written is not faster than standard attention; a real kernel is.

The lecture's own comparison, batch 2, heads 8, d 64, k 32, at its length of 512 and others. All four run in turn, one
untimed run first: standard attention (scores, softmax, product), the lecture's top-k (scores, topk, softmax, scatter,
product), our kernel of the same top-k, and torch's fused attention over all keys. A speed-up is the median over turns
of standard's seconds ÷ those of the other, with the order-statistic interval of the median. Before timing, our output
is compared with the lecture's. Where standard attention took surely less time for more tokens, nothing is judged.
Source: the lecture's implementation note, whose timing has no warm-up and one run.
"""

from collections.abc import Callable
from functools import partial

import torch

from sentei.benches.topk import MAY_DIFFER, TOLERANCE, Case, K, scatter, sdpa
from sentei.geometry.intervals import median_interval
from sentei.lab.finding import Finding, Row, disturbed, measured
from sentei.measurement.charts import Chart, Series
from sentei.measurement.latency import turns

CLAIM = ("Top-k attention as first written (scores, top-k, scatter into a dense matrix) is not faster than standard "
         "attention; a real kernel is.")
LENGTHS, DOCUMENT = (128, 256, 512, 1024, 2048), 512
RUNS, SHORT = 9, 41  # turns, and at lengths up to DOCUMENT, where a turn takes little
STANDARD, WRITTEN, OURS, FUSED = "standard", "top-k as written", "top-k kernel", "torch sdpa, all keys"
Timed = dict[str, list[float]]


def standard(case: Case) -> torch.Tensor:
    """The lecture's standard attention, with its matrix of scores."""
    query, key, value = case.heads()
    return ((query @ key.transpose(-1, -2)) / 64**0.5).softmax(-1) @ value


@torch.no_grad()
def time_all(length: int, runs: int | None = None) -> Timed:
    """Seconds of every way at one length, in turn.

    Args:
        length: tokens.
        runs: timed turns; RUNS or SHORT by default.
    Raises:
        AssertionError: our output is not that of the lecture's top-k; then nothing is timed.
    """
    case, usual = Case(length, False), SHORT if length <= DOCUMENT else RUNS
    differ = (case.ours() - scatter(case, True)).abs().gt(TOLERANCE).float().mean().item()
    if differ > MAY_DIFFER:
        raise AssertionError(f"{case}: {100 * differ:.3g} % of the outputs differ")
    return turns({STANDARD: partial(standard, case), WRITTEN: partial(scatter, case, True), OURS: case.ours,
                  FUSED: partial(sdpa, case)}, runs=runs or usual)


def measure(lengths: tuple[int, ...] = LENGTHS, timed: Callable[[int], Timed] = time_all) -> Finding:
    """Times every length and judges the speed-ups at the lecture's.

    Args:
        lengths: tokens, DOCUMENT among them.
        timed: seconds by name at a length.
    Cost: half a minute on two cores.
    """
    return judge([_row(length, timed(length)) for length in lengths])


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    at = next(row for row in rows if row["tokens"] == DOCUMENT)
    doubt = disturbed("standard attention", rows, "tokens", SPENT)
    checks = (measured(f"speed-up of top-k as written at {DOCUMENT} tokens, k {K}, is",
                       tuple(at[f"{WRITTEN}{end}"] for end in ENDS), most=1, doubt=doubt),
              measured(f"speed-up of our kernel of it at {DOCUMENT} tokens is",
                       tuple(at[f"{OURS}{end}"] for end in ENDS), least=1, doubt=doubt))
    x = tuple(float(row["tokens"]) for row in rows)
    series = [Series(name="standard attention", x=x, y=(1.0,) * len(x), expected=True)]
    series += [Series(name=name, x=x, y=tuple(row[name] for row in rows), low=tuple(row[f"{name} low"] for row in rows),
                      high=tuple(row[f"{name} high"] for row in rows)) for name in (WRITTEN, OURS, FUSED)]
    chart = Chart(title=f"Speed over standard attention, k = {K}, with intervals of the medians.", x="tokens",
                  y="times as fast as standard", log_x=True, log_y=True, series=tuple(series))
    wins = {name: [f"{row['tokens']:,}" for row in rows if row["fastest"] == name]
            for name in (STANDARD, WRITTEN, OURS, FUSED)}
    told = "; ".join(f"{name} at {', '.join(where)}" for name, where in wins.items() if where)
    return Finding(claim=CLAIM, rows=tuple(rows), checks=checks, charts=(chart,),
                   notes=(f"Fastest: {told} tokens.", "The fused kernel reads every key and writes no score down; the "
                          "lecture's standard attention, which all are compared with, writes every one."))


ENDS = ("", " low", " high")
SPENT = "standard ms"


def _row(length: int, seconds: Timed) -> Row:
    """Milliseconds of standard attention and speed-ups of the others, with intervals."""
    row = {"tokens": length}
    row |= {f"{SPENT}{end}": 1000 * each for end, each in zip(ENDS, median_interval(seconds[STANDARD]), strict=True)}
    for name in (WRITTEN, OURS, FUSED):
        ratios = [base / spent for base, spent in zip(seconds[STANDARD], seconds[name], strict=True)]
        row |= {f"{name}{end}": value for end, value in zip(ENDS, median_interval(ratios), strict=True)}
    medians = {name: median_interval(spent)[0] for name, spent in seconds.items()}
    return row | {"fastest": min(medians, key=medians.get)}
