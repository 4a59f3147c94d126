"""Is Soft MoE faster than soft-moe-pytorch, forward and backward?

Both layers have the same weights: the peer's biases are zero, and its normalisation is in both. Outputs and the
gradient of the input are compared before anything is timed; then both run in turn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn

from sentei.axes.experts import Config, MixtureOfExperts
from sentei.axes.experts.gates import Soft
from sentei.core.rules import All
from sentei.measurement.latency import interleave, measured


@dataclass(frozen=True)
class Case:
    """E experts of 4 · width neurons, whose slots are together as many as the tokens of a sequence."""

    experts: int
    width: int
    tokens: int

    def __str__(self) -> str:
        return (f"Soft MoE, {self.experts} × {4 * self.width:,}, width {self.width}, {self.tokens:,} tokens, forward "
                "and backward, float32")


CASES = {"soft": [Case(8, 512, 1024), Case(32, 256, 1024)]}


def layers(case: Case) -> tuple[nn.Module, nn.Module]:
    """Ours and the peer's, of the same numbers."""
    from soft_moe_pytorch import SoftMoE

    theirs = SoftMoE(dim=case.width, seq_len=case.tokens, num_experts=case.experts)
    config = Config(rule=All(), gate=Soft(slots=case.tokens // case.experts), unit=4 * case.width)
    mixture = MixtureOfExperts(config, width=case.width, neurons=4 * case.width * case.experts, gated=False,
                               activation="gelu", causal=False)
    with torch.no_grad():
        for number, (up, _, _, down) in enumerate(theirs.experts.experts):
            nn.init.zeros_(up.bias)
            nn.init.zeros_(down.bias)
            mixture.up[number], mixture.down[number] = up.weight, down.weight
        mixture.router.weight.copy_(theirs.slot_norm(theirs.slot_embeds).flatten(0, 1))
    return nn.Sequential(theirs.norm, mixture), theirs


def step(layer: nn.Module, x: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A call of the output and the input's gradient; the gradients of the weights are fresh each time."""
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        layer.zero_grad()
        x.grad = None
        output = layer(x)
        output.square().sum().backward()
        return output.detach(), x.grad
    return call


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case: the keys of `sentei.benches.table`.

    Args:
        names: of CASES.
        runs: timed pairs a row.
        absent: told why there are no rows.
    Raises:
        AssertionError: outputs or gradients differ; there is no ratio then.
    """
    if names and find_spec("soft_moe_pytorch") is None:
        return absent("soft-moe-pytorch is not installed")
    for case in (case for name in names for case in CASES[name]):
        torch.manual_seed(0)
        x = torch.randn(1, case.tokens, case.width, requires_grad=True)
        ours, theirs = (step(layer, x) for layer in layers(case))
        for found, expected in zip(ours(), theirs(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        yield measured("rooms", str(case), "soft-moe-pytorch", interleave(theirs, ours, runs=runs))
