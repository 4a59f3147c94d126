"""weights in a pretrained layer: its feed-forward network keeps some of its neurons, refitted to what it computed.

    y = down_S · hidden_S(x)       down_S = down · G_·S (G_SS)⁻¹       G = Σ hidden hiddenᵀ over calibration text

The neurons S that are kept, and the least squares, are those of `sentei.axes.weights` for a network; the result is an
ordinary, narrower module of the model's own class, so that whatever is fast for the one is fast for the other.
"""

import math

import torch
from torch import nn

from sentei.axes.weights import Config, Network, from_dense, linear_like
from sentei.conversion.layers import Layer
from sentei.conversion.statistics import State
from sentei.core.errors import UnsupportedError
from sentei.core.rules import All, TopK

# A width is a multiple of so many neurons: two registers of fp32, or one of bf16, are then always full.
STEP = 32
SHARES = (0.875, 0.75)


def parts(config: Config) -> tuple[str, ...]:
    """The network."""
    return ("network",)


def wants(config: Config) -> tuple[str, ...]:
    """The second moment of the neurons, unless magnitude alone counts."""
    return () if isinstance(config.rule, All) or config.saliency == "magnitude" else ("network_hidden",)


def options(layer: Layer, lever: str) -> list[Config]:
    """All neurons, then fewer and fewer, in multiples of STEP."""
    width = layer.member("down_proj").in_features
    widths = sorted({STEP * math.floor(share * width / STEP) for share in SHARES} - {0, width}, reverse=True)
    return [Config(saliency="obs"), *(Config(rule=TopK(kept), saliency="obs") for kept in widths)]


def words(config: Config) -> str:
    """How many neurons are kept."""
    return "all" if isinstance(config.rule, All) else f"{getattr(config.rule, 'k', config.rule)} neurons"


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """The narrower network.

    Raises:
        UnsupportedError: weights that are not whole neurons, or a network of other layers.
        RuleError: see `sentei.axes.weights`.
    Cost: a factorisation of F³ and a solution of kept³ multiply-adds in fp64.
    """
    if config.among != "columns":
        raise UnsupportedError("weights", expected="whole neurons (among 'columns')", got=repr(config.among),
                               do="keep this network as it is")
    if isinstance(config.rule, All):
        return layer.places[part]
    calibration = seen.get("network_hidden") if wants(config) else None
    return narrowed(layer, from_dense(network_of(layer), config, calibration).fix(calibration).layer)


@torch.no_grad()
def blank(layer: Layer, part: str, config: Config) -> tuple[nn.Module, ...]:
    """A network as narrow, of weights that are not set.

    Raises:
        UnsupportedError: a rule that does not say how many neurons are kept.
    """
    own = network_of(layer)
    if config.among != "columns" or not isinstance(config.rule, TopK) or config.rule.k < 1:
        raise UnsupportedError("weights", expected="whole neurons and the rule TopK", got=str(config)[:200],
                               do="name the number of neurons that are kept")
    kept = torch.arange(min(config.rule.k, own.down.in_features))
    up, gate = (linear and linear_like(linear, linear.weight[kept], linear.bias, kept) for linear in (own.up, own.gate))
    return narrowed(layer, Network(up, linear_like(own.down, own.down.weight[:, kept], own.down.bias), gate,
                                   own.activation))


def network_of(layer: Layer) -> Network:
    """A layer's own feed-forward network, whatever its family calls the parts.

    Raises:
        UnsupportedError: one of other parts.
    """
    up, down, gate, act = (layer.member(name) for name in ("up_proj", "down_proj", "gate_proj", "act_fn"))
    if not isinstance(up, nn.Linear) or not isinstance(down, nn.Linear) or act is None:
        raise UnsupportedError("convert", expected="a feed-forward network of linear layers and an activation",
                               got=str(layer.network)[:200], do="keep this network as it is")
    return Network(up, down, gate, act)


def narrowed(layer: Layer, network: Network) -> tuple[nn.Module, ...]:
    """The modules of a layer's network with the linear layers of `network`; the rest is shared."""
    gate = {} if network.gate is None else {"gate_proj": network.gate}
    made = layer.rebuilt("network", {"up_proj": network.up, "down_proj": network.down, **gate})
    made[0].intermediate_size = network.down.in_features
    return made
