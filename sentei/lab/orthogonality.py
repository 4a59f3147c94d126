"""Claim 1: random directions are almost orthogonal.

    E[u·v] = 0,   Var[u·v] = 1 / d        for u, v drawn evenly from the unit sphere of R^d

Measured are all pairs of BATCH directions, BATCHES times for each of two seeds: the mean of u·v in units of 1 / √d, and
the variance (about 0) in units of 1 / d. Intervals are Student's t over batches, which are independent; the products
inside one are so pair by pair.
Source: the lecture, "the emptiness of high-dimensional space"; Vershynin 2018, High-Dimensional Probability, 3.3.3.
"""

import math
from collections.abc import Callable

import torch

from sentei.geometry.intervals import mean_interval
from sentei.geometry.orthogonality import inner_products, unit_vectors
from sentei.lab.finding import Finding, Row, measured
from sentei.measurement.charts import Chart, Series

CLAIM = "The inner product of two random directions in d dimensions has mean 0 and variance 1/d."
DIMENSIONS = tuple(2**power for power in range(1, 15))
SEEDS, BATCHES, BATCH = (0, 1), 24, 256
WITHIN = 0.02
Draw = Callable[[int, int, torch.Generator], torch.Tensor]


def measure(dimensions: tuple[int, ...] = DIMENSIONS, batches: int = BATCHES, draw: Draw = unit_vectors) -> Finding:
    """Draws directions and judges their inner products.

    Args:
        dimensions: d.
        batches: of each seed.
        draw: so many directions of d dimensions.
    Cost: 2 · batches · 256 · d draws for each d: three seconds in all.
    """
    return judge([_row(size, batches, draw) for size in dimensions])


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    checks = [measured(f"variance × d at d = {row['d']:,} is", (row["variance × d"], row["low"], row["high"]),
                       least=1 - WITHIN, most=1 + WITHIN) for row in reversed(rows)]
    checks += [measured(f"mean × √d at d = {row['d']:,} is", (row["mean × √d"], row["mean low"], row["mean high"]),
                        least=-WITHIN, most=WITHIN) for row in reversed(rows)]
    sizes = tuple(float(row["d"]) for row in rows)
    spread = {key: tuple(row[name] / row["d"] for row in rows)
              for key, name in (("y", "variance × d"), ("low", "low"), ("high", "high"))}
    chart = Chart(title="The variance falls as 1/d.", x="dimensions d", y="variance of u·v", log_x=True, log_y=True,
                  series=(Series(name="1/d", x=sizes, y=tuple(1 / size for size in sizes), expected=True),
                          Series(name="measured, 95 % interval", x=sizes, **spread)))
    narrow = rows[-1]
    notes = (f"At d = {narrow['d']:,} {narrow['within 5° of 90°']:.1%} of the pairs are within 5 degrees of a right "
             f"angle, at d = {rows[0]['d']:,} {rows[0]['within 5° of 90°']:.1%}.",)
    return Finding(claim=CLAIM, rows=tuple(rows), checks=tuple(checks), charts=(chart,), notes=notes,
                   within=f"{100 * WITHIN:g} %")


def _row(size: int, batches: int, draw: Draw) -> Row:
    """One d: each seed's variance, and mean and variance with their intervals over all batches."""
    means, squares, right = [], [], []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(batches):
            products = inner_products(draw(BATCH, size, generator))
            means.append(products.mean().item() * math.sqrt(size))
            squares.append(products.square().mean().item() * size)
            right.append((products.abs() <= math.sin(math.radians(5))).double().mean().item())
    (mean, *mean_ends), (square, *ends) = mean_interval(means), mean_interval(squares)
    by_seed = {f"seed {seed}": sum(squares[place * batches:(place + 1) * batches]) / batches
               for place, seed in enumerate(SEEDS)}
    return {"d": size, "variance × d": square, "low": ends[0], "high": ends[1], **by_seed,
            "mean × √d": mean, "mean low": mean_ends[0], "mean high": mean_ends[1],
            "within 5° of 90°": sum(right) / len(right)}
