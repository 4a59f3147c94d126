"""The experts of a mixture of transformers by our kernel: few tokens, as in decoding, and many, each where faster.

Found by what transformers calls them with, and proven on random tokens, whatever the family: a module of stacked,
gated experts becomes a subclass of its own class and keeps its parameters, path, state_dict and hooks, as in
`conversion.rows`. What the kernel is not for goes to the implementation that the model's config names.
"""

import inspect

import torch
from torch import nn

from sentei.conversion.altered import DIFFER, Kind, all_rows, native_class
from sentei.conversion.experts import is_plain, run_experts
from sentei.conversion.linear import Choice, Steps, input_of
from sentei.kernels import native
from sentei.kernels.linear import fused_cpp

INPUTS = ["self", "hidden_states", "top_k_index", "top_k_weights"]
TRIED = 1, 13  # tokens
KEPT = 2  # experts a token keeps where it is not said how many
DIFFERS = {torch.float32: DIFFER, torch.bfloat16: 0.06}  # of an answer's largest number, as rounding may


class NativeExperts:
    """Stacked experts whose tokens are a native call's; `native_rows` is its Choice."""

    native_rows: Choice

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """As the module's own; see `NativeLinear.forward`."""
        if type(hidden_states) is torch.Tensor and self.native_rows.takes(hidden_states):
            return run_experts(self, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)


def given(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, other experts for each, and weights that add up to 1."""
    number, tokens = len(module.down_proj), x[0]
    kept = min(number, getattr(getattr(module, "config", None), "num_experts_per_tok", KEPT))
    draws = torch.rand(len(tokens), number, generator=torch.Generator().manual_seed(len(tokens)))
    weights, ids = draws.to(tokens.device).topk(kept, dim=-1)
    return tokens, ids, (weights / weights.sum(-1, keepdim=True)).to(tokens.dtype)


def _looks_stacked(module: nn.Module) -> bool:
    return {name for name, _ in module.named_parameters()} == {"gate_up_proj", "down_proj"} and is_plain(module)


@torch.no_grad()
def _prove(module: nn.Module, mixin: type) -> str:
    """Switches the module if what its own implementation answers is what ours does; else says why not."""
    weights = list(module.parameters())
    if list(inspect.signature(type(module).forward).parameters) != INPUTS:
        return "another forward than transformers' experts have"
    if native.missing() or not all(map(fused_cpp.is_plain, weights)) or not all(weight.numel() for weight in weights):
        return native.missing() or "weights that are not plain, or none"
    for tokens in TRIED:
        inputs = given(module, input_of(module, tokens))
        found, own = run_experts(module, *inputs).float(), module(*inputs).float()
        if not (found - own).abs().max() <= DIFFERS[weights[0].dtype] * own.abs().max():
            return "another result than by our kernel, on random tokens"
    module.__class__ = native_class(mixin, type(module))
    module.native_rows = all_rows(module)
    return ""


KIND = Kind(NativeExperts, _looks_stacked, _prove, Steps(), lambda module: module.down_proj.shape[1], given)
