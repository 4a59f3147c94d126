"""Attention of a few query rows after a cache, each over its own choice among pages of keys.

A row reads the bounds of every page, keeps the pages its rule takes, and attends to their keys alone:

    bound_c = scale · Σ_d max(q_d · low_cd, q_d · high_cd) + log n_c      low, high: of the n_c keys the row may see
    score_c = log mean_h softmax_c(bound_hc)                              one choice for the heads h of a KV group
    o_h     = Σ_j softmax_j(scale · q_h·k_j) v_j                          over the keys j of the kept pages

A bound is never below the page's true log mass. Reference: Quest, arXiv 2406.10774.
"""

import torch

from sentei.core.cost import Cost
from sentei.core.errors import ImplError
from sentei.core.selection import Selection
from sentei.core.shapes import scale_of
from sentei.kernels.paging import eager, fused_cpp, reference
from sentei.kernels.paging.pages import PAGE, Pages, bounds_of, can_choose

__all__ = ["IMPLS", "PAGE", "SCORES", "Pages", "attend", "bounds_of", "can_choose", "choose_impl", "cost", "score"]

IMPLS = {"reference": reference.attend, "eager": eager.attend, "fused_cpp": fused_cpp.attend}
SCORES = {"reference": reference.score, "eager": eager.score, "fused_cpp": fused_cpp.score}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    *,
    scale: float | None = None,
    impl: str = "auto",
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the pages of every row and attends to them.

    Args:
        query: [B, R, H, D], any float dtype and strides.
        key, value: [B, Tk, G, D] and [B, Tk, G, Dv], of one dtype, which need not be the query's.
        pages: what may be seen, and the rule.
        scale: on the scores; D**-0.5 by default.
        impl: "auto", or one of IMPLS, which then runs or raises.
        kept: bool [B, G, R, KB] or 1 for any but the last, a choice made before; None: made here.
    Returns:
        output [B, R, H, Dv] in the query's dtype, and the choice. A row that sees nothing gives 0. What stands in
        padding, NaN included, reaches neither.
    Raises:
        ShapeError: shapes, dtypes or bounds do not fit; a scale that is not finite.
        RuleError: a rule not of ours; NaN or infinity among the scores.
        ImplError: an unknown implementation, or one that cannot run here.
    Cost: two multiply-adds a page, head and channel to choose; kept keys · (D + Dv) a head.
    """
    pages.check(query, key, value, kept)
    name, _ = choose_impl(impl, query, key, value)
    scale = scale_of("paging", scale, query.shape[-1])
    return IMPLS[name](query, key, value, pages, scale=scale, kept=kept)


def score(
    query: torch.Tensor, key: torch.Tensor, pages: Pages, *, scale: float | None = None, impl: str = "auto"
) -> torch.Tensor:
    """The scores `attend` chooses by, float32 or wider [B, G, R, KB]; -inf where a row sees no key of a page.

    Arguments and errors are those of `attend`.
    """
    pages.check(query, key, key)
    name, _ = choose_impl(impl, query, key, key)
    return SCORES[name](query, key, pages, scale=scale_of("paging", scale, query.shape[-1]))


def choose_impl(impl: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[str, str]:
    """The implementation that will run for these arguments of `attend`, and why.

    Raises:
        ImplError: an unknown name, or one that cannot run here.
    """
    if impl in ("auto", "fused_cpp"):
        reason = fused_cpp.refusal(query, key, value)
        if not reason:
            return "fused_cpp", "the fastest there is" if impl == "auto" else "asked for by name"
        if impl == "auto":
            return "eager", f"fused_cpp cannot take {reason}"
        raise ImplError("fused_cpp", expected="tensors it can take", got=reason, do="use impl='auto'")
    if impl not in IMPLS:
        raise ImplError("paging", expected=f"impl 'auto', {', '.join(map(repr, IMPLS))}", got=repr(impl),
                        do="choose one of these")
    return impl, "asked for by name"


def cost(selection: Selection, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Cost:
    """What `attend` costs with a choice; its bytes are those of queries, bounds, and the keys and values kept."""
    kept, permitted = int(selection.count().sum()), int(selection.permitted.sum())
    heads, width, both = query.shape[2] // key.shape[2], key.shape[3], key.shape[3] + value.shape[3]
    read = kept * PAGE * both + permitted * 2 * width
    return Cost(multiply_adds=kept * PAGE * heads * both, dense_multiply_adds=permitted * PAGE * heads * both,
                bytes=2 * query.numel() * query.element_size() + read * key.element_size(),
                choosing=permitted * heads * 2 * width)
