"""The room `connections`: prune an attention layer, see what is no longer computed, train what remains.

Run from the repository's root: python -m examples.connections
"""

import copy

import torch
from torch import nn

from sentei.axes.connections import Config, SelfAttention, from_dense
from sentei.core.rules import All, Mass
from sentei.core.tracing import trace

TOKENS, WIDTH, HEADS, TOPICS, STEPS = 768, 64, 4, 8, 15


def sequences(count: int, generator: torch.Generator, centres: torch.Tensor) -> torch.Tensor:
    """Float [count, TOKENS, WIDTH]: runs of 32 tokens about one topic each, so that attention has something to find."""
    topics = torch.randint(TOPICS, (count, TOKENS // 32), generator=generator).repeat_interleave(32, 1)
    return centres[topics] + 0.5 * torch.randn(count, TOKENS, WIDTH, generator=generator)


def dense_layer() -> nn.MultiheadAttention:
    """A layer of torch whose queries look for keys like themselves, as those of a trained model do."""
    layer = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
    with torch.no_grad():
        query, key, _ = layer.in_proj_weight.chunk(3)
        key.copy_(query)
        layer.in_proj_weight[:2 * WIDTH] *= 1.5
    return layer.eval()


def error(layer: SelfAttention, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared difference from the dense output, against the size of that output."""
    return (layer(x) - target).square().mean() / target.square().mean()


def heal(layer: SelfAttention, x: torch.Tensor, target: torch.Tensor) -> None:
    """A few steps towards the dense output; gradients flow through what is kept."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        error(layer, x, target).backward()
        optimizer.step()


def main() -> None:
    """Prints one line a rule: the density, and the error on unseen sequences before and after training."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(TOPICS, WIDTH, generator=generator)
    learn, unseen = sequences(2, generator, centres), sequences(2, generator, centres)
    dense = dense_layer()
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    with torch.no_grad():
        goal, expected = (dense(x, x, x, attn_mask=later, need_weights=False)[0] for x in (learn, unseen))

    print(f"{'rule':<12}{'density':>9}{'error':>11}{f'after {STEPS} steps':>17}")
    for rule in (All(), Mass(0.95), Mass(0.8), Mass(0.6)):
        pruned = from_dense(dense, Config(rule=rule, tile=(32, 32), window=32))
        with torch.no_grad(), trace(pruned) as records:
            before = error(pruned, unseen, expected)
        healed = copy.deepcopy(pruned)
        heal(healed, learn, goal)
        with torch.no_grad():
            after = error(healed, unseen, expected)
        name = "All" if isinstance(rule, All) else f"Mass({rule.mass})"
        print(f"{name:<12}{records.density():>9.3f}{before.item():>11.2e}{after.item():>17.2e}")


if __name__ == "__main__":
    main()
