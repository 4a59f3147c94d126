"""Which estimate of a tile's mass, and which rule, choose best? Recovered mass and perplexity at equal density.

Run from the repository's root: python -m benchmarks.bench_selection --tokens 4096 --windows 2

Every row keeps the same share of the tiles, so only *which* tiles differs. The one parameter of its rule (k, mass,
ratio) is the same in every layer and head, and is set on the dense model's own queries and keys to reach the density.
Besides the rule's choice a row keeps only what it must: the first block, the diagonal and the last query block; the
rows called "default room" also keep the window of 128 tokens that `Config` has by default. "Sink + window" keeps
nothing else, with the window grown until the density is reached. The oracle scores every query against every key.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks import subject
from benchmarks.equal_density import RULES, Observation, change, everywhere, observe, tune
from benchmarks.publish import table, write_result
from sentei.axes.connections import Config, Connections
from sentei.budget.judge import Judge
from sentei.budget.workload import Prefill
from sentei.conversion.plan import prunable_layers
from sentei.core.rules import TopK
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
    "default room, 1 in 12": Config(estimator=Sampled(12)),
    "default room, 1 in 16": Config(estimator=Sampled(16)),
}


class WithMass(Observation):
    """The scores of every room, and the true mean share of the rows, float32 [H, QB, KB] of every layer and window."""

    def __init__(self):
        super().__init__(ROOMS)
        self.mass: list[torch.Tensor] = []
        self.windows: dict[int, torch.Tensor] = {}

    def __call__(self, module: Connections, inputs: tuple) -> None:
        super().__call__(module, inputs)
        query, key, *_ = inputs
        grid = module.grid(query, key, None)
        self.mass.append(estimate(Sampled(1), query, key, grid, module.scale_of(query))[0].exp())
        self.windows = self.windows or {window: always_kept(grid, query.device, window=window)[0]
                                        for window in range(0, grid.num_keys, grid.key_block)}

    def recovered(self, keep: list[torch.Tensor]) -> float:
        """The true mass on what is kept, mean over layers, heads and query blocks."""
        shares = [(mass * layer).sum(-1).mean().item() for mass, layer in zip(self.mass, keep, strict=True)]
        return sum(shares) / len(shares)


def sink_and_window(observation: WithMass, density: float) -> Config:
    """The room that keeps the first block and the window that comes nearest to the density."""
    heads, name = len(observation.mass[0]), "oracle, mass"
    window = min(observation.windows, key=lambda window: abs(
        observation.density(name, [observation.windows[window].expand(heads, -1, -1)]) - density))
    return Config(rule=TopK(0), window=window)


def rows(model: nn.Module, windows: torch.Tensor, judge: Judge, rooms: list[str],
         rules: list[str]) -> list[list[str]]:
    """The lines of the table for these rooms and rules, worst density last."""
    observation, lines = WithMass(), []
    observe(model, windows, observation)
    judge.prepare("judge", lambda: None)

    def add(name: str, rule: str, target: float, config: Config | None, keep: list[torch.Tensor] | None) -> None:
        if config is None:
            lines.append([str(target), name, rule, "–", "–", "what must be kept is more"])
            return
        judgement = judge.judge(everywhere(model, config), "judge", lambda: None)
        density = judgement.mean_density(prunable_layers(model))
        lines.append([str(target), name, rule, f"{density:.3f}", f"{observation.recovered(keep):.3f}",
                      change(judgement.quality)])
        print(" | ".join(lines[-1]), flush=True)

    for target in DENSITIES:
        for name, config in ((name, ROOMS[name]) for name in rooms):
            for kind, family in ((kind, RULES[kind]) for kind in rules):
                if name.startswith("default room") and kind != "Threshold":
                    continue
                rule = tune(observation, name, family, target)
                add(name, kind, target, rule and replace(config, rule=rule), rule and observation.keep(name, rule))
        config = sink_and_window(observation, target)
        keep = [observation.windows[config.window].expand_as(mass) for mass in observation.mass]
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
    judge = Judge(measured.model, Prefill(arguments.tokens), {"judge": measured.windows}, Stages(arguments.stages),
                  {**measured.facts, "environment": environment()})
    head = ["density asked", "estimate, criterion", "rule", "density", "true mass kept", "perplexity, 95 % interval"]
    lines = rows(measured.model, measured.windows, judge, arguments.rooms, arguments.rules)
    write_result(f"selection-{arguments.tokens}", __doc__, [measured.title, table(head, lines)])


if __name__ == "__main__":
    main()
