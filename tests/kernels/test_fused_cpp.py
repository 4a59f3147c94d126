"""The native kernel against fp64, on every case the others must pass, and the estimate it makes."""

import oracle
import pytest
import torch
from oracle import CASES, Case

from sentei.core.errors import ImplError
from sentei.kernels import native
from sentei.kernels.attention import Grid, Tiles, attend, choose_impl, fused_cpp
from sentei.kernels.attention.select import Sampled, estimate

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
LARGER = [
    Case(name="three tiles wide", queries=200, keys=200, tile=(64, 64), heads=6, groups=2),
    Case(name="rows left over", queries=77, keys=130, tile=(13, 24), heads=2, groups=1),
    Case(name="padded", queries=90, keys=90, tile=(32, 16), lengths=((17, 90), (0, 41))),
]


def check_forward(run, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Raises AssertionError unless output and lse are as near to fp64 as masked attention in the same dtype."""
    tensors, pairs, scale = case.tensors(dtype), case.pairs(), 6 ** -0.5
    exact = oracle.masked_attention(*(tensor.double() for tensor in tensors), pairs, scale)
    plain = oracle.masked_attention(*tensors, pairs, scale)
    got = run(*tensors, case.tiles(), scale=scale, return_lse=True)
    assert got[0].dtype == dtype
    for value, other, true in zip(got, plain, exact, strict=True):
        assert value.shape == true.shape
        assert torch.equal(value.isneginf(), true.isneginf()), "-inf in the wrong places"
        if not value.numel():
            continue
        finite = ~true.isneginf()
        true = true.masked_fill(~finite, 0)
        error, allowed = ((x.double().masked_fill(~finite, 0) - true).abs().amax() for x in (value, other))
        step = 4 * torch.finfo(dtype).eps * true.abs().amax().clamp(min=1)
        assert error <= 2 * allowed + step, f"error {error:.3g}, plain attention {allowed:.3g} + {step:.3g}"
    assert (got[0][~pairs.any(-1).transpose(1, 2)] == 0).all(), "a query without keys must give 0"


def test_the_native_library_was_built():
    assert native.present(), "build it: pip install -e . with a C++17 compiler"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES + LARGER, ids=lambda case: case.name)
def test_is_as_near_to_fp64_as_masked_attention_in_the_same_dtype(case, dtype):
    check_forward(fused_cpp.attend, case, dtype)


def test_a_forgotten_scale_is_seen():
    with pytest.raises(AssertionError, match="error"):
        check_forward(lambda *tensors, scale, return_lse: fused_cpp.attend(*tensors, scale=1.0, return_lse=return_lse),
                      CASES[0])


def test_strides_do_not_matter():
    case = LARGER[0]
    tensors = case.tensors(torch.float32)
    expected = fused_cpp.attend(*tensors, case.tiles(), scale=0.3)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    spread = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in tensors]
    assert torch.equal(fused_cpp.attend(*turned, case.tiles(), scale=0.3), expected)
    assert torch.equal(fused_cpp.attend(*spread, case.tiles(), scale=0.3), expected)


def test_one_thread_gives_the_bits_of_two():
    case, threads = LARGER[0], torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs.append(fused_cpp.attend(*case.tensors(torch.float32), case.tiles(), scale=0.3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("pool", ["mean", "rms"])
@pytest.mark.parametrize("stride", [1, 3, 8])
@every_case
def test_shares_are_those_of_the_estimator(case, stride, pool):
    query, key, _ = case.tensors(torch.float32)
    grid = case.grid()
    expected = estimate(Sampled(stride), query.double(), key.double(), grid, 0.3, pool=pool).exp()
    found = estimate(Sampled(stride), query, key, grid, 0.3, pool=pool).exp()
    assert found.dtype == torch.float32
    # The last block is always whole; its fill-up rows are no part of the promise.
    torch.testing.assert_close(found[:, :, :-1].double(), expected[:, :, :-1], atol=2e-5, rtol=1e-3)


def test_what_it_cannot_take_is_refused_by_name_and_left_by_auto():
    query, key, value = CASES[0].tensors(torch.float64)
    tiles = CASES[0].tiles()
    with pytest.raises(ImplError, match="fused_cpp: expected tensors it can take, got torch.float64 on cpu"):
        attend(query, key, value, tiles, impl="fused_cpp")
    assert choose_impl("auto", query, key, value, tiles)[0] == "eager"
    leaf = query.float().requires_grad_()
    assert choose_impl("auto", leaf, key.float(), value.float(), tiles) == (
        "eager", "fused_cpp cannot take tensors that require gradients")
    with torch.no_grad():
        assert choose_impl("auto", leaf, key.float(), value.float(), tiles)[0] == "fused_cpp"
    assert choose_impl("auto", leaf, key.float(), value.float(), Tiles(grid=Grid(
        num_queries=12, num_keys=12, query_block=4, key_block=3)))[0] == "eager"
