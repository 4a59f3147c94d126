"""The Triton kernels in Triton's interpreter, against fp64; what only compiling shows is in test_triton_compiled.py.

`tests/conftest.py` tells Triton to interpret. The interpreter is slow, so that tiles and widths are small here; what a
GPU does with large ones is the business of `benchmarks/gpu_check.py`.
"""

import importlib.util
import platform
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import CASES, Case, check_attend, masked_attention
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels.attention import Tiles, attend, auto, choose_impl, fused_triton

MISSING = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(MISSING, reason="triton is not installed")
check = partial(check_attend, steps=4)
PADS = ((9, 40), (0, 23))
TILED = [
    Case(name="causal, ragged", queries=41, keys=41, tile=(32, 16), heads=2, groups=1, widths=(16, 24)),
    Case(name="bidirectional", queries=20, keys=40, tile=(16, 32), causal=False),
    Case(name="after a cache, a choice a group", queries=20, keys=40, tile=(16, 16), heads=4, groups=2, choices=2),
    Case(name="padded", queries=40, keys=40, tile=(32, 32), groups=1, lengths=PADS),
    Case(name="padded bidirectional", queries=20, keys=40, tile=(32, 32), lengths=PADS, causal=False),
    Case(name="queries before the first key", queries=40, keys=20, tile=(16, 16), kept=1.0),
    Case(name="nothing kept", queries=32, keys=32, tile=(16, 16), kept=0.0),
    Case(name="little kept", queries=48, keys=48, tile=(16, 16), kept=0.15),
    Case(name="padding alone", queries=32, keys=32, tile=(16, 16), lengths=((20, 20), (0, 32)), kept=1.0),
    Case(name="half a block of queries", queries=48, keys=32, tile=(32, 16), widths=(32, 16), causal=False),
]
NAMES = {"dense", "dense bidirectional", "dense cross", "dense padded", "one query dense", "grouped dense",
         "a row of padding alone, dense", "no query, dense"}
WINDOWED = [
    Case(name="window", queries=80, keys=80, tile=(16, 16), heads=2, groups=1, window=19, kept=0.8),
    Case(name="window, dense", queries=80, keys=80, tile=(16, 16), heads=2, groups=1, window=33, kept=None),
    Case(name="window, dense, wide", queries=100, keys=100, tile=(16, 16), groups=1, window=60, kept=None),
    Case(name="window of one, dense", queries=40, keys=40, tile=(16, 16), heads=1, groups=1, window=1, kept=None),
    Case(name="window, after a cache, padded, dense", queries=37, keys=75, tile=(16, 16), window=18, kept=None,
         lengths=((9, 60), (0, 75), (70, 75))),
    Case(name="window, padded", queries=37, keys=75, tile=(32, 16), heads=4, choices=2, window=40, kept=0.7,
         lengths=((30, 75), (0, 41))),
    Case(name="window beyond the text", queries=20, keys=20, tile=(16, 16), window=100, kept=None),
    Case(name="window, queries before the first key", queries=40, keys=20, tile=(16, 16), window=5, kept=None),
]
CAPPED = [
    Case(name="soft cap and window, dense", queries=50, keys=50, tile=(16, 16), softcap=1.5, logits=3.0, window=20,
         groups=1, kept=None),
    Case(name="soft cap", queries=40, keys=40, tile=(32, 16), softcap=2.0, logits=3.0, heads=2, groups=1),
    Case(name="soft cap, far away, padded", queries=40, keys=40, tile=(16, 16), softcap=1e3, lengths=PADS),
    Case(name="soft cap, huge logits", queries=40, keys=40, tile=(16, 16), softcap=30.0, logits=300.0, kept=None),
]
DENSE = [case for case in CASES if case.name in NAMES] + [
    replace(TILED[0], name="dense, many tiles", kept=None),
    replace(TILED[3], name="dense padded, many tiles", kept=None, queries=30),
]
each = {"ids": lambda case: case.name}


def test_triton_is_there_wherever_it_can_be():
    assert not MISSING or (sys.platform, platform.machine()) != ("linux", "x86_64")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Programs of 16 by 16, so that a block of a plan is several of them and a dense row many tiles."""
    if not MISSING:
        from sentei.kernels.attention import triton_tiles

        monkeypatch.setattr(triton_tiles, "launch", lambda *_: triton_tiles.Launch(16, 16, 4, 1))


@needs_triton
@pytest.mark.parametrize("case", TILED + DENSE + WINDOWED + CAPPED, **each)
def test_output_and_gradients_are_as_near_to_fp64_as_masked_attention_in_the_same_dtype(case):
    check(fused_triton.attend, case, torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [TILED[0], TILED[3], DENSE[-2], CAPPED[0], CAPPED[2]], **each)
def test_so_are_they_in_half_precision(case, dtype):
    check(fused_triton.attend, case, dtype)


@needs_triton
def test_huge_logits_are_as_exact_as_their_rounding_lets_them_be():
    """The gradients make a score of size 1e4 again in another order; its rounding is a relative error of its share."""
    case = Case(name="huge logits", queries=32, keys=32, tile=(16, 16), logits=1e4)
    check_attend(fused_triton.attend, case, torch.float32, steps=4 * 10**4)
    tensors, pairs = case.tensors(torch.float32), case.pairs()
    exact, plain = (masked_attention(*(tensor.to(kind) for tensor in tensors), pairs, 0.3)[0]
                    for kind in (torch.float64, torch.float32))
    output = fused_triton.attend(*tensors, case.tiles(), scale=0.3)
    assert (output - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + 4 * torch.finfo(torch.float32).eps


@st.composite
def tiled_cases(draw) -> Case:
    keys, groups = draw(st.integers(1, 40)), draw(st.integers(1, 2))
    span = st.tuples(st.integers(0, keys), st.integers(0, keys)).map(sorted).map(tuple)
    sizes, causal = st.sampled_from([16, 32, 64]), draw(st.booleans())
    return Case(name="drawn", queries=draw(st.integers(0, 40)), keys=keys, groups=groups,
                heads=groups * draw(st.integers(1, 2)), choices=draw(st.sampled_from([None, groups])),
                tile=(draw(sizes), draw(sizes)), causal=causal,
                window=draw(st.sampled_from([0, 1, 7, 20])) if causal else 0,
                softcap=draw(st.sampled_from([0.0, 0.0, 0.8])),
                lengths=draw(st.none() | st.lists(span, min_size=1, max_size=2).map(tuple)),
                kept=draw(st.sampled_from([None, 0.0, 0.3, 0.7, 1.0])),
                widths=(draw(st.integers(1, 40)), draw(st.integers(1, 40))))


@needs_triton
@settings(deadline=None, max_examples=6, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=tiled_cases())
def test_so_are_they_for_drawn_cases(case):
    check(fused_triton.attend, case, torch.float32)


@needs_triton
@pytest.mark.slow
@settings(deadline=None, max_examples=150, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=tiled_cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_so_are_they_for_many_drawn_cases(case, dtype):
    check(fused_triton.attend, case, dtype)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("widths", [(64, 64), (80, 128), (128, 96), (256, 256)], ids=str)
@pytest.mark.parametrize("kept", [0.4, None])
def test_so_are_they_for_the_widths_of_models_as_they_are_started(widths, kept, monkeypatch):
    monkeypatch.undo()
    case = Case(name="", queries=130, keys=190, tile=(64, 128), heads=2, groups=1, widths=widths, kept=kept)
    check(fused_triton.attend, case, torch.bfloat16)


@needs_triton
@pytest.mark.parametrize("case", [TILED[0], TILED[3], TILED[-1], DENSE[-1], WINDOWED[4], CAPPED[2]], **each)
def test_nothing_outside_the_tensors_and_nothing_in_the_padding_is_read(case):
    """Keys and values stand in a buffer of NaN, and so do the queries; the padding is NaN too."""
    def guarded(tensor, name):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 96, *tensor.shape[2:]), torch.nan)
        inside = wide[:, 32:32 + tensor.shape[1]]
        inside.copy_(tensor)
        for row, (start, stop) in enumerate(case.lengths or () if name != "query" else ()):
            inside[row, :start], inside[row, stop:] = torch.nan, torch.nan
        return inside.requires_grad_() if inside.is_leaf else inside.detach().requires_grad_()

    plain = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    views = [guarded(tensor.detach(), name) for tensor, name in zip(plain, ("query", "key", "value"), strict=True)]
    results = []
    for tensors in (plain, views):
        output, lse = fused_triton.attend(*tensors, case.tiles(), scale=0.3, softcap=case.softcap, return_lse=True)
        loss = output.sum() + lse.masked_fill(lse.isneginf(), 0).sum()
        results.append([output, lse, *torch.autograd.grad(loss, tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_triton
def test_strides_and_a_negative_scale_do_not_matter():
    case = TILED[2]
    tensors = case.tensors(torch.float32)
    expected = fused_triton.attend(*tensors, case.tiles(), scale=0.3)
    strided = [tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for tensor in tensors]
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    for other in (strided, heads_first):
        assert torch.equal(fused_triton.attend(*other, case.tiles(), scale=0.3), expected)
    assert torch.equal(fused_triton.attend(-tensors[0], *tensors[1:], case.tiles(), scale=-0.3), expected)


@needs_triton
def test_a_nan_key_makes_nan_of_the_rows_that_keep_it_and_of_no_other_block():
    case = replace(TILED[0], queries=48, keys=48)
    query, key, value = case.tensors(torch.float32)
    key[:, 0] = torch.nan
    output = fused_triton.attend(query, key, value, case.tiles(), scale=0.3)
    keeps = case.pairs()[..., 0].transpose(1, 2)
    assert keeps.any() and not keeps.all()
    assert output.isnan().all(-1)[keeps].all() and output[~keeps].isfinite().all()


@needs_triton
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 6])
def test_a_wrong_part_of_the_backward_is_seen(number, monkeypatch):
    """What the backward is given, one part after another wrong."""
    right = torch.ops.sentei.attend_triton_backward

    def wrong(given, *extra):
        return right([part * 1.01 if place == number else part for place, part in enumerate(given)], *extra)

    monkeypatch.setattr(torch.ops.sentei, "attend_triton_backward", wrong)
    with pytest.raises(AssertionError, match="d[qkv]: error"):
        check(fused_triton.attend, TILED[2], torch.float32)


@needs_triton
@pytest.mark.parametrize("case", [TILED[3], DENSE[-1], *CAPPED[:2]], **each)
def test_it_is_a_proper_op_of_torch(case):
    tiles, grid = case.tiles(), case.grid()
    plan = [] if tiles.is_everything else [tiles.full_count, tiles.full_ids, tiles.partial_count, tiles.partial_ids]
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    sizes = [*case.tile, int(grid.causal), case.window]
    torch.library.opcheck(torch.ops.sentei.attend_triton.default,
                          (*tensors, plan, grid.lengths, sizes, 0.3, case.softcap))


@needs_triton
def test_tensors_without_memory_get_shapes_and_gradients_of_gradients_are_refused():
    case = TILED[0]
    tiles = case.tiles()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in case.tensors(torch.float32)]
        output = attend(*fakes, tiles, impl="fused_triton")
    assert (type(output), output.shape) == (FakeTensor, (1, 41, 2, 24))
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    output = fused_triton.attend(*tensors, case.tiles(), scale=0.3)
    gradient, = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(ImplError, match="gradients of gradients"):
        gradient.sum().backward()


@needs_triton
@pytest.mark.parametrize("change, reason", [
    ({"tile": (24, 16)}, "blocks of 24 by 16, not powers of two from 16"),
    ({"tile": (16, 8)}, "blocks of 16 by 8, not"),
    ({"widths": (16, 257)}, "heads 16 and 257 wide, not 1 to 256"),
])
def test_what_it_cannot_take_is_refused_with_a_reason(change, reason):
    case = replace(TILED[0], **change)
    with pytest.raises(ImplError, match=f"fused_triton: .*got {reason}"):
        fused_triton.attend(*case.tensors(torch.float32), case.tiles(), scale=0.3)


@needs_triton
def test_float64_and_forward_gradients_are_refused():
    case = TILED[0]
    with pytest.raises(ImplError, match="got torch.float64 on cpu"):
        fused_triton.attend(*case.tensors(), case.tiles(), scale=0.3)
    query, key, value = case.tensors(torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        assert "forward gradient" in fused_triton.refusal(dual, key, value, case.tiles())


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = TILED[0]
    with pytest.raises(ImplError, match="got a Python without triton; use impl='auto'"):
        attend(*case.tensors(torch.float32), case.tiles(), impl="fused_triton")


def test_auto_takes_it_on_a_gpu_alone_and_says_why_not(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    case = TILED[0]
    tensors = [tensor.as_subclass(OnGpu) for tensor in case.tensors(torch.float32)]
    monkeypatch.setattr(fused_triton, "refusal", lambda *_: "")
    assert choose_impl("auto", *tensors, case.tiles()) == ("fused_triton", "the fastest there is")
    assert choose_impl("auto", *tensors, Tiles(grid=case.grid()))[0] == "eager"
    assert choose_impl("auto", *tensors, Tiles(grid=case.grid()), softcap=2.0)[0] == "fused_triton"
    monkeypatch.setattr(auto, "SHORTEST", 1)
    assert choose_impl("auto", *tensors, Tiles(grid=replace(case.grid(), window=5))) == (
        "fused_triton", "torch's own kernel needs a mask of every pair for this plan")
    monkeypatch.setattr(fused_triton, "refusal", lambda *_: "this")
    assert choose_impl("auto", *tensors, case.tiles()) == ("eager", "fused_triton cannot take this")
    assert choose_impl("auto", *case.tensors(torch.float32), case.tiles())[0] != "fused_triton"


@needs_triton
def test_a_plan_that_names_blocks_the_grid_does_not_have_is_refused():
    case = TILED[0]
    tiles = case.tiles()
    for changes in ({"full_ids": tiles.full_ids + 9}, {"partial_count": tiles.partial_count + 9}):
        with pytest.raises(ShapeError, match="expected blocks from 0 to 2 up to the count"):
            fused_triton.attend(*case.tensors(torch.float32), replace(tiles, **changes), scale=0.3)
