"""Claim 2: noise drowns a signal that lies in few dimensions, unless the right ones are selected.

    SNR of a read-out over all d dimensions = k / (d - k)       signal in k of them, noise in the others
    SNR of one over k selected, a share w of them wrong = (1 - w) / w,   with 1 - w of the signal's power

Signal, noise and the probe that reads them are standard normal; the SNR is the variance of the signal's part of q·x ÷
that of the noise's part. Intervals are Student's t of the logarithm over batches of independent read-outs.
Source: the lecture, "sparsity as noise removal".
"""

import math
from collections.abc import Callable

import torch

from sentei.geometry.intervals import mean_interval
from sentei.geometry.snr import expected_ratio, readouts
from sentei.lab.finding import Finding, Row, measured
from sentei.measurement.charts import Chart, Series

CLAIM = ("With signal in k of d dimensions a dense read-out has a signal-to-noise ratio that falls as k/(d-k); "
         "selecting the right k restores it.")
SIGNAL = 16
DENSE = tuple(2**power for power in range(5, 13))
WRONG = (0, 1, 2, 4, 8, 12, 14, 15, 16)  # of the SIGNAL dimensions that are selected
BATCHES, NUMBER = 32, 4096
WITHIN = 0.05
Read = Callable[[int, int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def measure(dense: tuple[int, ...] = DENSE, batches: int = BATCHES, read: Read = readouts) -> Finding:
    """Reads the signal densely and selected, and judges the ratios.

    Args:
        dense: d of the dense read-outs.
        batches: of NUMBER read-outs.
        read: as `geometry.snr.readouts`.
    Cost: 2 · batches · NUMBER · (sum of dense) draws: about ten seconds.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [_row("dense", size, SIGNAL, size - SIGNAL, batches, read, generator) for size in dense]
    rows += [_row(f"selected, {wrong} of {SIGNAL} wrong", SIGNAL, SIGNAL - wrong, wrong, batches, read, generator)
             for wrong in WRONG]
    return judge(rows)


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    both = [row for row in rows if row["right"] and row["wrong"]]
    dense, selected = ([row for row in rows if (row["read-out"] == "dense") == is_dense] for is_dense in (True, False))
    checks = [measured(f"SNR ÷ formula, {row['read-out']}, {row['read']:,} dimensions read, is",
                       (row["÷ formula"], row["low"], row["high"]), least=1 - WITHIN, most=1 + WITHIN)
              for row in reversed(both)]
    right = next(row for row in selected if not row["wrong"])
    checks += [measured("with the right dimensions selected, noise power ÷ signal power is",
                        (right["noise power"] / right["signal power"],) * 3, least=0, most=0)]
    sizes = tuple(float(row["read"]) for row in dense)
    pictures = (Chart(
        title="A dense read-out drowns.", x="dimensions read, 16 of them with signal", y="SNR", log_x=True, log_y=True,
        series=(Series(name="k/(d-k)", x=sizes, y=tuple(row["formula"] for row in dense), expected=True),
                Series(name="measured", x=sizes, y=tuple(row["SNR"] for row in dense)))),
        _chart_of_selected([row for row in selected if row["wrong"]], dense[-1]))
    least, most = dense[0], dense[-1]
    even = 1 - SIGNAL / most["read"]
    notes = (f"From {least['read']:,} to {most['read']:,} dimensions the SNR falls from {least['SNR']:.3g} to "
             f"{most['SNR']:.3g}.",
             f"Wrong selections cost: half wrong has SNR 1 and half of the signal's power. Selecting is better than "
             f"reading all {most['read']:,} as long as less than {even:.1%} are wrong, the share of a blind choice, "
             "which has the dense read-out's SNR and loses nearly all of the signal.")
    return Finding(claim=CLAIM, rows=tuple(rows), checks=tuple(checks), charts=pictures, notes=notes,
                   within=f"{100 * WITHIN:g} %")


def _chart_of_selected(rows: list[Row], densest: Row) -> Chart:
    """SNR against the number of wrong dimensions, beside what reading everything gives."""
    rows = [row for row in rows if row["right"]]
    wrong = tuple(float(row["wrong"]) for row in rows)
    return Chart(title="What selecting wrong ones costs.", x=f"wrong ones of {SIGNAL} selected", y="SNR", log_y=True,
                 series=(Series(name="(1-w)/w", x=wrong, y=tuple(row["formula"] for row in rows), expected=True),
                         Series(name="selected, measured", x=wrong, y=tuple(row["SNR"] for row in rows)),
                         Series(name=f"all {densest['read']:,}, measured", x=wrong, y=(densest["SNR"],) * len(wrong))))


def _row(name: str, read: int, right: int, wrong: int, batches: int, reader: Read, generator: torch.Generator) -> Row:
    """One read-out: powers of signal and noise, and where there are both their ratio."""
    parts = [reader(right, wrong, NUMBER, generator) for _ in range(batches)]
    powers = [tuple(part.square().mean().item() for part in pair) for pair in parts]
    signal, noise = (sum(pair[side] for pair in powers) / batches for side in (0, 1))
    row = {"read-out": name, "read": read, "right": right, "wrong": wrong, "signal power": signal, "noise power": noise,
           "SNR": 0.0, "formula": 0.0, "÷ formula": 0.0, "low": 0.0, "high": 0.0}
    if not wrong or not right:
        return row | {"SNR": "no noise" if right else 0.0, "formula": "no noise" if right else 0.0}
    formula = expected_ratio(right, wrong)
    ratio, low, high = (math.exp(value) for value in mean_interval(
        [math.log(signal / noise / formula) for signal, noise in powers]))
    return row | {"SNR": ratio * formula, "formula": formula, "÷ formula": ratio, "low": low, "high": high}
