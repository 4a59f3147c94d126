"""What every claim's measurement gives: rows, pictures, and checks, of which the verdict is made and nothing else.

A check is a number with its 95 % interval and the range that the claim says it lies in. It holds where the whole
interval lies in that range, does not hold where the whole interval lies outside, and is open between the two; a number
that is in doubt is open wherever it lies. A claim holds where all its checks do, and does not hold where one of them
does not.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from sentei.core.errors import FileError, SenteiError, require
from sentei.measurement.charts import Chart, Series

HOLDS, OPEN, FAILS = "holds", "is open", "does not hold"
Cell = str | int | float
Row = dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number a claim stands on.

    Args:
        name: what it is, in words.
        value, low, high: as measured; low and high are the value where it was counted.
        least, most: the range the claim says it lies in; None where that has no end.
        doubt: why the number is not to be judged, whatever it is, in words: the check is open then.
    """

    name: str
    value: float
    low: float
    high: float
    least: float | None = None
    most: float | None = None
    doubt: str = ""

    def __post_init__(self):
        ends = [end for end in (self.least, self.most) if end is not None]
        require("Check", self, {
            "finite numbers, low and high around the value": all(map(_is_number, (self.value, self.low, self.high)))
            and self.low <= self.value <= self.high,
            "a doubt in words": isinstance(self.doubt, str),
            "a range of finite numbers": len(ends) > 0 and all(map(_is_number, ends)) and ends == sorted(ends)})

    @property
    def verdict(self) -> str:
        """HOLDS, OPEN or FAILS."""
        least = -math.inf if self.least is None else self.least
        most = math.inf if self.most is None else self.most
        if self.doubt:
            return OPEN
        if least <= self.low and self.high <= most:
            return HOLDS
        return FAILS if self.high < least or self.low > most else OPEN

    def words(self) -> str:
        """The number, its interval and what was claimed, and why it is in doubt."""
        interval = "" if self.low == self.high else f" ({number(self.low)} to {number(self.high)})"
        if self.least is not None and self.least == self.most:
            claimed = number(self.least)
        elif self.least is None or self.most is None:
            claimed = f"at most {number(self.most)}" if self.least is None else f"at least {number(self.least)}"
        else:
            claimed = f"{number(self.least)} to {number(self.most)}"
        doubt = f"; not judged, {self.doubt}" if self.doubt else ""
        return f"{self.name} {number(self.value)}{interval}, claimed {claimed}{doubt}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one claim.

    Args:
        claim: what is claimed, a sentence.
        rows: of the table, all with the same keys.
        checks: of the verdict; the first is the one that is told where all hold.
        charts: pictures.
        within: how near the claim's numbers have to be met, e.g. "2 %"; empty where the ranges are the claim's own.
        notes: sentences about what was seen besides.
        heat: shares from 0 to 1 by layer and head, drawn as a map; or nothing.
    """

    claim: str
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    charts: tuple[Chart, ...] = ()
    within: str = ""
    notes: tuple[str, ...] = ()
    heat: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        keys = {tuple(row) for row in self.rows}
        require("Finding", self.claim, {"rows of the same keys": len(keys) == 1,
                                        "a check at least": len(self.checks) > 0})

    @property
    def verdict(self) -> str:
        """HOLDS, OPEN or FAILS: the worst of the checks."""
        found = {check.verdict for check in self.checks}
        return next(verdict for verdict in (FAILS, OPEN, HOLDS) if verdict in found)

    @property
    def sentence(self) -> str:
        """The verdict and the number that decides it: the first of the checks with that verdict."""
        deciding = [check for check in self.checks if check.verdict == self.verdict]
        within = f" within {self.within}" if self.verdict == HOLDS and self.within else ""
        held = sum(check.verdict == HOLDS for check in self.checks)
        others = "" if len(self.checks) == 1 else f"; {held} of {len(self.checks)} checks hold"
        return f"The claim {self.verdict}{within}: {deciding[0].words()}{others}."

    def to_json(self) -> dict:
        """The finding as a JSON object."""
        return {**asdict(self), "verdict": self.verdict, "sentence": self.sentence}

    @classmethod
    def from_json(cls, value: object) -> "Finding":
        """The finding written by `to_json`; the verdict is made again from the checks.

        Raises:
            FileError: anything else.
        """
        try:
            known = {key: value[key] for key in cls.__dataclass_fields__}
            charts = tuple(Chart(**{**chart, "labels": tuple(chart["labels"]), "series": tuple(
                Series(**{key: tuple(part) if isinstance(part, list) else part for key, part in series.items()})
                for series in chart["series"])}) for chart in known["charts"])
            finding = cls(**{**known, "charts": charts, "rows": tuple(map(dict, known["rows"])),
                             "checks": tuple(Check(**check) for check in known["checks"]),
                             "notes": tuple(map(str, known["notes"])), "heat": tuple(map(tuple, known["heat"]))})
            plain = all(isinstance(cell, str | int | float) for row in finding.rows for cell in row.values())
            shares = all(_is_number(share) for row in finding.heat for share in row)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise _not_ours(str(error)) from error
        if not (plain and shares and isinstance(finding.claim, str) and isinstance(finding.within, str)):
            raise _not_ours("cells that are no text or number")
        return finding


Measure = Callable[[], Finding]


def _not_ours(got: str) -> SenteiError:
    return FileError("a finding", expected="a finding as sentei lab writes it", got=got[:200],
                     do="measure the claim again")


def measured(name: str, interval: tuple[float, float, float], *, doubt: str = "", **claimed: float) -> Check:
    """A check of a value with its interval (value, low, high); `claimed` is least and most."""
    value, low, high = interval
    return Check(name=name, value=value, low=low, high=high, doubt=doubt, **claimed)


def disturbed(what: str, rows: list[Row], size: str, spent: str) -> str:
    """Why times are not to be trusted: more work that took surely less time, the machine having done other things.

    Args:
        what: was timed.
        rows: of a table, with the columns `size`, and `spent`, `spent` low and `spent` high in milliseconds.
    Returns:
        The pair of rows furthest apart of which the interval of the larger lies below the smaller's, in words; or "".
    """
    ordered = sorted(rows, key=lambda row: row[size])
    pairs = [(less, more) for place, less in enumerate(ordered) for more in ordered[place + 1:]
             if more[size] > less[size] and more[f"{spent} high"] < less[f"{spent} low"]]
    if not pairs:
        return ""
    less, more = max(pairs, key=lambda pair: pair[0][spent] / pair[1][spent])
    return (f"the machine was disturbed: {what} took {number(less[spent])} ms for {number(less[size])} {size} and "
            f"{number(more[spent])} ms for {number(more[size])}")


def counted(name: str, value: float, claimed: float) -> Check:
    """A check of a number that was counted and has to be exactly that."""
    return Check(name=name, value=value, low=value, high=value, least=claimed, most=claimed)


def number(value: Cell) -> str:
    """A cell as text: whole numbers with commas, others with four digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
