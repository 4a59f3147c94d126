"""How many keys a query keeps, and which it always keeps."""

from dataclasses import dataclass

import torch

from sentei.core.errors import RuleError
from sentei.core.rules import MAX_K
from sentei.kernels.attention.tiles import Grid


@dataclass(frozen=True)
class Choice:
    """The k keys of the highest scores; ties go to the lower key.

    Args:
        k: how many, as far as as many are permitted.
        window: None, or the first real key, the query's own and the `window` before it count first, whatever their
            scores and be they more than k.
    Raises:
        RuleError: a number out of range.
    """

    k: int
    window: int | None = None

    def __post_init__(self):
        numbers = (self.k,) if self.window is None else (self.k, self.window)
        if not all(type(number) is int and 0 <= number <= MAX_K for number in numbers):
            raise RuleError("attend_topk", expected=f"k and window as whole numbers from 0 to {MAX_K}",
                            got=repr(numbers)[:200], do="choose others")

    def slots(self, num_keys: int) -> int:
        """The most keys a query can keep of `num_keys`."""
        return min(num_keys, self.k if self.window is None else max(self.k, self.window + 2))

    def forced(self, positions: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Bool [B or 1, Q, Tk]: the keys that count first for queries at `positions`, int64 [Q], permitted or not."""
        keys = torch.arange(grid.num_keys, device=positions.device)
        if self.window is None:
            return torch.zeros(1, len(positions), len(keys), dtype=torch.bool, device=positions.device)
        start = grid.bounds(positions.device)[0].view(-1, 1, 1).clamp(min=0)
        return (keys == start) | (keys >= positions[:, None] - self.window)
