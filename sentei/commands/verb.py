"""What every verb of the command line is, and how it talks to a terminal."""

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from sentei.core.errors import SenteiError

# Takes a result as data and as text, and prints the one or the other.
Say = Callable[[dict, str], None]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb: what it says of itself, its arguments, and its work, which says results and returns: is all well?"""

    summary: str
    examples: tuple[str, ...]
    arguments: Callable[[argparse.ArgumentParser], None]
    work: Callable[[argparse.Namespace, Say], bool]


class Progress:
    """Shows the stages of a run on `stream`: a bar each on a terminal, elsewhere one plain line as each stage starts.

    No colours are ever used, so NO_COLOR has nothing to switch off; a terminal that says it is dumb gets plain lines.
    """

    def __init__(self, stream: TextIO, *, bars: bool):
        self.stream, self.bars, self.start = stream, bars, time.monotonic()

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yields `step(note="")`, to be called once after each of the stage's `total` steps."""
        if not self.bars:
            steps = f" ({total} steps)" if total > 1 else ""
            print(f"[{time.monotonic() - self.start:5.0f} s] {name}{steps}", file=self.stream, flush=True)
            yield lambda note="": None
            return
        from tqdm import tqdm

        with tqdm(total=total, desc=f"{name:<10}", file=self.stream, dynamic_ncols=True) as bar:

            def step(note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update()

            yield step


def draws(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can redraw a line: not a dumb one, nor one that says it has no columns."""
    capable = stream.isatty() and os.environ.get("TERM") != "dumb"
    return capable and os.get_terminal_size(stream.fileno()).columns > 0


def json_argument(parser: argparse.ArgumentParser, each: str = "") -> None:
    """`--json`, the same for every verb."""
    parser.add_argument("--json", action="store_true",
                        help=f"print one JSON object {each} on stdout and nothing else there".replace("  ", " "))


def table(rows: dict[str, str]) -> str:
    """Names and values in two columns, one row a line."""
    width = max(map(len, rows), default=0) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def number(flag: str, text: str | None, expected: str, fits: Callable[[float], bool]) -> float | None:
    """`text` as a number, None where the flag was not given.

    Raises:
        SenteiError: (exit code 2) not a number, or one that does not fit; NaN never fits.
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise SenteiError(flag, expected=expected, got=repr(text), do="correct the number and run the command again")
    return value
