"""The room `heads`: pool the key/value heads of a trained layer, see what the cache saves, and train what remains.

A small language model of characters reads the documentation of Python; then its layers are turned from MHA to GQA and
MQA. Run from the repository's root: python -m examples.heads
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.heads import Cache, Config, SharedAttention, from_dense, share_saved
from sentei.measurement.text import read_text

WIDTH, HEADS, LAYERS, TOKENS, ROWS = 64, 8, 2, 64, 16
STEPS, MORE_STEPS = 300, 60


class Block(nn.Module):
    """Attention and a feed-forward network, each on top of its input."""

    def __init__(self):
        super().__init__()
        self.attention = SharedAttention(Config(), width=WIDTH, num_heads=HEADS)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """x [B, T, WIDTH] → [B, T, WIDTH]."""
        x = x + self.attention(self.norms[0](x), cache=cache)
        return x + self.feed_forward(self.norms[1](x))


class Characters(nn.Module):
    """Bytes [B, T], the first at position `start`, to logits [B, T, 128] of the next."""

    def __init__(self):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, tokens: torch.Tensor, caches: list[Cache] | None = None, start: int = 0) -> torch.Tensor:
        """See the class."""
        x = self.bytes(tokens) + self.positions(torch.arange(start, start + tokens.shape[1]))
        for block, cache in zip(self.blocks, caches or [None] * LAYERS, strict=True):
            x = block(x, cache)
        return self.head(self.norm(x))


def batch(text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Int64 [ROWS, TOKENS + 1]: pieces of the text."""
    starts = torch.randint(len(text) - TOKENS - 1, (ROWS, 1), generator=generator)
    return text[starts + torch.arange(TOKENS + 1)]


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Nats a byte."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, text: torch.Tensor, steps: int) -> None:
    """Adam on pieces of the text."""
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=2e-3), torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch(text, generator)).backward()
        optimizer.step()


@torch.no_grad()
def unseen(model: nn.Module, text: torch.Tensor) -> float:
    """Nats a byte on text that was not trained on."""
    generator = torch.Generator().manual_seed(2)
    return sum(loss(model, batch(text, generator)).item() for _ in range(20)) / 20


@torch.no_grad()
def decoded_alike(model: nn.Module, tokens: torch.Tensor) -> tuple[float, int]:
    """The largest difference of the logits, one byte at a time from the cache or all at once; the cache's bytes."""
    caches = [Cache() for _ in range(LAYERS)]
    steps = [model(tokens[:, at:at + 1], caches, at) for at in range(tokens.shape[1])]
    return (torch.cat(steps, 1) - model(tokens)).abs().max().item(), sum(cache.bytes() for cache in caches)


def main() -> None:
    """Prints one line a number of key/value heads."""
    torch.manual_seed(0)
    text = torch.tensor(list(read_text(None).text.encode("ascii", "replace")))
    learn, rest = text[:-50_000], text[-50_000:]
    dense = Characters()
    train(dense, learn, STEPS)
    print(f"{'key/value heads':<16}{'cache saved':>12}{'cache bytes':>13}{'nats a byte':>13}"
          f"{f'after {MORE_STEPS} steps':>16}{'cache against none':>20}")
    for groups in (8, 4, 2, 1):
        pooled = copy.deepcopy(dense)
        for block in pooled.blocks:
            block.attention = from_dense(block.attention, Config(num_kv_heads=groups))
        before = unseen(pooled, rest)
        train(pooled, learn, MORE_STEPS)
        difference, held = decoded_alike(pooled, rest[None, :TOKENS])
        print(f"{groups:<16}{share_saved(HEADS, groups):>12.1%}{held:>13,}{before:>13.3f}"
              f"{unseen(pooled, rest):>16.3f}{difference:>20.1e}")


if __name__ == "__main__":
    main()
