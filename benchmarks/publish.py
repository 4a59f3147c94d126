"""Writes a benchmark's result as a page: what was measured, where, when, at which commit, and how to repeat it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from sentei.measurement.outcome import environment, today

RESULTS = Path(__file__).parent / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def write_result(name: str, about: str, parts: list[str]) -> Path:
    """Writes results/NAME_HARDWARE_DATE.md and returns its path.

    Args:
        name: what was measured, e.g. "selection-4096".
        about: the benchmark's docstring; its first line becomes the heading.
        parts: paragraphs and tables, in order.
    """
    title, _, rest = about.strip().partition("\n")
    known = environment()
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{known['threads']} threads {known['processor']}".lower()).strip("-")
    path = RESULTS / f"{name}_{hardware}_{today()}.md"
    facts = ", ".join(f"{key} {value}" for key, value in known.items())
    origin = f"{facts}. {today()}, commit {_commit()}, `{shlex.join(['python', '-m', _module(), *sys.argv[1:]])}`."
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join([f"# {title}", rest.strip(), origin, *parts]) + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    """The commit the tree is at, and whether the code differs from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout

    changed = git("status", "--porcelain", "--", "../sentei", "*.py")
    return git("rev-parse", "--short", "HEAD").strip() + (" with changes" if changed.strip() else "")


def _module() -> str:
    return sys.modules["__main__"].__spec__.name
