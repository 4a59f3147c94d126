"""Lines, intervals and bars over one axis, as SVG by hand: what the pages of measurements share.

As in `drawing`, marks have classes and the page's style has the colours. Series differ in their dashes and in the size
of their dots too, so that no one needs to tell colours apart.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sentei.core.errors import require
from sentei.measurement.drawing import finite, ticks, visible
from sentei.measurement.marks import dot, line, svg, text

LEFT, RIGHT, BOTTOM, HEIGHT = 62.0, 14.0, 46.0, 250.0
LEGEND, A_LETTER = 17.0, 6.3  # the height of a line of the legend, and the width of a letter in it
STYLES = 6  # classes s0 … s5 of the page's style


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind.

    Args:
        name: in the legend.
        x, y: as many of the one as of the other.
        low, high: of the intervals of y, or nothing.
        expected: what theory says: a dashed line without dots.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    expected: bool = False

    def __post_init__(self):
        sizes = {len(self.x), len(self.y), *(len(part) for part in (self.low, self.high) if part)}
        numbers = all(map(finite, (*self.x, *self.y, *self.low, *self.high)))
        require("Series", self, {"finite numbers, as many x as y, low and high": len(sizes) == 1 and numbers,
                                 "low and high together": bool(self.low) == bool(self.high)})


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture of some series.

    Args:
        title: a sentence: what is to be seen.
        x, y: what the axes are.
        log_x, log_y: whether they are logarithmic.
        labels: of the places 0, 1, 2, … of x where these are no numbers; then points are not joined.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        points = [(x, y) for part in self.series for x, y in zip(part.x, part.y, strict=True)]
        require("Chart", self, {
            "a point at least": len(points) > 0,
            "numbers above 0 on a logarithmic axis": all((x > 0 or not self.log_x) and (y > 0 or not self.log_y)
                                                         for x, y in points)})


def draw(chart: Chart, width: float = 560.0) -> str:
    """The chart as an SVG of that width."""
    legend = list(_legend(chart, width))
    top = 24 + LEGEND * (1 + max(row for row, _, _ in legend))
    height = top + HEIGHT + BOTTOM
    across, up = _scale(chart, "x"), _scale(chart, "y")

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (width - LEFT - RIGHT) * across(x), top + HEIGHT * (1 - up(y))

    marks = [*_axes(chart, place, (LEFT, width - RIGHT, top, top + HEIGHT))]
    for row, x, number in legend:
        y, part = 12 + LEGEND * row, chart.series[number]
        marks += [line(x, y, x + 22, y, _kind(part, number)), text(x + 28, y + 4, visible(part.name), "tick")]
        marks += [] if part.expected else [dot(x + 11, y, _size(number), f"mark {_style(number)}")]
    for number, part in enumerate(chart.series):
        marks += _series(chart, part, number, place)
    marks.append(text(width - RIGHT, height - 6, visible(chart.x), "axis", "end"))
    marks.append(text(4, top - 8, f"↑ {visible(chart.y)}", "axis"))
    return svg(width, height, f"{visible(chart.title)} {_told(chart)}", marks, "chart")


def _told(chart: Chart) -> str:
    """The ends of each series in words."""
    parts = [f"{visible(part.name)}: from {part.y[0]:.3g} at {_at(chart, part.x[0])} to {part.y[-1]:.3g} at "
             f"{_at(chart, part.x[-1])}" for part in chart.series]
    return f"{visible(chart.y)} against {visible(chart.x)}. {'; '.join(parts)}."


def _at(chart: Chart, x: float) -> str:
    return visible(chart.labels[int(x)]) if chart.labels else f"{x:g}"


def _style(number: int) -> str:
    return f"s{number % STYLES}"


def _kind(part: Series, number: int) -> str:
    return f"curve {'expected' if part.expected else _style(number)}"


def _size(number: int) -> float:
    return (3.2, 2.4, 3.8, 2.8, 2.0, 4.2)[number % STYLES]


def _legend(chart: Chart, width: float) -> Iterator[tuple[int, float, int]]:
    """The row, place and number of every series' name."""
    row, x = 0, 4.0
    for number, part in enumerate(chart.series):
        size = 42 + A_LETTER * len(visible(part.name))
        if x > 4 and x + size > width:
            row, x = row + 1, 4.0
        yield row, x, number
        x += size


def _values(chart: Chart, axis: str) -> list[float]:
    if axis == "x" and chart.labels:
        return [-0.5, len(chart.labels) - 0.5]
    found = [value for part in chart.series for name in ((axis,) if axis == "x" else ("y", "low", "high"))
             for value in getattr(part, name)]
    return [value for value in found if value > 0] if getattr(chart, f"log_{axis}") else found


def _scale(chart: Chart, axis: str):
    """From a number on an axis to its place there, 0 to 1."""
    values, logarithmic = _values(chart, axis), getattr(chart, f"log_{axis}")
    low, high = min(values), max(values)
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    elif axis == "y" and 0 <= low < 0.5 * high:
        low = 0.0
    room = 0.0 if axis == "x" and chart.labels else 0.04 * ((high - low) or abs(high) or 1.0)
    low, high = (low if low == 0 and not logarithmic else low - room), high + room

    def scale(value: float) -> float:
        level = (math.log10(value) if value > 0 else low) if logarithmic else value
        return min(max((level - low) / (high - low), 0.0), 1.0)
    return scale


def _marked(chart: Chart, axis: str) -> Sequence[float]:
    """The numbers that an axis names."""
    values, logarithmic = _values(chart, axis), getattr(chart, f"log_{axis}")
    low, high = min(values), max(values)
    if not logarithmic:
        return ticks(low if low < 0 or low > 0.5 * high else 0.0, high, 5) if high > low else [low]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(exponents) <= 3 else (1,)
    return [step * 10.0**exponent for exponent in exponents for step in steps
            if low * 0.999 <= step * 10.0**exponent <= high * 1.001] or [low]


def _axes(chart: Chart, place, frame: tuple[float, float, float, float]) -> Iterator[str]:
    left, right, top, base = frame
    for tick in _marked(chart, "y"):
        y = place(_values(chart, "x")[0], tick)[1]
        yield line(left, y, right, y, "grid")
        yield text(left - 7, y + 4, f"{tick:,.6g}", "tick", "end")
    yield line(left, base, right, base, "frame")
    named = enumerate(chart.labels) if chart.labels else ((tick, f"{tick:,.6g}") for tick in _marked(chart, "x"))
    for tick, name in named:
        x = place(tick, max(_values(chart, "y")))[0]
        yield line(x, base, x, base + 4, "frame")
        yield text(x, base + 18, visible(name), "tick", "middle")


def _series(chart: Chart, part: Series, number: int, place) -> Iterator[str]:
    shift = 5.0 * (number - (len(chart.series) - 1) / 2) if chart.labels else 0.0
    spots = [(x + shift, y) for x, y in map(place, part.x, part.y)]
    if not chart.labels:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        yield f'<polyline class="{_kind(part, number)}" points="{joined}"/>'
    for x, low, high in zip(part.x, part.low, part.high, strict=False):
        (at, bottom), (_, top) = place(x, low), place(x, high)
        yield line(at + shift, bottom, at + shift, top, f"whisker {_style(number)}")
    for (x, y), across, value in zip(spots, part.x, part.y, strict=True):
        if not part.expected:
            title = f"{visible(part.name)}, {_at(chart, across)}: {value:.4g}"
            yield dot(x, y, _size(number), f"mark {_style(number)}", title)
        elif chart.labels:
            yield line(x - 9, y, x + 9, y, "curve expected")
