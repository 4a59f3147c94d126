"""Experts of one shape as stacked weights, for fast kernels; to the definition they are functions, one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sentei.core.errors import ShapeError
from sentei.core.shapes import check_shape

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
               "identity": lambda x: x}


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

    @classmethod
    def from_joint(cls, gate_up: torch.Tensor, down: torch.Tensor, activation: str = "silu") -> "Stack":
        """Experts whose gates and ups are the halves of one weight, whose gradient then is made in one piece.

        Args:
            gate_up: [E, 2 F, D], gate's rows first.
            down: [E, D_out, F].
            activation: one of ACTIVATIONS.
        Raises:
            ShapeError: as the class does.
        """
        sizes = check_shape("Stack", "gate_up", gate_up, "E G D")
        if sizes["G"] % 2:
            raise ShapeError("Stack", expected="gate_up [E, 2 F, D]", got=str(list(gate_up.shape)),
                             do="put gate's rows and up's into one weight")
        plain = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        wants = gate_up.requires_grad and torch.is_grad_enabled() and not plain
        gate, up = _Halves.apply(gate_up) if wants else gate_up.chunk(2, dim=1)
        return cls(up=up, down=down, gate=gate, activation=activation)

    def __len__(self) -> int:
        return self.up.shape[0]  # len() of a tensor takes longer

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


def firsts_of(up: torch.Tensor, gate: torch.Tensor | None) -> list[torch.Tensor]:
    """The weights of the first products: gate and then up, as one where they are halves of one."""
    if gate is None:
        return [up]
    experts, width, inputs = up.shape
    if (gate.stride() == up.stride() and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
            and up.storage_offset() == gate.storage_offset() + width * up.stride(1)):
        return [gate.as_strided((experts, 2 * width, inputs), gate.stride())]
    return [gate, up]


def activate(products: torch.Tensor, gated: bool, activation: str) -> torch.Tensor:
    """The activations [N, F] of the first products: gate's and up's [N, 2 F], or up's alone."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(products)
    gate, up = products.chunk(2, dim=-1)
    return act(gate) * up


class _Halves(torch.autograd.Function):
    """The halves of [E, 2 F, D]; gradients that lie together already are taken so, in place of three copies."""

    @staticmethod
    def forward(ctx, joint):
        half = joint.shape[1] // 2
        return joint[:, :half], joint[:, half:]

    @staticmethod
    def backward(ctx, first, second):
        experts, half, width = first.shape
        whole = half * 2 * width, width, 1
        if (first.stride() == second.stride() == whole
                and second.storage_offset() == first.storage_offset() + half * width
                and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()):
            return first.as_strided((experts, 2 * half, width), whole)
        return torch.cat((first, second), 1)
