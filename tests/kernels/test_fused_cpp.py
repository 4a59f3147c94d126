"""The native kernel against fp64, on every case the others must pass."""

import ctypes
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import CASES, Case, check_attend, drawn_cases
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sentei.core.errors import ImplError, ResourceError, ShapeError
from sentei.core.growing import Growing
from sentei.kernels import native
from sentei.kernels.attention import Grid, Tiles, attend, choose_impl, fused_cpp
from sentei.kernels.attention.select import Sampled, estimate

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
LARGER = [
    Case(name="three tiles wide", queries=200, keys=200, tile=(64, 64), heads=6, groups=2),
    Case(name="rows left over", queries=77, keys=130, tile=(13, 24), heads=2, groups=1),
    Case(name="padded", queries=90, keys=90, tile=(32, 16), lengths=((17, 90), (0, 41))),
    *(Case(name=f"far below a cap of {cap:g}", queries=70, keys=70, tile=(64, 64), softcap=cap, logits=3.0)
      for cap in (9.0, 1e3, 1e6, 1e9)),
    *(Case(name=f"far above a cap of {cap:g}", queries=70, keys=70, tile=(64, 64), softcap=cap, logits=3.0)
      for cap in (0.1, 1e-3)),
]
# Rows that read every key where it lies, four at most, and the first number that packs them.
FEW = [
    Case(name="one row, a page and a key", queries=1, keys=17, tile=(64, 64), kept=None, heads=3, groups=1,
         widths=(24, 5)),
    Case(name="one row, padded", queries=1, keys=90, tile=(32, 16), kept=None, lengths=((17, 90), (0, 41), (3, 3))),
    Case(name="two rows, several runs of pages", queries=2, keys=600, tile=(64, 64), kept=None, heads=6, groups=2),
    Case(name="three rows, both ways", queries=3, keys=40, tile=(2, 16), kept=None, causal=False, heads=5, groups=5),
    Case(name="four rows, padded, values wider", queries=4, keys=33, tile=(4, 8), kept=None, lengths=((2, 33), (0, 31)),
         widths=(12, 20)),
    Case(name="four rows of four", queries=4, keys=4, tile=(64, 64), kept=None),
    Case(name="five rows", queries=5, keys=90, tile=(64, 64), kept=None),
    Case(name="four rows, huge scores", queries=4, keys=130, tile=(64, 64), kept=None, logits=3e4),
]


# It sums in another order than torch, and the gradients make the weights again from the scores.
check = partial(check_attend, steps=4)


def test_the_native_library_was_built_wherever_there_is_a_compiler():
    assert not native.missing() or not (shutil.which("c++") or shutil.which("g++")), native.missing()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES + LARGER + FEW, ids=lambda case: case.name)
def test_output_and_gradients_are_as_near_to_fp64_as_masked_attention_in_the_same_dtype(case, dtype, machine_or_pairs):
    check(fused_cpp.attend, case, dtype)


@needs_library
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_rows_that_are_trained_give_the_gradients_of_those_with_lse(case):
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    found, expected = (torch.autograd.grad(output.square().sum(), leaves) for output in (
        fused_cpp.attend(*leaves, case.tiles(), scale=0.3),
        fused_cpp.attend(*leaves, case.tiles(), scale=0.3, return_lse=True)[0]))
    assert all(map(torch.equal, found, expected))


@needs_library
@settings(deadline=None, max_examples=150, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn_cases())
def test_so_are_they_for_drawn_cases(case, machine):
    check(fused_cpp.attend, case, torch.float32)


@needs_library
@settings(deadline=None, max_examples=100, derandomize=True)
@given(case=drawn_cases())
def test_so_are_those_of_bfloat16_on_the_last_instruction_set(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "MACHINE", native.machines() - 1)
        check(fused_cpp.attend, case, torch.bfloat16)


@needs_library
def test_a_forgotten_scale_is_seen():
    with pytest.raises(AssertionError, match="error"):
        check(lambda *tensors, scale, **rest: fused_cpp.attend(*tensors, scale=1.0, **rest),
              CASES[0], torch.float32)


@needs_library
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_wrong_part_of_the_backward_is_seen(number, monkeypatch):
    """What the backward is given, one part after another wrong: key, value, softmax, gradient, delta."""
    right = torch.ops.sentei.attend_backward

    def wrong(given, *extra):
        return right([part * 1.01 if place == number else part for place, part in enumerate(given)], *extra)

    monkeypatch.setattr(torch.ops.sentei, "attend_backward", wrong)
    with pytest.raises(AssertionError, match="d[qkv]: error"):
        check(fused_cpp.attend, LARGER[0], torch.float32)


@needs_library
@pytest.mark.parametrize("case", [CASES[0], LARGER[2]], ids=lambda case: case.name)
def test_it_is_a_proper_op_of_torch(case):
    grid, tiles = case.grid(), case.tiles()
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    plan = [tiles.full_count, tiles.full_ids, tiles.partial_count, tiles.partial_ids]
    arguments = *tensors, plan, grid.lengths, [*case.tile, int(grid.causal), 0], 0.3, 0.0
    torch.library.opcheck(torch.ops.sentei.attend.default, arguments)


@needs_library
@pytest.mark.parametrize("case", [FEW[1], FEW[2]], ids=lambda case: case.name)
def test_so_is_that_of_few_rows_and_it_has_no_gradients(case):
    grid, tensors = case.grid(), case.tensors(torch.float32)
    arguments = grid.lengths, [*case.tile, int(grid.causal), 0], 0.3
    torch.library.opcheck(torch.ops.sentei.attend_rows.default, (*tensors, *arguments))
    output = torch.ops.sentei.attend_rows(*(tensor.requires_grad_() for tensor in tensors), *arguments)
    with pytest.raises(ImplError, match="no gradients"):
        output.sum().backward()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_rows_read_a_growing_cache(dtype, machine):
    case = FEW[2]
    query, key, value = case.tensors(dtype)
    with torch.no_grad():
        keys, values = (Growing(part[:, :599]).append(part[:, 599:]).rows for part in (key, value))
        assert keys.stride() != key.stride()
        found, expected = (fused_cpp.attend(query, *given, case.tiles(), scale=0.3)
                           for given in ((keys, values), (key, value)))
    assert torch.equal(found, expected)


@needs_library
@pytest.mark.parametrize("queries", [1, 4, 5])
def test_rows_without_keys_give_zeros(queries, poison):
    tensors = [torch.randn(2, tokens, 2, 8) for tokens in (queries, 0, 0)]
    grid = Grid(num_queries=queries, num_keys=0, query_block=64, key_block=64, causal=False)
    assert (fused_cpp.attend(*tensors, Tiles(grid=grid), scale=0.3) == 0).all()


def between(case: Case):
    """A function whose attention stands between other operations."""
    tiles = case.tiles()

    def function(query, key, value):
        return attend(query + 0, key, value, tiles, scale=0.3, impl="fused_cpp") * 2

    return function


@needs_library
def test_a_compiled_decoder_keeps_few_rows_in_one_graph():
    tensors, function = FEW[2].tensors(torch.float32), between(FEW[2])
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*tensors), function(*tensors))


@needs_library
def test_a_compiled_function_keeps_it_in_one_graph():
    tensors, function = LARGER[0].tensors(torch.float32), between(LARGER[0])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    found, expected = (torch.autograd.grad(run(*leaves).square().sum(), leaves) for run in (compiled, function))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@needs_library
def test_gradients_of_gradients_are_refused_and_not_wrong():
    query, key, value = (tensor.requires_grad_() for tensor in CASES[0].tensors(torch.float32))
    output = fused_cpp.attend(query, key, value, CASES[0].tiles(), scale=0.3)
    first, = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(ImplError, match="fused_cpp: expected first gradients only"):
        torch.autograd.grad(first.sum(), key)


@needs_library
def test_strides_do_not_matter():
    case = LARGER[0]
    tensors = case.tensors(torch.float32)
    expected = fused_cpp.attend(*tensors, case.tiles(), scale=0.3)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    spread = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in tensors]
    assert torch.equal(fused_cpp.attend(*turned, case.tiles(), scale=0.3), expected)
    assert torch.equal(fused_cpp.attend(*spread, case.tiles(), scale=0.3), expected)


@needs_library
def test_one_thread_gives_the_bits_of_two():
    case, threads = LARGER[0], torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
            output = fused_cpp.attend(*leaves, case.tiles(), scale=0.3)
            outputs.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *outputs))


@needs_library
def test_what_it_cannot_take_is_refused_by_name_and_left_by_auto():
    query, key, value = CASES[0].tensors(torch.float64)
    tiles = CASES[0].tiles()
    with pytest.raises(ImplError, match="fused_cpp: expected tensors it can take, got torch.float64 on cpu"):
        attend(query, key, value, tiles, impl="fused_cpp")
    assert choose_impl("auto", query, key, value, tiles)[0] == "eager"
    assert choose_impl("auto", query.float(), key.float(), value.float(), tiles)[0] == "fused_cpp"
    assert choose_impl("auto", query.float(), key.float(), value.float(), Tiles(grid=Grid(
        num_queries=12, num_keys=12, query_block=4, key_block=3)))[0] == "eager"


@needs_library
@every_case
def test_the_default_dtype_and_device_do_not_matter(case):
    tensors, tiles, grid = case.tensors(torch.float32), case.tiles(), case.grid()
    expected = fused_cpp.attend(*tensors, tiles, scale=0.3, return_lse=True)
    shares = fused_cpp.estimate(*tensors[:2], grid, scale=0.3, rows=("exact", 0, 2), square=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = fused_cpp.attend(*tensors, tiles, scale=0.3, return_lse=True)
            again = fused_cpp.estimate(*tensors[:2], grid, scale=0.3, rows=("exact", 0, 2), square=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, (*found, again), (*expected, shares)))


@needs_library
def test_a_tile_that_is_dropped_is_not_read():
    case = CASES[0]
    query, key, value = case.tensors(torch.float32)
    keep = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    keep[..., 1] = False
    tiles = Tiles.from_mask(keep, case.grid())
    expected = fused_cpp.attend(query, key, value, tiles, scale=0.3)
    key[:, 3:6], value[:, 3:6] = torch.nan, torch.nan
    assert torch.equal(fused_cpp.attend(query, key, value, tiles, scale=0.3), expected)


@needs_library
@pytest.mark.parametrize("name", ["padding left", "padding both, grouped"])
def test_a_row_of_the_batch_is_alone(name):
    case = next(case for case in CASES if case.name == name)
    tensors = case.tensors(torch.float32)
    expected = fused_cpp.attend(*tensors, case.tiles(), scale=0.3)
    alone = Tiles.from_mask(case.keep()[1:], replace(case.grid(), lengths=case.grid().lengths[1:]))
    assert torch.equal(fused_cpp.attend(*(tensor[1:] for tensor in tensors), alone, scale=0.3), expected[1:])
    for tensor in tensors:
        tensor[0] = torch.nan
    assert torch.equal(fused_cpp.attend(*tensors, case.tiles(), scale=0.3)[1:], expected[1:])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_no_width_all_weigh_the_same(dtype, machine_or_pairs):
    """What is read of them the sanitizers see (`make test-sanitized`)."""
    key, value = torch.zeros(1, 5, 2, 0, dtype=dtype), torch.arange(80, dtype=dtype).view(1, 5, 2, 8)
    tiles = Tiles(grid=Grid(num_queries=5, num_keys=5, query_block=16, key_block=16, causal=False))
    found = fused_cpp.attend(key, key, value, tiles, scale=0.3)
    assert torch.equal(found, value.mean(1, keepdim=True).expand_as(value))


@needs_library
@pytest.mark.parametrize("ids", [[[4]], [[-1]], [[2**30]]], ids=["beyond the last", "empty but counted", "far beyond"])
def test_a_plan_that_names_other_tiles_is_refused(ids):
    query, key, value = CASES[0].tensors(torch.float32)
    count = torch.ones(1, 2, 3, dtype=torch.int32)
    none = torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3, 0, dtype=torch.int32)
    tiles = Tiles(grid=CASES[0].grid(), full_count=count, partial_count=none[0], partial_ids=none[1],
                  full_ids=torch.tensor(ids, dtype=torch.int32).expand(1, 2, 3, 1))
    with pytest.raises(ShapeError, match="attend: expected ascending ids of 4 blocks, -1 beyond the count"):
        fused_cpp.attend(query, key, value, tiles, scale=0.3)


@needs_library
def test_memory_that_cannot_be_had_is_an_error_and_no_crash():
    """A key of one row seen 2^32 times has no size, its packed copy would have a terabyte."""
    query, key = torch.ones(1, 1, 1, 64), torch.ones(1, 1, 1, 64).expand(1, 2**32, 1, 64)
    grid = Grid(num_queries=1, num_keys=2**32, query_block=64, key_block=4096)
    keep = torch.zeros(1, 1, 1, 2**20, dtype=torch.bool)
    keep[..., 0] = True
    with pytest.raises(ResourceError, match="expected memory for a packed copy"):
        fused_cpp.attend(query, key, key, Tiles.from_mask(keep, grid), scale=0.3)


@needs_library
def test_tensors_without_memory_get_shapes_and_no_pointers():
    case = LARGER[0]
    tensors, grid, tiles = case.tensors(torch.float32), case.grid(), case.tiles()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        query, key, value = (mode.from_tensor(tensor) for tensor in tensors)
        shares, output = estimate(Sampled(8), query, key, grid, 0.3), attend(query, key, value, tiles)
    assert (type(shares), shares.shape) == (FakeTensor, (1, 6, 4, 4))
    assert (type(output), output.shape) == (FakeTensor, value.shape[:2] + (6, 5))


@needs_library
def test_forward_gradients_are_left_to_eager():
    tensors, tiles = CASES[0].tensors(torch.float32), CASES[0].tiles()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        assert choose_impl("auto", dual, *tensors[1:], tiles) == (
            "eager", "fused_cpp cannot take tensors that carry a forward gradient")


def test_without_its_library_auto_computes_the_same_in_plain_torch_and_says_so(monkeypatch):
    tensors, tiles = CASES[0].tensors(torch.float32), CASES[0].tiles()
    expected = attend(*tensors, tiles)
    shares = estimate(Sampled(2), *tensors[:2], CASES[0].grid(), 0.3)
    monkeypatch.setattr(native, "missing", lambda: "a package without its native library")
    assert choose_impl("auto", *tensors, tiles) == (
        "eager", "fused_cpp cannot take a package without its native library")
    torch.testing.assert_close(attend(*tensors, tiles), expected)
    torch.testing.assert_close(estimate(Sampled(2), *tensors[:2], CASES[0].grid(), 0.3), shares)


@pytest.mark.parametrize("content, reason", [
    (None, "a package without its native library"), (b"no library", "a native library that cannot be loaded"),
], ids=["none", "damaged"])
def test_a_library_that_cannot_be_used_is_said_to_be_missing(tmp_path, monkeypatch, content, reason):
    if content:
        (tmp_path / "_native.so").write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    assert reason in native.missing.__wrapped__()


@needs_library
def test_a_library_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert native.missing.__wrapped__() == f"a native library of version {native.ABI - 1}, not {native.ABI}"


@needs_library
def test_python_and_cpp_mean_the_same_struct():
    assert native.load().sentei_problem_size() == ctypes.sizeof(fused_cpp._Problem)
    assert native.load().sentei_backward_size() == ctypes.sizeof(fused_cpp._Backward)
    assert native.load().sentei_estimate_size() == ctypes.sizeof(fused_cpp._Estimate)
    assert native.load().sentei_choice_size() == ctypes.sizeof(fused_cpp._Choice)
