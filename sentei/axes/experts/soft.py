"""Soft MoE: every slot is a mean of tokens, and its expert's answer goes to every token (2308.00951, eq. 1-3).

    slot_s = Σ over t of softmax_t(z)_ts · x_t,     y_t = Σ over s of softmax_s(z)_ts · expert(slot_s)
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sentei.axes.experts.gates import FAINT
from sentei.core.precision import in_full, widened
from sentei.core.selection import Selection
from sentei.kernels.routing import Stack, route


def answer(selection: Selection, hidden: torch.Tensor, dispatch: torch.Tensor, stack: Stack, impl: str) -> torch.Tensor:
    """The answers [..., T, O] to tokens [..., T, D] by a selection's weights; no slot holds a token that was permitted
    nothing.

    Args:
        dispatch: [..., T, S], in fp32 or wider; the share of a token in a slot. An expert has S / E slots.
        impl: the kernel of the experts, see `route`.
    """
    real = (selection.permitted > 0).unsqueeze(-1)
    with in_full(hidden):
        slots = dispatch.mT @ widened(hidden.masked_fill(~real, 0))
    answers = answers_to(slots.to(hidden.dtype), stack, impl)
    with in_full(hidden):
        return (selection.dense_weights() @ answers.to(dispatch.dtype)).to(answers.dtype)


def mix(hidden: torch.Tensor, logits: torch.Tensor, stack: Stack, impl: str) -> torch.Tensor:
    """`answer` where every token and slot is permitted, in a third of the passes over [T, S].

    Args:
        logits: [..., T, S], finite and in fp32 or wider. What is below FAINT of a sum is 0, in gradients too.
    Cost: first gradients only.
    """
    answers = answers_to(_Dispatch.apply(widened(hidden), logits).to(hidden.dtype), stack, impl)
    return _Combine.apply(answers.to(logits.dtype), logits).to(answers.dtype)


def answers_to(slots: torch.Tensor, stack: Stack, impl: str) -> torch.Tensor:
    """What the experts make of slots [..., S, D], each of its own S / E."""
    experts = torch.arange(len(stack), device=slots.device).repeat_interleave(slots.shape[-2] // len(stack))
    ids = experts.expand(slots.shape[:-1]).reshape(-1, 1)
    ones = torch.ones_like(ids, dtype=torch.promote_types(slots.dtype, torch.float32))
    return route(slots.flatten(0, -2), ids, ones, stack, impl=impl).unflatten(0, slots.shape[:-1])


class _Dispatch(torch.autograd.Function):
    """Slots [..., S, D]: means of the tokens [..., T, D] by the softmax of logits [..., T, S] over the tokens."""

    @staticmethod
    def forward(ctx, hidden, logits):
        shares = F.threshold_(logits.softmax(-2), FAINT, 0)
        ctx.save_for_backward(hidden, shares)
        return shares.mT @ hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (hidden, shares), (wants_hidden, wants_logits) = ctx.saved_tensors, ctx.needs_input_grad
        return (shares @ gradient if wants_hidden else None,
                through_softmax(hidden @ gradient.mT, shares, -2) if wants_logits else None)


class _Combine(torch.autograd.Function):
    """Means [..., T, O] of the answers [..., S, O] by the softmax of logits [..., T, S] over the slots."""

    @staticmethod
    def forward(ctx, answers, logits):
        shares = F.threshold_(logits.softmax(-1), FAINT, 0)
        ctx.save_for_backward(answers, shares)
        return shares @ answers

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (answers, shares), (wants_answers, wants_logits) = ctx.saved_tensors, ctx.needs_input_grad
        return (shares.mT @ gradient if wants_answers else None,
                through_softmax(gradient @ answers.mT, shares, -1) if wants_logits else None)


def through_softmax(gradient: torch.Tensor, shares: torch.Tensor, dim: int) -> torch.Tensor:
    """The gradient of logits, in place of the `gradient` of their softmax along `dim`.

    Their mean is of the very numbers it is taken from: what one share of 1 gets is exactly 0.
    """
    return gradient.sub_((gradient * shares).sum(dim, keepdim=True)).mul_(shares)
