"""Rules set to keep the same share of the tiles, so that only *which* tiles differs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.subject import read
from sentei.axes.connections import Config, Connections
from sentei.conversion import wrapper
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import Mass, Rule, Threshold, TopK
from sentei.measurement.quality import Quality


@dataclass(frozen=True)
class Family:
    """Rules of one kind, from the sparsest parameter to the densest."""

    make: Callable[[float], Rule]
    sparsest: float
    densest: float


RULES = {
    "TopK": Family(lambda k: TopK(round(k)), 0, 256),
    "Mass": Family(Mass, 0.0, 1.0),
    "Threshold": Family(lambda negative: Threshold(-negative), -1.0, 0.0),
}


class Observation:
    """What one dense pass shows of every layer: the scores of every room, and what it must keep.

    Attributes:
        rooms: by name.
        scores: by room, float32 [H, QB, KB] of every layer of every window.
        forced: by room, bool [1, QB, KB].
    """

    def __init__(self, rooms: dict[str, Config]):
        self.rooms = rooms
        self.scores: dict[str, list[torch.Tensor]] = {name: [] for name in rooms}
        self.forced: dict[str, torch.Tensor] = {}

    def __call__(self, module: Connections, inputs: tuple) -> None:
        """Called before a dense room runs, with its inputs."""
        for name, config in self.rooms.items():
            room = self.room(name, replace(config, rule=TopK(0)))
            room.scale = module.scale
            self.scores[name].append(room.score(*inputs)[0])
            if name not in self.forced:
                self.forced[name] = room.forced(*inputs)[0]

    def room(self, name: str, config: Config) -> Connections:
        """The room that is called so, with a configuration."""
        return Connections(config)

    def keep(self, name: str, rule: Rule) -> list[torch.Tensor]:
        """Bool [H, QB, KB] of every layer: what the rule keeps in a room."""
        permitted = self.permitted(name)
        return [rule.keep(scores, permitted, (self.forced[name] & permitted).expand_as(scores)) & permitted
                for scores in self.scores[name]]

    def permitted(self, name: str) -> torch.Tensor:
        """Bool [H, QB, KB]."""
        return ~torch.isneginf(self.scores[name][0])

    def density(self, name: str, keep: list[torch.Tensor]) -> float:
        """The mean over layers and heads of kept ÷ permitted tiles, as `Judgement.mean_density` counts."""
        permitted = self.permitted(name).sum((1, 2))
        return sum((layer.sum((1, 2)) / permitted).mean().item() for layer in keep) / len(keep)


@torch.no_grad()
def observe(model: nn.Module, windows: torch.Tensor, observation: Observation) -> None:
    """One dense pass over windows [N, T] with every room looking on; the model is dense afterwards."""
    convert(model, everywhere(model, Config()))
    handles = [room.register_forward_pre_hook(observation) for room in wrapper.rooms(model).values()]
    try:
        read(model, windows, handles)
    finally:
        convert(model, Plan())


def tune(observation: Observation, room: str, family: Family, density: float) -> Rule | None:
    """The rule of the family that comes nearest to the density; None where what must be kept is already more."""
    def reached(parameter: float) -> float:
        return observation.density(room, observation.keep(room, family.make(parameter)))

    sparse, dense = family.sparsest, family.densest
    if reached(sparse) > density * 1.01:
        return None
    for _ in range(18):
        middle = (sparse + dense) / 2
        if family is RULES["Threshold"]:  # ratios spread over orders of magnitude
            middle = -((max(-sparse, 1e-9) * max(-dense, 1e-9)) ** 0.5)
        sparse, dense = (sparse, middle) if reached(middle) > density else (middle, dense)
    return family.make(min((sparse, dense), key=lambda parameter: abs(reached(parameter) - density)))


def everywhere(model: nn.Module, config: Config) -> Plan:
    """The same room in every layer that can have one."""
    return Plan.everywhere(prunable_layers(model), "connections", config)


def change(quality: Quality) -> str:
    """The change of perplexity that a quality is, with its 95 % interval."""
    value, low, high = (100 * (1 / ratio - 1) for ratio in (quality.value, quality.high, quality.low))
    return f"{value:+.2f} % ({low:+.2f} to {high:+.2f})"
