"""What is it worth that a query block's shared choice has seen the block's later queries?

Run from the repository's root: python -m benchmarks.bench_leak --tokens 4096 --windows 2

A block of n queries shares one choice: its first row is served by a choice that has seen up to n - 1 later queries.
No row reads a later key, but *which* earlier keys it reads may depend on them. Against it stands the same rule on the
same exact scores with a choice of each row's own, pooled over that row and the n - 1 rows before it: as many rows, none
of them later. Both keep the first key block, the diagonal and the last 64 rows whole, both are set to the same share of
the permitted pairs, and both run through the same masked attention.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks import subject
from benchmarks.publish import table, write_result
from sentei.axes.connections import Config, Connections
from sentei.conversion import wrapper
from sentei.conversion.plan import Plan, attention_path, convert, prunable_layers
from sentei.core.rules import Threshold
from sentei.measurement.quality import compare, token_losses

BLOCKS = (32, 64, 128)
KEY_BLOCK = WHOLE_ROWS = 64


def exact_shares(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Float32 [H, T, KB]: the share of every row's attention that falls on every key block.

    Args:
        query, key: [T, H, D] and [T, G, D].
        scale: on the scores.
    """
    tokens, heads = query.shape[:2]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    shares = []
    for head in range(heads):
        scores = query[:, head] @ key[:, head * key.shape[1] // heads].T * scale
        shares.append(pad(scores.masked_fill_(future, -torch.inf).softmax(-1), (0, -tokens % KEY_BLOCK)).unflatten(
            -1, (-1, KEY_BLOCK)).sum(-1))
    return torch.stack(shares)


def shared(shares: torch.Tensor, block: int) -> torch.Tensor:
    """Root mean square over the rows of each aligned block, given to all its rows: what sentei does."""
    tokens = shares.shape[1]
    blocks = pad(shares.square(), (0, 0, 0, -tokens % block)).unflatten(1, (-1, block)).sum(2)
    rows = pad(torch.ones(tokens), (0, -tokens % block)).unflatten(0, (-1, block)).sum(-1)
    return (blocks / rows[:, None]).sqrt().repeat_interleave(block, 1)[:, :tokens]


def from_the_past(shares: torch.Tensor, block: int) -> torch.Tensor:
    """Root mean square over each row and the `block` - 1 rows before it."""
    total = pad(shares.double().square().cumsum(1), (0, 0, 1, 0))
    rows = torch.arange(1, shares.shape[1] + 1)
    first = (rows - block).clamp(min=0)
    return ((total[:, rows] - total[:, first]) / (rows - first)[:, None]).clamp(min=0).sqrt().float()


CHOICES = {"shared by the block": shared, "strictly from the past": from_the_past}


@dataclass(frozen=True)
class Permitted:
    """Which pairs of a causal square of `tokens` there are, by row and key block."""

    tokens: int

    def pairs(self) -> torch.Tensor:
        """Int64 [T, KB]: the permitted keys of each row in each key block."""
        first = torch.arange(0, self.tokens, KEY_BLOCK)
        return (torch.arange(self.tokens)[:, None] + 1 - first).clamp(0, KEY_BLOCK)

    def forced(self) -> torch.Tensor:
        """Bool [T, KB]: the first key block, the row's own, and everything for the last rows."""
        rows, blocks = torch.arange(self.tokens)[:, None], torch.arange(-(-self.tokens // KEY_BLOCK))
        return (blocks == 0) | (blocks == rows // KEY_BLOCK) | (rows >= self.tokens - WHOLE_ROWS)

    def keep(self, pooled: torch.Tensor, ratio: float) -> torch.Tensor:
        """Bool [H, T, KB]: blocks that reach `ratio` of the row's largest, and the forced ones, where permitted."""
        pairs = self.pairs() > 0
        scores = pooled.clamp(min=torch.finfo(pooled.dtype).tiny).log().masked_fill(~pairs, -torch.inf)
        return Threshold(ratio).keep(scores, pairs.expand_as(scores), (self.forced() & pairs).expand_as(scores))

    def density(self, keep: torch.Tensor) -> float:
        """Kept ÷ permitted pairs, mean over heads."""
        pairs = self.pairs()
        return ((keep * pairs).sum((1, 2)).double() / pairs.sum()).mean().item()


class RowByRow(Connections):
    """A room in which every row may keep its own key blocks; it reads the whole score matrix, so it is slow."""

    def __init__(self, choice: str, block: int, ratio: float):
        super().__init__(Config())
        self.choice, self.block, self.ratio, self.densities = choice, block, ratio, []

    def forward(self, query, key, value, lengths=None):
        """Attention over the kept pairs; batch 1, causal, no padding."""
        permitted = Permitted(query.shape[1])
        if query.shape[1] < 2 * WHOLE_ROWS:
            return super().forward(query, key, value, lengths)
        pooled = CHOICES[self.choice](exact_shares(query[0], key[0], self.scale_of(query)), self.block)
        keep = permitted.keep(pooled, self.ratio)
        self.densities.append(permitted.density(keep))
        mask = keep.repeat_interleave(KEY_BLOCK, -1)[..., :query.shape[1]].tril()
        heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.scale_of(query),
                                            enable_gqa=True).transpose(1, 2)


@torch.no_grad()
def observe(model: nn.Module, row: torch.Tensor) -> list[torch.Tensor]:
    """The exact shares of every prunable layer on one window [T], from a dense pass."""
    convert(model, Plan.everywhere(prunable_layers(model), "connections", Config()))
    shares = []
    for room in wrapper.rooms(model).values():
        room.register_forward_pre_hook(lambda module, inputs: shares.append(
            exact_shares(inputs[0][0], inputs[1][0], module.scale_of(inputs[0]))))
    model.get_decoder()(input_ids=row[None], use_cache=False)
    convert(model, Plan())
    return shares


def tune(pooled: list[torch.Tensor], target: float) -> float:
    """The one ratio for all layers and heads that keeps `target` of the pairs."""
    permitted, low, high = Permitted(pooled[0].shape[1]), 1e-6, 1.0
    for _ in range(14):
        middle = (low * high) ** 0.5
        density = sum(permitted.density(permitted.keep(layer, middle)) for layer in pooled) / len(pooled)
        low, high = (middle, high) if density > target else (low, middle)
    return (low * high) ** 0.5


def main() -> None:
    """Measures both choices at every block size and density and writes the table."""
    parser = subject.parser(__doc__)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.125], help="shares of the pairs to keep")
    arguments = parser.parse_args()
    measured = subject.load(arguments)
    model, windows = measured.model, measured.windows
    shares, dense, lines = observe(model, windows[0]), token_losses(model, windows), []
    for block in BLOCKS:
        pooled = {name: [choice(layer, block) for layer in shares] for name, choice in CHOICES.items()}
        for target in arguments.densities:
            losses, cells = {}, []
            for name in CHOICES:
                rooms = {attention_path(model, layer): RowByRow(name, block, tune(pooled[name], target))
                         for layer in prunable_layers(model)}
                wrapper.install(model, rooms)
                losses[name] = token_losses(model, windows)
                convert(model, Plan())
                densities = [density for room in rooms.values() for density in room.densities]
                cells += [f"{sum(densities) / len(densities):.3f}", change(dense, losses[name])]
            lines.append([str(block), str(target), *cells, change(*losses.values())])
            print(" | ".join(lines[-1]), flush=True)
    head = ["query block", "density asked", "shared: density", "perplexity", "past: density", "perplexity",
            "past against shared"]
    write_result(f"leak-{arguments.tokens}", __doc__, [
        f"{measured.title} "
        "Perplexity is the change against the dense model with its 95 % interval; the last column compares the two "
        "choices on the same tokens: above zero, the leak helped.", table(head, lines)])


def change(before: torch.Tensor, after: torch.Tensor) -> str:
    """The change of perplexity from one set of token losses to another, with its 95 % interval."""
    quality = compare(before, after)
    value, low, high = (100 * (1 / ratio - 1) for ratio in (quality.value, quality.high, quality.low))
    return f"{value:+.2f} % ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
