"""What is it worth that a query block's shared choice has seen the block's later queries?

Run from the repository's root: python -m benchmarks.bench_leak --tokens 4096 --windows 4

A block of n queries shares one choice, made from one query in eight of the block: its first row is served by a choice
that has seen up to n - 1 later queries. No row reads a later key, but *which* earlier keys it reads may depend on them.
Against it stands the same rule without lookahead (`Config.without_lookahead`): eight rows share a choice, made from the
first of them and one row in eight of those before, 2 n rows in all; no later query has a say. Both are set to the same
share of the tiles by their one parameter, the same in every layer and head, and run through the same kernels.
"""

from dataclasses import replace

import torch

from benchmarks import subject
from benchmarks.equal_density import RULES, Observation, change, everywhere, observe, tune
from benchmarks.publish import table, write_result
from sentei.axes.connections import Config
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.tracing import trace
from sentei.measurement.quality import compare, token_losses

BLOCKS = (32, 64, 128)
SHARED = {block: Config(tile=(block, 64)) for block in BLOCKS}
PAST = {block: config.without_lookahead() for block, config in SHARED.items()}


def read(model: torch.nn.Module, windows: torch.Tensor, config: Config) -> tuple[torch.Tensor, float]:
    """The token losses with the same room in every layer, and the density on the first window."""
    convert(model, everywhere(model, config))
    try:
        with trace(model) as records, torch.no_grad():
            model.get_decoder()(input_ids=windows[:1], use_cache=False)
        heads = [record.selection.count().sum(-1) / record.selection.permitted.sum(-1) for record in records]
        return token_losses(model, windows), torch.stack(heads).double().mean().item()
    finally:
        convert(model, Plan())


def main() -> None:
    """Measures both choices at every block size and density and writes the table."""
    parser = subject.parser(__doc__)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.375, 0.25], help="shares to keep")
    arguments = parser.parse_args()
    measured = subject.load(arguments)
    model, windows = measured.model, measured.windows
    dense, lines = token_losses(model, windows), []
    for block in BLOCKS:
        observation = Observation({"shared": SHARED[block], "past": PAST[block]})
        observe(model, windows[:1], observation)
        for target in arguments.densities:
            rules = {name: tune(observation, name, RULES["Threshold"], target) for name in observation.rooms}
            if None in rules.values():
                lines.append([str(block), str(target), *["–"] * 4, "what must be kept is more"])
                continue
            found = {name: read(model, windows, replace(observation.rooms[name], rule=rule))
                     for name, rule in rules.items()}
            cells = [cell for losses, density in found.values()
                     for cell in (f"{density:.3f}", change(compare(dense, losses)))]
            lines.append([str(block), str(target), *cells, change(compare(found["shared"][0], found["past"][0]))])
            print(" | ".join(lines[-1]), flush=True)
    head = ["query block", "density asked", "shared: density", "perplexity", "without lookahead: density", "perplexity",
            "without lookahead against shared"]
    write_result(f"leak-{arguments.tokens}", __doc__, [
        f"{measured.title} {len(prunable_layers(model))} layers, window 128. "
        "Perplexity is the change against the dense model with its 95 % interval; the last column compares the two "
        "choices on the same tokens: above zero, the leak helped.", table(head, lines)])


if __name__ == "__main__":
    main()
