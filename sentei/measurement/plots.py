"""The plots of a report as files, SVG and PNG, by matplotlib (imported only when they are written)."""

import math
from functools import partial
from pathlib import Path

from sentei.core.storage import write_whole
from sentei.measurement.drawing import by_speed, drawable, finite, frontier_range, mean, undominated

INDIGO, VERMILION, GREY = "#1f4e79", "#b5371a", "#8a857b"


def write_plots(folder: Path, result: dict, details: dict) -> list[Path]:
    """Writes slack and frontier as SVG (text kept as text) and PNG into `folder` with matplotlib.

    Returns:
        The paths written; a plot whose data is empty is left out.
    """
    import matplotlib

    written = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sentei", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False}):
        figures = {"slack": _slack_figure(details), "frontier": _frontier_figure(result, details)}
        for name, figure in figures.items():
            for kind in ("svg", "png") if figure else ():
                path = folder / f"{name}.{kind}"
                metadata = {"Date": None} if kind == "svg" else None  # the same data give the same bytes
                write_whole(path, partial(figure.savefig, format=kind, dpi=160, metadata=metadata))
                written.append(path)
    return written


def write_curve(path: Path, rows: list[dict]) -> None:
    """Writes the losses of a training run as one picture, of the kind that the end of `path` names.

    Args:
        rows: as `sentei train` notes them: step, loss (not before the first step), held_out (where measured).
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sentei", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for key, colour, style in (("loss", GREY, "-"), ("held_out", INDIGO, "o-")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot([x for x, _ in points], [y for _, y in points], style, color=colour, linewidth=1, markersize=3,
                      label={"loss": "training", "held_out": "held-out text"}[key])
        axes.set(xlabel="step", ylabel="nats a token")
        axes.legend(frameon=False)
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else None
        write_whole(path, partial(figure.savefig, format=kind, dpi=160, metadata=metadata))


def _slack_figure(details: dict):
    from matplotlib.figure import Figure

    rows = details["density"]
    heads = max((len(row) for row in rows if row), default=0)
    if not heads:
        return None
    figure = Figure(figsize=(10, max(4.0, min(12.0, 0.17 * len(rows)))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    table = [[*(row or ()), *[math.nan] * (heads - len(row or ()))] for row in rows]
    image = left.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    left.set(xlabel="head", ylabel="layer", title="density of the chosen plan (blank: not prunable)")
    figure.colorbar(image, ax=left, label="density")
    shades = _shades(len(details["slack"]))
    for entry, shade in zip(details["slack"], shades, strict=True):
        curve = [(mean(option["density"]), mean(option["error"])) for option in entry["options"] if option["density"]]
        curve = [(x, y) for x, y in curve if finite(x) and finite(y) and y > 0]
        right.plot([x for x, _ in curve], [y for _, y in curve], color=shade, linewidth=1, label=str(entry["layer"]))
    right.set(xlabel="density", ylabel="error, mean over heads", yscale="log", title="slack: one line a layer")
    if 0 < len(details["slack"]) <= 40:
        right.legend(title="layer", ncols=2, fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _shades(count: int) -> list[tuple[float, float, float, float]]:
    """`count` colours from early to late layers, even in lightness."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(count - 1, 1)) for index in range(count)]


def _frontier_figure(result: dict, details: dict):
    from matplotlib.figure import Figure

    points = drawable(result["frontier"])
    if not points or not drawable([result]):
        return None
    goal = details["goal"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    x1, x2, y1, y2 = frontier_range(points, result, goal)
    axes.set(xlim=(x1, x2), ylim=(100 * y1, 100 * y2), xlabel="speed-up over dense", ylabel="quality, % of dense")
    front = undominated(by_speed(points, "foreseen"))
    axes.plot([p["speedup"] for p in front], [100 * p["quality"] for p in front], color=GREY, linewidth=0.8, ls="--")
    for speed, fill in (("foreseen", "white"), ("measured", INDIGO)):
        tried = [p for p in by_speed(points, speed) if not (p["chosen"] and speed == "measured")]
        inside, below = [p for p in tried if p["quality"] >= y1], [p for p in tried if p["quality"] < y1]
        axes.scatter([p["speedup"] for p in inside], [100 * p["quality"] for p in inside], s=16, color=fill,
                     edgecolor=INDIGO, label=f"tried, speed-up {speed}" if inside else None, zorder=3)
        axes.scatter([p["speedup"] for p in below], [100 * y1] * len(below), s=22, marker="v", color=fill, zorder=3,
                     edgecolor=INDIGO, label=f"below the picture, {speed}" if below else None, clip_on=False)
    if finite(goal.get("quality")):
        axes.axhline(100 * goal["quality"], color=VERMILION, linewidth=0.9, label=f"bound {100 * goal['quality']:g} %")
    if finite(goal.get("speed")):
        axes.axvline(goal["speed"], color=VERMILION, linewidth=0.9, label=f"bound {goal['speed']:g}×")
    x, y = result["speedup"], 100 * result["quality"]
    (low, high), (slow, fast) = details["quality_interval"], details["speedup_interval"]
    if finite(low) and finite(high):
        axes.plot([x, x], [100 * low, 100 * high], color=VERMILION, linewidth=1.4, zorder=4)
    if finite(slow) and finite(fast):
        axes.plot([slow, fast], [y, y], color=VERMILION, linewidth=1.4, zorder=4)
    axes.scatter([x], [y], s=42, color=VERMILION, zorder=5, label="chosen, as measured")
    axes.scatter([1], [100], s=30, facecolor="white", edgecolor="black", zorder=5, label="dense")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure
