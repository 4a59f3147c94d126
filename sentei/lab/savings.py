"""Claim 8: what grouped heads, LoRA and Mixture-of-Depths save, counted and measured.

    GQA, H query and G key/value heads:   keys and values take G / H: groups of 4 save 75 %
    LoRA, rank R:                         R (d_in + d_out) weights are trained instead of d_in · d_out
    MoD, share c:                         ⌈c T⌉ of T tokens pass the block

Counted are the parameters and bytes of the layers themselves, after a pass or a step; time is that of one layer beside
the whole one, in turn, with the order-statistic interval of its median. It is told and not judged: what is claimed are
bytes, weights and tokens.
Source: the lecture, "GQA, LoRA, MoD"; Ainslie 2023 (2305.13245), Hu 2021 (2106.09685), Raposo 2024 (2404.02258).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sentei.axes import heads, rank
from sentei.axes.depth import Depth
from sentei.benches import depth as depth_bench
from sentei.benches import heads as heads_bench
from sentei.core.tracing import trace
from sentei.geometry.intervals import median_interval
from sentei.lab.finding import Finding, Row, counted
from sentei.measurement.charts import Chart, Series
from sentei.measurement.latency import turns

CLAIM = ("Grouped heads in groups of 4 save 75 % of keys and values; LoRA trains r(d_in + d_out) weights instead of "
         "d_in·d_out; Mixture-of-Depths runs a chosen share of the tokens.")
RUNS = 7
QUERY_HEADS, GROUPS, HEAD, KEYS = 8, (8, 4, 2, 1), 64, 4096
LAYERS, RANKS = ((576, 1536), (1024, 1024)), (4, 32)
SHARES, WIDTH, TOKENS = (0.125, 0.5), 256, 512


@dataclass(frozen=True, kw_only=True)
class Saving:
    """One part that shrinks: how much of the whole is left.

    Args:
        what, setting: in words.
        formula: the share that the claim says is left.
        left, whole: as counted in the layers.
        unit: of these.
        small, large: do the work of the smaller and of the whole layer; None where there is nothing to time.
        times: how often each of the two does it.
    """

    what: str
    setting: str
    formula: float
    left: int
    whole: int
    unit: str
    small: Callable[[], object] | None = None
    large: Callable[[], object] | None = None
    times: tuple[int, int] = (1, 1)


def measure(parts: Callable[[], Iterator[Saving]] | None = None, runs: int = RUNS) -> Finding:
    """Counts and times every part.

    Args:
        parts: the savings; by default those of `grouped_heads`, `low_rank` and `depths`.
        runs: timed turns.
    Cost: twenty seconds on two cores.
    """
    rows = []
    for part in (every if parts is None else parts)():
        row = {"what": part.what, "setting": part.setting, "of": part.unit, "left": part.left, "whole": part.whole,
               "share left": part.left / part.whole, "formula": part.formula, "time ÷ whole": "", "low": "", "high": ""}
        if part.small is not None:
            seconds = turns({"small": part.small, "large": part.large}, runs=runs)
            each = part.times[1] / part.times[0]
            ratios = [each * small / large for small, large in zip(seconds["small"], seconds["large"], strict=True)]
            row |= dict(zip(("time ÷ whole", "low", "high"), median_interval(ratios), strict=True))
        rows.append(row)
    return judge(rows)


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    checks = tuple(counted(f"{row['what']}, {row['setting']}: the share of {row['of']} left is", row["share left"],
                           row["formula"]) for row in rows)
    timed = [row for row in rows if row["time ÷ whole"] != ""]
    places = tuple(map(float, range(len(timed))))
    charts = () if not timed else (Chart(
        title="What is left of the work, and of the time.", x="", y="share of the whole",
        labels=tuple(f"{row['what']} {row['setting']}" for row in timed), series=(
            Series(name="counted", x=places, y=tuple(row["share left"] for row in timed), expected=True),
            Series(name="time, with intervals of the medians", x=places, y=tuple(row["time ÷ whole"] for row in timed),
                   low=tuple(row["low"] for row in timed), high=tuple(row["high"] for row in timed)))),)
    notes = tuple(f"{row['what']}, {row['setting']}: {row['share left']:.3f} of the {row['of']}, "
                  f"{row['time ÷ whole']:.3f} of the time ({row['low']:.3f} to {row['high']:.3f})." for row in timed)
    return Finding(claim=CLAIM, rows=tuple(rows), checks=checks, charts=charts, notes=notes)


def every() -> Iterator[Saving]:
    """All parts, in the order of the claim."""
    yield from grouped_heads()
    yield from low_rank()
    yield from depths()


def grouped_heads() -> Iterator[Saving]:
    """Weights and cache of keys and values, and the time of one decoded token's attention over a long cache."""
    whole = heads.from_dense(nn.MultiheadAttention(QUERY_HEADS * HEAD, QUERY_HEADS, batch_first=True), heads.Config())
    base = heads_bench.Case(QUERY_HEADS, KEYS, torch.float32)
    layers = base.layers()
    for groups in GROUPS[1:]:
        layer = heads.from_dense(whole, heads.Config(num_kv_heads=groups))
        weights, all_weights = (sum(part.numel() for name, part in one.named_parameters()
                                    if name.startswith(("key", "value"))) for one in (layer, whole))
        case = heads_bench.Case(groups, KEYS, torch.float32)
        small = case.layers()  # more of them, so that no cache of the processor holds them
        cache, all_cache = (sum(part.nbytes for part in one[0][1:]) for one in (small, layers))
        setting = f"{QUERY_HEADS}/{groups}"
        yield Saving(what="GQA", setting=setting, formula=groups / QUERY_HEADS, left=weights, whole=all_weights,
                     unit="weights of keys and values")
        yield Saving(what="GQA", setting=setting, formula=groups / QUERY_HEADS, left=cache, whole=all_cache,
                     unit="cache bytes", times=(len(small), len(layers)),
                     small=heads_bench.everywhere(heads_bench.ROOM, small),
                     large=heads_bench.everywhere(heads_bench.ROOM, layers))


def low_rank() -> Iterator[Saving]:
    """Weights that are trained, and the bytes that Adam keeps for them after a step."""
    for into, out in LAYERS:
        for number in RANKS:
            layer = rank.from_dense(nn.Linear(into, out, bias=False), rank.Config(rank=number))
            full = nn.Linear(into, out, bias=False)
            trained = sum(part.numel() for part in layer.parameters() if part.requires_grad)
            formula = number * (into + out) / (into * out)
            yield Saving(what="LoRA", setting=f"{into}→{out}, rank {number}", formula=formula, left=trained,
                         whole=into * out, unit="trained weights")
            yield Saving(what="LoRA", setting=f"{into}→{out}, rank {number}", formula=formula,
                         left=moments(layer, into), whole=moments(full, into), unit="bytes of Adam's moments")


def moments(layer: nn.Module, into: int) -> int:
    """Bytes of the moments that AdamW holds after one step of the layer."""
    trained = [part for part in layer.parameters() if part.requires_grad]
    adam = torch.optim.AdamW(trained)
    layer(torch.ones(2, into)).square().sum().backward()
    adam.step()
    return sum(part.nbytes for state in adam.state.values() for part in state.values() if part.dim() > 0)


def depths() -> Iterator[Saving]:
    """Tokens that pass a block whose rule keeps a share of them, and the block's time, forward and backward."""
    for share in SHARES:
        case = depth_bench.Case(share, True, width=WIDTH, batch=2, tokens=TOKENS)
        room: Depth = case.room()
        x = torch.randn(case.batch, case.tokens, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.no_grad(), trace(room) as records:
            room(x)
        chosen = records[0].selection
        formula = math.ceil(share * case.tokens) / case.tokens
        yield Saving(what="MoD", setting=f"{share:g} of the tokens", formula=formula, left=int(chosen.count().sum()),
                     whole=int(chosen.permitted.sum()), unit="tokens that pass", small=depth_bench.step(
                         lambda room=room, x=x: room(x), True), large=depth_bench.step(
                         lambda room=room, x=x: depth_bench.dense(room.block, x), True))
