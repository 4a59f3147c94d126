"""Routing as the definition reads: one candidate at a time, on the tokens that kept it.

    y_t = Σ over the experts e kept by t of  w_te · expert_e(x_t)

Any floating dtype, differentiable by autograd, for reading and for tests.
Reference: Shazeer et al. 2017, arXiv 1701.06538, eq. 1.
"""

from collections.abc import Callable, Sequence

import torch

from sentei.core.shapes import check_shape


def route(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """See `sentei.kernels.routing.route`. The sum is made in fp32 or wider.

    The first expert is called even when no token keeps it: its answer for no rows gives the width.
    """
    output = dtype = None
    for e, expert in enumerate(experts):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if len(token) == 0 and e > 0:
            continue
        value = expert(hidden[token])
        width = {} if output is None else {"D": output.shape[1]}
        check_shape("route", f"the answer of expert {e}", value, "N D", N=len(token), **width)
        if output is None:
            dtype = value.dtype
            output = value.new_zeros(len(ids), value.shape[1], dtype=torch.promote_types(dtype, torch.float32))
        weighed = weights[token, slot].to(output.dtype).unsqueeze(-1) * value.to(output.dtype)
        output = output.index_add(0, token, weighed)
    return output.to(dtype)
