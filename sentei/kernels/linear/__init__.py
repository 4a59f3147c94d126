"""A linear layer: one operation, several implementations of one signature."""

import torch

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels.linear import eager, fused_cpp, reference

__all__ = ["IMPLS", "choose_impl", "linear"]

IMPLS = {"reference": reference.linear, "eager": eager.linear, "fused_cpp": fused_cpp.linear}


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Returns the product of a few rows, or of many, with a matrix of weights.

        y_ro = Σ_i x_ri w_oi + b_o

    Args:
        x: [..., I], any float dtype and strides.
        weight: [O, I], of the input's dtype.
        bias: [O], or None.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        [..., O]. In `fused_cpp` a row's numbers depend neither on the number of threads nor on the other rows, but for
        whether they are few.
    Raises:
        ShapeError: shapes do not fit.
        ImplError: an unknown implementation, or a named one that cannot take the tensors.
    Cost: reading the weights once where the rows are few; `auto` then takes `fused_cpp`, and `eager` for more rows,
    without asking which is faster here: `sentei.conversion.linear` measures. Many rows are multiplied by a copy of the
    weights in fp32, or of pairs of bfloat16, 64 MiB at once, beside which each thread holds 96 rows; the process keeps
    that memory for its next calls (256 MiB of all native calls, at most).
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or (
            bias is not None and bias.shape != weight.shape[:1]):
        raise ShapeError("linear", expected="x [..., I], weight [O, I] and bias [O]",
                         got=f"{list(x.shape)}, {list(weight.shape)}, {bias if bias is None else list(bias.shape)}",
                         do="give tensors that fit")
    name, _ = choose_impl(impl, x, weight, bias)
    return IMPLS[name](x, weight, bias)


def choose_impl(
    impl: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[str, str]:
    """The implementation that will run for these arguments of `linear`, and why.

    Raises:
        ImplError: an unknown name.
    """
    if impl in IMPLS:
        return impl, "asked for by name"
    if impl != "auto":
        raise ImplError("linear", expected=f"impl 'auto', {', '.join(map(repr, IMPLS))}", got=repr(impl),
                        do="choose one of these")
    reason = fused_cpp.refusal(x, weight, bias)
    if reason:
        return "eager", f"fused_cpp cannot take {reason}"
    few = x.numel() <= fused_cpp.FEW_ROWS * x.shape[-1]
    return ("fused_cpp", "made for few rows") if few else ("eager", "many rows, and nobody has measured")
