"""experts in a pretrained layer: a token keeps some of its feed-forward network's neurons. Nothing is trained.

One neuron an expert (`unit` 1) is chosen by what its own gate says: its score is |act(gate_f x)| times the size of what
that is usually multiplied with, √E (up_f x)² · ‖down_f‖. All gates are read, and of the other weights what is kept.
Larger experts are made and chosen by `sentei.conversion.grouping`: neurons whose sizes go together in one, the largest
shared by all tokens, a router from ridge regression that foretells an expert's size.

    y = Σ over the kept  act(gate_f x) · (up_f x) · down_f         without gates, in experts alone, act(up_f x) · down_f

A layer that is a mixture already keeps its router, and a token leaves out those of its experts that weigh less than a
share of the largest, the rule Threshold (`sentei.conversion.sparing`); any other rule chooses among the same.

Few tokens read the rows they keep and no others; of many tokens at once single neurons are all computed, which saves
nothing, and experts by those that keep them. The rows lie as they are read, beside the original's.
References: CATS 2404.08763, WINA 2505.19427 (the norm of what follows in the score), CMoE 2502.04416, NAEE 2402.14800.
"""

import torch
from torch import nn

from sentei.axes.experts import Config, Experts
from sentei.axes.experts.gates import Unit
from sentei.axes.experts.neurons import Neurons
from sentei.axes.weights import Network
from sentei.conversion.grouping import Groups, group
from sentei.conversion.layers import Layer
from sentei.conversion.rooms.weights import narrowed, network_of
from sentei.conversion.sparing import gate_of, is_mixture, sizes_of, sparing
from sentei.conversion.statistics import Activity, State
from sentei.core.errors import ShapeError, UnsupportedError
from sentei.core.rules import All, Threshold, TopK
from sentei.kernels.routing.stack import ACTIVATIONS

SHARES = (0.75, 0.5, 0.25)
UNIT, SHARED = 64, 0.25  # neurons of an expert; the share of the neurons that all tokens keep
SKIPPED = (0.25, 0.5, 0.75)  # of the largest weight of a token: experts that weigh less are skipped
WIDE = 16  # numbers that an input is longer by where there are biases: two registers of fp32, one of bf16


def parts(config: Config) -> tuple[str, ...]:
    """The network."""
    return ("network",)


def wants(config: Config) -> tuple[str, ...]:
    """How large what the gates multiply is, or how large neurons are where their input points; of a mixture nothing."""
    if isinstance(config.rule, All) or not isinstance(config.gate, Unit):
        return ()
    return ("network_neurons",) if config.unit == 1 else ("network_amplitudes",)


def options(layer: Layer, lever: str) -> list[Config]:
    """All neurons, then fewer and fewer; for a prompt in experts, because its tokens keep nearly every neuron together.

    A network of too few neurons to make experts of UNIT from is offered single ones, if these have gates to choose by;
    one of an activation that the kernels do not know, nothing. A mixture is offered to skip experts.
    """
    if is_mixture(layer):
        return [Config(rule=rule, gate=gate_of(layer), unit=sizes_of(layer)[2])
                for rule in (All(), *map(Threshold, SKIPPED))]
    own = network_of(layer)
    width, every = own.down.in_features, Config(unit=1)
    shared = round(SHARED * width / UNIT)
    if _activation(own) is None:
        return [every]
    if lever == "decode" or width % UNIT or not shared:
        return [every, *(Config(rule=TopK(round(share * width)), unit=1) for share in SHARES if _is_gated(own))]
    kept = sorted({round(share * width / UNIT) - shared for share in SHARES} - {0}, reverse=True)
    return [every, *(Config(rule=TopK(k), unit=UNIT, shared=shared) for k in kept)]


def words(config: Config) -> str:
    """What a token keeps."""
    if isinstance(config.rule, All):
        return "all"
    if not isinstance(config.gate, Unit):
        return " ".join(["the router's,", type(config.rule).__name__.lower(), *map(str, vars(config.rule).values())])
    kept = f"{getattr(config.rule, 'k', config.rule)}"
    return f"{kept} neurons" if config.unit == 1 else f"{kept} + {config.shared} experts of {config.unit} neurons"


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """The network whose tokens choose.

    Raises:
        UnsupportedError: a gate that weighs, shared single neurons, single neurons of a network without gates, or an
            activation that the kernels do not know; of a mixture see `sparing`.
        ShapeError: neurons that do not make whole experts.
        RuleError: a rule that looks at later tokens.
    """
    if isinstance(config.rule, All):
        return layer.places[part]
    if is_mixture(layer):
        return sparing(layer, config)
    own, single = network_of(layer), config.unit == 1
    if (single and (config.shared or not _is_gated(own)) or not isinstance(config.gate, Unit)
            or config.metric != "dot" or _activation(own) is None):
        raise UnsupportedError("experts", expected="the gate Unit, the metric 'dot', a known activation, and single "
                               "neurons, none shared, of a gated network without biases alone",
                               got=f"{config} for {layer.network}"[:300], do="keep this network as it is")
    if single:
        return _standing(layer, ChoosingNetwork(own, config, seen["network_neurons"]))
    neurons = own.down.in_features
    if neurons % config.unit or config.shared * config.unit >= neurons:
        raise _not_whole(neurons, config)
    return _standing(layer, RoutedNetwork(layer, config, _groups(own, config, seen["network_amplitudes"])))


def blank(layer: Layer, part: str, config: Config) -> tuple[nn.Module, ...]:
    """The network whose tokens choose, with neither its weights nor what it chooses by."""
    if is_mixture(layer):
        return sparing(layer, config)
    neurons, width = layer.member("up_proj").weight.shape
    if config.unit == 1:
        return build(layer, part, config, {"network_neurons": Activity(neurons)})
    number, shared = neurons // config.unit - config.shared, config.shared * config.unit
    if neurons % config.unit or number < 1:
        raise _not_whole(neurons, config)
    groups = Groups(torch.arange(shared), torch.arange(shared, neurons).unflatten(0, (number, config.unit)),
                    torch.zeros(number, width), torch.zeros(number))
    return _standing(layer, RoutedNetwork(layer, config, groups))


def _standing(layer: Layer, network: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of the part: the network first; where another would make its last product, that is made already."""
    return network, *layer.rebuilt("network", {"down_proj": nn.Identity()})[1:]


def _is_gated(own: Network) -> bool:
    """Whether single neurons can be chosen by what their gates say."""
    return own.gate is not None and all(linear.bias is None for linear in (own.gate, own.up, own.down))


def _not_whole(neurons: int, config: Config) -> ShapeError:
    return ShapeError("experts", expected=f"a unit that divides {neurons}, and fewer shared than all",
                      got=f"unit {config.unit}, shared {config.shared}", do="choose another unit")


def _groups(own: Network, config: Config, amplitudes: State) -> Groups:
    """The experts, by the sizes that neurons have in the output."""
    norms = own.down.weight.detach().double().norm(dim=0).to(amplitudes.neurons.device)
    return group(amplitudes.inputs, amplitudes.neurons * norms, unit=config.unit, shared=config.shared)


def _activation(own: Network) -> str | None:
    """The name of what its activation computes, or None where the kernels know none such."""
    x = torch.linspace(-12, 12, 4001, device="cpu")
    return next((name for name, known in ACTIVATIONS.items() if (own.activation(x) - known(x)).abs().max() <= 1e-5),
                None)


class ChoosingNetwork(nn.Module):
    """A gated network that shares the weights of `own`; each token computes the neurons it keeps.

    `neurons` is the room. The last projection is held with a row a neuron.
    """

    def __init__(self, own: Network, config: Config, activity: State):
        super().__init__()
        self.gate_proj, self.up_proj, self.act_fn = own.gate, own.up, own.activation
        self.neurons = Neurons(config.rule)
        down = own.down.weight.detach()
        size = (activity.size.to(down.device) * down.double().norm(dim=0)).float()
        self.register_buffer("rows", down.T.contiguous())
        self.register_buffer("scale", size.clamp(min=torch.finfo(torch.float32).tiny))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., T, D] of x [..., T, D]."""
        acts = self.act_fn(self.gate_proj(x))
        return self.neurons(x, acts, self.scale, self.up_proj.weight, self.rows)


class RoutedNetwork(nn.Module):
    """A network of experts; each token computes those it keeps, and `shared`, a narrower network like the dense.

    `experts` is the room. The experts' weights are copies, those of gate and up together; the biases of these are
    weights of a one behind the input, with zeros to a multiple of WIDE.
    """

    def __init__(self, layer: Layer, config: Config, groups: Groups):
        super().__init__()
        own = network_of(layer)
        firsts = [linear for linear in (own.gate, own.up) if linear is not None]
        down, kept = own.down.weight.detach(), groups.experts.to(own.down.weight.device)
        self.experts = Experts(config, len(kept), activation=_activation(own))
        self.ones = WIDE if own.up.bias is not None else 0
        self.up = nn.Parameter(torch.cat([_joined(linear, self.ones)[kept] for linear in firsts], 1),
                               requires_grad=False)
        self.down = nn.Parameter(down.T[kept].mT.contiguous(), requires_grad=False)
        self.bias = None if own.down.bias is None else nn.Parameter(own.down.bias.detach().clone(), requires_grad=False)
        self.register_buffer("router", groups.weight.to(down.device).float())
        self.register_buffer("offset", groups.bias.to(down.device).float())
        self.shared = _only(layer, groups.shared.to(down.device)) if len(groups.shared) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., T, D] of x [..., T, D]."""
        logits = nn.functional.linear(x.float(), self.router.float(), self.offset.float())
        given = nn.functional.pad(x, (0, self.ones), value=1.0) if self.ones else x
        output = self.experts(given, logits, self.up, self.down)
        output = output if self.shared is None else output + self.shared(x)
        return output if self.bias is None else output + self.bias


def _joined(linear: nn.Linear, ones: int) -> torch.Tensor:
    """The weight with the bias behind it, for inputs with so many ones behind them, of which one counts."""
    weight = linear.weight.detach()
    if not ones:
        return weight
    return torch.cat([weight, linear.bias.detach()[:, None], weight.new_zeros(len(weight), ones - 1)], 1)


def _only(layer: Layer, neurons: torch.Tensor) -> nn.Module:
    """A network with these neurons and no last bias: a module like the layer's own, where that is one alone."""
    def of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        made.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return made

    own = network_of(layer)
    up, gate = (linear and of(linear.weight[neurons], None if linear.bias is None else linear.bias[neurons])
                for linear in (own.up, own.gate))
    network = Network(up, of(own.down.weight[:, neurons]), gate, own.activation)
    return narrowed(layer, network)[0] if len(layer.places["network"]) == 1 else network
