"""depth in a pretrained layer: its attention, its network, or both are left out, for every token.

    y = x + attention(norm(x))   becomes   y = x          and likewise for the network

In an encoder, whose norms stand behind the sums, they go with the part: there, too, y = x. Attention that is left out
writes no keys and values: nothing reads them, and caches number their layers as before. The first layer of each kind of
attention cannot lose its attention, because transformers reads the length of a cache there.
References: ShortGPT 2403.03853 (whole layers), Router-Tuning 2410.13184 (attention is what can go first).
"""

import torch
from torch import nn

from sentei.axes.depth import Config
from sentei.conversion.layers import Layer
from sentei.conversion.statistics import State
from sentei.core.errors import UnsupportedError
from sentei.core.rules import All, Fixed


def parts(config: Config) -> tuple[str, ...]:
    """Those that are left out."""
    return ("attention", "network") if config.part == "block" else (config.part,)


def wants(config: Config) -> tuple[str, ...]:
    """Nothing: what is left out needs no fitting."""
    return ()


def options(layer: Layer, lever: str) -> list[Config]:
    """All is kept; or the attention, the network or both are left out."""
    return [Config(), *(Config(rule=Fixed(()), part=part) for part in ("attention", "network", "block")
                        if part == "network" or not layer.leads)]


def words(config: Config) -> str:
    """What is left out."""
    return "all" if isinstance(config.rule, All) else f"no {config.part}"


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """What adds nothing to the stream, and norms that do nothing around it.

    Raises:
        UnsupportedError: a rule that neither keeps all nor nothing, or the attention a cache's length is read from.
    """
    if isinstance(config.rule, All):
        return (getattr(layer, part),)
    if not isinstance(config.rule, Fixed) or config.rule.ids:
        raise UnsupportedError("depth", expected="the rule All, or Fixed(()) to leave a part out", got=str(config.rule),
                               do="choose one of the two: choosing by token must be trained")
    if part == "attention" and layer.leads:
        raise UnsupportedError("depth", expected="a layer whose keys are not needed for the length of the cache",
                               got=f"layer {layer.index}", do="leave out the attention of later layers")
    return (NoAttention() if part == "attention" else NoNetwork(),
            *(Stream() for _ in (*layer.places[part][1:], *layer.norms[part])))


def blank(layer: Layer, part: str, config: Config) -> tuple[nn.Module, ...]:
    """The same: there are no weights."""
    return build(layer, part, config, {})


class Stream(nn.Module):
    """Gives the stream it is given: alone where a norm stands, behind what would be added to it where an encoder adds.

    A norm in front of what is left out need not be computed.
    """

    def forward(self, *states: torch.Tensor) -> torch.Tensor:
        """The last of them."""
        return states[-1]


class NoNetwork(nn.Module):
    """Adds nothing: a zero that broadcasts, [1] for hidden [B, T, D]."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zero."""
        return hidden_states.new_zeros(1)


class NoAttention(nn.Module):
    """Adds nothing, called as transformers calls attention; it neither reads nor writes the cache."""

    def forward(self, hidden_states: torch.Tensor, *args, **named) -> tuple[torch.Tensor, None]:
        """Zero, and no attention weights."""
        return hidden_states.new_zeros(1), None
