"""Attention over chosen tiles: one operation, several implementations of one signature."""

import math

import torch

from sentei.core.errors import ImplError, ShapeError
from sentei.core.shapes import scale_of
from sentei.kernels.attention import auto, eager, flex, fused_cpp, fused_triton, reference
from sentei.kernels.attention.tiles import Grid, Tiles

__all__ = ["IMPLS", "Grid", "Tiles", "attend", "choose_impl", "merge", "sink"]

IMPLS = {"reference": reference.attend, "eager": eager.attend, "fused_cpp": fused_cpp.attend,
         "fused_triton": fused_triton.attend, "flex": flex.attend}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: Tiles,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    impl: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Returns softmax attention over the permitted keys of the kept tiles.

        o_i = Σ_j softmax_j(s_ij) v_j      s_ij = scale · q_i·k_j

    Shapes: B batch, T tokens, H query heads, G key/value heads (G divides H), D width.

    Args:
        query: [B, Tq, H, D], any float dtype and strides.
        key, value: [B, Tk, G, D] and [B, Tk, G, Dv], of the query's dtype.
        tiles: which tiles to compute; its grid says what is permitted (causality, a sliding window, padding).
        scale: on the scores; D**-0.5 by default.
        softcap: scores become softcap · tanh(s_ij / softcap), as in Gemma 2; 0 leaves them.
        impl: "auto", or one of IMPLS, which then runs or raises.
        return_lse: also return the log-sum-exp of the scores, for `merge` and `sink`.
    Returns:
        output [B, Tq, H, Dv]; a query that sees no key gives 0. With `return_lse` also lse [B, Tq, H], -inf there,
        in float32 or wider. What stands in padding, NaN included, reaches no output; a NaN or an
        infinity in a key or value that only later rows of a block may see reaches the block's earlier rows, too.
    Raises:
        ShapeError: shapes, dtypes or grid do not fit; a scale that is not finite.
        ImplError: an unknown implementation.
    Cost: kept pairs · (D + Dv) multiply-adds; the dense plan is torch's own kernel.

    Attention sinks are one step more, see `sink`. There is no additive bias: no family that sentei converts has one
    (it is with Bloom, MPT and T5), and as a tensor it is the n by n matrix that this operation never makes.
    """
    _check(query, key, value, tiles)
    name, _ = choose_impl(impl, query, key, value, tiles, softcap, return_lse)
    if not 0 <= softcap < math.inf:
        raise ShapeError("attend", expected="a softcap from 0", got=str(softcap), do="leave it out for none")
    scale = scale_of("attend", scale, query.shape[-1])
    key, value = tiles.grid.without_padding(key, value)
    return IMPLS[name](query, key, value, tiles, scale=scale, softcap=softcap, return_lse=return_lse)


def choose_impl(
    impl: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles, softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[str, str]:
    """The implementation that will run for these arguments of `attend`, and why.

    Raises:
        ImplError: an unknown name.
    """
    if impl in IMPLS:
        return impl, "asked for by name"
    if impl != "auto":
        raise ImplError("attend", expected=f"impl 'auto', {', '.join(map(repr, IMPLS))}", got=repr(impl),
                        do="choose one of these")
    if tiles.is_everything and not softcap and not return_lse:
        return auto.dense(query, key, value, tiles)
    return auto.fused(query, key, value, tiles)


def merge(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Args:
        output, other: [B, T, H, D].
        lse, other_lse: [B, T, H]; -inf where a set is empty.
    Returns:
        output and lse of the union.
    """
    empty = torch.isneginf(lse) & torch.isneginf(other_lse)
    # Two infinities less each other have no gradient: where both sets are empty, anything else stands for them.
    lses = [part.masked_fill(empty, 0) for part in (lse, other_lse)]
    total = torch.logaddexp(*lses)
    kept, added = ((part - total).exp().masked_fill(empty, 0).unsqueeze(-1).to(output.dtype) for part in lses)
    return kept * output + added * other, total.masked_fill(empty, -torch.inf)


def sink(output: torch.Tensor, lse: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with one key more, whose value is 0: a head can look nowhere (attention sinks, as in gpt-oss).

        o_i = Σ_j exp(s_ij) v_j / (exp(b) + Σ_j exp(s_ij))      b the head's logit

    Args:
        output: [B, T, H, D]; lse: [B, T, H], both of `attend`, by any implementation.
        logits: [H], the score b of that key: neither scaled nor capped. It has a gradient, as the others have.
    Returns:
        output and lse with it.
    Raises:
        ShapeError: logits that are not one a head.
    """
    if logits.shape != lse.shape[2:]:
        raise ShapeError("sink", expected=f"logits [{lse.shape[2]}], one a head", got=str(list(logits.shape)),
                         do="give one a query head")
    return merge(output, lse, torch.zeros_like(output), logits.to(lse.dtype).expand_as(lse))


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> None:
    tiles.grid.check("attend", query, key, value)
    if not tiles.is_everything and (tiles.full_count.shape[0] != query.shape[0]
                                    or tiles.full_count.shape[1] not in (query.shape[2], key.shape[2])):
        raise ShapeError("attend",
                         expected=f"tiles of {query.shape[0]} rows and {query.shape[2]} or {key.shape[2]} heads",
                         got=str(list(tiles.full_count.shape)), do="build the tiles for these tensors")
    if not tiles.is_everything and tiles.full_count.device != query.device:
        raise ShapeError("attend", expected=f"tiles on {query.device}", got=str(tiles.full_count.device),
                         do="move the tiles with Tiles.to")
