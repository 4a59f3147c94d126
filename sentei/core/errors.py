"""Errors in four parts: where, what was expected, what came instead, what to do.

Every error sentei raises on purpose is a `SenteiError`; its class fixes the exit code of the command line.
"""


class SenteiError(ValueError):
    """Something the caller can mend, told in four parts.

    Args:
        where: the room, file or argument at fault, e.g. "connections" or "config.json".
        expected: what would have been right.
        got: what came instead.
        do: the next step for the reader, as an instruction.
    """

    exit_code = 2

    def __init__(self, where: str, *, expected: str, got: str, do: str):
        self.where, self.expected, self.got, self.do = where, expected, got, do
        super().__init__(f"{where}: expected {expected}, got {got}; {do}")

    def lines(self) -> str:
        """The same four parts, one a line, for a terminal: what a terminal would obey is escaped."""
        parts = {"error    ": self.where, "expected ": self.expected, "got      ": self.got, "do this  ": self.do}
        return "\n".join(name + "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in part)
                         for name, part in parts.items())


class ShapeError(SenteiError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class RuleError(SenteiError):
    """A rule or a budget outside its range."""


class ImplError(SenteiError):
    """A kernel asked for by name that cannot run here."""


class FileError(SenteiError):
    """A file that is missing, malformed or not to be trusted."""

    exit_code = 3


class ResourceError(SenteiError):
    """Not enough memory, disk or time."""

    exit_code = 4


class UnsupportedError(SenteiError):
    """A model, layer or feature sentei has no conversion for."""

    exit_code = 5


def require(where: str, got: object, checks: dict[str, bool]) -> None:
    """Raises a SenteiError for the first of `checks`, from what is expected to whether it holds, that does not hold."""
    for expected, holds in checks.items():
        if not holds:
            raise SenteiError(where, expected=expected, got=repr(got)[:400], do="change that and try again")


def shown(value: object, longest: int = 120) -> str:
    """A stranger's value made safe for a terminal: printable ASCII, shortened to `longest` characters."""
    text = ascii(str(value) if isinstance(value, Exception) else value)
    return text if len(text) <= longest else text[:longest] + "…"
