"""What several experiments build their models of."""

from torch import nn

from sentei.axes import experts
from sentei.axes.experts.gates import Gate
from sentei.core.rules import Rule, TopK
from sentei.model import Config, Routed, Transformer
from sentei.model.slots import GatedFeedForward


def mixture(number: int, rule: Rule | int, unit: int, gate: Gate, shared: int = 0) -> Routed:
    """A feed-forward layer of `number` experts of `unit` neurons, of which a token keeps what the rule says."""
    rule = TopK(rule) if isinstance(rule, int) else rule
    room = experts.Config(rule=rule, gate=gate, unit=unit, shared=shared)
    return Routed(neurons=(number + shared) * unit, room=room)


def transformer(**shape: object) -> Transformer:
    """A model whose feed-forward layers begin as `nn.Linear` does, with variances of 1 ÷ (3 · inputs).

    The model's own small ones learn more slowly in a training as short as these. The inputs of the last projection
    are the neurons that a token keeps, so that the width of an expert does not matter, nor what a gate's weights add up
    to (see `MixtureOfExperts.draw`).
    """
    model = Transformer(Config(**shape))
    for layer in model.modules():
        if isinstance(layer, experts.MixtureOfExperts):
            layer.draw()
        elif isinstance(layer, GatedFeedForward):
            for part in (layer.gate, layer.up, layer.down):
                nn.init.uniform_(part.weight, -(part.in_features ** -0.5), part.in_features ** -0.5)
    return model
