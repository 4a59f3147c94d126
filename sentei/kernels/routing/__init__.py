"""Routing: the definition where the values are functions of the query. One operation, one signature."""

from collections.abc import Callable, Sequence

import torch

from sentei.core.errors import ImplError, ShapeError
from sentei.core.shapes import check_shape
from sentei.kernels.routing import reference
from sentei.kernels.routing.stack import Stack

__all__ = ["IMPLS", "Stack", "choose_impl", "route"]

IMPLS = {"reference": reference.route}


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

    Args:
        hidden: [T, D], any float dtype and strides.
        ids: int64 [T, K]; expert numbers, -1 where a slot is empty. The order of the slots does not matter.
        weights: float [T, K]; what a kept expert counts; not read where a slot is empty.
        experts: E functions from [N, D] to [N, D_out].
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        [T, D_out] in the dtype of the experts' answers; a token that keeps nothing gives 0.
    Raises:
        ShapeError: shapes, dtypes, devices or expert numbers do not fit.
        ImplError: an unknown implementation.
    Cost: one call of each kept expert, on its own tokens only; nothing for the others.
    Reference: Shazeer et al. 2017, arXiv 1701.06538, eq. 1.
    """
    name, _ = choose_impl(impl)
    _check(hidden, ids, weights, experts)
    return IMPLS[name](hidden, ids, weights, experts)


def choose_impl(impl: str) -> tuple[str, str]:
    """The implementation that will run and why.

    Raises:
        ImplError: an unknown name.
    """
    if impl == "auto":
        return "reference", "the only implementation there is"
    if impl not in IMPLS:
        raise ImplError("route", expected=f"impl 'auto', {', '.join(map(repr, IMPLS))}", got=repr(impl),
                        do="choose one of these")
    return impl, "asked for by name"


def _check(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Sequence) -> None:
    sizes = check_shape("route", "hidden", hidden, "T D")
    sizes = check_shape("route", "ids", ids, "T K", T=sizes["T"])
    check_shape("route", "weights", weights, "T K", **sizes)
    if ids.dtype != torch.int64 or not hidden.is_floating_point() or not weights.is_floating_point():
        raise ShapeError("route", expected="ids int64, hidden and weights floating",
                         got=f"{ids.dtype}, {hidden.dtype}, {weights.dtype}", do="convert them before the call")
    if not hidden.device == ids.device == weights.device:
        raise ShapeError("route", expected="one device", got=f"{hidden.device}, {ids.device}, {weights.device}",
                         do="move them before the call")
    if not experts:
        raise ShapeError("route", expected="at least one expert", got="none", do="give one function an expert")
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= len(experts):
        raise ShapeError("route", expected=f"ids in -1..{len(experts) - 1}", got=f"{low}..{high}",
                         do="give one function an expert, and -1 where a slot is empty")
