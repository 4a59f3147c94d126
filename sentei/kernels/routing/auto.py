"""Which kernel computes a stack of experts fastest on this machine.

Ours multiplies bfloat16 as pairs where that is the faster, and else in fp32. A processor may have instructions for
bfloat16 that torch makes more of: then many rows an expert are left to torch. And experts of a few neurons are visited
one by one, row by row: of many rows that keep a good part of them, all are computed in whole products and masked. Both
are measured once, see `gains`.
"""

from collections.abc import Callable
from functools import partial

import torch

from sentei.core.modes import is_plain_call
from sentei.kernels import gains, native
from sentei.kernels.routing import eager, fused_cpp, masked
from sentei.kernels.routing.stack import Stack

MANY = 16  # rows an expert
COPIED = 128  # rows an expert, from which a narrow copy of it costs less than it saves
SIZE = 384  # neurons and widths at most, of experts that are measured in place of larger ones
MARGIN = 1.2
NARROW = 16  # neurons an expert, below which an expert's own products are no blocks
ROWS, PART = 64, 4  # tokens, and the part of the experts each of them keeps (one in PART), in which ways are compared
LARGEST = 1 << 26  # activations of all experts for all tokens: 256 MiB in float32


def fastest(hidden: torch.Tensor, ids: torch.Tensor, experts) -> tuple[str, str]:
    """The implementation for arguments of `route` that `fused_cpp` can take, and why.

    Args:
        experts: a `Stack`.
    Cost: in the first call of many rows in bfloat16, 10 calls of both ways for experts of SIZE at most; in that of
        ROWS tokens for narrow experts of new sizes, as many.
    """
    told = _all_or_kept(hidden, ids, experts)
    if told:
        return told
    if hidden.dtype is not torch.bfloat16 or ids.numel() < MANY * len(experts) or not is_plain_call():
        return "fused_cpp", "made for experts in a stack"
    shape = *(min(size, SIZE - size % 2) for size in (*experts.up.shape[1:], experts.down.shape[1])), (
        experts.gate is not None)
    gain, origin = gains.gain(("bfloat16 experts", *shape, torch.get_num_threads()), partial(_ours_and_torch, *shape))
    return ("eager" if gain > 1 else "fused_cpp",
            f"{origin}: torch's products of such experts in bfloat16 are {gain:.2f} times as fast as ours")


def pays_to_narrow(hidden: torch.Tensor, ids: torch.Tensor, experts: Stack) -> bool:
    """Whether float32 experts are worth a copy in bfloat16 for tokens in bfloat16, which autocast asks for."""
    if hidden.dtype is not torch.bfloat16 or ids.numel() < COPIED * len(experts) or not is_plain_call():
        return False
    return native.takes_pairs() or fastest(hidden, ids, experts)[0] == "eager"


def _all_or_kept(hidden: torch.Tensor, ids: torch.Tensor, experts: Stack) -> tuple[str, str] | None:
    """Whether all of many narrow experts are cheaper than those kept, in whose number the time of the latter grows."""
    number, neurons, width = experts.up.shape
    narrow = 0 < neurons < NARROW and hidden.dtype is torch.float32
    if not (narrow and len(ids) >= ROWS and len(ids) * number * neurons <= LARGEST and is_plain_call()):
        return None
    shape = number, neurons, width, experts.down.shape[1], experts.gate is not None
    gain, origin = gains.gain(("narrow experts", *shape, torch.get_num_threads()),
                              partial(_kept_and_all, *shape))
    gain *= PART * ids.shape[1] / number
    told = "at most "
    if gain >= MARGIN:  # if no slot is empty
        told, gain = "", gain * int((ids >= 0).sum()) / ids.numel()
    return ("masked" if gain >= MARGIN and not masked.refusal(hidden, experts) else "fused_cpp",
            f"{origin}: to compute all {number} experts is {told}{gain:.2f} times as fast as to visit what is kept")


def _kept_and_all(*shape: int) -> gains.Ways:
    """ROWS tokens that keep one in PART of narrow experts, each and all."""
    given = _drawn(*shape)
    return partial(_without_gradients, fused_cpp.route, given), partial(_without_gradients, masked.route, given)


def _ours_and_torch(*shape: int) -> gains.Ways:
    """ROWS tokens of one bfloat16 expert, by our products and by torch's."""
    given = _drawn(1, *shape, dtype=torch.bfloat16)
    return partial(_without_gradients, fused_cpp.route, given), partial(_without_gradients, eager.route, given)


@torch.no_grad()
def _drawn(number: int, neurons: int, width: int, outputs: int, gated: bool, dtype=torch.float32) -> tuple:
    """Arguments of `route`: ROWS tokens that keep one in PART of so many experts."""
    generator = torch.Generator().manual_seed(0)
    hidden, up, gate, down = (torch.randn(shape, generator=generator).to(dtype) for shape in (
        (ROWS, width), (number, neurons, width), (number, neurons, width), (number, outputs, neurons)))
    ids = torch.rand(ROWS, number, generator=generator).topk(-(-number // PART)).indices.sort().values
    return hidden, ids, torch.ones(ids.shape), Stack(up=up, down=down, gate=gate if gated else None)


@torch.no_grad()
def _without_gradients(way: Callable, given: tuple) -> torch.Tensor:
    return way(*given)


