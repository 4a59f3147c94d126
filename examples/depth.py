"""The room `depth`: train a small Mixture-of-Depths, then generate from it with its causal predictor.

Run from the repository's root: python -m examples.depth

A character in four calls for a look at the past; the others follow from the one before. Three models of four blocks,
the second and the fourth of which some tokens skip, learn the text; then they read unseen text as a generation would,
token by token with a cache.
"""

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.depth import Cache, Config, Depth, Transformer
from sentei.core.rules import All, Capacity, Rule
from sentei.core.tracing import trace

WIDTH, HEADS, BLOCKS, TOKENS, LETTERS, STEPS = 48, 4, 4, 96, 16, 150


def sequences(count: int, generator: torch.Generator, table: torch.Tensor) -> torch.Tensor:
    """Int64 [count, TOKENS]: a letter follows from the one before it, every fourth from the one eight back as well."""
    letters = torch.randint(LETTERS, (count, TOKENS), generator=generator)
    for place in range(8, TOKENS):
        before = letters[:, place - 1]
        letters[:, place] = table[before] if place % 4 else (before + letters[:, place - 8]) % LETTERS
    return letters


class Model(nn.Module):
    """Letters to the logits of the next; every second block is of the rule given."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.letters, self.head = nn.Embedding(LETTERS, WIDTH), nn.Linear(WIDTH, LETTERS)
        blocks = [Transformer(width=WIDTH, num_heads=HEADS, hidden=4 * WIDTH, rotary=100.0) for _ in range(BLOCKS)]
        self.blocks = nn.ModuleList(Depth(Config(rule=rule if place % 2 else All()), block, width=WIDTH,
                                          work=block.work) for place, block in enumerate(blocks))

    def forward(self, letters: torch.Tensor, caches: list[Cache] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, T, LETTERS] and the sum of the predictors' losses."""
        x, loss = self.letters(letters), torch.zeros(())
        for place, block in enumerate(self.blocks):
            if self.training and block.looks_along:
                loss = loss + block.predictor_loss(x)
            x = block(x, None, caches[place] if caches else None)
        return self.head(x), loss


def miss(logits: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of the next letter, where it can be told."""
    return F.cross_entropy(logits[:, 8:-1].flatten(0, 1), letters[:, 9:].flatten())


def train(model: Model, generator: torch.Generator, table: torch.Tensor) -> None:
    """STEPS steps on new text each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        letters = sequences(16, generator, table)
        logits, predictors = model(letters)
        optimizer.zero_grad()
        (miss(logits, letters) + 0.1 * predictors).backward()
        optimizer.step()


@torch.no_grad()
def main() -> None:
    """Prints one line a rule: work, loss by the rule of training, and loss and work of generation."""
    table = torch.randperm(LETTERS, generator=torch.Generator().manual_seed(1))
    unseen = sequences(8, torch.Generator().manual_seed(2), table)
    print(f"{'rule':<24}{'work':>7}{'loss':>8}{'generating: work':>20}{'loss':>8}{'cache rows':>12}")
    for rule in (All(), Capacity(0.5), Capacity(0.25)):
        torch.manual_seed(0)
        model = Model(rule)
        with torch.enable_grad():
            train(model, torch.Generator().manual_seed(0), table)
        with trace(model) as learning:
            expected = miss(model(unseen)[0], unseen)
        model.eval()
        caches = [Cache() for _ in range(BLOCKS)]
        with trace(model) as generating:
            logits = torch.cat([model(unseen[:, t:t + 1], caches)[0] for t in range(TOKENS)], 1)
        rows = [int((cache.positions >= 0).sum()) // len(unseen) for cache in caches]
        print(f"{str(rule):<24}{learning.density():>7.2f}{expected:>8.3f}{generating.density():>20.2f}"
              f"{miss(logits, unseen):>8.3f}   {rows}")


if __name__ == "__main__":
    main()
