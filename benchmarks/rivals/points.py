"""What was found of each rival, a JSON line a point, so that a run that was cut off goes on where it stopped."""

import json
from pathlib import Path


class Points:
    """The lines of a file; one that the process did not live to finish is not read."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[:text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self.rows: list[dict] = [json.loads(line) for line in whole.splitlines()]

    def add(self, row: dict) -> None:
        """Writes one more."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def where(self, **same: object) -> list[dict]:
        """The points that have these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in same.items())]
