"""The room `rank`: adapt a trained model to another text with LoRA, then let each token keep a few directions.

A small language model of characters learns Python's documentation in upper case; an adapter then learns it as it is
written, while the model stays as it is. Run from the repository's root: python -m examples.rank
"""

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.rank import Config
from sentei.conversion.adapters import adapters_of, add, merge, remove, unmerge
from sentei.core.rules import All, Mass, TopK
from sentei.core.tracing import trace
from sentei.measurement.text import read_text

WIDTH, SEEN, ROWS = 128, 8, 256
STEPS, ADAPTER_STEPS = 400, 300


class Characters(nn.Sequential):
    """The last SEEN bytes [B, SEEN] to logits [B, 128] of the next."""

    def __init__(self):
        super().__init__(nn.Embedding(128, 32), nn.Flatten(), nn.Linear(32 * SEEN, WIDTH), nn.GELU(),
                         nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 128))


def loss(model: nn.Module, text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Nats a byte, over ROWS places of the text."""
    starts = torch.randint(len(text) - SEEN - 1, (ROWS, 1), generator=generator)
    pieces = text[starts + torch.arange(SEEN + 1)]
    return F.cross_entropy(model(pieces[:, :-1]), pieces[:, -1])


def train(model: nn.Module, text: torch.Tensor, steps: int) -> None:
    """Adam on what has a gradient."""
    optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, text, generator).backward()
        optimizer.step()


@torch.no_grad()
def unseen(model: nn.Module, text: torch.Tensor) -> float:
    """Nats a byte on text that was not trained on."""
    generator = torch.Generator().manual_seed(2)
    return sum(loss(model, text, generator).item() for _ in range(40)) / 40


def main() -> None:
    """Prints the loss of the model, of its adapter, and of what is left of the adapter under each rule."""
    torch.manual_seed(0)
    text = read_text(None).text.encode("ascii", "replace")
    upper, mixed = (torch.tensor(list(part)) for part in (text.upper(), text))
    model, half, last = Characters(), len(text) // 2, len(text) - 50_000
    train(model, upper[:half], STEPS)
    print(f"{'the model, upper case':<36}{unseen(model, upper[last:]):>8.3f} nats a byte")
    print(f"{'the model, as written':<36}{unseen(model, mixed[last:]):>8.3f}")

    add(model, ["2", "4", "6"], Config(rank=8, alpha=16, scaling="root"))
    train(model, mixed[half:last], ADAPTER_STEPS)
    trained = sum(part.numel() for part in model.parameters() if part.requires_grad)
    print(f"{f'its adapter, {trained:,} numbers':<36}{unseen(model, mixed[last:]):>8.3f}")
    merge(model)
    print(f"{'merged':<36}{unseen(model, mixed[last:]):>8.3f}")
    unmerge(model)

    print(f"\n{'rule':<12}{'directions kept':>17}{'nats a byte':>13}")
    for rule in (All(), Mass(0.9), Mass(0.7), TopK(4), TopK(2), TopK(0)):
        for adapter in adapters_of(model).values():
            adapter.rank.rule = rule
        with trace(model) as records:
            left = unseen(model, mixed[last:])
        name = "All" if isinstance(rule, All) else f"{type(rule).__name__}({next(iter(vars(rule).values()))})"
        print(f"{name:<12}{records.density():>17.1%}{left:>13.3f}")
    print(f"\n{'taken away, upper case':<36}{unseen(remove(model), upper[last:]):>8.3f}")


if __name__ == "__main__":
    main()
