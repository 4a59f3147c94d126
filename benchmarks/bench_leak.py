"""What is it worth that a query block's shared choice has seen the block's later queries?

Run from the repository's root: python -m benchmarks.bench_leak --tokens 4096 --windows 4

A block of n queries shares one choice, made from one query in eight of the block: its first row is served by a choice
that has seen up to n - 1 later queries. No row reads a later key, but *which* earlier keys it reads may depend on them.
Three choices are compared, each by the same rule and from n / 8 exactly scored rows:

- shared: what the room does, one choice a block of n;
- past: `Config.without_lookahead`, one choice for eight rows, from the first of them and rows up to n before it;
- centred: the tiles and the number of rows of "past", but half of the rows come after the eight. Against "past" it
  differs in nothing but where its rows stand: it has seen the future.

Each is set to the same share of the permitted pairs by its one parameter, the same in every layer and head, on a window
of its own. The last 128 rows of a window, some of which are kept whole, count neither in the share nor in the loss.
"""

from dataclasses import replace

import torch
from torch import nn

from benchmarks import subject
from benchmarks.equal_density import RULES, Observation, change, observe, tune
from benchmarks.publish import table, write_result
from sentei.axes.connections import Config, Connections
from sentei.conversion import wrapper
from sentei.conversion.plan import Plan, attention_path, convert, prunable_layers
from sentei.core.rules import Rule
from sentei.core.tracing import Record, Trace, trace
from sentei.kernels.attention import Grid
from sentei.measurement.quality import RUN, compare, token_losses

BLOCKS = (32, 64, 128)
UNCOUNTED = 128
CHOICES = ("shared", "past", "centred")


class Centred(Connections):
    """Chooses from as many rows as it would without lookahead, half of which come after the block."""

    def score(self, query, key, value, lengths=None):
        """The scores of the query block half a history later, where both may see the tile."""
        scores = super().score(query, key, value, lengths)
        ahead = (self.config.estimator.history + 1) // 2
        later = torch.cat([scores[:, :, ahead:], scores[:, :, -1:].expand(-1, -1, ahead, -1)], 2)
        return later.masked_fill(scores.isneginf(), -torch.inf)


def pairs(tokens: int, block: int) -> torch.Tensor:
    """Int64 [QB, KB]: the permitted pairs of every tile that count."""
    counted = tokens - UNCOUNTED
    rows = torch.arange(counted)[:, None] + 1 - torch.arange(0, tokens, 64)
    tiles = rows.clamp(0, 64).unflatten(0, (-1, block)).sum(1)
    grid = Grid(num_queries=tokens, num_keys=tokens, query_block=block, key_block=64)
    return torch.cat([tiles, tiles.new_zeros(grid.num_query_blocks - len(tiles), tiles.shape[1])])


class Choices(Observation):
    """The three choices at one block size; the density is that of the pairs that count."""

    def __init__(self, block: int, tokens: int):
        shared = Config(tile=(block, 64))
        past = shared.without_lookahead()
        super().__init__({"shared": shared, "past": past, "centred": past})
        self.pairs = {name: pairs(tokens, config.tile[0]) for name, config in self.rooms.items()}

    def room(self, name: str, config: Config) -> Connections:
        """Also the one that has seen the future."""
        return Centred(config) if name == "centred" else Connections(config)

    def density(self, name: str, keep: list[torch.Tensor]) -> float:
        """The mean over layers and heads of kept ÷ permitted pairs."""
        weights = self.pairs[name]
        return sum(((layer * weights).sum((1, 2)).double() / weights.sum()).mean().item() for layer in keep) / len(keep)


class Density(Trace):
    """A trace that keeps the share of the pairs of every selection, and not the selection."""

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.weights, self.found = weights, []

    def append(self, record: Record) -> None:
        """Notes the share, mean over heads, of batch row 0."""
        kept = (record.selection.mask()[0] * self.weights).sum((1, 2)).double() / self.weights.sum()
        self.found.append(kept.mean().item())


def read(model: nn.Module, windows: torch.Tensor, choices: Choices, name: str,
         rule: Rule) -> tuple[torch.Tensor, float]:
    """The token losses with one choice in every layer, and its density."""
    rooms = {attention_path(model, layer): choices.room(name, replace(choices.rooms[name], rule=rule))
             for layer in prunable_layers(model)}
    wrapper.install(model, rooms)
    try:
        with trace(model, Density(choices.pairs[name])) as densities:
            losses = token_losses(model, windows)
        return losses[:, :-UNCOUNTED], sum(densities.found) / len(densities.found)
    finally:
        convert(model, Plan())


def main() -> None:
    """Measures the choices at every block size and density and writes the table."""
    parser = subject.parser(__doc__)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.45, 0.3], help="shares of the pairs to keep")
    arguments = parser.parse_args()
    measured = subject.load(arguments, tune=1)
    model, windows = measured.model, measured.windows
    dense, lines = token_losses(model, windows)[:, :-UNCOUNTED], []
    for block in BLOCKS:
        choices = Choices(block, arguments.tokens)
        observe(model, measured.others, choices)
        for target in arguments.densities:
            found = {}
            for name in CHOICES:
                rule = tune(choices, name, RULES["Threshold"], target)
                if rule is None:
                    raise SystemExit(f"what {name} must keep at blocks of {block} is more than {target}")
                found[name] = read(model, windows, choices, name, rule)
            run = max(RUN, block)
            cells = [cell for losses, density in found.values()
                     for cell in (f"{density:.3f}", change(compare(dense, losses, run)))]
            lines.append([str(block), str(target), *cells, *(change(compare(found[name][0], found["past"][0], run))
                                                             for name in ("shared", "centred"))])
            print(" | ".join(lines[-1]), flush=True)
    head = ["n", "density asked", *(cell for name in CHOICES for cell in (f"{name}: density", "perplexity")),
            "past against shared", "past against centred"]
    write_result(f"leak-{arguments.tokens}", __doc__, [
        f"{measured.title} {len(prunable_layers(model))} layers, window 128. Perplexity is the change against the "
        "dense model with its 95 % interval, over means of runs of max(64, n) tokens; the last columns compare two "
        "choices on the same tokens: above zero, the future helped the other.", table(head, lines)])


if __name__ == "__main__":
    main()
