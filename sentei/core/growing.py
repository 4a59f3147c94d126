"""Tokens that are appended to one another: the keys, or the values, that a cache holds."""

import torch

from sentei.core.errors import ShapeError

GROWTH = 1.5  # of the room to what is held, when room is made


class Growing:
    """Rows [B, T, G, D] to which more are appended. Heads lie apart, as attention of one row reads them fastest.

    Args:
        rows: those that are held at first; None for none.
    """

    def __init__(self, rows: torch.Tensor | None = None):
        self.rows, self._room = rows, None

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Adds rows [B, N, G, D] behind the others and returns all of them. What was returned before does not change.

        Raises:
            ShapeError: the rows are of another shape, dtype or device than what is held.
        Cost: a copy of the new rows; and of what is held where gradients may be wanted, or no room is left.
        """
        held = 0 if self.rows is None else self.rows.shape[1]
        if held:
            _check(self.rows, rows)
        length = held + rows.shape[1]
        if torch.is_grad_enabled():  # a graph may hold what was returned before, and must not see it written to
            parts = [part.transpose(1, 2) for part in (self.rows, rows) if part is not None]
            self._room = torch.cat(parts, 2)
        else:
            if not self._takes(length):
                self._make(rows, length)
            self._room[:, :, held:length] = rows.transpose(1, 2)
        self.rows = self._room[:, :, :length].transpose(1, 2)
        return self.rows

    def _takes(self, length: int) -> bool:
        """Whether there is room for so many rows, and it may be written to."""
        return (self._room is not None and length <= self._room.shape[2]
                and (torch.is_inference_mode_enabled() or not self._room.is_inference()))

    def _make(self, rows: torch.Tensor, length: int) -> None:
        """Room for `length` rows and more, with what is held at its beginning."""
        batch, _, groups, width = rows.shape
        self._room = rows.new_empty(batch, groups, int(length * GROWTH) + 1, width)
        if self.rows is not None:
            self._room[:, :, :self.rows.shape[1]] = self.rows.transpose(1, 2)


def _check(held: torch.Tensor, rows: torch.Tensor) -> None:
    known, new = ((x.shape[0], *x.shape[2:], x.dtype, x.device) for x in (held, rows))
    if known != new:
        raise ShapeError("cache", expected=f"rows like the {list(held.shape)} of {held.dtype} that are held",
                         got=f"{list(rows.shape)} of {rows.dtype}", do="begin a new cache")
