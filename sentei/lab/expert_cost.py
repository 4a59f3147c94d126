"""Claim 6: two experts of eight cost about 2/8 of the dense feed-forward layer with the same parameters.

    FLOPs ÷ dense = 2/8 + the router's share       time ÷ dense = FLOPs ÷ dense · (dense GFLOP/s ÷ ours) + choosing

FLOPs are counted by the room itself. Time is that of the layer with its router, beside the dense layer, in turn; the
experts alone, with the choice given, are timed in the same turns, so that the gap falls into two parts: how fast the
smaller products run, and what choosing takes. With few tokens the layer waits for weights and not for products: then
what counts is how many experts are touched. Where the dense layer took surely less time for more tokens, time is not
judged.
Source: the lecture, "amount of computation: about 2/8 = 1/4".
"""

from collections.abc import Callable

import torch

from sentei.axes.experts import Config, MixtureOfExperts
from sentei.axes.experts.dense import FeedForward
from sentei.axes.experts.gates import Renormalised
from sentei.core.rules import TopK
from sentei.core.tracing import trace
from sentei.geometry.intervals import median_interval
from sentei.kernels.routing import route
from sentei.lab.finding import Finding, Row, disturbed, measured
from sentei.measurement.charts import Chart, Series
from sentei.measurement.latency import turns

CLAIM = ("Two of eight experts for each token cost about 2/8 of the dense feed-forward layer with the same parameters, "
         "in FLOPs and, with many tokens, in time.")
EXPERTS, KEPT, WIDTH, NEURONS = 8, 2, 512, 8192
TOKENS = (1, 16, 256, 1024)
RUNS = 15
WITHIN_FLOPS, WITHIN_TIME = 0.02, 0.2
DENSE, MIXED, ALONE = "dense", "mixture", "experts alone"
Timed = dict[str, list[float]]


class Subject:
    """A dense layer and a mixture of as many parameters, on the same tokens."""

    def __init__(self, tokens: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = Config(rule=TopK(KEPT), gate=Renormalised(), unit=NEURONS // EXPERTS)
            self.mixture = MixtureOfExperts(config, width=WIDTH, neurons=NEURONS).eval()
            self.dense = FeedForward(WIDTH, NEURONS, gated=True, activation="silu").eval()
            self.x = torch.randn(tokens, WIDTH)
        with torch.no_grad(), trace(self.mixture) as records:
            self.mixture(self.x)
        self.record = records[0]
        self.stack = self.mixture.experts.stack(self.mixture.up, self.mixture.down)

    @property
    def flops(self) -> tuple[float, float]:
        """Of the dense layer and of the mixture, the router among its own."""
        cost = self.record.cost
        return 2.0 * cost.dense_multiply_adds, 2.0 * (cost.multiply_adds + cost.choosing)

    @property
    def touched(self) -> int:
        """How many experts some token keeps."""
        return int((self.record.selection.load() > 0).sum())

    @torch.no_grad()
    def timed(self, runs: int) -> Timed:
        """Seconds of the dense layer, of the mixture, and of its experts with the choice given."""
        ids, weights = self.record.selection.ids, self.record.selection.weights
        return turns({DENSE: lambda: self.dense(self.x), MIXED: lambda: self.mixture(self.x),
                      ALONE: lambda: route(self.x, ids, weights, self.stack)}, runs=runs)


def measure(tokens: tuple[int, ...] = TOKENS, make: Callable[[int], Subject] = Subject, runs: int = RUNS) -> Finding:
    """Counts and times every number of tokens.

    Args:
        tokens: ascending.
        make: the subject of so many tokens.
        runs: timed turns.
    Cost: twenty seconds on two cores.
    """
    rows = []
    for number in tokens:
        subject = make(number)
        rows.append(_row(number, subject.flops, subject.touched, subject.timed(runs)))
    return judge(rows)


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    share, most = KEPT / EXPERTS, rows[-1]
    checks = (measured("FLOPs ÷ dense FLOPs are", (most["FLOPs ÷ dense"],) * 3, least=share * (1 - WITHIN_FLOPS),
                       most=share * (1 + WITHIN_FLOPS)),
              measured(f"time ÷ dense time with {most['tokens']:,} tokens is",
                       (most["time ÷ dense"], most["low"], most["high"]), least=share * (1 - WITHIN_TIME),
                       most=share * (1 + WITHIN_TIME), doubt=disturbed("the dense layer", rows, "tokens", "dense ms")))
    x = tuple(float(row["tokens"]) for row in rows)
    chart = Chart(
        title="Time and FLOPs of the mixture as a share of the dense layer's.", x="tokens", y="share of dense",
        log_x=True, series=(
            Series(name="FLOPs", x=x, y=tuple(row["FLOPs ÷ dense"] for row in rows), expected=True),
            Series(name="time", x=x, y=tuple(row["time ÷ dense"] for row in rows),
                   low=tuple(row["low"] for row in rows), high=tuple(row["high"] for row in rows)),
            Series(name="experts touched ÷ 8", x=x, y=tuple(row["experts touched"] / EXPERTS for row in rows))))
    notes = tuple(
        f"{row['tokens']:,} tokens: time is {row['time ÷ dense']:.3f} of dense, {row['time ÷ dense'] - share:+.3f} "
        f"over 2/8: {row['slower products']:+.3f} because the experts' products run at {row['experts GFLOP/s']:.3g} "
        f"GFLOP/s and the dense layer's at {row['dense GFLOP/s']:.3g}, {row['choosing']:+.3f} for router, choice and "
        f"sorting; {row['experts touched']} of {EXPERTS} experts' weights are read." for row in rows)
    return Finding(claim=CLAIM, rows=tuple(rows), checks=checks, charts=(chart,), notes=notes,
                   within=f"{100 * WITHIN_FLOPS:g} % in FLOPs and {100 * WITHIN_TIME:g} % in time")


def _row(tokens: int, flops: tuple[float, float], touched: int, seconds: Timed) -> Row:
    """Shares of dense FLOPs and time, and the parts of the gap between them."""
    ratios = [mixed / dense for mixed, dense in zip(seconds[MIXED], seconds[DENSE], strict=True)]
    share, low, high = median_interval(ratios)
    (dense, *ends), (alone, *_) = (median_interval(seconds[name]) for name in (DENSE, ALONE))
    counted = flops[1] / flops[0]
    return {"tokens": tokens, "FLOPs ÷ dense": counted, "time ÷ dense": share, "low": low, "high": high,
            "dense ms": 1000 * dense, "dense ms low": 1000 * ends[0], "dense ms high": 1000 * ends[1],
            "dense GFLOP/s": flops[0] / dense / 1e9,
            "experts GFLOP/s": flops[0] * KEPT / EXPERTS / alone / 1e9, "experts touched": touched,
            "slower products": alone / dense - KEPT / EXPERTS, "choosing": share - alone / dense}
