"""Routing: the definition where the values are functions of the query. One operation, one signature."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from sentei.core.errors import ImplError, ShapeError
from sentei.core.precision import are_alike, in_full, product_dtype
from sentei.core.shapes import check_shape
from sentei.kernels.routing import auto, eager, exchange, fused_cpp, fused_triton, masked, reference
from sentei.kernels.routing.stack import Stack

__all__ = ["IMPLS", "Stack", "choose_impl", "route"]

IMPLS = {"reference": reference.route, "eager": eager.route, "masked": masked.route, "fused_cpp": fused_cpp.route,
         "fused_triton": fused_triton.route}
CHOSEN = {"masked": masked.run, "fused_cpp": fused_cpp.run}  # without what choosing has asked already


def route(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Returns, for each token, the weighed sum of the experts it kept.

        y_t = Σ over the experts e kept by t of  w_te · expert_e(x_t)

    Shapes: T tokens, K slots, E experts, D and D_out widths, N the tokens that kept one expert.

    Under autocast the answers of a `Stack` have autocast's dtype; in which its products are made, `choose_impl` says.

    Args:
        hidden: [T, D], any float dtype and strides; that of a `Stack`.
        ids: int64 [T, K]; expert numbers, -1 where a slot is empty. The order of the slots does not matter.
        weights: float [T, K]; what a kept expert counts; not read where a slot is empty.
        experts: E functions from [N, D] to [N, D_out]. A `Stack` of DTensors, sharded over the experts, is asked in the
            processes that have them (`exchange.py`), which all call this together.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        [T, D_out] in the dtype of the experts' answers; a token that keeps nothing gives 0.
    Raises:
        ShapeError: shapes, dtypes, devices or expert numbers do not fit.
        ImplError: an unknown implementation.
    Cost: one call of each kept expert, on its own tokens only; nothing for the others. Of narrow experts of which each
        token keeps many, "auto" may find all of them cheaper (`masked`).
    Reference: Shazeer et al. 2017, arXiv 1701.06538, eq. 1.
    """
    _check(hidden, ids, weights, experts)
    if exchange.is_sharded(experts):
        _check_ids(ids, len(experts))
        return exchange.route(hidden, ids, weights, experts, partial(route, impl=impl))
    if _is_narrowed(hidden, experts):
        given = _under_autocast(impl, hidden, ids, weights, experts)
        with in_full(hidden):
            answers = route(*given, impl=impl)
        return answers.to(product_dtype(experts.up))
    name, _ = choose_impl(impl, hidden, ids, weights, experts)
    if name != "fused_cpp":  # which looks at the ids itself, in passing
        _check_ids(ids, len(experts))
    kernel = CHOSEN.get(name, IMPLS[name]) if impl == "auto" else IMPLS[name]
    return kernel(hidden, ids, weights, experts)


def choose_impl(
    impl: str,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> tuple[str, str]:
    """The implementation that will run for these arguments of `route`, and why.

    `fused_triton` runs by its name alone: on which GPU it is the fastest, nobody has measured.

    Raises:
        ImplError: an unknown name.
    """
    if exchange.is_sharded(experts):
        return exchange.NAME, exchange.REASON
    if _is_narrowed(hidden, experts):
        given = _under_autocast(impl, hidden, ids, weights, experts)
        with in_full(hidden):
            name, reason = choose_impl(impl, *given)
        return name, f"{reason}; experts of {given[-1].up.dtype} under autocast"
    if impl in IMPLS:
        return impl, "asked for by name"
    if impl != "auto":
        raise ImplError("route", expected=f"impl 'auto', {', '.join(map(repr, IMPLS))}", got=repr(impl),
                        do="choose one of these")
    reason = fused_cpp.refusal(hidden, ids, weights, experts)
    return ("eager", f"fused_cpp cannot take {reason}") if reason else auto.fastest(hidden, ids, experts)


def _is_narrowed(hidden: torch.Tensor, experts: Sequence) -> bool:
    """Whether autocast would make the products of a stack narrower."""
    return torch.is_autocast_enabled(hidden.device.type) and isinstance(experts, Stack)


def _under_autocast(impl: str, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Stack
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Stack]:
    """The arguments as they are computed with where autocast is on: as narrow as torch's products would be.

    But "auto" leaves the experts as they are for `fused_cpp` where a narrow copy of all of them would cost more than it
    saves.
    """
    narrow, alike = hidden.to(product_dtype(hidden)), hidden.to(experts.up.dtype)
    with in_full(hidden):
        stays = (impl == "auto" and not fused_cpp.refusal(alike, ids, weights, experts)
                 and not auto.pays_to_narrow(narrow, ids, experts))
    if stays:
        return alike, ids, weights, experts
    up, down, gate = (None if weight is None else weight.to(product_dtype(weight))
                      for weight in (experts.up, experts.down, experts.gate))
    return narrow, ids, weights, Stack(up=up, down=down, gate=gate, activation=experts.activation)


def _check(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Sequence) -> None:
    if not (hidden.dim() == ids.dim() == 2 and ids.shape == weights.shape and ids.shape[0] == hidden.shape[0]):
        sizes = check_shape("route", "hidden", hidden, "T D")
        sizes = check_shape("route", "ids", ids, "T K", T=sizes["T"])
        check_shape("route", "weights", weights, "T K", **sizes)
    if ids.dtype != torch.int64 or not hidden.is_floating_point() or not weights.is_floating_point():
        raise ShapeError("route", expected="ids int64, hidden and weights floating",
                         got=f"{ids.dtype}, {hidden.dtype}, {weights.dtype}", do="convert them before the call")
    if not hidden.device == ids.device == weights.device:
        raise ShapeError("route", expected="one device", got=f"{hidden.device}, {ids.device}, {weights.device}",
                         do="move them before the call")
    alike = not isinstance(experts, Stack) or hidden.dtype == experts.up.dtype and hidden.device == experts.up.device
    if not alike and not are_alike(hidden, experts.up):
        raise ShapeError("route", expected="experts of the tokens' dtype, on their device",
                         got=f"{hidden.dtype} on {hidden.device} for {experts.up.dtype} on {experts.up.device}",
                         do="convert the tokens or the experts")
    if isinstance(experts, Stack) and hidden.shape[1] != experts.up.shape[2]:
        raise ShapeError("route", expected=f"hidden [T, {experts.up.shape[2]}], as wide as the experts",
                         got=str(list(hidden.shape)), do="give the tokens these experts are for")
    if not experts:
        raise ShapeError("route", expected="at least one expert", got="none", do="give one function an expert")


def _check_ids(ids: torch.Tensor, experts: int) -> None:
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= experts:
        raise ShapeError("route", expected=f"ids in -1..{experts - 1}", got=f"{low}..{high}",
                         do="give one function an expert, and -1 where a slot is empty")
