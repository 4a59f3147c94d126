"""experts in a pretrained layer: a token keeps some neurons of its feed-forward network, by what their gates say.

    y = Σ over the neurons f kept of  act(gate_f x) · (up_f x) · down_f

Nothing is trained and no weight is changed: a neuron's score is |act(gate_f x)| times the size of what it is usually
multiplied with, √E (up_f x)² · ‖down_f‖. Few tokens read the rows they keep and no others, for which the last
projection is held a second time, a row a neuron; of more tokens every neuron is computed, which saves nothing.
References: CATS 2404.08763; WINA 2505.19427 (the norm of what follows in the score).
"""

import torch
from torch import nn

from sentei.axes.experts import Config
from sentei.axes.experts.gates import Unit
from sentei.axes.experts.neurons import Neurons
from sentei.conversion.layers import Layer
from sentei.conversion.statistics import State
from sentei.core.errors import UnsupportedError
from sentei.core.rules import All, TopK

SHARES = (0.75, 0.625, 0.5, 0.375, 0.25)


def parts(config: Config) -> tuple[str, ...]:
    """The network."""
    return ("network",)


def wants(config: Config) -> tuple[str, ...]:
    """How large what the gates multiply is."""
    return () if isinstance(config.rule, All) else ("network_neurons",)


def options(layer: Layer, lever: str) -> list[Config]:
    """All neurons, then fewer and fewer."""
    width = layer.network.down_proj.in_features
    return [Config(unit=1), *(Config(rule=TopK(round(share * width)), unit=1) for share in SHARES)]


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """The network whose tokens choose.

    Raises:
        UnsupportedError: experts of more than a neuron, a gate that weighs, or a network of other layers.
    """
    original = layer.network
    layers = [getattr(original, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(isinstance(linear, nn.Linear) and linear.bias is None for linear in layers)
    if config.unit != 1 or config.shared or not isinstance(config.gate, Unit) or not plain:
        raise UnsupportedError("experts", expected="unit 1, the gate Unit, and a gated network without biases",
                               got=f"{config} for {original}"[:300], do="keep this network as it is")
    if isinstance(config.rule, All):
        return (original,)
    return (ChoosingNetwork(original, config, seen["network_neurons"]),)


class ChoosingNetwork(nn.Module):
    """A gated network that shares the weights of `original`; each token computes the neurons it keeps.

    `neurons` is the room. Beside the weights it holds the last projection once more, with a row a neuron.
    """

    def __init__(self, original: nn.Module, config: Config, activity: State):
        super().__init__()
        self.gate_proj, self.up_proj, self.act_fn = original.gate_proj, original.up_proj, original.act_fn
        self.neurons = Neurons(config.rule)
        down = original.down_proj.weight.detach()
        size = (activity.size.to(down.device) * down.double().norm(dim=0)).float()
        tiny = torch.finfo(torch.float32).tiny
        self.register_buffer("rows", down.T.contiguous(), persistent=False)
        self.register_buffer("scale", size.clamp(min=tiny), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., T, D] of x [..., T, D]."""
        acts = self.act_fn(self.gate_proj(x))
        return self.neurons(x, acts, self.scale, self.up_proj.weight, self.rows)
