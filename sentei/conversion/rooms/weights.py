"""weights in a pretrained layer: its feed-forward network keeps some of its neurons, refitted to what it computed.

    y = down_S · hidden_S(x)       down_S = down · G_·S (G_SS)⁻¹       G = Σ hidden hiddenᵀ over calibration text

The neurons S that are kept, and the least squares, are those of `sentei.axes.weights` for a network; the result is an
ordinary, narrower module of the model's own class, so that whatever is fast for the one is fast for the other.

A mixture keeps some of its experts, for every token, and the router's rows for them: those that added most to what the
network gave over calibration text, the mean of w_te ‖expert_e(x_t)‖ over the tokens that kept e. As many experts as
before are chosen for a token: memory shrinks, and time where fewer weights are read.
Reference: REAP 2510.13999.
"""

import math

import torch
from torch import nn

from sentei.axes.weights import OF_EXPERTS, Config, Network, from_dense, linear_like
from sentei.conversion.layers import Layer
from sentei.conversion.sparing import is_mixture, sizes_of, without
from sentei.conversion.statistics import State
from sentei.core.errors import UnsupportedError
from sentei.core.rules import All, TopK

# A width is a multiple of so many neurons: two registers of fp32, or one of bf16, are then always full.
STEP = 32
SHARES = (0.875, 0.75)
EXPERTS = (0.75, 0.5)  # the same of the experts of a mixture


def parts(config: Config) -> tuple[str, ...]:
    """The network."""
    return ("network",)


def wants(config: Config) -> tuple[str, ...]:
    """The second moment of the neurons, unless magnitude alone counts; of experts what they add."""
    if config.among == "experts" and not isinstance(config.rule, All):
        return ("network_experts",)
    return () if isinstance(config.rule, All) or config.saliency == "magnitude" else ("network_hidden",)


def options(layer: Layer, lever: str) -> list[Config]:
    """All neurons, then fewer and fewer, in multiples of STEP; or experts, no fewer than a token keeps."""
    if is_mixture(layer):
        number, least, _ = sizes_of(layer)
        counts = sorted({max(least, math.ceil(share * number)) for share in EXPERTS} - {number}, reverse=True)
        saliency, among = OF_EXPERTS
        return [Config(saliency=saliency, among=among, rule=rule) for rule in (All(), *map(TopK, counts))]
    width = layer.member("down_proj").in_features
    widths = sorted({STEP * math.floor(share * width / STEP) for share in SHARES} - {0, width}, reverse=True)
    return [Config(saliency="obs"), *(Config(rule=TopK(kept), saliency="obs") for kept in widths)]


def words(config: Config) -> str:
    """How many neurons, or experts, are kept."""
    kept = f"{getattr(config.rule, 'k', config.rule)} {'experts' if config.among == 'experts' else 'neurons'}"
    return "all" if isinstance(config.rule, All) else kept


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """The narrower network, or that of fewer experts.

    Raises:
        UnsupportedError: weights that are not whole neurons, or experts of a mixture; or a network of other layers.
        RuleError: see `sentei.axes.weights`.
    Cost: a factorisation of F³ and a solution of kept³ multiply-adds in fp64; of experts, a copy of those kept.
    """
    _check(layer, config)
    if isinstance(config.rule, All):
        return layer.places[part]
    if is_mixture(layer):
        kept = seen["network_experts"].saliency.topk(_number(layer, config)).indices
        return without(layer, kept.sort().values)
    calibration = seen.get("network_hidden") if wants(config) else None
    return narrowed(layer, from_dense(network_of(layer), config, calibration).fix(calibration).layer)


@torch.no_grad()
def blank(layer: Layer, part: str, config: Config) -> tuple[nn.Module, ...]:
    """A network as narrow, or of as few experts, of weights that are not set.

    Raises:
        UnsupportedError: a rule that does not say how many neurons are kept.
    """
    _check(layer, config)
    if is_mixture(layer):
        return without(layer, torch.arange(_number(layer, config)))
    own = network_of(layer)
    if not isinstance(config.rule, TopK) or config.rule.k < 1:
        raise UnsupportedError("weights", expected="whole neurons and the rule TopK", got=str(config)[:200],
                               do="name the number of neurons that are kept")
    kept = torch.arange(min(config.rule.k, own.down.in_features))
    up, gate = (linear and linear_like(linear, linear.weight[kept], linear.bias, kept) for linear in (own.up, own.gate))
    return narrowed(layer, Network(up, linear_like(own.down, own.down.weight[:, kept], own.down.bias), gate,
                                   own.activation))


def _check(layer: Layer, config: Config) -> None:
    """Raises UnsupportedError unless what competes is what such a layer is made of."""
    among = "experts" if is_mixture(layer) else "columns"
    if config.among != among:
        raise UnsupportedError("weights", expected=f"whole {'experts' if is_mixture(layer) else 'neurons'} (among "
                               f"{among!r})", got=repr(config.among), do="keep this network as it is")


def _number(layer: Layer, config: Config) -> int:
    """How many experts of a mixture a configuration keeps.

    Raises:
        UnsupportedError: fewer than a token keeps, more than there are, or a rule that does not say.
    """
    number, least, _ = sizes_of(layer)
    kept = getattr(config.rule, "k", None)
    if type(kept) is not int or not least <= kept <= number:
        raise UnsupportedError("weights", expected=f"the rule TopK of {least} to {number} experts",
                               got=str(config.rule)[:200], do="name how many of the experts are kept")
    return kept


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
