"""What a run of the command line leaves behind: its error in four parts, and its files."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sentei.commands.verb import Progress


def four_parts(stderr: str) -> dict[str, str]:
    """The four parts of the error that `stderr` is, by their names."""
    parts = dict(re.fullmatch(r"(error|expected|got|do this) +(.*)", line).groups() for line in stderr.splitlines())
    assert list(parts) == ["error", "expected", "got", "do this"]
    return parts


def last_error(stderr: str) -> dict[str, str]:
    """The four parts of the error that `stderr` ends with."""
    return four_parts("\n".join(stderr.splitlines()[-4:]))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder by its path, folders with None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def unfinished(folder: Path) -> list[str]:
    """Files and folders below `folder` that look as if somebody was still writing them; the lock is not among them."""
    return [str(path) for path in folder.rglob("*") if path.name != ".lock" and (
        path.name.startswith(".") or path.suffix in (".part", ".tmp"))]


def watching(watch: Callable[[str, int], object]) -> type[Progress]:
    """The command line's progress, which also calls `watch(stage, steps done)`: at each stage's start and step."""
    class Watched(Progress):
        @contextmanager
        def stage(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
            done = 0

            def step(note: str = "") -> None:
                nonlocal done
                done += 1
                inner(note)
                watch(name, done)

            with super().stage(name, total) as inner:
                watch(name, 0)
                yield step

    return Watched
