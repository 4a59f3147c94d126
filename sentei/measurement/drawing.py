"""The pictures inside a report: SVG written by hand, and the words and numbers they share with the page.

The drawings carry no colours: marks have classes, the page's style gives them a colour in light, dark and print.
Where a mark's strength is its density, that is `fill-opacity`: blending over the paper in sRGB is close to even
steps of lightness in both schemes, so one attribute is the whole colour scale.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from sentei.measurement.marks import dot, line, svg, text

LABEL_LIMIT = 160
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
DECADES = 4  # an error ten thousand times below the largest is drawn as if it were zero
TOP = 24  # of the quality-speed plot, room for the name of its axis
CROWD = 16  # heads in one panel beyond which marks shrink


def visible(value: object, limit: int | None = LABEL_LIMIT) -> str:
    """`value` as text in which nothing hides: control, bidirectional and unassigned characters become escapes.

    Text longer than `limit` is cut and says so. The result is plain text, not yet escaped for HTML.
    """
    text = str(value)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}… ({len(text):,} characters)"
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if unicodedata.category(character) not in HIDDEN:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def percent(value: float, against: float | None = None) -> str:
    """0.9912 as "99.1 %"; with `against`, as many decimals as it takes to stand on its side of that bound."""
    if not finite(value):
        return "an unmeasured share"
    digits = 1
    while against is not None and digits < 5 and value != against and round(100 * value, digits) == 100 * against:
        digits += 1
    return f"{100 * value:.{digits}f} %"


def counted(number: int, noun: str) -> str:
    """ "1 layer", "2 layers": a number with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Sequence[float]) -> float:
    """The mean of a sequence that is not empty."""
    return sum(values) / len(values)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def heat_map(density: Sequence[Sequence[float] | None]) -> str:
    """The chosen density of every head, layers from top to bottom, heads from left to right, row means at the right.

    Args:
        density: one row of numbers in [0, 1] a layer; None for a layer that cannot be pruned, drawn as a dashed line.

    Returns:
        An inline SVG about 350 units wide; empty text where no layer has a row.
    """
    cells = [(value, layer, head) for layer, row in enumerate(density) for head, value in enumerate(row or ())]
    if not cells:
        return ""
    heads = max(len(row) for row in density if row)
    wide, tall = min(58.0, 232 / heads), min(15.0, max(8.0, 480 / len(density)))
    left, top = 34.0, 32.0
    right = left + heads * wide
    stride = 1 if wide > 12 else 8
    marks = [text(left, 10, "head", "axis"), text(right + 14, 10, "layer mean", "axis")]
    marks += [text(left + (head + 0.5) * wide, 25, str(head), "tick", "middle") for head in range(0, heads, stride)]
    for layer, row in enumerate(density):
        marks += _heat_row(layer, row, (left, top + layer * tall), (wide, tall), right)
    low, high = min(cells), max(cells)
    average = mean([value for value, _, _ in cells])
    label = (f"Heat map of density, {counted(len(density), 'layer')} by {counted(heads, 'head')}. Mean {average:.2f}; "
             f"lowest {low[0]:.2f} at layer {low[1]}, head {low[2]}; highest {high[0]:.2f} at layer {high[1]}, "
             f"head {high[2]}. {counted(sum(row is None for row in density), 'layer')} not prunable.")
    return svg(right + 106, top + len(density) * tall + 2, label, marks, "heat")


def _heat_row(layer: int, row: Sequence[float] | None, corner: tuple[float, float], size: tuple[float, float],
              right: float) -> Iterator[str]:
    (left, y), (wide, tall) = corner, size
    roomy = tall > 10.5
    if roomy or layer % 5 == 0:
        yield text(left - 7, y + tall / 2 + 3.4, str(layer), "tick", "end")
    if not row:
        yield line(left, y + tall / 2, right + 74, y + tall / 2, "unpruned")
        return
    gap = 1 if wide > 6 else 0.5
    for head, value in enumerate(row):
        yield (f'<rect class="cell" x="{left + head * wide:.2f}" y="{y:.2f}" width="{wide - gap:.2f}" '
               f'height="{tall - gap:.2f}" fill-opacity="{min(max(value, 0), 1):.3f}">'
               f"<title>layer {layer}, head {head}: density {value:.3f}</title></rect>")
    average = mean(row)
    yield f'<rect class="track" x="{right + 14:.1f}" y="{y + tall / 2 - 0.5:.1f}" width="60" height="1"/>'
    yield dot(right + 14 + 60 * average, y + tall / 2, 2.4, "mean")
    if roomy:
        yield text(right + 82, y + tall / 2 + 3.4, f"{average:.2f}", "tick")


def density_scale() -> str:
    """The colour scale of `heat_map`, from density 0 (the page itself) to 1 (full colour)."""
    marks = [f'<rect class="cell" x="{20 * step}" y="0" width="20" height="10" fill-opacity="{step / 10}"/>'
             for step in range(11)]
    label = "Colour scale from density 0, the colour of the page, to density 1, full colour."
    return svg(220, 24, label, [*marks, text(0, 22, "0", "tick"), text(220, 22, "1", "tick", "end")], "heat scale")


def density_bar(share: object) -> str:
    """A bar as wide as a density, empty where it is not a number; decoration beside that number."""
    kept = 100 * min(max(share, 0), 1) if finite(share) else 0
    return ('<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="track" width="100" height="8"/><rect class="kept" width="{kept:.1f}" height="8"/></svg>')


def curve_panels(slack: Sequence[dict], density: Sequence[Sequence[float] | None]) -> list[str]:
    """One small plot a layer: error (logarithmic, shared by all) against density, with the chosen densities as dots.

    Args:
        slack: per layer "layer" and "options", each with "density" and "error" per head; dearest option first.
        density: the chosen densities, as for `heat_map`.

    Returns:
        Inline SVGs of 104 x 66 units; the first is the key that names the axes. Empty where nothing can be drawn.
    """
    errors = [error for entry in slack for option in entry["options"] for error in option["error"] if finite(error)]
    positive = [error for error in errors if error > 0]
    if not positive:
        return []
    top = math.ceil(math.log10(max(positive)) - 1e-9)
    bottom = min(top - 1, max(top - DECADES, math.floor(math.log10(min(positive)))))

    def place(share: float, error: float) -> tuple[float, float]:
        level = min(max(math.log10(error), bottom), top) if error > 0 else bottom
        return 2 + 100 * min(max(share, 0), 1), 62 - 56 * (level - bottom) / (top - bottom)

    grid = [line(2, place(0, 10.0 ** decade)[1], 102, place(0, 10.0 ** decade)[1], "grid")
            for decade in range(bottom, top + 1)]
    key = [*grid, text(4, 15, f"error {10.0 ** top:g}", "tick"), text(4, 59, f"{10.0 ** bottom:g}", "tick"),
           text(101, 59, "density 1", "tick", "end")]
    label = f"Key: across, density from 0 to 1; up, error from {10.0 ** bottom:g} to {10.0 ** top:g}, logarithmic."
    return [svg(104, 66, label, key, "panel key"), *(_panel(entry, density, place, grid) for entry in slack)]


def _panel(entry: dict, density: Sequence[Sequence[float] | None], place, grid: list[str]) -> str:
    layer, options = int(entry["layer"]), entry["options"]
    heads = zip(*(zip(option["density"], option["error"], strict=True) for option in options), strict=True)
    heads = [[point for point in head if finite(point[0]) and finite(point[1])] for head in heads]
    lines = "".join("M" + "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in head) for head in heads if head)
    average = [(mean(option["density"]), mean(option["error"])) for option in options
               if option["density"] and all(map(finite, [*option["density"], *option["error"]]))]
    middle = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in average)
    marks = [*grid, f'<path class="head" d="{lines}"/>', f'<polyline class="curve" points="{middle}"/>']
    chosen, crowd = density[layer] if 0 <= layer < len(density) else None, len(heads) > CROWD
    for head, share in zip(heads, chosen or [], strict=False):
        marks.append(dot(*place(share, error_at(head, share)), 0.9 if crowd else 1.7, "chosen"))
    marks.append(text(101, 15, str(layer), "tick", "end"))
    kept = f"; chosen mean density {mean(chosen):.2f}" if chosen else ""
    ends = f", mean error from {average[0][1]:.2g} to {average[-1][1]:.2g}" if average else ""
    label = f"Layer {layer}: error against density{ends}{kept}."
    return svg(104, 66, label, marks, "panel crowd" if crowd else "panel")


def error_at(curve: Sequence[tuple[float, float]], share: float) -> float:
    """The error of a curve of (density, error) at density `share`, straight between its points; its ends outside."""
    ordered = sorted(curve)
    if not ordered or share >= ordered[-1][0]:
        return ordered[-1][1] if ordered else 0.0
    for (x1, y1), (x2, y2) in pairwise(ordered):
        if x1 <= share <= x2:
            return y1 if x2 == x1 else y1 + (y2 - y1) * (share - x1) / (x2 - x1)
    return ordered[0][1]


def frontier_range(points: Sequence[dict], result: dict, goal: dict) -> tuple[float, float, float, float]:
    """What the quality-speed plot shows: lowest and highest speed-up, lowest and highest quality.

    The neighbourhood of the bound is what matters: qualities far below it are left out (drawn as arrows on the edge).
    """
    speeds = [1.0, result["speedup"], *(point["speedup"] for point in points), *filter(finite, [goal.get("speed")])]
    qualities = [1.0, result["quality"], *(point["quality"] for point in points)]
    asked = goal.get("quality", result["quality"])
    loss = max(1 - min(asked, result["quality"]), 0.002)
    low, high = max(min(*qualities, asked), 1 - 4 * loss), max(qualities)
    span, room = max(max(speeds) - min(speeds), 0.05), max(high - low, 0.002)
    return min(speeds) - 0.06 * span, max(speeds) + 0.3 * span, low - 0.14 * room, high + 0.12 * room


def frontier(points: Sequence[dict], result: dict, details: dict, width: int) -> str:
    """Quality against speed-up: every point tried, the bound as a line, the chosen plan as measured with its intervals.

    What is filled was measured in both; of what is hollow the speed-up is foreseen.

    Args:
        points: those of `result["frontier"]` whose numbers are finite.
        width: in CSS pixels; the page carries a wide and a narrow drawing so that type keeps its size.
    """
    height, left, bottom = round(width * (0.45 if width > 500 else 0.9)), 56, 44
    x1, x2, y1, y2 = frontier_range(points, result, details["goal"])

    def place(speed: float, quality: float) -> tuple[float, float]:
        across, up = (min(max(speed, x1), x2) - x1) / (x2 - x1), (min(max(quality, y1), y2) - y1) / (y2 - y1)
        return left + (width - left - 8) * across, TOP + (height - bottom - TOP) * (1 - up)

    base = height - bottom
    marks = [line(left, base, width - 8, base, "frame")]
    for tick in ticks(x1, x2, 6 if width > 500 else 4):
        x = place(tick, y1)[0]
        marks += [line(x, base, x, base + 4, "frame"), text(x, base + 18, f"{tick:g}×", "tick", "middle")]
    for tick in ticks(y1, y2, 5):
        if tick <= 1:
            y = place(x1, tick)[1]
            marks += [line(left, y, width - 8, y, "grid"),
                      text(left - 8, y + 4, f"{100 * tick:.4g}\u00a0%", "tick", "end")]
    marks.append(text(width - 8, height - 6, "speed-up: ● measured  ○ foreseen  →", "axis", "end"))
    marks.append(text(0, 11, "↑  quality, share of dense", "axis"))
    marks += _bound(details["goal"], place, (left, width - 8, base))
    best = [place(point["speedup"], point["quality"]) for point in undominated(by_speed(points, "foreseen"))]
    marks.append(f'<polyline class="front" points="{" ".join("{:.1f},{:.1f}".format(*spot) for spot in best)}"/>')
    marks += [_tried(point, place(point["speedup"], point["quality"]), point["quality"] < y1) for point in points
              if not (point["chosen"] and point["speed"] == "measured")]
    marks += _chosen(points, result, details, place)
    label = (f"Quality against speed-up: {counted(len(points), 'point')} tried, of {len(by_speed(points, 'measured'))} "
             f"the speed-up was measured, of the others foreseen. The chosen plan measured "
             f"{result['speedup']:.2f} times the dense speed at {percent(result['quality'])} of the dense quality.")
    return svg(width, height, label, marks, "frontier")


def _tried(point: dict, spot: tuple[float, float], below: bool) -> str:
    """A plan that was tried, filled where its speed-up was measured; where its quality is below the picture, an arrow.
    """
    (x, y), measured = spot, point["speed"] == "measured"
    title = (f'{visible(point["name"])}: {point["speedup"]:.2f}× as {point["speed"]}, quality '
             f'{percent(point["quality"])}, density {point["density"]:.2f}')
    if below:
        return (f'<path class="below{"" if measured else " hollow"}" d="M{x - 4:.1f} {y - 7:.1f}h8l-4 6z">'
                f"<title>{escape(title)}</title></path>")
    return dot(x, y, 3.2, "tried" if measured else "tried hollow", title)


def by_speed(points: Sequence[dict], speed: str) -> list[dict]:
    """The points whose speed-up was "measured", or "foreseen"."""
    return [point for point in points if point["speed"] == speed]


def undominated(points: Sequence[dict]) -> list[dict]:
    """The points no other point beats in both quality and speed, slowest first."""
    best, front = -math.inf, []
    for point in sorted(points, key=lambda point: (-point["speedup"], -point["quality"])):
        if point["quality"] > best:
            best = point["quality"]
            front.append(point)
    return front[::-1]


def _bound(goal: dict, place, frame: tuple[float, float, float]) -> Iterator[str]:
    left, right, base = frame
    if finite(goal.get("quality")):
        y = place(1, goal["quality"])[1]
        yield line(left, y, right, y, "bound")
        yield text(left + 6, y + 14, f"bound {100 * goal['quality']:g} %", "boundlabel")
    if finite(goal.get("speed")):
        x = place(goal["speed"], 1)[0]
        yield line(x, TOP, x, base, "bound")
        yield text(x - 6, base - 8, f"bound {goal['speed']:g}×", "boundlabel", "end")


def _chosen(points: Sequence[dict], result: dict, details: dict, place) -> Iterator[str]:
    x, y = place(1, 1)
    yield dot(x, y, 4, "dense", "dense: 1×, quality 100 %")
    yield text(x + 9, y - 6, "dense", "tick")
    x, y = place(result["speedup"], result["quality"])
    above = y
    for point in points:
        if point["chosen"] and point["speed"] == "foreseen":
            start = place(point["speedup"], point["quality"])
            yield line(*start, x, y, "foreseen")
            above = min(above, start[1])
            yield dot(*start, 5.5, "ring", f"{visible(point['name'])}: chosen, as foreseen")
    low = y
    if all(map(finite, details["quality_interval"])):
        low, high = (place(1, quality)[1] for quality in details["quality_interval"])
        yield line(x, low, x, high, "interval")
        above = min(above, high)
    if all(map(finite, details["speedup_interval"])):
        slow, fast = (place(speed, 1)[0] for speed in details["speedup_interval"])
        yield line(slow, y, fast, y, "interval")
    yield dot(x, y, 5, "chosen", "the chosen plan, as measured")
    asked = details["goal"].get("quality")
    # Over everything that belongs to the point, or under it where the plan as foreseen lies far above.
    level = above - 9 if y - above < 16 else max(y, low) + 19
    yield text(x + 9, level, f"{result['speedup']:.2f}× at {percent(result['quality'], asked)}", "callout")


def timing_strip(timings: dict[str, Sequence[float]]) -> str:
    """Every timed run as a dot over seconds from zero, dense above pruned, with the median of each as a tick."""
    runs = {name: [value for value in timings.get(name, ()) if finite(value)] for name in ("dense", "pruned")}
    longest = max((value for values in runs.values() for value in values), default=0.0)
    if longest <= 0:
        return ""
    width, left = 340, 54
    marks, medians = [], []
    for row, (name, values) in enumerate(runs.items()):
        y = 16 + 26 * row
        marks += [text(left - 10, y + 4, name, "tick", "end"), line(left, y, width - 8, y, "grid")]
        spots = [left + (width - left - 14) * value / longest for value in sorted(values)]
        marks += [dot(x, y, 3.2, "run" if name == "dense" else "run pruned") for x in spots]
        if values:
            middle = (spots[(len(spots) - 1) // 2] + spots[len(spots) // 2]) / 2
            marks.append(line(middle, y - 9, middle, y + 9, "median"))
            ordered = sorted(values)
            medians.append(f"{name} {(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2:.3g} s")
    for tick in ticks(0, longest, 4):
        x = left + (width - left - 14) * tick / longest
        marks += [line(x, 58, x, 62, "frame"), text(x, 76, f"{tick:g} s", "tick", "middle")]
    marks.append(line(left, 58, width - 8, 58, "frame"))
    return svg(width, 82, f"Timed runs. Medians: {', '.join(medians)}.", marks, "strip")


def drawable(points: Sequence[dict]) -> list[dict]:
    """The points whose quality, speed-up and density are all finite numbers."""
    return [point for point in points if all(finite(point[key]) for key in ("quality", "speedup", "density"))]
