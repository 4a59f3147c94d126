"""Decoder layers in two native calls: to the bit what the smaller calls give, and what they leave alone."""

import pytest
import torch
from kernels.test_rows import heads_case, layer, random, to

from sentei.core.errors import ShapeError
from sentei.kernels import native
from sentei.kernels.linear import block, fused_cpp, rows

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def norm_of(width: int, dtype: torch.dtype) -> block.Norm:
    return block.Norm(random(width, seed=11).to(dtype), 1e-5, 0.25)


def after_case(dtype, tokens=(1, 2), inner=24, width=37, hidden=53, bias=True) -> tuple:
    """The arguments of `after`."""
    linear, gate, up, down = to(dtype, layer(width, inner, 4, bias), layer(hidden, width, 1, bias),
                                layer(hidden, width, 2, False), layer(width, hidden, 3, bias))
    return (random(*tokens, inner, seed=5).to(dtype), random(*tokens, width, seed=6).to(dtype), linear,
            norm_of(width, dtype), gate, up, down, "silu")


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", [{}, {"bias": True, "normed": True}, {"tokens": (2, 4), "turns": (1, 4)},
                                  {"heads": (9, 3), "widths": (64, 64), "inputs": 130, "tokens": (1, 8)}], ids=str)
def test_before_is_the_heads_of_the_normed_rows(case, dtype, machine):
    x, *heads = heads_case(dtype, **case)
    norm = norm_of(x.shape[-1], dtype)
    for y, own in zip(block.before(x, norm, *heads), rows.heads(rows.norm(x, *norm), *heads), strict=True):
        assert torch.equal(y, own) and y.stride() == own.stride()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", [{}, {"bias": False, "tokens": (2, 4)},
                                  {"inner": 576, "width": 64, "hidden": 200, "tokens": (8, 1)}], ids=str)
def test_after_is_the_smaller_calls_one_after_another(case, dtype, activation, machine):
    attended, x, linear, norm, *gated = after_case(dtype, **case)[:-1]
    given = attended.clone(), x.clone()
    hidden = x + fused_cpp.linear(attended, *linear)
    expected = hidden + rows.gated(rows.norm(hidden, *norm), *gated, activation)
    assert block.takes(x, linear, norm, *gated, activation)
    assert torch.equal(block.after(attended, x, linear, norm, *gated, activation), expected)
    strided = attended.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(block.after(strided, x, linear, norm, *gated, activation), expected)
    assert torch.equal(attended, given[0]) and torch.equal(x, given[1]), "nothing that was given is written to"


def test_what_the_calls_do_not_take_is_left():
    x, query, key, value, turn = heads_case(torch.float32)
    norm = norm_of(x.shape[-1], torch.float32)
    assert block.before(x, norm, query, key, value, turn) is not None
    for other in (x.double(), x.to(HALF), x[0], x[:, :0], x.repeat(9, 1, 1), x[..., :36].contiguous()):
        assert block.before(other, norm, query, key, value, turn) is None
    for other in (norm.weight[:36], norm.weight.to(HALF), norm.weight.repeat(2)[::2]):
        assert block.before(x, norm._replace(weight=other), query, key, value, turn) is None
    assert block.before(x, norm, (query[0][:20], None), key, value, turn) is None
    attended, *given = after_case(torch.float32)
    assert block.takes(*given)
    x, linear, norm, gate, up, down, activation = given
    for other in (x.double(), x[0], x[:, :0], x.repeat(9, 1, 1), x[..., :36].contiguous()):
        assert not block.takes(other, *given[1:])
    for wrong in ((x, (linear[0][:36], linear[1])), (x, (linear[0], linear[1][:36])), (x, (linear[0][0], None)),
                  (x, linear, norm._replace(weight=norm.weight[:36])), (x, linear, norm, down),
                  (x, linear, norm, gate, up, (down[0][:36], None))):
        assert not block.takes(*wrong, *given[len(wrong):])
    with torch.enable_grad():
        assert not block.takes(*given) and block.before(x, norm, query, key, value, turn) is None
    for wrong in (attended[..., :-1], attended.to(HALF), attended.repeat(2, 1, 1)):
        with pytest.raises(ShapeError, match="^after: expected torch.float32"):
            block.after(wrong, *given)


def test_the_structs_are_those_of_the_library():
    assert native.load().sentei_before_size() == block._BEFORE.size
    assert native.load().sentei_after_size() == block._AFTER.size
