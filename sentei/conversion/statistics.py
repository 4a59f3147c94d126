"""What the rooms want to know of a pretrained layer: sums over calibration text, one state for each kind of statistic.

| name | state | of what |
|---|---|---|
| attention_input | Moment | what the query, key and value projections are given, [D, D] |
| attention_hidden | Moment | the heads side by side, what the output projection is given, [H · D, H · D] |
| attention_heads | Attended | what the heads score and attend to in their neighbours' keys and values |
| attention_influence | Influence | the residual stream before and after the attention |
| network_neurons | Activity | how large what the gates of the neurons multiply is, [F] |
| network_amplitudes | Amplitudes | how large the neurons are where their input points, [D + 1, F] |
| network_input | Moment | what the first projections of the network are given, [D, D] |
| network_hidden | Moment | the neurons, what the last projection of the network is given, [F, F] |
| network_influence | Influence | the residual stream before and after the network |
| network_experts | Contributions | how much each expert of a mixture adds to what the network gives, [E] |

A row of a hidden moment counts as much as it is small beside the stream that the part's output is added to, 1 / ‖y‖²:
what follows is normed, so that is what an error in it is worth, and a few tokens of a thousand times the usual size do
not drown the others.

A state is a sum over rows (tokens): `see` adds rows, `merge` adds the state of other rows. Sums are fp64, so that
neither the order of the batches nor the number of processes that share them matters beyond the last digits. The
diagonal of a moment holds the norms of its neurons, a block on the diagonal those of a head.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import nn

from sentei.conversion.attended import Attended, Watch
from sentei.conversion.experts import function_of
from sentei.conversion.layers import Layer
from sentei.core.errors import UnsupportedError
from sentei.kernels.linear.calibration import Calibration

MAX_BUILT = 1 << 29  # numbers, 2 GB in fp32


class State(Protocol):
    """A sum over rows."""

    def merge(self, other: "State") -> None:
        """Adds the state of other rows."""


class Influence:
    """How far a part of a layer moves the residual stream: Σ cos(x, y) and Σ ‖y − x‖² / ‖x‖² over the rows x → y.

    Block influence, 1 − the mean cosine, is the score of ShortGPT (arXiv 2403.03853).
    """

    def __init__(self):
        self.cosines, self.moves, self.rows = 0.0, 0.0, 0

    def see(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Adds rows [..., D] of the stream."""
        x, y = (part.detach().flatten(0, -2).double() for part in (before, after))
        size = x.square().sum(-1).clamp(min=1e-300)
        self.cosines += float(nn.functional.cosine_similarity(x, y, dim=-1).sum())
        self.moves += float(((y - x).square().sum(-1) / size).sum())
        self.rows += len(x)

    def merge(self, other: "Influence") -> None:
        """Adds the state of other rows."""
        self.cosines += other.cosines
        self.moves += other.moves
        self.rows += other.rows

    @property
    def influence(self) -> float:
        """1 − the mean cosine: 0 for a part that turns nothing."""
        return 1 - self.cosines / max(self.rows, 1)

    @property
    def move(self) -> float:
        """The mean of ‖y − x‖² / ‖x‖²."""
        return self.moves / max(self.rows, 1)


class Activity:
    """Σ u² of the neurons of a gated network, what its gates multiply, u = up x, in fp64 [F]."""

    def __init__(self, neurons: int):
        self.squares = torch.zeros(neurons, dtype=torch.float64)
        self.rows = 0

    def see(self, ups: torch.Tensor) -> None:
        """Adds u [..., F]."""
        ups = ups.detach().flatten(0, -2).double()
        self.squares += ups.square().sum(0).to(self.squares.device)
        self.rows += len(ups)

    def merge(self, other: "Activity") -> None:
        """Adds the state of other rows."""
        self.squares += other.squares
        self.rows += other.rows

    @property
    def size(self) -> torch.Tensor:
        """√ of the mean of u²."""
        return (self.squares / max(self.rows, 1)).sqrt()


class Amplitudes:
    """How large the neurons of a gated network are where its input points: sums in fp64 over the rows x [D].

    `inputs` [D + 1, D + 1], Σ x₁ x₁ᵀ with x₁ = (x, 1), and `neurons` [D + 1, F], Σ x₁ |h|ᵀ of the neurons h; the last
    row and column are sums. Regression on x takes no more.
    """

    def __init__(self, width: int, neurons: int):
        self.inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self.neurons = torch.zeros(width + 1, neurons, dtype=torch.float64)
        self.rows = 0

    def see(self, x: torch.Tensor, neurons: torch.Tensor) -> None:
        """Adds rows x [..., D] and their neurons [..., F]."""
        x, neurons = x.detach().flatten(0, -2), neurons.detach().flatten(0, -2).abs()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.inputs += (x.T.double() @ x.double()).to(self.inputs.device)
        self.neurons += (x.T.double() @ neurons.double()).to(self.neurons.device)
        self.rows += len(x)

    def merge(self, other: "Amplitudes") -> None:
        """Adds the state of other rows."""
        self.inputs += other.inputs
        self.neurons += other.neurons
        self.rows += other.rows


class Contributions:
    """How much the experts of a mixture add: Σ w ‖expert(x)‖ over the rows x that keep one weighed w, in fp64 [E].

    `kept` [E] is the number of these rows. With the mean over them for a saliency, REAP (arXiv 2510.13999).
    """

    def __init__(self, experts: int):
        self.sizes = torch.zeros(experts, dtype=torch.float64)
        self.kept = torch.zeros(experts, dtype=torch.int64)

    def see(self, expert: int, weights: torch.Tensor, answers: torch.Tensor) -> None:
        """Adds rows of one expert: its weights [N] and answers [N, D]."""
        self.sizes[expert] += float((weights.double() * answers.double().norm(dim=-1)).sum())
        self.kept[expert] += len(weights)

    def merge(self, other: "Contributions") -> None:
        """Adds the state of other rows."""
        self.sizes += other.sizes
        self.kept += other.kept

    @property
    def saliency(self) -> torch.Tensor:
        """The mean of w ‖expert(x)‖; 0 of an expert that no row kept."""
        return self.sizes / self.kept.clamp(min=1)


class Kind(NamedTuple):
    """One kind of statistic: an empty state for a layer, and the hooks that add to it, which are returned."""

    empty: Callable[[Layer], State]
    listen: Callable[[Layer, State], list]


class Moment(Calibration):
    """Σ wₜ xₜ xₜᵀ, for what a linear layer is given; the products of PIECE rows are in fp32, their sums in fp64."""

    PIECE = 1024

    def weigh(self, x: torch.Tensor, stream: torch.Tensor) -> None:
        """Adds rows [..., D], each divided by the root mean square of its row of the stream [..., D']."""
        size = stream.detach().flatten(0, -2).float().square().mean(-1, keepdim=True).clamp(min=1e-30)
        self.see(x.detach().flatten(0, -2).float() / size.sqrt())

    def see(self, x: torch.Tensor) -> None:
        """Adds rows [..., D]. Cost: D² multiply-adds a row."""
        for piece in x.detach().flatten(0, -2).float().split(self.PIECE):
            self.gram += (piece.T @ piece).to(self.gram)
            self.rows += len(piece)


def _input(name: str) -> Kind:
    """The second moment of what a linear layer is given."""
    return Kind(lambda layer: _empty(_member(layer, name)), lambda layer, state: [
        layer.member(name).register_forward_pre_hook(lambda _, inputs: state.see(inputs[0]))])


def _hidden(part: str, name: str) -> Kind:
    """The same for the last linear layer of a part, each row divided by the size of the stream it is added to."""
    def listen(layer: Layer, state: Moment) -> list:
        stream = []

        def before(_, inputs: tuple) -> None:
            stream[:] = [inputs[0]]

        def after(_, inputs: tuple, output: torch.Tensor) -> None:
            state.weigh(inputs[0], stream.pop() + output)

        return [layer.given(part).register_forward_pre_hook(before), layer.member(name).register_forward_hook(after)]

    return Kind(lambda layer: _empty(_member(layer, name)), listen)


def _member(layer: Layer, name: str) -> nn.Module:
    """A member of a layer, see `Family.members`.

    Raises:
        UnsupportedError: a layer that is made of others: a mixture, or one that is none.
    """
    member = layer.member(name)
    if member is None:
        raise UnsupportedError("calibrate", expected=f"a layer with {name}", got=f"one of {layer.family.architecture}",
                               do="leave the configuration out that wants to know of it, see the rooms' options")
    return member


def _empty(linear: nn.Linear) -> Moment:
    return Moment(linear.in_features, linear.out_features)


def _listen_attention(layer: Layer, state: Influence) -> list:
    """Before: what the layer is given. After: what the network is given, or the norm before it."""
    stream = []

    def before(_, inputs: tuple, named: dict) -> None:
        stream[:] = [named["hidden_states"] if "hidden_states" in named else inputs[0]]

    return [layer.block.register_forward_pre_hook(before, with_kwargs=True),
            layer.given("network").register_forward_pre_hook(lambda _, inputs: state.see(stream.pop(), inputs[0]))]


def _listen_network(layer: Layer, state: Influence) -> list:
    """Before: what the network is given, or the norm before it. After: what the layer gives."""
    stream = []

    def after(_, inputs: tuple, output) -> None:
        state.see(stream.pop(), output[0] if isinstance(output, tuple) else output)

    return [layer.given("network").register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0])),
            layer.block.register_forward_hook(after)]


def _listen_neurons(layer: Layer, state: Activity) -> list:
    return [layer.member("up_proj").register_forward_hook(lambda _, inputs, output: state.see(output))]


def _listen_amplitudes(layer: Layer, state: Amplitudes) -> list:
    up, down, inputs = layer.member("up_proj"), layer.member("down_proj"), []
    return [up.register_forward_pre_hook(lambda _, given: inputs.append(given[0])),
            down.register_forward_pre_hook(lambda _, given: state.see(inputs.pop(), given[0]))]


def _listen_experts(layer: Layer, state: Contributions) -> list:
    """Every call of a mixture's experts; each answers its rows once more."""
    own = layer.member("experts")

    @torch.no_grad()
    def told(_, inputs: tuple) -> None:
        hidden, ids, weights = inputs
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            state.see(expert, weights[token, slot], function_of(own, expert)(hidden[token]))

    return [own.register_forward_pre_hook(told)]


KINDS = {
    "attention_input": _input("q_proj"),
    "attention_hidden": _hidden("attention", "o_proj"),
    "attention_heads": Kind(lambda layer: Attended(*layer.heads), lambda layer, state: [Watch(layer.attention, state)]),
    "attention_influence": Kind(lambda layer: Influence(), _listen_attention),
    "network_input": _input("up_proj"),
    "network_neurons": Kind(lambda layer: Activity(_member(layer, "down_proj").in_features), _listen_neurons),
    "network_amplitudes": Kind(lambda layer: Amplitudes(_member(layer, "up_proj").in_features,
                                                        _member(layer, "down_proj").in_features), _listen_amplitudes),
    "network_hidden": _hidden("network", "down_proj"),
    "network_influence": Kind(lambda layer: Influence(), _listen_network),
    "network_experts": Kind(lambda layer: Contributions(len(_member(layer, "experts").down_proj)), _listen_experts),
}


class Statistics(dict[tuple[int, str], State]):
    """The states by layer and name, and the modules that were made from them.

    The modules are kept so that a plan that is installed again and again, to be judged and timed, is built once. All
    together they hold at most MAX_BUILT numbers; the one that was used longest ago goes first.

    Args:
        states: by layer and name.
        read: where they are not all held at once: gives those of a layer, and of others as may be. They then take the
            place of what was held.
    """

    def __init__(self, states: Iterable = (), read: "Callable[[int], Statistics] | None" = None):
        super().__init__(states)
        self.read = read
        self.built: OrderedDict[Hashable, tuple[nn.Module, ...]] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether there are any, held or to be read."""
        return len(self) > 0 or self.read is not None

    @classmethod
    def empty(cls, layers: list[Layer], wanted: dict[int, set[str]]) -> "Statistics":
        """Nothing seen yet, of what is wanted by layer."""
        return cls({(layer.index, name): KINDS[name].empty(layer)
                    for layer in layers for name in sorted(wanted.get(layer.index, ()))})

    def listen(self, layers: list[Layer]) -> list:
        """Hooks by which every forward pass adds to the states; to be removed by the caller."""
        known = {layer.index: layer for layer in layers}
        return [handle for (index, name), state in self.items() for handle in KINDS[name].listen(known[index], state)]

    def once(self, key: Hashable, build: Callable[[], tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
        """What `build` gives, or gave before for this key, in which the layer it is built for stands."""
        if not self:
            return build()
        self.built[key] = self.built.pop(key) if key in self.built else build()
        while len(self.built) > 1 and sum(map(_numbers, self.built.values())) > MAX_BUILT:
            self.built.popitem(last=False)
        return self.built[key]

    def of(self, layer: int) -> dict[str, State]:
        """The states of one layer, by name; those that are not held are read."""
        if self.read is not None and all(index != layer for index, _ in self):
            self.clear()  # before memory is taken for others
            self.update(self.read(layer))
        return {name: state for (index, name), state in self.items() if index == layer}

    def merge(self, other: "Statistics") -> None:
        """Adds what was seen of other rows, e.g. by another process; the states must be the same kinds."""
        for place, state in other.items():
            self[place].merge(state)
        self.built.clear()


def bytes_of(layer: Layer, names: Iterable[str]) -> int:
    """What the states of a layer take; nothing is allocated to know it."""
    with torch.device("meta"):
        states = [KINDS[name].empty(layer) for name in names]
    return sum(value.nbytes for state in states for value in vars(state).values() if isinstance(value, torch.Tensor))


def _numbers(modules: tuple[nn.Module, ...]) -> int:
    return sum(weight.numel() for module in modules for weight in module.parameters())
