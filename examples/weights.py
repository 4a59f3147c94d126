"""The room `weights`: train a small network, prune it by every saliency of one calibration pass, and time what is left.

Run from the repository's root: python -m examples.weights
"""

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.weights import Config, Network, from_dense
from sentei.core.rules import Capacity, TopK
from sentei.core.tracing import trace
from sentei.kernels.linear.calibration import Calibration, calibrate
from sentei.measurement.latency import interleave

WIDTH, HIDDEN, ROWS, STEPS, RUNS = 64, 512, 1024, 200, 7
CHOICES = {"half the neurons": ("columns", Capacity(0.5)), "half of each row": ("row", Capacity(0.5)),
           "2 of 4": ("four", TopK(2))}


def inputs(count: int, generator: torch.Generator, mix: torch.Tensor) -> torch.Tensor:
    """Float [count, WIDTH], near few directions, as the hidden states of a model are."""
    few = torch.randn(count, len(mix), generator=generator)
    return few @ mix + 0.2 * torch.randn(count, WIDTH, generator=generator)


def train(network: Network, teacher: nn.Module, generator: torch.Generator, mix: torch.Tensor) -> None:
    """STEPS steps towards a teacher."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(STEPS):
        x = inputs(ROWS, generator, mix)
        optimizer.zero_grad()
        F.mse_loss(network(x), teacher(x).detach()).backward()
        optimizer.step()


def pruned(network: Network, config: Config, calibration: Calibration, moved: bool) -> tuple[nn.Module, nn.Module]:
    """The network with its last matrix, or its neurons, pruned for good; and the room that did it."""
    if config.among == "columns":
        room = from_dense(network, config, calibration).fix(calibration if moved else None)
        return room, room
    room = from_dense(network.down, config, calibration).fix(calibration if moved else None)
    return Network(network.up, room, network.gate, network.activation), room


def main() -> None:
    """Prints one line a choice: the error on unseen inputs, multiply-adds, and the time, all against dense."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH // 4, WIDTH, generator=generator)
    teacher = nn.Sequential(nn.Linear(WIDTH, 96), nn.Tanh(), nn.Linear(96, WIDTH))
    network = Network(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN))
    train(network, teacher, generator, mix)
    seen, unseen = inputs(4 * ROWS, generator, mix), inputs(ROWS, generator, mix)
    with calibrate({"down": network.down}) as found:
        F.mse_loss(network(seen), teacher(seen).detach() + 0.1 * torch.randn(len(seen), WIDTH, generator=generator),
                   reduction="sum").backward()

    print(f"{'kept':<18}{'saliency':<11}{'error':>9}{'moved':>9}{'work of it':>12}{'time of all':>13}")
    with torch.no_grad():
        expected = network(unseen)
        for name, (among, rule) in CHOICES.items():
            for saliency in ("magnitude", "fisher", "wanda", "obs"):
                config = Config(rule=rule, among=among, saliency=saliency)
                errors = []
                for moved in (False, True):
                    layer, room = pruned(network, config, found["down"], moved)
                    with trace(room) as records:
                        output = layer(unseen)
                    errors.append((F.mse_loss(output, expected) / expected.square().mean()).item())
                timed = interleave(lambda: network(unseen), lambda layer=layer: layer(unseen), runs=RUNS)
                print(f"{name:<18}{saliency:<11}{errors[0]:>9.4f}{errors[1]:>9.4f}{records.density():>12.2f}"
                      f"{1 / timed.speedup():>13.2f}")
        print(f"\nwhy: {records[0].reason}")


if __name__ == "__main__":
    main()
