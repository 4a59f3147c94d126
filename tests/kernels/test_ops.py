"""What the ops' backward makes nothing of: gradients that nobody gave."""

from collections.abc import Callable

import pytest
import torch
from stacks import drawn
from torch.utils._python_dispatch import TorchDispatchMode

from sentei.kernels import native
from sentei.kernels.attention import attend
from sentei.kernels.attention.tiles import Grid, Tiles
from sentei.kernels.routing import route
from sentei.kernels.topk import attend_topk

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


class Zeros(TorchDispatchMode):
    """The dtypes and shapes of all zeros that are made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "zeros" in func.__name__:
            self.made.append((result.dtype, tuple(result.shape)))
        return result


def given() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 40, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def topk() -> tuple[torch.Tensor, ...]:
    return attend_topk(*given(), 7, impl="fused_cpp")


def tiles() -> tuple[torch.Tensor, ...]:
    grid = Grid(num_queries=40, num_keys=40, query_block=16, key_block=16)
    return attend(*given(), Tiles(grid=grid), impl="fused_cpp", return_lse=True)


def experts() -> tuple[torch.Tensor, ...]:
    leaves, ids, stack = drawn()
    return (route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp"),)


@pytest.mark.parametrize("call, used, wanted", [
    (experts, 0, []), (topk, 0, [(torch.float32, (1, 40, 4))]), (topk, 1, [(torch.float32, (1, 40, 4, 16))]),
    (tiles, 0, []), (tiles, 1, [(torch.float32, (1, 40, 4, 16))])])
def test_a_backward_makes_no_zeros_for_what_was_not_used(call: Callable, used: int, wanted: list):
    output = call()[used]
    with Zeros() as zeros:
        output.backward(torch.ones_like(output))
    assert zeros.made == wanted
