"""Routing by torch's own products: tokens sorted by expert, one product an expert, answers gathered slot by slot.

Any float dtype and device; one number of the host is read a call, the counts. Nothing is scattered, so that two slots
of a token never write to one place and the sum does not depend on who came first.
"""

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from sentei.core.shapes import check_shape
from sentei.kernels.routing.order import combine, gather, sort
from sentei.kernels.routing.stack import Stack, activate, firsts_of


def route(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """See `sentei.kernels.routing.route`. The sum is made in fp32 or wider.

    A `Stack` outside autocast and transforms has first gradients only, and keeps the products of gate and up for them.
    """
    counts, token, place = sort(ids, len(experts))
    empty, *sizes = counts.tolist()
    token, place = token[empty:], (place - empty).clamp(min=0)
    if isinstance(experts, Stack) and len(token) and _is_plain(hidden, *experts.weights()):
        answers = _Grouped.apply(hidden, experts.up, experts.gate, experts.down,
                                 (ids, place, token, sizes, experts.activation))
    else:
        answers = _each(hidden[token], sizes, experts)
    if not len(token):
        return answers.new_zeros(len(ids), answers.shape[1]).index_add(0, token, answers)
    return combine(answers, ids, place, weights)


def _each(x: torch.Tensor, sizes: list[int], experts: Sequence) -> torch.Tensor:
    """The answers [N, D_out] of functions, each to its own rows of x; the first is asked even without rows."""
    answers, start = [], 0
    for e, size in enumerate(sizes):
        if size or e == 0:
            value = experts[e](x[start:start + size])
            width = {"D": answers[0].shape[1]} if answers else {}
            check_shape("route", f"the answer of expert {e}", value, "N D", N=size, **width)
            answers.append(value)
        start += size
    return torch.cat([value.to(answers[0].dtype) for value in answers])


def _is_plain(*tensors: torch.Tensor) -> bool:
    """Whether autograd alone looks on, and each product's dtype is the tensors' own."""
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled(tensors[0].device.type)
                or torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0)


class _Grouped(torch.autograd.Function):
    """Answers [N, O] of a stack to the tokens, sorted by expert."""

    @staticmethod
    def forward(ctx, hidden, up, gate, down, kept):
        ids, place, token, sizes, activation = kept
        x, firsts = hidden[token], firsts_of(up, gate)
        products = x.new_empty(len(x), sum(first.shape[1] for first in firsts))
        answers = x.new_empty(len(x), down.shape[1])
        for e, rows in _slices(sizes):
            _into([first[e].t() for first in firsts], x[rows], products[rows])
            torch.mm(activate(products[rows], gate is not None, activation), down[e].t(), out=answers[rows])
        ctx.save_for_backward(hidden, up, gate, down, ids, place, token, products)
        ctx.sizes, ctx.activation = sizes, activation
        return answers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        hidden, up, gate, down, ids, place, token, products = ctx.saved_tensors
        x, firsts = hidden[token], firsts_of(up, gate)
        wants_x, *wants_first, wants_down, _ = ctx.needs_input_grad
        wants_first = any(wants_first)
        of_x = torch.empty_like(x)
        of_first = up.new_empty(len(up), products.shape[1], up.shape[2]) if wants_first else None
        of_down = torch.empty_like(down, memory_format=torch.contiguous_format) if wants_down else None
        for e, rows in _slices(ctx.sizes, everyone=True):
            with torch.enable_grad():
                own = products[rows].detach().requires_grad_()
                acts = activate(own, gate is not None, ctx.activation)
            slopes, = torch.autograd.grad(acts, own, gradient[rows] @ down[e])
            if wants_down:
                torch.mm(gradient[rows].t(), acts.detach(), out=of_down[e])
            if wants_first:
                torch.mm(slopes.t(), x[rows], out=of_first[e])
            if wants_x:
                torch.mm(slopes[:, :firsts[0].shape[1]], firsts[0][e], out=of_x[rows])
                for first in firsts[1:]:
                    of_x[rows].addmm_(slopes[:, firsts[0].shape[1]:], first[e])
        of_hidden = gather(of_x, ids, place).sum(1) if wants_x else None
        width = up.shape[1]
        of_gate = of_first[:, :width] if wants_first and gate is not None else None
        of_up = of_first[:, -width:] if wants_first else None
        return of_hidden, of_up, of_gate, of_down, None


def _slices(sizes: list[int], everyone: bool = False):
    """(expert, its rows) of those that have some, or of all."""
    start = 0
    for e, size in enumerate(sizes):
        if size or everyone:
            yield e, slice(start, start + size)
        start += size


def _into(factors: list[torch.Tensor], x: torch.Tensor, output: torch.Tensor) -> None:
    """Writes the products of x with each factor beside each other."""
    start = 0
    for factor in factors:
        torch.mm(x, factor, out=output[:, start:start + factor.shape[1]])
        start += factor.shape[1]
