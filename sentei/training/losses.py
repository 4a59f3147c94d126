"""What is minimised: the loss of the next token, and whatever rooms add for themselves."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sentei.core.tracing import trace

# Opened around one forward pass; what it yields gives, after that pass, a number to be added to the loss, or None.
Term = Callable[[nn.Module], AbstractContextManager[Callable[[], torch.Tensor | None]]]


def next_token(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of each token after the first, in nats; float32 or wider.

    Args:
        model: from tokens [B, T] to logits [B, T, V].
        windows: int64 [B, T + 1].
    """
    logits = model(windows[:, :-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.flatten(0, 1).to(wide), windows[:, 1:].flatten())


@contextmanager
def of_rooms(model: nn.Module) -> Iterator[Callable[[], torch.Tensor | None]]:
    """The term of the rooms that offer `auxiliary(records)`, a weighed loss made of their records of the pass.

    A record is detached; a room whose loss needs a gradient holds the numbers it is made of itself, until it is asked.
    Without such a room nothing is traced.
    """
    rooms = [(path, module) for path, module in model.named_modules() if hasattr(module, "auxiliary")]
    if not rooms:
        yield lambda: None
        return
    with trace(model) as records:
        yield lambda: sum(room.auxiliary(records.at(path)) for path, room in rooms)
