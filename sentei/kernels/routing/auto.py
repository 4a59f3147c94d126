"""Which kernel computes a stack of experts fastest on this machine.

Ours computes in fp32, whatever the dtype. Where torch's own products of bfloat16 are faster than those of float32,
because the processor has instructions for them, many rows an expert are left to torch. That is measured once,
see `gains`.
"""

from functools import partial

import torch

from sentei.core.modes import is_plain_call
from sentei.kernels import gains

MANY = 16  # rows an expert
MARGIN = 1.2
SIZE = 384


def fastest(hidden: torch.Tensor, ids: torch.Tensor, experts) -> tuple[str, str]:
    """The implementation for arguments of `route` that `fused_cpp` can take, and why.

    Args:
        experts: a `Stack`.
    Cost: in the first call of many rows in bfloat16, about 10 products of SIZE.
    """
    if hidden.dtype is not torch.bfloat16 or not is_plain_call() or ids.numel() < MANY * len(experts):
        return "fused_cpp", "made for experts in a stack"
    gain, origin = gains.gain(("routing", SIZE, torch.get_num_threads()), _products)
    name = "eager" if gain >= MARGIN else "fused_cpp"
    return name, f"{origin}: torch's bfloat16 products are {gain:.2f} times as fast as its float32 ones"


def _products() -> gains.Ways:
    """A product in float32 and in bfloat16."""
    wide = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return tuple(partial(torch.nn.functional.linear, x, x) for x in (wide, wide.bfloat16()))
