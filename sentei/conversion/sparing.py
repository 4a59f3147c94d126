"""A layer of transformers that is a mixture of experts already, with fewer: dropped for all tokens or skipped by some.

    y_t = Σ over the experts e that the layer's own router chose for t of  w_te · expert_e(x_t)

Dropped experts leave the stacked weights and the router's rows, and the layer stays a module of the model's own class.
Skipped ones stay, and a token leaves out those of its router's choice that weigh little beside its largest. The
weights that are left are what the router would have given had it chosen no others: made to add up where the family
makes them so, and shares among all experts where it does not.
References: skipping Lu et al. 2024, arXiv 2402.14800 (NAEE); dropping by what an expert adds 2510.13999 (REAP).
"""

from dataclasses import replace

import torch
from torch import nn

from sentei.axes.experts import Config, Experts
from sentei.axes.experts.gates import Gate, Renormalised, Softmax
from sentei.conversion.experts import activation_of, is_plain
from sentei.conversion.layers import Layer, copied, family_of
from sentei.core.errors import UnsupportedError
from sentei.core.precision import widened
from sentei.core.rules import All

STACKED = ("gate_up_proj", "down_proj")


def choice_path(model: nn.Module, layer: int) -> str:
    """Where the room stands in a layer whose tokens skip experts."""
    family = family_of(model)
    return f"{family.layers}.{layer}.{family.members.get('experts', 'mlp')}.choice"


def is_mixture(layer: Layer) -> bool:
    """Whether the layer's family makes it a mixture of experts."""
    return layer.family.mixture is not None


def sizes_of(layer: Layer) -> tuple[int, int, int]:
    """The experts of a mixture, how many of them its router chooses for a token, and the neurons of one."""
    number, _, neurons = layer.member("experts").down_proj.shape
    return number, layer.member("router").top_k, neurons


def gate_of(layer: Layer) -> Gate:
    """How the weights of a mixture are made of its router's logits."""
    router = layer.member("router")
    return Renormalised() if getattr(router, "norm_topk_prob", True) else Softmax()


@torch.no_grad()
def without(layer: Layer, kept: torch.Tensor) -> tuple[nn.Module, ...]:
    """The modules of the network with the experts `kept`, int64 in rising order; the rest is shared."""
    made = {name: copied(layer.member(name)) for name in ("experts", "router")}
    for module, names in ((made["experts"], STACKED), (made["router"], ("weight",))):
        for name in names:
            weight = getattr(module, name).detach()
            setattr(module, name, nn.Parameter(weight[kept.to(weight.device)], requires_grad=False))
        module.num_experts = len(kept)
    return layer.rebuilt("network", made)


class Sparing(Experts):
    """The room experts where the router is another's: it is given what that router weighs its choice by.

    Inputs: hidden [T, D], weights [T, E] (0 where the router has not chosen), up [E, 2F, D], down [E, O, F]; returns
    [T, O]. Candidates are the experts that were chosen; their scores are the logarithms of their weights.
    """

    def shortcut(self, *inputs):
        """None: that of the room takes what chooses for logits."""

    @torch.no_grad()
    def score(self, hidden, weights, up, down):
        self.check(hidden, weights, up, down, None)
        return widened(weights).log()

    def weigh(self, selection, scores, hidden, weights, up, down):
        weights = widened(weights)
        kept = selection.weigh(weights)
        if not self.gate.adds_up:
            return kept
        # Both sums over all experts, in one order: where nothing is skipped they are equal to the bit.
        total, left = weights.sum(-1, keepdim=True), kept.dense_weights().sum(-1, keepdim=True)
        return replace(kept, weights=kept.weights * (total / left.clamp(min=torch.finfo(torch.float32).tiny)))


class SparingExperts(nn.Module):
    """Stacked experts of transformers, called as these are; a token keeps what a rule leaves of its router's choice.

    `choice` is the room. The weights are the original's own, under their names.
    """

    def __init__(self, own: nn.Module, config: Config):
        super().__init__()
        self.gate_up_proj, self.down_proj = own.gate_up_proj, own.down_proj
        self.choice = Sparing(config, len(own.down_proj), activation=activation_of(own))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
                ) -> torch.Tensor:
        """[T, D] of hidden_states [T, D], the router's choice int64 [T, K] and its weights [T, K]."""
        weights = top_k_weights.new_zeros(len(hidden_states), len(self.down_proj))
        weights = weights.scatter(1, top_k_index.long(), top_k_weights)
        return self.choice(hidden_states, weights, self.gate_up_proj, self.down_proj).to(hidden_states.dtype)


def sparing(layer: Layer, config: Config) -> tuple[nn.Module, ...]:
    """The modules of a network whose tokens skip experts of their router's choice.

    Raises:
        UnsupportedError: another gate, unit or metric than the layer's, shared experts, or experts that are no stack of
            gated networks of a known activation.
    """
    own, (_, _, neurons) = layer.member("experts"), sizes_of(layer)
    meant = replace(config, rule=All()) == Config(gate=gate_of(layer), unit=neurons)
    if not meant or not is_plain(own):
        raise UnsupportedError("experts", expected=f"the gate {gate_of(layer)}, the unit {neurons} and nothing shared, "
                               "for experts that are a stack of gated networks of a known activation",
                               got=f"{config} for {layer.network}"[:300], do="choose the rule alone")
    return layer.rebuilt("network", {"experts": SparingExperts(own, config)})
