"""Which estimate of a tile's mass, and which rule, choose best? Recovered mass and perplexity at equal density.

Run from the repository's root: python -m benchmarks.bench_selection --tokens 4096 --windows 2

Every row keeps the same share of the tiles, so only *which* tiles differs. The one parameter of its rule (k, mass,
ratio) is the same in every layer and head, and is set on the dense model's own queries and keys to reach the density.
Besides the rule's choice a row keeps only what it must: the first block, the diagonal and the last query block; the
rows called "default room" also keep the window of 128 tokens that `Config` has by default. "Sink + window" keeps
nothing else, with the window grown until the density is reached. The oracle scores every query against every key.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks import subject
from benchmarks.publish import table, write_result
from sentei.axes.connections import Config, Connections
from sentei.budget.judge import Judge
from sentei.conversion import wrapper
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import Mass, Rule, Threshold, TopK
from sentei.core.storage import Stages
from sentei.kernels.attention.select import Antidiagonal, PageBounds, Pooled, Sampled, always_kept, estimate
from sentei.measurement.outcome import environment

DENSITIES = (0.5, 0.25, 0.125)
BARE = Config(window=0)
ROOMS = {
    "oracle, peak": replace(BARE, estimator=Sampled(1)),
    "oracle, mass": replace(BARE, estimator=Sampled(1), criterion="mass"),
    "sampled 1 in 8, peak": BARE,
    "sampled 1 in 8, mass": replace(BARE, criterion="mass"),
    "sampled 1 in 8, output": replace(BARE, criterion="output"),
    "antidiagonal 8, mass": replace(BARE, estimator=Antidiagonal(8), criterion="mass"),
    "pooled keys, mass": replace(BARE, estimator=Pooled(), criterion="mass"),
    "page bounds, mass": replace(BARE, estimator=PageBounds(), criterion="mass"),
    "default room": Config(),
}


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
    """What one dense pass shows of every layer: the scores of every room, the true mass, and what must be kept.

    Attributes:
        scores: by room, float32 [H, QB, KB] of every layer of every window.
        mass: the same shape; the true mean share of the rows.
        forced: by window size, bool [1, QB, KB].
    """

    def __init__(self):
        self.scores: dict[str, list[torch.Tensor]] = {name: [] for name in ROOMS}
        self.mass: list[torch.Tensor] = []
        self.forced: dict[int, torch.Tensor] = {}

    def __call__(self, module: Connections, inputs: tuple) -> None:
        """Called before a dense room runs, with its inputs."""
        query, key, *_ = inputs
        for name, config in ROOMS.items():
            room = Connections(replace(config, rule=TopK(0)), scale=module.scale)
            self.scores[name].append(room.score(*inputs)[0])
        grid = module.grid(query, key, None)
        self.mass.append(estimate(Sampled(1), query, key, grid, module.scale_of(query))[0].exp())
        self.forced = {window: always_kept(grid, query.device, window=window, dense_below=0)[0]
                       for window in range(0, grid.num_keys, grid.key_block)}

    def keep(self, room: str, rule: Rule) -> list[torch.Tensor]:
        """Bool [H, QB, KB] of every layer: what the rule keeps."""
        permitted = ~torch.isneginf(self.scores["oracle, mass"][0])
        forced = self.forced[ROOMS[room].window] & permitted
        return [rule.keep(scores, permitted, forced) & permitted for scores in self.scores[room]]

    def density(self, keep: list[torch.Tensor]) -> float:
        """The mean over layers and heads of kept ÷ permitted tiles, as `Judgement.mean_density` counts."""
        permitted = ~torch.isneginf(self.scores["oracle, mass"][0])
        return sum((layer.sum((1, 2)) / permitted.sum((1, 2))).mean().item() for layer in keep) / len(keep)

    def recovered(self, keep: list[torch.Tensor]) -> float:
        """The true mass on what is kept, mean over layers, heads and query blocks."""
        shares = [(mass * layer).sum(-1).mean().item() for mass, layer in zip(self.mass, keep, strict=True)]
        return sum(shares) / len(shares)


@torch.no_grad()
def observe(model: nn.Module, windows: torch.Tensor) -> Observation:
    """One dense pass over windows [N, T] with every room looking on; the model is dense afterwards."""
    convert(model, plan_of(model, BARE))
    observation = Observation()
    handles = [room.register_forward_pre_hook(observation) for room in wrapper.rooms(model).values()]
    try:
        for row in windows:
            model.get_decoder()(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        convert(model, Plan())
    return observation


def plan_of(model: nn.Module, config: Config) -> Plan:
    """The same room in every layer that can have one."""
    return Plan.everywhere(prunable_layers(model), "connections", config)


def tune(observation: Observation, room: str, family: Family, density: float) -> Rule | None:
    """The rule of the family that comes nearest to the density; None where what must be kept is already more."""
    sparse, dense = family.sparsest, family.densest
    if observation.density(observation.keep(room, family.make(sparse))) > density * 1.01:
        return None
    for _ in range(18):
        middle = (sparse + dense) / 2
        if family is RULES["Threshold"]:  # ratios spread over orders of magnitude
            middle = -((max(-sparse, 1e-9) * max(-dense, 1e-9)) ** 0.5)
        if observation.density(observation.keep(room, family.make(middle))) > density:
            dense = middle
        else:
            sparse = middle
    rules = [family.make(sparse), family.make(dense)]
    return min(rules, key=lambda rule: abs(observation.density(observation.keep(room, rule)) - density))


def sink_and_window(observation: Observation, density: float) -> Config:
    """The room that keeps the first block and the window that comes nearest to the density."""
    heads = len(observation.mass[0])
    window = min(observation.forced, key=lambda window: abs(
        observation.density([observation.forced[window].expand(heads, -1, -1)]) - density))
    return Config(rule=TopK(0), window=window)


def rows(model: nn.Module, windows: torch.Tensor, judge: Judge, rooms: list[str],
         rules: list[str]) -> list[list[str]]:
    """The lines of the table for these rooms and rules, worst density last."""
    observation, lines = observe(model, windows), []
    judge.prepare("judge", lambda: None)

    def add(name: str, rule: str, target: float, config: Config | None, keep: list[torch.Tensor] | None) -> None:
        if config is None:
            lines.append([str(target), name, rule, "–", "–", "what must be kept is more"])
            return
        judgement = judge.judge(plan_of(model, config), "judge", lambda: None)
        density = judgement.mean_density(prunable_layers(model))
        quality = judgement.quality
        change = [100 * (1 / value - 1) for value in (quality.value, quality.high, quality.low)]
        lines.append([str(target), name, rule, f"{density:.3f}", f"{observation.recovered(keep):.3f}",
                      f"{change[0]:+.2f} % ({change[1]:+.2f} to {change[2]:+.2f})"])
        print(" | ".join(lines[-1]), flush=True)

    for target in DENSITIES:
        for name, config in ((name, ROOMS[name]) for name in rooms):
            for kind, family in ((kind, RULES[kind]) for kind in rules):
                if name == "default room" and kind != "Threshold":
                    continue
                rule = tune(observation, name, family, target)
                add(name, kind, target, rule and replace(config, rule=rule), rule and observation.keep(name, rule))
        config = sink_and_window(observation, target)
        keep = [observation.forced[config.window].expand_as(mass) for mass in observation.mass]
        add("sink + window", f"window {config.window}", target, config, keep)
    return lines


def main() -> None:
    """Measures one length and writes its table; run again, it goes on where it stopped."""
    parser = subject.parser(__doc__)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS), help="rows to measure; all")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="rules to measure; all")
    parser.add_argument("--stages", type=Path, help="a folder for what is done, to go on from")
    arguments = parser.parse_args()
    measured = subject.load(arguments)
    judge = Judge(measured.model, {"judge": measured.windows}, Stages(arguments.stages),
                  {**measured.facts, "environment": environment()})
    head = ["density asked", "estimate, criterion", "rule", "density", "true mass kept", "perplexity, 95 % interval"]
    lines = rows(measured.model, measured.windows, judge, arguments.rooms, arguments.rules)
    write_result(f"selection-{arguments.tokens}", __doc__, [measured.title, table(head, lines)])


if __name__ == "__main__":
    main()
