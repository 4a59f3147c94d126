"""Every implementation of `linear` against fp64, and what the native one must leave alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sentei.core.errors import ImplError, ResourceError, ShapeError
from sentei.kernels import native
from sentei.kernels.linear import IMPLS, choose_impl, fused_cpp, linear

needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
HALF = torch.bfloat16


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(function, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """The result differs from fp64 by at most twice what torch's own does, or by what one rounding may; where rows
    are many, whose sums are made number by number and torch's in parts, by five, or by what so many roundings may."""
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias)]
    exact = torch.nn.functional.linear(*wide)
    size = torch.nn.functional.linear(wide[0].abs(), wide[1].abs(), None if bias is None else wide[2].abs())
    y = function(x, weight, bias)
    assert y.dtype == x.dtype and y.shape == exact.shape
    # Of a sum in fp32, whatever its order, and of one rounding to the dtype.
    unit = torch.finfo(torch.float32).eps * size + torch.finfo(x.dtype).eps * exact.abs()
    error, own = (((found - exact).abs() / unit.clamp(min=1e-30)).amax().item() if y.numel() else 0
                  for found in (y, torch.nn.functional.linear(x, weight, bias)))
    few = x.shape[:-1].numel() <= fused_cpp.FEW_ROWS
    # Each is of up to half a unit, uniformly: where all terms have one sign, the root of a twelfth of their number / 3.
    many = max(5, 1.5 * (x.shape[-1] / 36) ** 0.5)
    assert error <= max(2 * own, 1 if few else many), f"error {error}, torch's {own}"


cases = {"rows": st.integers(1, 20) | st.sampled_from([96, 97, 210]),  # from nine on they are many
         "width": st.integers(1, 70) | st.sampled_from([576, 1025]), "outputs": st.integers(0, 21) | st.just(530),
         "with_bias": st.booleans(), "dtype": st.sampled_from([torch.float32, HALF]),
         "gap": st.integers(0, 3), "seed": st.integers(0, 99)}


@needs_library
@settings(deadline=None, max_examples=150, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**cases)
def test_is_as_near_to_fp64_as_torch(rows, width, outputs, with_bias, dtype, gap, seed, machine_or_pairs):
    x, weight = random(rows, width + gap, seed=seed, dtype=dtype), random(outputs, width + gap, seed=1, dtype=dtype)
    bias = random(2, outputs, seed=2, dtype=dtype).T[:, 0] if with_bias else None
    check(fused_cpp.linear, x[:, :width], weight[:, :width], bias)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "fused_cpp"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (5,), (0, 5)], ids=str)
def test_the_others_are_too(impl, dtype, shape):
    check(IMPLS[impl], random(*shape, dtype=dtype), random(4, 5, seed=1, dtype=dtype), random(4, seed=2, dtype=dtype))


@needs_library
@pytest.mark.parametrize("wrong", [lambda x, w, b: fused_cpp.linear(x, w, None),
                                   lambda x, w, b: fused_cpp.linear(x, w.flip(0), b),
                                   lambda x, w, b: fused_cpp.linear(x, w[:, :-1].contiguous(), b)
                                   if x.shape[1] == w.shape[1] - 1 else fused_cpp.linear(x[:, :-1], w[:, :-1], b)],
                         ids=["bias", "outputs", "width"])
def test_a_wrong_product_is_seen(wrong):
    with pytest.raises(AssertionError, match="error"):
        check(wrong, random(3, 33), random(7, 33, seed=1), random(7, seed=2))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_row_depends_on_nothing_but_itself(dtype, machine, monkeypatch):
    x, weight = random(8, 131, dtype=dtype), random(1003, 131, seed=1, dtype=dtype)
    expected = torch.cat([fused_cpp.linear(row[None], weight) for row in x])
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for rows in range(1, 9):
            assert torch.equal(fused_cpp.linear(x[:rows], weight), expected[:rows])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_row_of_many_depends_on_nothing_but_itself(dtype, machine_or_pairs, monkeypatch):
    x, weight = random(250, 132, dtype=dtype), random(1003, 132, seed=1, dtype=dtype)
    expected = fused_cpp.linear(x, weight)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for first, count in ((0, 9), (1, 96), (100, 97), (3, 200)):
            assert torch.equal(fused_cpp.linear(x[first:first + count], weight), expected[first:first + count])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_many_rows_take_weights_in_groups_of_outputs(dtype, machine_or_pairs):
    """16,777,216 numbers are laid out at once."""
    width = 1 << 19
    x, weight, bias = torch.ones(9, width, dtype=dtype), torch.zeros(70, width, dtype=dtype), torch.arange(70).to(dtype)
    weight[:, 0], weight[:, -1], x[:, 0] = torch.arange(70).to(dtype), 1, torch.arange(9).to(dtype)
    expected = torch.arange(9)[:, None] * torch.arange(70) + 1 + torch.arange(70)
    assert torch.equal(fused_cpp.linear(x, weight, bias), expected.to(dtype))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("width", [5, 32, 37])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_reach_their_outputs_and_no_others(dtype, width, poison, machine_or_pairs):
    for place in (0, width - 1):
        x, weight = torch.ones(11, width, dtype=dtype), torch.ones(6, width, dtype=dtype)
        x[1, place] = weight[4, place] = poison
        for rows in (3, 11):
            torch.testing.assert_close(fused_cpp.linear(x[:rows], weight), torch.nn.functional.linear(x[:rows], weight),
                                       equal_nan=True)


@needs_library
def test_numbers_beyond_a_view_are_not_read():
    whole, weight = torch.full((11, 9), torch.nan), torch.full((4, 9), torch.nan)
    whole[:, 2:7], weight[:, 1:6] = 1, 2
    for rows in (3, 11):
        assert fused_cpp.linear(whole[:rows, 2:7], weight[:, 1:6]).tolist() == [[10.0] * 4] * rows


@needs_library
def test_bfloat16_is_rounded_to_the_nearest_even():
    x = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [3e38, 3e38]], dtype=HALF)
    weight = torch.ones(1, 2, dtype=HALF)
    assert fused_cpp.linear(x, weight).flatten().tolist() == [1.0, 1 + 2**-6, torch.inf]


WEIGHT, ROW = torch.ones(4, 3), torch.ones(2, 3)


@needs_library
@pytest.mark.parametrize("x, weight, reason", [
    (ROW.double(), WEIGHT.double(), "torch.float64 on cpu"), (ROW.half(), WEIGHT.half(), "torch.float16 on cpu"),
    (ROW, WEIGHT.to(HALF), "torch.bfloat16 on cpu with torch.float32"), (ROW.to("meta"), WEIGHT.to("meta"), "on meta"),
    (torch.ones(0, 3), WEIGHT, "an input that is empty"),
    (torch.ones(2, 0), torch.ones(4, 0), "an input that is empty"),
    (ROW, torch.ones(3, 4).T, "rows are not contiguous"),
    (ROW, WEIGHT.clone().requires_grad_(), "want gradients"), (ROW.clone().requires_grad_(), WEIGHT, "want gradients"),
], ids=str)
def test_auto_leaves_to_torch_what_the_kernel_cannot_take(x, weight, reason):
    name, why = choose_impl("auto", x, weight)
    assert name == "eager" and reason in why
    with pytest.raises(ImplError, match="fused_cpp: expected a product it can take"):
        linear(x, weight, impl="fused_cpp")
    if x.device.type == "cpu" and x.dtype == weight.dtype:
        assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


@needs_library
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn],
                         ids=["coo", "csr", "mkldnn"])
def test_so_it_does_with_tensors_of_another_layout(change):
    for x, weight in ((ROW, change(WEIGHT)), (change(ROW), WEIGHT)):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                assert choose_impl("auto", x, weight) == (
                    "eager", f"fused_cpp cannot take an input of {x.layout} and weights of {weight.layout}")
                assert fused_cpp.at_once(x, weight, None) is None
    if change is not torch.Tensor.to_mkldnn:  # torch has no product of these
        assert torch.equal(linear(ROW, change(WEIGHT)), linear(ROW, WEIGHT))


@needs_library
def test_gradients_autocast_and_transforms_are_those_of_torch():
    x, weight = random(2, 3).requires_grad_(), random(4, 3, seed=1)
    own, expected = (torch.autograd.grad(function(x, weight).sum(), x)[0]
                     for function in (linear, torch.nn.functional.linear))
    assert torch.equal(own, expected)
    with torch.autocast("cpu"):
        assert linear(ROW, WEIGHT).dtype == HALF
    rows = random(5, 2, 3)
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight))(rows), rows @ weight.T)
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda x: linear(x, weight), (rows[0],), (rows[1],))
        torch.testing.assert_close(tangent, rows[1] @ weight.T)
        assert choose_impl("auto", x, weight)[0] == "fused_cpp"


@needs_library
def test_it_is_an_op_of_torch_where_torch_looks_on():
    arguments = random(2, 3), random(4, 3, seed=1), random(4, seed=2)
    torch.library.opcheck(torch.ops.sentei.linear.default, arguments)
    compiled = torch.compile(lambda x: linear(x + 0, *arguments[1:]) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments[0]), linear(*arguments) * 2)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(arguments[0]), *arguments[1:], impl="fused_cpp").shape == (2, 4)
    with pytest.raises(ImplError, match="expected no gradients"):
        torch.ops.sentei.linear(arguments[0].requires_grad_(), *arguments[1:]).sum().backward()


@needs_library
def test_running_out_of_memory_is_told(monkeypatch):
    monkeypatch.setattr(fused_cpp, "_call", lambda: lambda *_: 1)
    with pytest.raises(ResourceError, match="linear: expected memory"):
        fused_cpp.linear(ROW, WEIGHT)


@pytest.mark.parametrize("x, weight, bias", [(ROW[:, :2], WEIGHT, None), (ROW, WEIGHT[0], None),
                                             (ROW, WEIGHT, torch.ones(3)), (torch.tensor(1.0), WEIGHT, None)])
def test_shapes_that_do_not_fit_are_refused(x, weight, bias):
    with pytest.raises(ShapeError, match="linear: expected x"):
        linear(x, weight, bias)


def test_an_unknown_implementation_is_refused_and_a_known_one_runs(monkeypatch):
    with pytest.raises(ImplError, match="impl 'auto', 'reference', 'eager', 'fused_cpp', got 'fast'"):
        linear(ROW, WEIGHT, impl="fast")
    monkeypatch.setattr(native, "missing", lambda: "a package without its native library")
    assert choose_impl("auto", ROW, WEIGHT) == (
        "eager", "fused_cpp cannot take a package without its native library")
    assert linear(ROW, WEIGHT).tolist() == [[3.0] * 4] * 2
