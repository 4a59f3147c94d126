"""experts in a pretrained layer: a token keeps some of its feed-forward network's neurons. Nothing is trained.

One neuron an expert (`unit` 1) is chosen by what its own gate says: its score is |act(gate_f x)| times the size of what
that is usually multiplied with, √E (up_f x)² · ‖down_f‖. All gates are read, and of the other weights what is kept.
Larger experts are made and chosen by `sentei.conversion.grouping`: neurons whose sizes go together in one, the largest
shared by all tokens, a router from ridge regression that foretells an expert's size.

    y = Σ over the kept  act(gate_f x) · (up_f x) · down_f

Few tokens read the rows they keep and no others; of many tokens at once single neurons are all computed, which saves
nothing, and experts by those that keep them. The rows lie as they are read, beside the original's.
References: CATS 2404.08763, WINA 2505.19427 (the norm of what follows in the score), CMoE 2502.04416.
"""

import torch
from torch import nn

from sentei.axes.experts import Config, Experts
from sentei.axes.experts.gates import Unit
from sentei.axes.experts.neurons import Neurons
from sentei.axes.weights import Network
from sentei.conversion.grouping import Groups, group
from sentei.conversion.layers import Layer
from sentei.conversion.rooms.weights import narrowed
from sentei.conversion.statistics import Activity, State
from sentei.core.errors import ShapeError, UnsupportedError
from sentei.core.rules import All, TopK
from sentei.kernels.routing.stack import ACTIVATIONS

SHARES = (0.75, 0.5, 0.25)
UNIT, SHARED = 64, 0.25  # neurons of an expert; the share of the neurons that all tokens keep


def parts(config: Config) -> tuple[str, ...]:
    """The network."""
    return ("network",)


def wants(config: Config) -> tuple[str, ...]:
    """How large what the gates multiply is, or how large neurons are where their input points."""
    if isinstance(config.rule, All):
        return ()
    return ("network_neurons",) if config.unit == 1 else ("network_amplitudes",)


def options(layer: Layer, lever: str) -> list[Config]:
    """All neurons, then fewer and fewer; for a prompt in experts, because its tokens keep nearly every neuron together.

    A network of too few neurons to make experts of UNIT from is offered single ones.
    """
    width = layer.network.down_proj.in_features
    shared = round(SHARED * width / UNIT)
    if lever == "decode" or width % UNIT or not shared:
        return [Config(unit=1), *(Config(rule=TopK(round(share * width)), unit=1) for share in SHARES)]
    kept = sorted({round(share * width / UNIT) - shared for share in SHARES} - {0}, reverse=True)
    return [Config(unit=1), *(Config(rule=TopK(k), unit=UNIT, shared=shared) for k in kept)]


def words(config: Config) -> str:
    """What a token keeps."""
    if isinstance(config.rule, All):
        return "all"
    kept = f"{getattr(config.rule, 'k', config.rule)}"
    return f"{kept} neurons" if config.unit == 1 else f"{kept} + {config.shared} experts of {config.unit} neurons"


def build(layer: Layer, part: str, config: Config, seen: dict[str, State]) -> tuple[nn.Module, ...]:
    """The network whose tokens choose.

    Raises:
        UnsupportedError: a gate that weighs, shared single neurons, or a network of other layers.
        ShapeError: neurons that do not make whole experts.
        RuleError: a rule that looks at later tokens.
    """
    original = layer.network
    layers = [getattr(original, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(isinstance(linear, nn.Linear) and linear.bias is None for linear in layers)
    if config.unit == 1 and config.shared or not isinstance(config.gate, Unit) or config.metric != "dot" or not plain:
        raise UnsupportedError("experts", expected="the gate Unit, the metric 'dot', no shared experts of one neuron, "
                               "and a gated network without biases", got=f"{config} for {original}"[:300],
                               do="keep this network as it is")
    if isinstance(config.rule, All):
        return (original,)
    if config.unit == 1:
        return (ChoosingNetwork(original, config, seen["network_neurons"]),)
    neurons = original.down_proj.in_features
    if neurons % config.unit or config.shared * config.unit >= neurons:
        raise _not_whole(neurons, config)
    return (RoutedNetwork(original, config, _groups(original, config, seen["network_amplitudes"])),)


def blank(layer: Layer, part: str, config: Config) -> tuple[nn.Module, ...]:
    """The network whose tokens choose, with neither its weights nor what it chooses by."""
    neurons, width = layer.network.up_proj.weight.shape
    if config.unit == 1:
        return build(layer, part, config, {"network_neurons": Activity(neurons)})
    number, shared = neurons // config.unit - config.shared, config.shared * config.unit
    if neurons % config.unit or number < 1:
        raise _not_whole(neurons, config)
    groups = Groups(torch.arange(shared), torch.arange(shared, neurons).unflatten(0, (number, config.unit)),
                    torch.zeros(number, width), torch.zeros(number))
    return (RoutedNetwork(layer.network, config, groups),)


def _not_whole(neurons: int, config: Config) -> ShapeError:
    return ShapeError("experts", expected=f"a unit that divides {neurons}, and fewer shared than all",
                      got=f"unit {config.unit}, shared {config.shared}", do="choose another unit")


def _groups(original: nn.Module, config: Config, amplitudes: State) -> Groups:
    """The experts, by the sizes that neurons have in the output."""
    norms = original.down_proj.weight.detach().double().norm(dim=0).to(amplitudes.neurons.device)
    return group(amplitudes.inputs, amplitudes.neurons * norms, unit=config.unit, shared=config.shared)


def _activation(original: nn.Module) -> str:
    """The name of what its activation computes.

    Raises:
        UnsupportedError: none that the kernels know.
    """
    x = torch.linspace(-12, 12, 4001, device="cpu")
    for name, known in ACTIVATIONS.items():
        if (original.act_fn(x) - known(x)).abs().max() <= 1e-5:
            return name
    raise UnsupportedError("experts", expected=f"an activation of {', '.join(ACTIVATIONS)}", got=str(original.act_fn),
                           do="keep this network as it is")


class ChoosingNetwork(nn.Module):
    """A gated network that shares the weights of `original`; each token computes the neurons it keeps.

    `neurons` is the room. The last projection is held with a row a neuron.
    """

    def __init__(self, original: nn.Module, config: Config, activity: State):
        super().__init__()
        self.gate_proj, self.up_proj, self.act_fn = original.gate_proj, original.up_proj, original.act_fn
        self.neurons = Neurons(config.rule)
        down = original.down_proj.weight.detach()
        size = (activity.size.to(down.device) * down.double().norm(dim=0)).float()
        self.register_buffer("rows", down.T.contiguous())
        self.register_buffer("scale", size.clamp(min=torch.finfo(torch.float32).tiny))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., T, D] of x [..., T, D]."""
        acts = self.act_fn(self.gate_proj(x))
        return self.neurons(x, acts, self.scale, self.up_proj.weight, self.rows)


class RoutedNetwork(nn.Module):
    """A gated network of experts; each token computes those it keeps, and `shared`, a narrower network like the dense.

    `experts` is the room. The experts' weights are copies, those of gate and up together.
    """

    def __init__(self, original: nn.Module, config: Config, groups: Groups):
        super().__init__()
        gate, up, down = (linear.weight.detach() for linear in (original.gate_proj, original.up_proj,
                                                                original.down_proj))
        kept = groups.experts.to(up.device)
        self.experts = Experts(config, len(kept), activation=_activation(original))
        self.up = nn.Parameter(torch.cat([gate[kept], up[kept]], 1), requires_grad=False)
        self.down = nn.Parameter(down.T[kept].mT.contiguous(), requires_grad=False)
        self.register_buffer("router", groups.weight.to(up.device).float())
        self.register_buffer("offset", groups.bias.to(up.device).float())
        self.shared = _only(original, groups.shared.to(up.device)) if len(groups.shared) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., T, D] of x [..., T, D]."""
        logits = nn.functional.linear(x.float(), self.router.float(), self.offset.float())
        output = self.experts(x, logits, self.up, self.down)
        return output if self.shared is None else output + self.shared(x)


def _only(original: nn.Module, neurons: torch.Tensor) -> nn.Module:
    """A network like the original with these neurons."""
    def of(weight: torch.Tensor) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        return made

    return narrowed(original, Network(of(original.up_proj.weight[neurons]), of(original.down_proj.weight[:, neurons]),
                                      of(original.gate_proj.weight[neurons]), original.act_fn))
