"""weights in a pretrained layer: its feed-forward network keeps some of its neurons, refitted to what it computed.

    y = down_S · hidden_S(x)       down_S = down · G_·S (G_SS)⁻¹       G = Σ hidden hiddenᵀ over calibration text

The neurons S that are kept, and the least squares, are those of `sentei.axes.weights` for a network; the result is an
ordinary, narrower module of the model's own class, so that whatever is fast for the one is fast for the other.
"""

import copy
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
    width = layer.network.down_proj.in_features
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
    original = layer.network
    names = {name for name, _ in original.named_children()}
    if config.among != "columns" or not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= names:
        raise UnsupportedError("weights", expected="whole neurons (among 'columns') of a gated network",
                               got=f"{config.among!r} of {sorted(names)}", do="keep this network as it is")
    if isinstance(config.rule, All):
        return (original,)
    network = Network(original.up_proj, original.down_proj, original.gate_proj, original.act_fn)
    calibration = seen.get("network_hidden") if wants(config) else None
    found = from_dense(network, config, calibration).fix(calibration).layer
    return (narrowed(original, found),)


@torch.no_grad()
def blank(layer: Layer, part: str, config: Config) -> tuple[nn.Module, ...]:
    """A network as narrow, of weights that are not set.

    Raises:
        UnsupportedError: a rule that does not say how many neurons are kept.
    """
    own = layer.network
    if config.among != "columns" or not isinstance(config.rule, TopK) or config.rule.k < 1:
        raise UnsupportedError("weights", expected="whole neurons and the rule TopK", got=str(config)[:200],
                               do="name the number of neurons that are kept")
    kept = torch.arange(min(config.rule.k, own.down_proj.in_features))
    up, gate = (linear_like(part, part.weight[kept], part.bias, kept) for part in (own.up_proj, own.gate_proj))
    down = linear_like(own.down_proj, own.down_proj.weight[:, kept], own.down_proj.bias)
    return (narrowed(own, Network(up, down, gate, own.act_fn)),)


def narrowed(original: nn.Module, network: Network) -> nn.Module:
    """A module like `original` that holds the layers of `network`; the rest is shared."""
    made = copy.copy(original)
    made._modules = dict(original._modules)
    made.gate_proj, made.up_proj, made.down_proj = network.gate, network.up, network.down
    made.intermediate_size = network.down.in_features
    return made
