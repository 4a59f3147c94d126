"""A signal in k of d dimensions, read by a probe over all of them, or over those somebody selected."""

import torch

from sentei.core.errors import RuleError


def expected_ratio(right: int, wrong: int) -> float:
    """Signal power ÷ noise power of a read-out over so many dimensions with signal and so many with noise."""
    return right / wrong


def readouts(right: int, wrong: int, number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What a probe makes of the signal and of the noise, float64 [number] each: q·x over the dimensions read.

    Signal, noise and probe are standard normal in every dimension; a dimension holds signal or noise.

    Args:
        right, wrong: dimensions read that hold signal, and that hold noise.
    Cost: 2 · number · (right + wrong) draws, in slices of 2^22.
    """
    if min(right, wrong) < 0 or number < 1:
        raise RuleError("readouts", expected="numbers of dimensions from 0, and a read-out", do="read some",
                        got=f"{right}, {wrong}, {number}")
    return tuple(_read(width, number, generator) for width in (right, wrong))


def _read(width: int, number: int, generator: torch.Generator) -> torch.Tensor:
    total, step = torch.zeros(number, dtype=torch.float64), max(1, (1 << 22) // number)
    for first in range(0, width, step):
        size = number, min(step, width - first)
        total += (torch.randn(size, generator=generator) * torch.randn(size, generator=generator)).sum(1).double()
    return total
