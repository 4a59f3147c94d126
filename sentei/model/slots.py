"""What may stand in a slot of the model: feed-forward layers, and what decides which tokens a block changes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes import depth, experts
from sentei.axes.depth import Rows
from sentei.axes.experts.gates import Task
from sentei.core.errors import FileError, SenteiError, require
from sentei.core.growing import Cache

INITIAL_SPREAD = 0.02
LARGEST = 1 << 24  # of sizes in a configuration, which may come from a file


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)): x [..., width] → [..., width].

    Args:
        hidden: F; config: the model's.
    """

    def __init__(self, hidden: int, config: object):
        super().__init__()
        self.gate, self.up = linear(config.width, hidden), linear(config.width, hidden)
        self.down = linear(hidden, config.width, adds=config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, tasks: torch.Tensor | None = None
                ) -> torch.Tensor:
        """The layer's output for x; no token of it depends on another or on a task, so that neither matters."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class EveryToken(nn.Module):
    """The slot `depth` without a room: the block changes every token.

    Args:
        block: from x [B, N, width] and `Rows` to what is added to x.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None, cache: Cache | None = None,
                tasks: torch.Tensor | None = None) -> torch.Tensor:
        """x + block(x).

        Args:
            lengths: int64 [B, 2], start and stop of the real tokens of x.
            cache: the layer's; x goes on where it ends.
            tasks: see `Rows`.
        """
        places = positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        if lengths is not None:
            real = (places >= lengths[:, :1]) & (places < lengths[:, 1:])
            positions = (places - lengths[:, :1]).where(real, -1)
        if cache is not None and cache.positions is not None:
            positions = (positions + cache.positions.amax(1, keepdim=True) + 1).where(positions >= 0, -1)
        return x + self.block(x, Rows(positions=positions, cache=cache, tasks=tasks))


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A mixture of experts in the place of a feed-forward layer.

    Args:
        neurons: of all experts together, the shared ones among them; a multiple of `room.unit`.
        room: how experts are made and chosen.
    """

    neurons: int = 352
    room: experts.Config = field(default_factory=experts.Config)

    def __post_init__(self):
        whole = type(self.neurons) is int and 1 <= self.neurons <= LARGEST
        require("model.Routed", self, {f"neurons from 1 to {LARGEST}": whole,
                                       "room an experts.Config": isinstance(self.room, experts.Config)})

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {"neurons": self.neurons, **self.room.to_json()}

    @classmethod
    def from_json(cls, value: dict) -> "Routed":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        room = experts.Config.from_json({key: item for key, item in value.items() if key != "neurons"})
        try:
            return cls(neurons=value.get("neurons"), room=room)
        except SenteiError as error:
            raise FileError(error.where, expected=error.expected, got=error.got, do=error.do) from error


def mixture(value: Routed, config: object) -> nn.Module:
    """The feed-forward layer that `value` describes, for a model of that configuration; its neurons begin as a dense
    one's."""
    made = experts.MixtureOfExperts(value.room, width=config.width, neurons=value.neurons, causal=config.causal)
    made.draw(up=INITIAL_SPREAD, down=adding_spread(config))
    return made


def is_by_task(feed_forward: object) -> bool:
    """Whether a configuration in the slot `feed_forward` chooses experts by the task of a sequence."""
    return isinstance(feed_forward, Routed) and isinstance(feed_forward.room.gate, Task)


@torch.no_grad()
def dense_for(mixture: experts.MixtureOfExperts, task: int, hidden: int, config: object) -> GatedFeedForward:
    """The feed-forward layer that answers as the mixture does for `task`; neurons beyond those it keeps are 0."""
    found, layer = mixture.extract(task), GatedFeedForward(hidden, config)
    kept = found.up_proj.out_features
    for weight, part in ((layer.gate.weight, found.gate_proj), (layer.up.weight, found.up_proj),
                         (layer.down.weight.T, found.down_proj)):
        weight[:kept] = part.weight.T if part is found.down_proj else part.weight
        weight[kept:] = 0
    return layer.to(mixture.up).train(mixture.training)


def mixture_of_depths(room: depth.Config, block: nn.Module, config: object) -> nn.Module:
    """The block around which the room stands, with a small random gate: every update counts about 1.

    With a gate of 0 all tokens would tie, and each sequence would keep its first ones.
    """
    made = depth.Depth(room, block, width=config.width)
    nn.init.normal_(made.gate.weight, std=INITIAL_SPREAD)
    nn.init.ones_(made.gate.bias)
    return made


class Slot(NamedTuple):
    """What may stand in a slot: the type of its configuration, how a layer is made of one, the layer's cache, and how
    many weights a token could meet in the layer besides those of linear layers."""

    config: type
    layer: Callable[..., nn.Module]
    cache: type | None = None
    weights: Callable[[nn.Module], int] = lambda layer: 0


# A room that fills a slot is one line here. A feed-forward layer is made of its configuration and the model's, and is
# called with x [B, N, width], a mask, bool [B, N], of the rows that are no padding, or None if all are, and the tasks
# of the sequences, int64 [B], or None. A depth layer is made of its configuration, the block and the model's, and is
# called with x, lengths, a cache of its own type, and tasks. Configurations of rooms have `to_json` and `from_json`.
FEED_FORWARDS = {"dense": Slot(int, GatedFeedForward),
                 "experts": Slot(Routed, mixture, weights=lambda layer: layer.up.numel() + layer.down.numel())}
DEPTHS = {"every": Slot(type(None), lambda _, block, config: EveryToken(block), Cache),
          "depth": Slot(depth.Config, mixture_of_depths, depth.Cache)}


def linear(into: int, out: int, *, adds: object = None) -> nn.Linear:
    """A linear layer without bias and with small weights; smaller still where it adds to the stream of a model
    with the configuration `adds`."""
    layer = nn.Linear(into, out, bias=False)
    nn.init.normal_(layer.weight, std=INITIAL_SPREAD if adds is None else adding_spread(adds))
    return layer


def adding_spread(config: object) -> float:
    """The standard deviation of the weights that add to the stream of a model: it sums two such a layer."""
    return INITIAL_SPREAD * (2 * config.layers) ** -0.5


def slot_of(slots: dict[str, Slot], value: object) -> Slot | None:
    """The entry of `slots` that `value` configures."""
    return next((slot for slot in slots.values() if type(value) is slot.config), None)


def slot_to_json(slots: dict[str, Slot], value: object) -> object:
    """What stands in a slot as JSON: a plain value, or a room's configuration with its name."""
    return value if value is None or isinstance(value, int) else {
        "room": next(name for name, slot in slots.items() if type(value) is slot.config), **value.to_json()}


def slot_from_json(slots: dict[str, Slot], value: object) -> object:
    """What `slot_to_json` wrote; a room that cannot stand in the slot is refused with a FileError."""
    if not isinstance(value, dict):
        return value
    rooms = {name: slot.config for name, slot in slots.items() if hasattr(slot.config, "from_json")}
    room = value.get("room")
    if not isinstance(room, str) or room not in rooms:
        raise FileError("model.Config", expected=f"a room of {', '.join(rooms) or 'none so far'}, or its plain form",
                        got=repr(value)[:200], do="correct the model's configuration")
    return rooms[room].from_json({key: item for key, item in value.items() if key != "room"})
