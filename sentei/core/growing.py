"""Tokens that are appended to one another: the keys, or the values, that a cache holds."""

from __future__ import annotations

import torch

from sentei.core.errors import ShapeError

GROWTH = 1.5  # of the room to what is held, when room is made


class Growing:
    """Rows [B, T, G, D] that others can follow: a value, which an append does not change.

    What follows is written into room behind the rows, where heads lie apart, as attention of one row reads them
    fastest. The room is that of whoever followed first: another who appends to the same rows gets room of its own.

    Args:
        rows: those that are held; None for none.
    """

    def __init__(self, rows: torch.Tensor | None = None):
        self.rows, self._room = rows, None

    def append(self, rows: torch.Tensor) -> Growing:
        """These rows, and behind them rows [B, N, G, D].

        Raises:
            ShapeError: the rows are of another shape, dtype or device than what is held.
        Cost: a copy of the new rows; and of what is held where there is no room, gradients may be wanted, or a graph
            is being compiled.
        """
        if self.rows is None:
            return Growing(rows)
        _check(self.rows, rows)
        # A graph of gradients may hold what was returned before; nor can a compiled one ask for room.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return Growing(torch.cat([part.transpose(1, 2) for part in (self.rows, rows)], 2).transpose(1, 2))
        held, length = self.rows.shape[1], self.rows.shape[1] + rows.shape[1]
        room = self._room if self._room is not None and self._room.takes(held, length) else _Room(self.rows, length)
        longer = Growing(room.written(rows, held))
        longer._room = room
        return longer


class _Room:
    """Memory [B, G, N, D] of which `used` tokens are written."""

    def __init__(self, rows: torch.Tensor, length: int):
        batch, held, groups, width = rows.shape
        self.memory = rows.new_empty(batch, groups, int(length * GROWTH) + 1, width)
        self.memory[:, :, :held] = rows.transpose(1, 2)
        self.used = held

    def takes(self, held: int, length: int) -> bool:
        """Whether what would follow `held` tokens, up to `length`, is not written yet, has room and may be written."""
        return (held == self.used and length <= self.memory.shape[2]
                and (torch.is_inference_mode_enabled() or not self.memory.is_inference()))

    def written(self, rows: torch.Tensor, held: int) -> torch.Tensor:
        """Everything, [B, T, G, D], with the rows behind what is held.

        `data`, because nobody has been given what is written to: a graph that holds earlier rows need not know of it.
        """
        self.used = held + rows.shape[1]
        self.memory.data[:, :, held:self.used] = rows.transpose(1, 2)
        return self.memory[:, :, :self.used].transpose(1, 2)


def _check(held: torch.Tensor, rows: torch.Tensor) -> None:
    known, new = ((x.shape[0], *x.shape[2:], x.dtype, x.device) for x in (held, rows))
    if known != new:
        raise ShapeError("cache", expected=f"rows like the {list(held.shape)} of {held.dtype} that are held",
                         got=f"{list(rows.shape)} of {rows.dtype}", do="begin a new cache")
