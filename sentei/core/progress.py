"""Who is told how far a job is."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Who is told how far the job is."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[str], object]]:
        """A context for one stage of `total` steps; it yields what to call after each."""


class Silent:
    """Progress nobody sees."""

    @contextmanager
    def stage(self, name: str, total: int):
        """Yields a step that does nothing."""
        yield lambda note="": None
