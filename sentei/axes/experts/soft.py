"""Soft MoE: every slot is a mean of tokens, and its expert's answer goes to every token (2308.00951, eq. 1-3)."""

import torch

from sentei.core.precision import in_full, widened
from sentei.core.selection import Selection
from sentei.kernels.routing import Stack, route


def answer(selection: Selection, hidden: torch.Tensor, dispatch: torch.Tensor, stack: Stack, impl: str) -> torch.Tensor:
    """`mix` by a selection's weights; tokens that were permitted nothing are in no slot."""
    real = (selection.permitted > 0).unsqueeze(-1)
    return mix(hidden.masked_fill(~real, 0), dispatch, selection.dense_weights(), stack, impl)


def mix(hidden: torch.Tensor, dispatch: torch.Tensor, combine: torch.Tensor, stack: Stack, impl: str) -> torch.Tensor:
    """The answers [..., T, O] to tokens [..., T, D].

    Args:
        dispatch: [..., T, S], in fp32 or wider; the share of a token in a slot. An expert has S / E slots.
        combine: [..., T, S]; the share of a slot's answer in a token's.
        impl: the kernel of the experts, see `route`.
    """
    with in_full(hidden):
        slots = dispatch.transpose(-1, -2) @ widened(hidden)
    rows, each = slots.to(hidden.dtype).flatten(0, -2), slots.shape[-2] // len(stack)
    ids = torch.arange(slots.shape[-2], device=rows.device).div(each, rounding_mode="floor")
    ids = ids.expand(slots.shape[:-1]).reshape(-1, 1)
    answers = route(rows, ids, torch.ones_like(ids, dtype=dispatch.dtype), stack, impl=impl)
    with in_full(hidden):
        answers_of_slots = answers.reshape(*slots.shape[:-1], answers.shape[-1]).to(dispatch.dtype)
        return (combine @ answers_of_slots).to(answers.dtype)
