"""Which kernel computes a stack of experts fastest on this machine.

Ours computes in fp32, whatever the dtype. Where torch's own products of bfloat16 are faster than those of float32,
because the processor has instructions for them, many rows an expert are left to torch. And experts of a few neurons
are visited one by one, row by row: of many rows that keep a good part of them, all are computed in whole products and
masked. Both are measured once, see `gains`.
"""

from collections.abc import Callable
from functools import partial

import torch

from sentei.core.modes import is_plain_call
from sentei.kernels import gains
from sentei.kernels.routing import fused_cpp, masked
from sentei.kernels.routing.stack import Stack

MANY = 16  # rows an expert
MARGIN = 1.2
SIZE = 384
NARROW = 16  # neurons an expert, below which an expert's own products are no blocks
ROWS, PART = 64, 4  # tokens, and the part of the experts each of them keeps (one in PART), in which ways are compared
LARGEST = 1 << 26  # activations of all experts for all tokens: 256 MiB in float32


def fastest(hidden: torch.Tensor, ids: torch.Tensor, experts) -> tuple[str, str]:
    """The implementation for arguments of `route` that `fused_cpp` can take, and why.

    Args:
        experts: a `Stack`.
    Cost: in the first call of many rows in bfloat16, about 10 products of SIZE; in that of ROWS tokens for narrow
        experts of new sizes, 10 calls of both ways.
    """
    told = _all_or_kept(hidden, ids, experts)
    if told:
        return told
    if hidden.dtype is not torch.bfloat16 or not is_plain_call() or ids.numel() < MANY * len(experts):
        return "fused_cpp", "made for experts in a stack"
    gain, origin = gains.gain(("routing", SIZE, torch.get_num_threads()), _products)
    name = "eager" if gain >= MARGIN else "fused_cpp"
    return name, f"{origin}: torch's bfloat16 products are {gain:.2f} times as fast as its float32 ones"


def _all_or_kept(hidden: torch.Tensor, ids: torch.Tensor, experts: Stack) -> tuple[str, str] | None:
    """Whether all of many narrow experts are cheaper than those kept, in whose number the time of the latter grows."""
    number, neurons, width = experts.up.shape
    narrow = 0 < neurons < NARROW and hidden.dtype is torch.float32
    if not (narrow and len(ids) >= ROWS and len(ids) * number * neurons <= LARGEST and is_plain_call()):
        return None
    shape = number, neurons, width, experts.down.shape[1], experts.gate is not None
    gain, origin = gains.gain(("narrow experts", *shape, torch.get_num_threads()),
                              partial(_both_ways, *shape))
    gain *= PART * int((ids >= 0).sum()) / (len(ids) * number)
    return ("masked" if gain >= MARGIN and not masked.refusal(hidden, experts) else "fused_cpp",
            f"{origin}: to compute all {number} experts is {gain:.2f} times as fast as to visit what is kept")


@torch.no_grad()
def _both_ways(number: int, neurons: int, width: int, outputs: int, gated: bool) -> gains.Ways:
    """ROWS tokens that keep one in PART of such experts, each and all."""
    generator = torch.Generator().manual_seed(0)
    hidden, up, gate, down = (torch.randn(shape, generator=generator) for shape in (
        (ROWS, width), (number, neurons, width), (number, neurons, width), (number, outputs, neurons)))
    stack = Stack(up=up, down=down, gate=gate if gated else None)
    ids = torch.rand(ROWS, number, generator=generator).topk(-(-number // PART)).indices.sort().values
    given = hidden, ids, torch.ones(ids.shape), stack
    return partial(_without_gradients, fused_cpp.route, given), partial(_without_gradients, masked.route, given)


@torch.no_grad()
def _without_gradients(way: Callable, given: tuple) -> torch.Tensor:
    return way(*given)


def _products() -> gains.Ways:
    """A product in float32 and in bfloat16."""
    wide = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return tuple(partial(torch.nn.functional.linear, x, x) for x in (wide, wide.bfloat16()))
