"""The results page: what each rival costs at each speed, and by how much it is behind or ahead of sentei."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.publish import table, write_result
from benchmarks.rivals.table import OURS, RIVALS

READS = {"itself": "prompt read by itself", "dense": "prompt read by the dense model"}
HEAD = ["at", "what", "setting", "speed-up (of pairs)", "ratio (95 %)", "sentei at least as fast", "÷ sentei's ratio"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one setting.

    Args:
        name, setting: of the rival.
        speeds: dense ÷ pruned seconds, pair by pair.
        quality: perplexity ratio, its interval, and the dense perplexity, by who has read the prompt.
    """

    name: str
    setting: str
    speeds: tuple[float, ...]
    quality: dict[str, list[float]]

    @property
    def speed(self) -> float:
        """The median of the pairs."""
        return statistics.median(self.speeds)


def rows_of(found: dict) -> list[Row]:
    """Everything that was both timed and judged."""
    return [Row(name=name, setting=setting, quality=kinds["quality"][setting], speeds=tuple(
        dense / pruned for dense, pruned in zip(seconds["dense"], seconds["pruned"], strict=True)))
        for name, kinds in found.items() if isinstance(kinds, dict)
        for setting, seconds in kinds.get("times", {}).items() if setting in kinds.get("quality", {})]


def beside(row: Row, ours: list[Row]) -> Row | None:
    """The best of sentei's plans that are at least as fast as a row; None where there is none."""
    return min((our for our in ours if our.speed >= row.speed), key=lambda our: our.quality["itself"][0], default=None)


def lines(found: dict, targets: tuple[float, ...], who: str) -> list[list[str]]:
    """The table's rows, by target, for one way of reading the prompt."""
    rows = [row for row in rows_of(found) if who in row.quality]
    ours = [row for row in rows if row.name == OURS]
    ordered = sorted(rows, key=lambda row: (_target(row, targets), row.name != OURS, row.quality[who][0]))
    return [_line(row, beside(row, ours), _target(row, targets), who) for row in ordered]


def _target(row: Row, targets: tuple[float, ...]) -> float:
    """The nearest; 1 for what is no faster than half the way to the first."""
    return min((1.0, *targets), key=lambda target: abs(1 / target - 1 / row.speed))


def _line(row: Row, our: Row | None, target: float, who: str) -> list[str]:
    ratio, low, high = row.quality[who][:3]
    setting = "a plan of all rooms" if row.name == OURS else row.setting
    setting += f" {RIVALS[row.name].setting}" if row.name in RIVALS else ""
    against = ["–", "none as fast"] if our is None else [
        f"{our.speed:.2f}x, {_short(our.quality[who][0])}", f"**{_short(ratio / our.quality[who][0])}**"]
    return [f"{target:g}x", row.name, setting, f"{row.speed:.2f} ({min(row.speeds):.2f} to {max(row.speeds):.2f})",
            f"{_short(ratio)} ({_short(low)} to {_short(high)})", *(["", ""] if row.name == OURS else against)]


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:.1e}"


def verdict(found: dict, who: str) -> str:
    """In how many rows sentei is ahead, and in which it is not."""
    rows = [row for row in rows_of(found) if who in row.quality]
    ours = [row for row in rows if row.name == OURS]
    pairs = [(row, beside(row, ours)) for row in rows if row.name != OURS]
    behind = [f"{row.name} at {row.speed:.2f}x ({_short(row.quality[who][0])} against {_short(our.quality[who][0])})"
              for row, our in pairs if our is not None and row.quality[who][0] <= our.quality[who][0]]
    alone = [f"{row.name} at {row.speed:.2f}x" for row, our in pairs if our is None]
    text = f"sentei is ahead in {len(pairs) - len(behind) - len(alone)} of {len(pairs)} rows at equal or higher speed."
    text += f" **sentei loses to**: {'; '.join(behind)}." if behind else ""
    return text + (f" No plan of sentei's that was timed is as fast as: {'; '.join(alone)}." if alone else "")


def write_page(about: str, work: Path, targets: tuple[float, ...]) -> Path:
    """Writes the page of everything in a folder."""
    parts = []
    for path in sorted(work.glob("*-*.json")):
        found = json.loads(path.read_text())
        for who, words in READS.items():
            rows = lines(found, targets, who)
            if rows:
                decoded = path.stem.startswith("decode")
                dense = next(row.quality[who][3] for row in rows_of(found) if who in row.quality)
                parts += [f"## {path.stem.replace('-', ':')}{f', {words}' if decoded else ''}",
                          f"Dense perplexity {dense:.2f}. {verdict(found, who)}", table(HEAD, rows)]
    notes = work / "notes.md"
    parts += [notes.read_text(encoding="utf-8").strip()] if notes.exists() else []
    return write_result("rivals", about, parts)
