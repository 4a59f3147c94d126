"""Routing as the dense layer with a mask: every expert of a stack on every token, and what was not kept counts 0.

Three products however many experts there are. Where experts are a few neurons wide and a token keeps a good part of
them, that is faster than to visit each; `auto` knows from where on. float32 and float64, any device, any gradients.
What is not finite would reach who did not keep it, and narrower numbers would be rounded once more than elsewhere:
neither is taken.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from sentei.core.errors import ImplError
from sentei.kernels.routing.stack import Stack, activate


def route(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """See `sentei.kernels.routing.route`. The sum is made by the last product, in its dtype.

    Raises:
        ImplError: `refusal` has a reason.
    Cost: all experts for all tokens, and their activations [T, E F] in memory.
    """
    reason = refusal(hidden, experts)
    if reason:
        raise ImplError("masked", expected="a call it can take", got=reason, do="use impl='auto'")
    return run(hidden, ids, weights, experts)


def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Stack) -> torch.Tensor:
    """`route` for who has just asked `refusal`."""
    kept, dense = laid_out(ids, weights, len(experts))
    firsts = [experts.up] if experts.gate is None else [experts.gate, experts.up]
    products = torch.cat([F.linear(hidden, part.flatten(0, 1)) for part in firsts], -1)
    acts = activate(products, experts.gate is not None, experts.activation).unflatten(-1, experts.up.shape[:2])
    acts = torch.where(kept[..., None], acts * dense[..., None], 0).to(hidden.dtype)
    return acts.flatten(1) @ experts.down.transpose(1, 2).flatten(0, 1)


def refusal(hidden: torch.Tensor, experts: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> str:
    """Why this implementation cannot take these arguments; empty when it can. Reads all of them once."""
    if not isinstance(experts, Stack):
        return "experts that are functions"
    if hidden.dtype not in (torch.float32, torch.float64):
        return f"{hidden.dtype}"
    with torch.no_grad():
        finite = all(bool(part.sum().isfinite()) for part in (hidden, *experts.weights()))
    return "" if finite else "NaN or infinity"


def laid_out(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [T, E] of what is kept, and its weights [T, E], in float32 or wider; an expert kept twice counts twice."""
    empty, ids = ids < 0, ids.clamp(min=0)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).masked_fill(empty, 0)
    dense = weights.new_zeros(len(ids), experts).scatter_add(1, ids, weights)
    kept = torch.zeros(len(ids), experts, dtype=torch.int32, device=ids.device).scatter_add(1, ids, (~empty).int())
    return kept > 0, dense

