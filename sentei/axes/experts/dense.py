"""Dense feed-forward networks: reading one, whatever library it is from, and making one of chosen experts."""

import torch
from torch import nn

from sentei.core.errors import ShapeError
from sentei.kernels.routing.stack import ACTIVATIONS, Stack


class FeedForward(nn.Module):
    """A dense feed-forward network, x [..., D] → [..., D]: down (act(gate x) · up x), or down act(up x).

    Args:
        width: D.
        neurons: F.
        gated: with a gate.
        activation: a name of `ACTIVATIONS`.
        bias: on the last projection.
    """

    def __init__(self, width: int, neurons: int, *, gated: bool = True, activation: str = "silu", bias: bool = False):
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(width, neurons, bias=False) if gated else None
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = nn.Linear(neurons, width, bias=bias)

    def draw(self, *, up: float, down: float) -> None:
        """Draws the weights anew, normal, of these standard deviations: the first projections' and the last one's."""
        for part, spread in ((self.gate_proj, up), (self.up_proj, up), (self.down_proj, down)):
            if part is not None:
                nn.init.normal_(part.weight, std=spread)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The network's answer."""
        act = ACTIVATIONS[self.activation]
        up = self.up_proj(x)
        return self.down_proj(act(up) if self.gate_proj is None else act(self.gate_proj(x)) * up)


@torch.no_grad()
def joined(stack: Stack, shared: FeedForward | None, bias: torch.Tensor | None) -> FeedForward:
    """The dense layer that is the sum of all experts of `stack`, of `shared` and of `bias`."""
    gated = stack.gate is not None
    up, gate, down = (None if w is None else w.flatten(0, 1) for w in (stack.up, stack.gate, stack.down.mT))
    if shared is not None:
        up, down = torch.cat([shared.up_proj.weight, up]), torch.cat([shared.down_proj.weight.mT, down])
        gate = torch.cat([shared.gate_proj.weight, gate]) if gated else None
    dense = FeedForward(up.shape[1], len(up), gated=gated, activation=stack.activation, bias=bias is not None)
    dense.to(device=up.device, dtype=up.dtype)
    dense.up_proj.weight.copy_(up)
    dense.down_proj.weight.copy_(down.mT)
    if gated:
        dense.gate_proj.weight.copy_(gate)
    if bias is not None:
        dense.down_proj.bias.copy_(bias)
    return dense


def parts(layer: nn.Module) -> tuple[nn.Linear | None, nn.Linear, nn.Linear, str]:
    """The gate, the first and the last projection of a dense feed-forward layer, and the name of its activation."""
    if isinstance(layer, nn.Sequential) and len(layer) == 3:
        gate, (up, act, down) = None, layer
    else:
        gate, up, down = (getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
        act = ACTIVATIONS[layer.activation] if isinstance(layer, FeedForward) else getattr(layer, "act_fn", None)
    linear = [part for part in (gate, up, down) if part is not None]
    # An activation is what it does: names differ from library to library.
    probe = torch.linspace(-4, 4, 101)
    same = [name for name, known in ACTIVATIONS.items() if callable(act) and torch.allclose(act(probe), known(probe),
                                                                                           rtol=0, atol=1e-6)]
    plain = len(linear) >= 2 and all(isinstance(part, nn.Linear) for part in linear) and down is not None
    if not plain or not same or any(part.bias is not None for part in linear[:-1]):
        raise ShapeError("experts", expected="a feed-forward layer of linear layers, without a bias before the "
                         f"activation, which is {', '.join(ACTIVATIONS)}", got=repr(layer)[:300],
                         do="build a MixtureOfExperts and copy the weights by hand")
    return gate, up, down, same[0]
