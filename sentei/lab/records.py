"""How a claim is measured, told and kept."""

import importlib
import time
from collections.abc import Iterator
from pathlib import Path

from sentei.core.progress import Progress
from sentei.core.storage import read_json, write_json
from sentei.lab.finding import Finding, number
from sentei.lab.table import CLAIMS
from sentei.measurement.outcome import environment, today

SCHEMA = "sentei.lab/1"


def measure(names: list[str], progress: Progress) -> Iterator[tuple[str, dict, Finding]]:
    """Measures claims one by one: the name, the record that `to_record` makes, and the finding."""
    for name in names:
        with progress.stage(name, 1) as step:
            start = time.perf_counter()
            module = importlib.import_module(f"sentei.lab.{CLAIMS[name]}")
            finding = module.measure()
            threads = getattr(module.measure, "threads", None)
            yield name, to_record(name, finding, time.perf_counter() - start, threads), finding
            step()


def to_record(name: str, finding: Finding, seconds: float, threads: int | None = None) -> dict:
    """A finding with where, when and how long it was measured, as a JSON object.

    Args:
        threads: of torch, that it was measured on; None for as many as there are now.
    """
    own = {} if threads is None else {"threads": str(threads)}
    return {"schema": SCHEMA, "name": name, "date": today(), "seconds": seconds, "environment": environment() | own,
            "finding": finding.to_json()}


def keep(record: dict, out: Path) -> None:
    """Writes a record to `out`, from where `kept` reads it."""
    write_json(out / f"{record['name']}.json", record)


def kept(out: Path) -> dict[str, tuple[dict, Finding]]:
    """The records in a folder with their findings, in the order of the claims.

    Raises:
        FileError: a file there that is no record.
    """
    found = {}
    for name in CLAIMS:
        path = out / f"{name}.json"
        if path.is_file():
            record = read_json(path)
            found[name] = record, Finding.from_json(record.get("finding"))
    return found


def lines(finding: Finding) -> list[str]:
    """The table of a finding: a line for its head and one for each row; texts stand left and numbers right."""
    head = list(finding.rows[0])
    left = [any(isinstance(row[key], str) for row in finding.rows) for key in head]
    cells = [head, *([number(row[key]) for key in head] for row in finding.rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(head))]
    return ["  ".join(cell.ljust(width) if is_left else cell.rjust(width)
                      for cell, width, is_left in zip(line, widths, left, strict=True)).rstrip() for line in cells]
