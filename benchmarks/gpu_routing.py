"""Mixtures of experts on a GPU: the cases of `gpu_check`, our calls of them and transformers'."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from sentei.kernels.routing import Stack, route

NAMES = ("output", "dx", "dweights", "dfirst", "ddown")
PEERS = ("grouped_mm", "eager")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """E gated experts of width F, K of them a token, model width D, and T tokens."""

    experts: int
    inner: int
    top: int
    width: int
    tokens: int = 16384
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True
    device: str = "cuda"

    def __str__(self) -> str:
        return (f"{self.experts} x {self.inner}, top {self.top}, width {self.width}, {self.tokens:,} tokens, "
                f"{str(self.dtype).removeprefix('torch.')}{', forward and backward' if self.backward else ''}")

    @cached_property
    def ids(self) -> torch.Tensor:
        """Int64 [T, K]: the experts of each token, drawn at random."""
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.rand(self.tokens, self.experts, generator=generator, device=self.device).topk(self.top).indices

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Hidden [T, D], weights [T, K], gate-and-up [E, 2 F, D] and down [E, D, F]."""
        generator = torch.Generator(self.device).manual_seed(0)
        shapes = ((self.tokens, self.width), (self.tokens, self.top), (self.experts, 2 * self.inner, self.width),
                  (self.experts, self.width, self.inner))
        return tuple((torch.randn(shape, generator=generator, device=self.device) * shape[-1] ** -0.5).to(
            self.dtype).requires_grad_(self.backward) for shape in shapes)

    def operations(self) -> float:
        """Floating-point operations, two a multiply-add."""
        return self.tokens * self.top * 6.0 * self.inner * self.width * (3 if self.backward else 1)

    def results(self, impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """What NAMES are, in the dtype."""
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in self.tensors]
        output = self.output(impl, leaves)
        seeds = torch.randn(output.shape, generator=torch.Generator(self.device).manual_seed(2), device=self.device)
        return [output.detach(), *torch.autograd.grad(output, leaves, seeds.to(dtype))]

    def output(self, impl: str, leaves) -> torch.Tensor:
        """Ours [T, D] of other tensors than its own."""
        hidden, weights, joint, down = leaves
        return route(hidden, self.ids, weights, Stack.from_joint(joint, down), impl=impl)

    def run(self, impl: str) -> Callable[[], object]:
        """A call of ours."""
        return self.whole(lambda: self.output(impl, self.tensors))

    def theirs(self, name: str) -> Callable[[], object]:
        """A call of transformers' backend of that name, on the same weights."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        hidden, weights, joint, down = self.tensors
        config = MixtralConfig(hidden_size=self.width, intermediate_size=self.inner, num_local_experts=self.experts)
        config._experts_implementation = name
        with torch.device("meta"):
            module = MixtralExperts(config)
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = joint, down
        return self.whole(lambda: module(hidden, self.ids, weights))

    def whole(self, call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        """The call alone without gradients, or with those of its sum."""
        if not self.backward:
            return torch.no_grad()(call)
        return lambda: torch.autograd.grad(call().sum(), self.tensors)


LARGE, FINE = Mixture(experts=8, inner=2048, top=2, width=512), Mixture(experts=64, inner=512, top=6, width=1024)
RIGHT = [replace(case, tokens=777, dtype=dtype) for case in (LARGE, FINE)
         for dtype in (torch.bfloat16, torch.float32, torch.float16)]
TIMED = [replace(case, backward=backward) for case in (LARGE, FINE) for backward in (False, True)]
