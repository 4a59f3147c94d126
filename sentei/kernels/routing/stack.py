"""Experts of one shape as stacked weights, for fast kernels; to the definition they are functions, one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sentei.core.errors import ShapeError
from sentei.core.shapes import check_shape

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack(Sequence[Callable[[torch.Tensor], torch.Tensor]]):
    """E feed-forward networks of one shape.

        expert_e(x) = down_e (act(gate_e x) · up_e x),   or down_e act(up_e x) without a gate

    Args:
        up: [E, F, D]; rows (the last dimension) may be strided views of a joint gate-and-up weight.
        down: [E, D_out, F].
        gate: [E, F, D], or None.
        activation: one of ACTIVATIONS.
    Raises:
        ShapeError: shapes, dtypes or devices that do not fit, or an unknown activation.
    """

    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None = None
    activation: str = "silu"

    def __post_init__(self):
        sizes = check_shape("Stack", "up", self.up, "E F D")
        check_shape("Stack", "down", self.down, "E O F", E=sizes["E"], F=sizes["F"])
        if self.gate is not None:
            check_shape("Stack", "gate", self.gate, "E F D", **sizes)
        kinds = {(weight.dtype, weight.device) for weight in self.weights()}
        if len(kinds) > 1 or self.activation not in ACTIVATIONS:
            raise ShapeError("Stack", expected=f"one dtype and device, an activation of {', '.join(ACTIVATIONS)}",
                             got=f"{', '.join(map(str, kinds))}, {self.activation!r}", do="convert the weights")

    def __len__(self) -> int:
        return len(self.up)

    def __getitem__(self, e: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Expert e, a function from [N, D] to [N, D_out]."""
        if not -len(self) <= e < len(self):
            raise IndexError(e)
        act = ACTIVATIONS[self.activation]

        def expert(x: torch.Tensor) -> torch.Tensor:
            hidden = F.linear(x, self.up[e])
            hidden = act(hidden) if self.gate is None else act(F.linear(x, self.gate[e])) * hidden
            return F.linear(hidden, self.down[e])

        return expert

    def weights(self) -> tuple[torch.Tensor, ...]:
        """Up, down and, if there is one, gate."""
        return (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)
