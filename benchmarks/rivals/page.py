"""The results page: what each rival costs at equal speeds, and by how much it is behind or ahead of sentei."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.publish import table, write_result
from benchmarks.rivals.bench import key_of, timed_as
from benchmarks.rivals.curve import Point, at
from benchmarks.rivals.points import Points
from benchmarks.rivals.table import CALM, DEPTH, OURS, RIVALS

TARGETS = (1.2, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one setting.

    Args:
        name, setting: of the rival.
        speeds: dense ÷ pruned seconds, both with native layers, turn by turn.
        over: the same with transformers' own dense model.
        quality: the line of its quality, by the minutes of healing.
    """

    name: str
    setting: float
    speeds: tuple[float, ...]
    over: tuple[float, ...]
    quality: dict[float, dict]

    @property
    def speed(self) -> float:
        """The median of the pairs."""
        return statistics.median(self.speeds)

    def point(self, minutes: float) -> Point:
        """Its place on a curve."""
        return Point(speed=self.speed, **{name: self.quality[minutes][name] for name in ("ratio", "low", "high")})


def rows_of(results: Path, workload: str) -> list[Row]:
    """Every newest recipe for a workload that was timed with native layers, by rival and setting."""
    recipes, quality, times = (Points(results / f"{kind}.jsonl") for kind in ("recipes", "quality", "times"))
    newest = {(row["rival"], row["setting"]): row["recipe"] for row in recipes.rows
              if row["workload"] in (None, workload)}
    rows: list[Row] = []
    for (name, setting), recipe in sorted(newest.items(), key=lambda item: item[0][0] == CALM):
        timed = times.where(workload=workload, way="native", key=timed_as(recipe))
        judged = {line["healed"]: line for line in quality.where(workload=workload, key=key_of(recipe))}
        speeds = over = ()
        if timed:
            speeds, over = (tuple(dense / pruned for dense, pruned in zip(timed[-1][who], timed[-1]["pruned"],
                                                                          strict=True))
                            for who in ("dense", "transformers"))
        elif "ran" in recipe and judged:
            speeds = over = (_as_fast(recipe, {len(newest[DEPTH, row.setting]["layers"]): row.speed for row in rows
                                               if row.name == DEPTH}),)
        if speeds:
            rows.append(Row(name=name, setting=setting, speeds=speeds, over=over, quality=judged))
    return rows


def _as_fast(recipe: dict, speeds: dict[int, float]) -> float:
    """The speed of a model with as many layers as ran on the mean.

    Args:
        speeds: of models by the number of their layers; between two the time is linear, and beyond them as between
            the two nearest.
    """
    known = sorted({len(recipe["layers"]): 1.0, **speeds}.items())
    ran = recipe["ran"]
    place = next((at for at, (layers, _) in enumerate(known[1:-1], 1) if layers >= ran), len(known) - 1)
    (few, fast), (many, slow) = known[place - 1:place + 1]
    return 1 / (1 / fast + (ran - few) / (many - few) * (1 / slow - 1 / fast))


def curves(rows: list[Row], minutes: float) -> dict[str, list[Point]]:
    """The points of every rival, and of sentei, that were healed so long."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        if minutes in row.quality:
            found.setdefault(row.name, []).append(row.point(minutes))
    return found


def compared(points: dict[str, list[Point]]) -> list[list[str]]:
    """A line a rival: the ratio at each target, and how many times sentei's it is."""
    lines = []
    for name in sorted(points, key=lambda name: name != OURS):
        line = [f"**{name}**" if name == OURS else name]
        for target in TARGETS:
            here, our = at(points[name], target), at(points.get(OURS, []), target)
            line.append(_words(here, points[name]))
            line.append("" if name == OURS or None in (here, our) else f"**{_short(here.ratio / our.ratio)}**")
        lines.append(line)
    return lines


def _words(point: Point | None, points: list[Point]) -> str:
    if point is None:
        return f"not reached ({max(each.speed for each in points):.2f})"
    return f"{_short(point.ratio)} ({_short(point.low)} to {_short(point.high)})"


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:.1e}"


def verdict(points: dict[str, list[Point]]) -> str:
    """At how many speeds of rivals sentei is ahead, and at which it is not."""
    ahead, behind, alone = 0, [], []
    for name, own in points.items():
        for target in TARGETS if name != OURS else ():
            here, our = at(own, target), at(points.get(OURS, []), target)
            if here is not None and our is None:
                alone.append(f"{name} at {target:g}")
            elif here is not None and here.ratio <= our.ratio:
                behind.append(f"{name} at {target:g} ({_short(here.ratio)} against {_short(our.ratio)})")
            elif here is not None:
                ahead += 1
    text = f"sentei is ahead in {ahead} of {ahead + len(behind) + len(alone)} comparisons."
    text += f" **It loses to**: {'; '.join(behind)}." if behind else ""
    return text + (f" No plan of its own is as fast as: {'; '.join(alone)}." if alone else "")


def measured(rows: list[Row]) -> list[list[str]]:
    """A line for everything that was measured."""
    lines = []
    for row in sorted(rows, key=lambda row: (row.name, row.setting)):
        words = "asked for this speed" if row.name == OURS else RIVALS[row.name].setting
        lines.append([row.name, f"{row.setting:g} {words}", f"{row.speed:.2f} ({min(row.speeds):.2f} to "
                      f"{max(row.speeds):.2f})", f"{statistics.median(row.over):.2f}", *(
            "; ".join(f"{_short(line['ratio'])} ({_short(line['low'])} to {_short(line['high'])})" + (
                f", {minutes:g} min" if minutes else "") for minutes, line in sorted(row.quality.items())
                if bool(minutes) == after) for after in (False, True))])
    return lines


def parts_of(results: Path, workload: str) -> list[str]:
    """A workload's part of the page."""
    rows = rows_of(results, workload)
    lengths = sorted({minutes for row in rows for minutes in row.quality})
    dense = next(line["dense"] for row in rows for line in row.quality.values())
    native = statistics.median(over / speed for row in rows for over, speed in zip(row.over, row.speeds, strict=True))
    parts = [f"## {workload}", f"Dense perplexity {dense:.2f}. Nothing pruned, with native layers, is {native:.2f} "
             "times as fast as transformers; speeds below are on top of that, but for the column that says otherwise."]
    head = ["what", *(words for target in TARGETS for words in (f"ratio at {target:g}", "÷ sentei's"))]
    for minutes in lengths:
        points = curves(rows, minutes)
        parts += [f"### {f'Healed for {minutes:g} minutes of processor time' if minutes else 'Unhealed'}",
                  verdict(points), table(head, compared(points))]
    return [*parts, "### What was measured", table(["what", "setting", "speed (of pairs)", "over transformers",
                                                    "ratio (95 %)", "healed"], measured(rows))]


def write_page(about: str, results: Path) -> Path:
    """Writes the page of everything in a folder, with its notes first."""
    notes = results / "notes.md"
    parts = [notes.read_text(encoding="utf-8").strip()] if notes.exists() else []
    for workload in dict.fromkeys(row["workload"] for row in Points(results / "times.jsonl").rows):
        parts += parts_of(results, workload)
    return write_result("rivals", about, parts)
