"""How a run is shared among processes, and what the loop asks of the processes it runs in.

Where there is one process nothing of `distributed.py` is imported and no process group exists.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from sentei.core.errors import require
from sentei.training import checkpoints

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the processes that `torchrun` starts share a model. Each reads its part of every batch, whatever stands here.

    Args:
        shard: weights, gradients and moments are cut over all processes (FSDP2); else each process has all of them.
        experts: processes that share the experts of a layer; tokens travel to them. It divides their number.
    """

    shard: bool = False
    experts: int = 1

    def __post_init__(self):
        require("parallel", self, {"shard a bool": isinstance(self.shard, bool),
                                   "experts from 1": type(self.experts) is int and 1 <= self.experts <= 1 << 16})


class World:
    """The processes of a run: here the only one. `distributed.Processes` are several.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def place(self, model: nn.Module, config: Config) -> None:
        """Cuts `model`, which all processes have made alike, in place.

        Raises:
            SenteiError: a model or number of processes that cannot be cut so.
        """
        require("parallel.experts", config.experts, {
            "1, as there is one process; or more processes, by torchrun": config.experts == 1})

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of a batch [B, …] that this process computes; equally many where that is possible."""
        return rows[self.rank::self.size]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the processes' tensors, in place; all of the same shape."""
        return tensor

    def clip(self, parameters: list[nn.Parameter], largest: float) -> float:
        """Limits the norm of the gradients of the mean loss of all processes, in place; returns what it was."""
        return nn.utils.clip_grad_norm_(parameters, largest).item()

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """`work()`, in the first process before the others."""
        return work()

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors on the CPU, put together; in other processes than the first nothing."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(self, folder: Path, step: int, tensors: dict[str, torch.Tensor], about: dict) -> None:
        """See `checkpoints.save`."""
        checkpoints.save(folder, step, tensors, about)


@contextmanager
def world() -> Iterator[World]:
    """The processes of this run, joined for as long as the block lasts: those that `torchrun` started, or one.

    Raises:
        ResourceError: another process was lost.
    """
    several = torch.distributed.is_available() and (
        torch.distributed.is_initialized() or torch.distributed.is_torchelastic_launched())
    if not several:
        yield World()
        return
    from sentei.training.distributed import joined

    with joined() as processes:
        yield processes
