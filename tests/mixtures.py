"""Small mixtures of experts, one of each kind: those a causal model may have, and those that look ahead."""

import torch

from sentei.axes.experts import Config, MixtureOfExperts
from sentei.axes.experts.gates import Choice, Noisy, Renormalised, Sigmoid, Soft, Softmax, Task, Unit
from sentei.core.rules import Capacity, Fixed, Mass, Threshold, TopK

WIDTH, UNIT, E = 6, 4, 8
KINDS = {
    "unit": Config(rule=TopK(3), gate=Unit(), unit=UNIT),
    "switch": Config(rule=TopK(1), gate=Softmax(), unit=UNIT),
    "switch, capacity": Config(rule=TopK(1), gate=Softmax(1.0), unit=UNIT),
    "top-2": Config(rule=TopK(2), gate=Renormalised(), unit=UNIT),
    "mass": Config(rule=Mass(0.4), gate=Softmax(), unit=UNIT),
    "threshold": Config(rule=Threshold(0.5), gate=Renormalised(), unit=UNIT),
    "fixed": Config(rule=Fixed((1, 5)), gate=Sigmoid(), unit=UNIT),
    "noisy": Config(rule=TopK(2), gate=Noisy(), unit=UNIT),
    "sigmoid": Config(rule=TopK(2), gate=Sigmoid(scale=2.5, groups=4, kept_groups=2), unit=UNIT),
    "cosine": Config(rule=TopK(2), gate=Softmax(), metric="cosine", unit=UNIT),
    "l2": Config(rule=TopK(2), gate=Softmax(), metric="l2", unit=UNIT),
    "task": Config(rule=TopK(2), gate=Task(3), unit=UNIT),
    "choice": Config(rule=Capacity(0.25), gate=Choice(), unit=UNIT),
    "shared": Config(rule=TopK(2), gate=Renormalised(), unit=UNIT, shared=2),
}
LOOKING = {
    "expert choice": Config(rule=Capacity(0.25), gate=Softmax(), unit=UNIT),
    "soft": Config(gate=Soft(2), metric="cosine", unit=UNIT),
}


def layer(kind: str, *, gated: bool = True, dtype: torch.dtype = torch.float64) -> MixtureOfExperts:
    config = {**KINDS, **LOOKING}[kind]
    made = MixtureOfExperts(config, width=WIDTH, neurons=(E + config.shared) * UNIT, gated=gated,
                            causal=kind in KINDS).to(dtype).eval()
    with torch.no_grad():
        made.router.weight.normal_()
        if made.experts.bias is not None:
            made.experts.bias.normal_()
    return made


def answer(made: MixtureOfExperts, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    tasks = torch.arange(len(x)) % 3 if isinstance(made.config.gate, Task) else None
    return made(x, mask, tasks)


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, dtype=dtype)
