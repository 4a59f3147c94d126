"""Routing through a `Stack` on a GPU, in Triton: one launch a product for all experts, forward and backward.

Rows are sorted by expert on the device and gathered as they are read; nothing is scattered, no expert waits for
another, and only the check of the ids waits for the device. bfloat16 and float16 on tensor cores with sums in fp32;
fp32 by three products of TensorFloat32. Activations are torch's own. A call is an op of torch (`sentei::route_triton`,
with `sentei::route_triton_backward`). Triton is imported by the first call. Never run on a GPU so far: tested in
Triton's interpreter, and compiled.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.autograd.forward_ad import unpack_dual

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels import ops
from sentei.kernels.routing.order import combine, gather, sort
from sentei.kernels.routing.stack import ACTIVATIONS, Stack, activate, firsts_of

_KINDS = tuple(ACTIVATIONS)
_ATEN = torch.ops.aten
# The gradient of an activation's argument, from that of its value and the argument.
_SLOPES = {"silu": _ATEN.silu_backward, "gelu": _ATEN.gelu_backward,
           "gelu_tanh": partial(_ATEN.gelu_backward, approximate="tanh"),
           "relu": partial(_ATEN.threshold_backward, threshold=0), "identity": lambda gradient, _: gradient}


def route(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """See `sentei.kernels.routing.route`. First gradients only, for which the products of gate and up are kept.

    Raises:
        ImplError: `refusal` has a reason.
    """
    reason = refusal(hidden, ids, weights, experts)
    if reason:
        raise ImplError("fused_triton", expected="a call it can take", got=reason, do="use impl='auto'")
    return torch.ops.sentei.route_triton(hidden, ids, weights, experts.up, experts.down, experts.gate,
                                         _KINDS.index(experts.activation))[0]


def refusal(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Sequence) -> str:
    """Why this implementation cannot take these arguments; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "a Python without triton"
    if not isinstance(experts, Stack):
        return "experts that are functions"
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not ops.runs_triton(hidden.device):
        return f"{hidden.dtype} on {hidden.device}"
    if experts.up.dtype != hidden.dtype or experts.up.device != hidden.device:
        return f"experts of {experts.up.dtype} on {experts.up.device} with {hidden.dtype} on {hidden.device}"
    if any(unpack_dual(tensor).tangent is not None for tensor in (hidden, weights, *experts.weights())):
        return "tensors that carry a forward gradient"
    return ""


def _forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
             gate: torch.Tensor | None, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `sentei::route_triton`: the output [T, O], and gate's and up's products [T · K, 2 F], in sorted order."""
    from sentei.kernels.routing import triton_groups as groups

    _check(hidden, ids, weights, up, down, gate)
    output, products = _forward_shapes(hidden, ids, weights, up, down, gate, kind)
    products.zero_()  # rows of empty slots are nobody's
    if not ids.numel() or not output.numel():
        return output.zero_(), products
    order, x = sort(ids, len(up)), _contiguous(hidden)
    plan, column = groups.schedule(order), 0
    for first in firsts_of(up, gate):
        groups.rows_product(groups.factor(x, order.token), first, products[:, column:column + first.shape[1]], plan)
        column += first.shape[1]
    answers = x.new_zeros(len(products), down.shape[1])
    acts = activate(products, gate is not None, _KINDS[kind])
    groups.rows_product(groups.factor(acts), down, answers, plan)
    return combine(answers, ids, order.place, weights), products


def _forward_shapes(hidden, ids, weights, up, down, gate, kind):
    width = up.shape[1] * (1 if gate is None else 2)
    return hidden.new_empty(len(hidden), down.shape[1]), hidden.new_empty(ids.numel(), width)


def _backward(gradient: torch.Tensor, given: list[torch.Tensor], gate: torch.Tensor | None, products: torch.Tensor,
              kind: int, wanted: list[bool]) -> list[torch.Tensor]:
    """The op `sentei::route_triton_backward`: gradients of hidden, weights, gate-and-up [E, 2 F, D] and down, or empty.

    Args:
        gradient: [T, O]; of the output.
        given: hidden, ids, weights, up and down.
        products: what `_forward` kept.
        wanted: which of the four.
    """
    from sentei.kernels.routing import triton_groups as groups

    hidden, ids, weights, up, down = given
    _check(*given, gate)
    found = _backward_shapes(gradient, given, gate, products, kind, wanted)
    if not ids.numel() or not gradient.numel():
        return [tensor.zero_() for tensor in found]
    order, x, gradient = sort(ids, len(up)), _contiguous(hidden), _contiguous(gradient)
    plan, token = groups.schedule(order), order.token
    asked = groups.factor(gradient, token)
    of_acts = torch.zeros(len(products), up.shape[1], dtype=torch.float32, device=x.device)
    groups.rows_product(asked, down, of_acts, plan, turned=True)  # of activations that are not weighed yet
    weight = torch.empty_like(order.place, dtype=torch.float32).flatten().index_copy(
        0, order.place.flatten(), weights.masked_fill(ids < 0, 0).flatten().float())[:, None]
    wide = products.float()
    acts = activate(wide, gate is not None, _KINDS[kind])
    slopes = _slopes(wide, of_acts * weight, gate is not None, _KINDS[kind]).to(x.dtype)
    if wanted[1]:
        found[1].copy_(gather((of_acts * acts).sum(1, keepdim=True), ids, order.place).squeeze(2))
    if wanted[3]:
        groups.weights_product(asked, groups.factor((acts * weight).to(x.dtype)), found[3], plan)
    if wanted[2]:
        groups.weights_product(groups.factor(slopes), groups.factor(x, token), found[2], plan)
    if wanted[0]:
        rows, column = torch.zeros(len(products), x.shape[1], dtype=torch.float32, device=x.device), 0
        for first in firsts_of(up, gate):
            part = slopes[:, column:column + first.shape[1]]
            groups.rows_product(groups.factor(part), first, rows, plan, turned=True, add=column > 0)
            column += first.shape[1]
        found[0].copy_(gather(rows, ids, order.place).sum(1))
    return found


def _slopes(products: torch.Tensor, gradient: torch.Tensor, gated: bool, activation: str) -> torch.Tensor:
    """The gradients [N, 2 F] of gate's and up's products, or [N, F] of up's, from those of the activations [N, F]."""
    slope = _SLOPES[activation]
    if not gated:
        return slope(gradient, products)
    gate, up = products.chunk(2, dim=-1)
    return torch.cat([slope(gradient * up, gate), gradient * ACTIVATIONS[activation](gate)], 1)


def _backward_shapes(gradient, given, gate, products, kind, wanted):
    hidden, _, weights, up, down = given
    shapes = hidden.shape, weights.shape, (len(up), up.shape[1] * (1 if gate is None else 2), up.shape[2]), down.shape
    return [tensor.new_empty(shape if want else 0)
            for tensor, shape, want in zip((hidden, weights, up, down), shapes, wanted, strict=True)]


def _contiguous(rows: torch.Tensor) -> torch.Tensor:
    """The rows, or a copy whose numbers are contiguous."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check(hidden, ids, weights, up, down, gate) -> None:
    """Anyone may call an op: what it is given may not lead a kernel outside the tensors."""
    floats = [hidden, up, down] + ([] if gate is None else [gate])
    good = (hidden.dim() == ids.dim() == 2 and up.dim() == down.dim() == 3 and ids.dtype == torch.int64
            and ids.shape == weights.shape and len(ids) == len(hidden) and up.shape[2] == hidden.shape[1]
            and down.shape[::2] == up.shape[:2] and (gate is None or gate.shape == up.shape)
            and all(tensor.dtype == hidden.dtype for tensor in floats)
            and all(tensor.device == hidden.device for tensor in (*floats, ids, weights)))
    good = good and (not ids.numel() or -1 <= int(ids.min()) and int(ids.max()) < len(up))
    if not good:
        raise ShapeError("route", expected="hidden [T, D], ids int64 [T, K] in -1..E-1, weights [T, K], up and gate "
                         "[E, F, D] and down [E, O, F] of one dtype and device",
                         got=", ".join(f"{t.dtype} {list(t.shape)}" for t in (*floats, ids, weights)),
                         do="call it through route")


def _save(ctx, inputs, output):
    *given, gate, ctx.kind = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros, as many as were saved
    ctx.save_for_backward(*given, gate, output[1])


def _differentiate(ctx, gradient, _):
    *given, gate, products = ctx.saved_tensors
    needs, width = ctx.needs_input_grad, given[3].shape[1]
    wanted = [needs[0], needs[2], needs[3] or needs[5], needs[4]]
    found = torch.ops.sentei.route_triton_backward(gradient, given, gate, products, ctx.kind, wanted)
    of_hidden, of_weights, first, of_down = (
        tensor if want else None for tensor, want in zip(found, wanted, strict=True))
    of_gate = first[:, :width] if wanted[2] and gate is not None else None
    return of_hidden, None, of_weights, first[:, -width:] if wanted[2] else None, of_down, of_gate, None


_DEVICES = "CUDA", "CPU"  # the CPU for Triton's interpreter
ops.define("route_triton(Tensor hidden, Tensor ids, Tensor weights, Tensor up, Tensor down, Tensor? gate, int kind)"
           " -> (Tensor, Tensor)", _forward, _forward_shapes, _DEVICES)
ops.define("route_triton_backward(Tensor gradient, Tensor[] given, Tensor? gate, Tensor products, int kind,"
           " bool[] wanted) -> Tensor[]", _backward, _backward_shapes, _DEVICES)
ops.differentiate_once("route_triton", _differentiate, _save, impl="fused_triton", do="use impl='reference'")
