"""The room `channels`: a small network that looks for shapes, gates on its feature maps, and fewer of them.

The images are drawn: a disc, a square, a cross or a ring somewhere in noise. Run from the repository's root:
python -m examples.channels
"""

import copy
import time

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.channels import Config, GatedConv, SmallCNN, SqueezeExcitation, from_dense
from sentei.core.rules import All, TopK
from sentei.core.tracing import trace

SIZE, WIDTH, ROWS, STEPS, MORE_STEPS = 20, 32, 64, 150, 40


def images(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Float [count, 1, SIZE, SIZE] and the number of the shape in each, int64 [count]."""
    labels = torch.randint(4, (count,), generator=generator)
    centres = torch.randint(6, SIZE - 6, (count, 2, 1, 1), generator=generator)
    radius = torch.randint(3, 6, (count, 1, 1), generator=generator)
    places = torch.arange(SIZE)
    dy, dx = (places[:, None] - centres[:, 0]).abs(), (places - centres[:, 1]).abs()
    square, distance = torch.maximum(dy, dx) <= radius, (dy**2 + dx**2).sqrt()
    shapes = torch.stack([distance <= radius, square, square & (torch.minimum(dy, dx) < 1),
                          (distance <= radius) & (distance > radius - 1.5)])
    drawn = shapes[labels, torch.arange(count)].float()
    return (drawn + 0.5 * torch.randn(count, SIZE, SIZE, generator=generator))[:, None], labels


def train(network: nn.Module, steps: int) -> None:
    """Adam on images that are drawn as they are needed."""
    optimizer, generator = torch.optim.Adam(network.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, labels = images(ROWS, generator)
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()


@torch.no_grad()
def right(network: nn.Module) -> float:
    """The share of unseen images that are told right."""
    x, labels = images(1000, torch.Generator().manual_seed(2))
    return (network(x).argmax(1) == labels).float().mean().item()


def with_rule(network: SmallCNN, config: Config) -> SmallCNN:
    """A copy whose gated layers choose by another rule."""
    copied = copy.deepcopy(network)
    copied.layers = nn.ModuleList(from_dense(layer, config) if isinstance(layer, GatedConv) else layer
                                  for layer in copied.layers)
    return copied


@torch.no_grad()
def milliseconds(network: nn.Module, x: torch.Tensor, runs: int = 100) -> float:
    """Of one image: the fastest of many runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        network(x)
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def main() -> None:
    """Prints one line a network: what is told right, and what one image costs; then the time of one wide layer."""
    torch.manual_seed(0)
    one = images(1, torch.Generator().manual_seed(3))[0]
    static, soft = (SmallCNN(config, inputs=1, classes=4, width=WIDTH) for config in (None, Config()))
    for network in (static, soft):
        train(network, STEPS)
    print(f"{'network':<16}{'maps read':>10}{'right':>8}{f'after {MORE_STEPS} more':>15}{'ms an image':>13}")
    print(f"{'static':<16}{'all':>10}{right(static):>8.1%}{'':>15}{milliseconds(static, one):>13.3f}")
    for rule in (All(), TopK(16), TopK(8)):
        chosen = with_rule(soft, Config(rule=rule))
        before = right(chosen)
        train(chosen, MORE_STEPS)
        with torch.no_grad(), trace(chosen) as records:
            chosen(one)
        name = "gates" if isinstance(rule, All) else f"gates, TopK({rule.k})"
        print(f"{name:<16}{records.density():>10.0%}{before:>8.1%}{right(chosen):>15.1%}"
              f"{milliseconds(chosen, one):>13.3f}")

    wide = GatedConv(Config(), SqueezeExcitation(256), nn.Conv2d(256, 256, 3, padding=1))
    maps = torch.randn(1, 256, 28, 28)
    print("\nms of one layer, 256 maps of 28 × 28 to 256, by the maps kept")
    for rule in (All(), TopK(128), TopK(64), TopK(32)):
        spent = milliseconds(from_dense(wide, Config(rule=rule)), maps, 20)
        print(f"{'all' if isinstance(rule, All) else rule.k:<16}{spent:>6.1f}")


if __name__ == "__main__":
    main()
