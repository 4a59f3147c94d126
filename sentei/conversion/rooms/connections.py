"""connections in a pretrained layer: a child of its attention, which transformers' attention interface calls.

It looks at the queries, keys and values of every call and needs nothing from calibration.
"""

from dataclasses import replace

from torch import nn

from sentei.axes.connections import Config, Connections
from sentei.conversion.layers import Layer
from sentei.conversion.statistics import State
from sentei.core.rules import All, Rule, Threshold


def parts(config: Config) -> tuple[str, ...]:
    """The attention."""
    return ("attention",)


def wants(config: Config) -> tuple[str, ...]:
    """Nothing."""
    return ()


def rules(lever: str) -> list[Rule]:
    """The rules worth trying, the one that keeps everything first.

    For a prompt that is the dense layer. For decoding it is our kernel on all pages: a layer that stays dense would
    keep transformers' cache, which is copied for every token.
    """
    if lever == "decode":
        return [Threshold(ratio) for ratio in (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)]
    return [All(), *(Threshold(ratio) for ratio in (0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32))]


def options(layer: Layer, lever: str) -> list[Config]:
    """One configuration a rule, which the field `lever` holds."""
    return [replace(Config(), **{lever: rule}) for rule in rules(lever)]


def words(config: Config) -> str:
    """The rule of what is pruned."""
    rule = config.rule if isinstance(config.decode, All) else config.decode
    return " ".join([type(rule).__name__.lower(), *map(str, vars(rule).values())])


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """The room."""
    return (Connections(config, causal=layer.family.causal),)
