"""What gated MLPs, norms and heads are given, whoever computes them."""

from typing import NamedTuple

import torch
from torch import nn

ACTIVATIONS = {"silu": nn.functional.silu, "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh")}

Layer = tuple[torch.Tensor, torch.Tensor | None]  # weight [O, I], and bias [O] or None


class Turn(NamedTuple):
    """What a query and a key go through after their linear layers: an RMS norm, and the rotary embedding.

    Args:
        cosine, sine: [N, D] or with ones before; row r is turned by row r mod N, number j together with j + D / 2.
        query_norm, key_norm: [D] or None.
        epsilon, shift: as of `norm`.
    """

    cosine: torch.Tensor
    sine: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0
    shift: float = 0.0
