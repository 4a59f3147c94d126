"""What a block remembers of earlier tokens: keys and values that are appended to one another."""

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


class Cache:
    """What one block remembers between calls of a generation: the rows it kept, and how many tokens it was shown.

    `seen` int64 [B]; `positions` int64 [B, P], -1 where a slot of the batch holds fewer than P rows; `keys` and
    `values` of [B, P, G, D]. The real rows of a slot are its last.
    """

    def __init__(self):
        self.seen = self.positions = None
        self.keys, self.values = Growing(), Growing()

    @property
    def is_empty(self) -> bool:
        """Whether it holds no keys."""
        return self.keys.rows is None

    def show(self, tokens: torch.Tensor) -> None:
        """Counts the tokens [B] of a call, kept or not."""
        self.seen = tokens if self.seen is None else self.seen + tokens

    def extend(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
               ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends key and value [B, N, G, D] of the rows at `positions` [B, N], -1 for padding; returns all of them.

        Cost: that of `Growing`; a copy of what is held where there is padding among the new rows.
        """
        is_padded = bool((positions < 0).any())  # what is held has its own in front already
        self.keys, self.values = self.keys.append(key), self.values.append(value)
        if self.positions is not None:
            positions = torch.cat([self.positions, positions], 1)
        if is_padded:
            real = positions >= 0
            order = torch.sort(real, dim=1, stable=True).indices[:, real.shape[1] - int(real.sum(1).max()):]
            self.keys, self.values = (Growing(x.rows.take_along_dim(order[..., None, None], 1))
                                      for x in (self.keys, self.values))
            positions = positions.gather(1, order)
        self.positions = positions
        return self.keys.rows, self.values.rows


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
