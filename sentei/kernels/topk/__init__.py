"""Attention over the best keys of each query: one operation, several implementations of one signature."""

import torch

from sentei.core.errors import ImplError, RuleError
from sentei.core.shapes import scale_of
from sentei.kernels.attention.tiles import Grid
from sentei.kernels.topk import eager, fused_cpp, reference
from sentei.kernels.topk.choice import Choice

__all__ = ["IMPLS", "Choice", "attend_topk", "choose_impl"]

IMPLS = {"reference": reference.attend_topk, "eager": eager.attend_topk, "fused_cpp": fused_cpp.attend_topk}


def attend_topk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k: int | Choice,
    *,
    causal: bool = True,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns softmax attention of each query over its k keys of the highest scores, exactly.

        o_i = Σ over j ∈ K_i of  softmax_j(s_ij) v_j      s_ij = scale · q_i·k_j,   K_i the k largest permitted s_ij

    Ties go to the lower key. Gradients flow through the keys kept, not through the choice.

    Shapes: B batch, T tokens, H query heads, G key/value heads (G divides H), D width, K slots: k, or Tk if that is
    fewer; with a window as many as it needs.

    Args:
        query: [B, Tq, H, D], any float dtype and strides; query i stands at position Tk - Tq + i.
        key, value: [B, Tk, G, D] and [B, Tk, G, Dv], of the query's dtype.
        k: how many keys; a `Choice` where some are always among them.
        causal: a query sees no later position.
        lengths: int64 [B, 2], start and stop of the real keys of each row; None: all are real.
        scale: on the scores; D**-0.5 by default.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        output [B, Tq, H, Dv], lse [B, Tq, H] of the kept scores in float32 or wider, and ids int32 [B, Tq, H, K]: the
        keys kept, ascending, -1 in empty slots. A score of -inf forbids. A query that keeps nothing gives 0 and -inf;
        one with a NaN or +inf among its permitted scores keeps nothing, gives NaN and passes on no gradient, unless it
        asks for no key (k = 0). What stands in padding, and the values of keys not kept, reach no output.
    Raises:
        ShapeError: shapes or dtypes do not fit; a scale that is not finite.
        RuleError: k or the window out of range, or a window without causality.
        ImplError: an unknown implementation, or one that cannot take these tensors.
        ResourceError: memory ran out.
    Cost: permitted pairs · D + kept pairs · Dv multiply-adds; memory linear in the tokens, the ids included.
    Reference: Gupta et al. 2021, arXiv 2106.06899 (top-k attention by blocks of queries).
    """
    grid = Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=1, key_block=1, causal=causal,
                lengths=lengths)
    grid.check("attend_topk", query, key, value)
    choice = k if isinstance(k, Choice) else Choice(k)
    if choice.window is not None and not causal:
        raise RuleError("attend_topk", expected="a window of causal attention", got="causal=False",
                        do="give k as a number")
    name, _ = choose_impl(impl, query, key, value)
    scale = scale_of("attend_topk", scale, query.shape[-1])
    return IMPLS[name](query, key, value, choice, causal=causal, lengths=lengths, scale=scale)


def choose_impl(impl: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[str, str]:
    """The implementation that will run for these arguments of `attend_topk`, and why.

    Raises:
        ImplError: an unknown name.
    """
    if impl in IMPLS:
        return impl, "asked for by name"
    if impl != "auto":
        raise ImplError("attend_topk", expected=f"impl 'auto', {', '.join(map(repr, IMPLS))}", got=repr(impl),
                        do="choose one of these")
    reason = fused_cpp.refusal(query, key, value)
    return ("eager", f"fused_cpp cannot take {reason}") if reason else ("fused_cpp", "the fastest there is")
