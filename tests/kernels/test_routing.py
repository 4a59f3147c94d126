"""Every implementation of `route` against one dense formula, and its doors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels.routing import IMPLS, Stack, choose_impl, route
from sentei.kernels.routing.stack import ACTIVATIONS

every_impl = pytest.mark.parametrize("impl", ["reference", "eager"])  # the others take stacks alone


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(matrices: torch.Tensor) -> list:
    """One bent linear map an expert, [N, D] to [N, D_out], from matrices [E, D, D_out]."""
    return [lambda x, matrix=matrix: (x @ matrix).tanh() for matrix in matrices]


def formula(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, then one sum with the weights laid out densely."""
    onehot = torch.nn.functional.one_hot(ids + 1, len(matrices) + 1)[..., 1:].to(weights.dtype)
    everything = torch.einsum("ti,eid->etd", hidden, matrices).tanh()
    return torch.einsum("tk,tke,etd->td", weights, onehot, everything)


@every_impl
@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(0, 9), slots=st.integers(0, 4), experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_is_the_weighed_sum_of_the_kept_experts(impl, tokens, slots, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, slots), generator=generator)
    hidden, weights, matrices = random(tokens, 3, seed=seed), random(tokens, slots, seed=seed), random(experts, 3, 5)
    y = route(hidden, ids, weights, linear(matrices), impl=impl)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, formula(hidden, ids, weights, matrices), rtol=1e-12, atol=1e-12)


@every_impl
def test_gradients_are_those_of_the_formula(impl):
    ids = torch.tensor([[0, 2], [-1, 1], [-1, -1], [2, 0]])
    leaves = tuple(x.requires_grad_() for x in (random(4, 3), random(4, 2), random(3, 3, 5)))
    assert torch.autograd.gradcheck(
        lambda hidden, weights, matrices: route(hidden, ids, weights, linear(matrices), impl=impl), leaves)
    kept = torch.autograd.grad(route(leaves[0], ids, leaves[1], linear(leaves[2]), impl=impl).sum(), leaves)
    dense = torch.autograd.grad(formula(leaves[0], ids, leaves[1], leaves[2]).sum(), leaves)
    torch.testing.assert_close(kept, dense, rtol=1e-12, atol=1e-12)


@every_impl
def test_the_gradient_of_a_token_that_keeps_nothing_is_0(impl):
    hidden = random(2, 3).requires_grad_()
    route(hidden, torch.full((2, 2), -1), random(2, 2), linear(random(2, 3, 5)), impl=impl).sum().backward()
    assert hidden.grad.tolist() == [[0.0] * 3] * 2


@every_impl
def test_an_empty_slot_is_not_read_even_if_its_weight_is_nan(impl):
    ids, weights = torch.tensor([[0, -1], [-1, -1]]), torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    y = route(torch.ones(2, 3), ids, weights, [lambda x: 2 * x], impl=impl)
    assert y.tolist() == [[2.0] * 3, [0.0] * 3]


@every_impl
def test_an_expert_sees_its_own_tokens_only_and_an_unwanted_one_is_not_called(impl):
    seen = {}

    def expert(e: int):
        return lambda x: seen.setdefault(e, x)

    hidden = torch.arange(8.0).view(4, 2)
    ids = torch.tensor([[1], [3], [1], [-1]])
    route(hidden, ids, torch.ones(4, 1), [expert(e) for e in range(4)], impl=impl)
    assert {e: x.tolist() for e, x in seen.items() if len(x)} == {1: [[0.0, 1.0], [4.0, 5.0]], 3: [[2.0, 3.0]]}
    assert 2 not in seen


@every_impl
def test_the_order_of_the_slots_does_not_matter_and_an_expert_may_be_kept_twice(impl):
    hidden, matrices = random(3, 3), random(4, 3, 5)
    ids, weights = torch.tensor([[0, 1, -1], [3, -1, 3], [2, 1, 0]]), random(3, 3)
    y = route(hidden, ids, weights, linear(matrices), impl=impl)
    turned = route(hidden, ids.flip(-1), weights.flip(-1), linear(matrices), impl=impl)
    torch.testing.assert_close(turned, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, formula(hidden, ids, weights, matrices), rtol=1e-12, atol=1e-12)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_that_of_the_experts_and_the_sum_is_wide(impl, dtype):
    """256 times 1 + 1/128: a running sum in bfloat16 would stop at 256."""
    hidden = torch.full((1, 2), 1 + 2**-7, dtype=dtype)
    ids, weights = torch.arange(256)[None], torch.ones(1, 256, dtype=dtype)
    y = route(hidden, ids, weights, [lambda x: x] * 256, impl=impl)
    assert y.dtype == dtype and y.tolist() == [[258.0, 258.0]]


@every_impl
def test_strides_do_not_matter(impl):
    hidden, weights, matrices = random(3, 4).T, random(2, 4).T, random(3, 3, 5)
    ids = torch.tensor([[0, 1, 2, -1], [1, -1, 0, 2]]).T
    torch.testing.assert_close(route(hidden, ids, weights, linear(matrices), impl=impl),
                               formula(hidden, ids, weights, matrices), rtol=1e-12, atol=1e-12)


IDS, WEIGHTS, HIDDEN = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2), torch.ones(4, 3)


@pytest.mark.parametrize("hidden, ids, weights, experts, message", [
    (torch.ones(1, 4, 3), IDS, WEIGHTS, 2, r"expected hidden \[T, D\], got \[1, 4, 3\]"),
    (HIDDEN, IDS[:3], WEIGHTS, 2, r"expected ids \[T, K\] with T=4, got \[3, 2\]"),
    (HIDDEN, IDS, WEIGHTS[:, :1], 2, r"expected weights \[T, K\] with T=4, K=2, got \[4, 1\]"),
    (HIDDEN, IDS.int(), WEIGHTS, 2, "expected ids int64.*torch.int32"),
    (HIDDEN, IDS, WEIGHTS.long(), 2, "hidden and weights floating"),
    (HIDDEN.long(), IDS, WEIGHTS, 2, "hidden and weights floating"),
    (HIDDEN, IDS, WEIGHTS.to("meta"), 2, "expected one device, got cpu, cpu, meta"),
    (HIDDEN, IDS - 2, WEIGHTS, 2, r"expected ids in -1\.\.1, got -2\.\.-2"),
    (HIDDEN, IDS + 2, WEIGHTS, 2, r"expected ids in -1\.\.1, got 2\.\.2"),
    (HIDDEN, IDS, WEIGHTS, 0, "expected at least one expert, got none"),
], ids=["hidden", "ids", "weights", "int32", "integer weights", "integer hidden", "device", "below", "above", "nobody"])
def test_what_does_not_fit_is_refused(hidden, ids, weights, experts, message):
    with pytest.raises(ShapeError, match="^route: .*" + message):
        route(hidden, ids, weights, [torch.neg] * experts)


@every_impl
@pytest.mark.parametrize("answer", [lambda x: x[:1], lambda x: x[:, :2], lambda x: x.sum(-1)],
                         ids=["rows", "width", "dimensions"])
def test_an_expert_that_answers_in_another_shape_is_named(impl, answer):
    with pytest.raises(ShapeError, match="the answer of expert 1"):
        route(HIDDEN, torch.tensor([[0, 1]] * 4), WEIGHTS, [torch.neg, answer], impl=impl)


def test_auto_says_what_it_chose_and_why():
    given = HIDDEN, IDS, WEIGHTS, [torch.neg] * 2
    assert choose_impl("auto", *given)[0] == "eager"
    assert [choose_impl(impl, *given) for impl in IMPLS] == [(impl, "asked for by name") for impl in IMPLS]


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ImplError, match="route: expected impl 'auto', 'reference', 'eager', 'masked', 'fused_cpp', "
                       "'fused_triton', got 'fast'"):
        route(HIDDEN, IDS, WEIGHTS, [torch.neg], impl="fast")


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_stack_is_a_sequence_of_feed_forward_networks(activation, gated):
    torch.manual_seed(0)
    gate, up, down = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double(), torch.randn(3, 2, 5).double()
    stack, x = Stack(up=up, down=down, gate=gate if gated else None, activation=activation), torch.randn(6, 4).double()
    act = ACTIVATIONS[activation]
    for e, expert in enumerate(stack):
        hidden = act(x @ gate[e].T) * (x @ up[e].T) if gated else act(x @ up[e].T)
        torch.testing.assert_close(expert(x), hidden @ down[e].T)
    assert len(stack) == len(list(stack)) == 3


def test_halves_of_one_weight_are_a_stack_and_have_one_gradient():
    torch.manual_seed(0)
    joint, down = (torch.randn(3, *shape, dtype=torch.float64).requires_grad_() for shape in ((10, 4), (2, 5)))
    x, ids, weights = torch.randn(6, 4).double(), torch.arange(6)[:, None] % 2, torch.rand(6, 1).double()
    for impl in ("reference", "eager"):
        stack = Stack.from_joint(joint, down, "relu")
        assert stack.gate.data_ptr() == joint.data_ptr() and stack.up.data_ptr() == joint[:, 5:].data_ptr()
        apart = Stack(gate=joint[:, :5], up=joint[:, 5:], down=down, activation="relu")
        found, expected = (torch.autograd.grad(route(x, ids, weights, experts, impl=impl).square().sum(), (joint, down))
                           for experts in (stack, apart))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ShapeError, match="expected gate_up"):
        Stack.from_joint(joint[:, :9], down)


@pytest.mark.parametrize("wrong", [{"down": torch.zeros(3, 2, 6)}, {"gate": torch.zeros(3, 5, 3)},
                                   {"up": torch.zeros(5, 4)}, {"down": torch.zeros(3, 2, 5).half()},
                                   {"activation": "tanh"}], ids=str)
def test_a_stack_whose_parts_do_not_fit_is_refused(wrong):
    parts = {"up": torch.zeros(3, 5, 4), "down": torch.zeros(3, 2, 5), "gate": torch.zeros(3, 5, 4)}
    with pytest.raises(ShapeError):
        Stack(**{**parts, **wrong})
