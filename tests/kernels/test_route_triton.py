"""Routing in Triton's interpreter, against fp64; whether it compiles is in test_triton_compiled.py.

The interpreter is slow, so that experts are small here; a GPU's sizes are the business of `benchmarks/gpu_check.py`.
"""

import importlib.util
from functools import partial

import pytest
import torch
from stacks import check as check_impl
from stacks import drawn, results

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels.routing import Stack, choose_impl, route

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
check = partial(check_impl, "fused_triton")
HALF = torch.bfloat16
CASES = {
    "gated": {}, "identity": {"activation": "identity"}, "plain": {"gated": False, "activation": "gelu"},
    "bfloat16": {"dtype": HALF, "activation": "gelu_tanh"}, "float16": {"dtype": torch.float16, "activation": "relu"},
    "several tiles an expert": {"tokens": 400, "slots": 1, "experts": 2},
    "more depths and columns than a step": {"inner": 70, "width": 37, "outputs": 131},
    "one neuron": {"inner": 1, "width": 1, "outputs": 1}, "many experts": {"experts": 40, "tokens": 7},
    "one expert": {"experts": 1, "slots": 1, "tokens": 64},
}


@pytest.mark.parametrize("case", CASES)
def test_is_as_near_to_fp64_as_the_definition(case):
    check(*drawn(**CASES[case]))


def test_halves_of_one_weight_get_the_gradients_of_two():
    (hidden, weights, joint, down), ids, stack = drawn(joint=True)
    apart = [half.clone().requires_grad_() for half in joint.detach().chunk(2, 1)]
    for experts in (stack(), Stack(gate=apart[0], up=apart[1], down=down)):
        route(hidden, ids, weights, experts, impl="fused_triton").square().sum().backward()
    torch.testing.assert_close(joint.grad, torch.cat([half.grad for half in apart], 1))


@pytest.mark.parametrize("empty", [{"tokens": 0}, {"slots": 0}, {"inner": 0}, {"width": 0}, {"outputs": 0}], ids=str)
def test_nothing_gives_nothing(empty):
    check(*drawn(**empty))


def test_slots_that_are_all_empty_and_experts_kept_twice():
    leaves, ids, stack = drawn(slots=3)
    ids[:] = ids[:, :1]
    check(leaves, ids, stack)
    check(leaves, torch.full_like(ids, -1), stack)


def test_nan_reaches_only_who_keeps_it():
    """A token that keeps nothing, an expert nobody keeps, and the weight of an empty slot are NaN."""
    leaves, ids, stack = drawn()
    ids[0], ids[1, 0] = -1, -1
    ids[ids == 2] = 1
    with torch.no_grad():
        leaves[0][0] = leaves[1][ids < 0] = torch.nan
        for weight in leaves[2:]:
            weight[2] = torch.nan
    found = results(leaves, ids, stack, "fused_triton", torch.ones(20, 7))
    assert all(one.isfinite().all() for one in found)
    assert not found[0][0].any() and not found[2][0].any() and not found[3][ids < 0].any()


def test_each_gradient_can_be_asked_for_alone_and_strides_do_not_matter():
    leaves, ids, stack = drawn()
    every = torch.autograd.grad(route(leaves[0], ids, leaves[1], stack(), impl="fused_triton").sum(), leaves)
    for leaf, expected in zip(leaves, every, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        turned = [x.T.contiguous().T for x in (leaves[0], ids, leaves[1])]
        found, = torch.autograd.grad(route(*turned, stack(), impl="fused_triton").sum(), leaf)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("wrong", [-2, 4])
def test_an_expert_that_does_not_exist_is_refused(wrong):
    leaves, ids, stack = drawn()
    ids[3, 1] = wrong
    with pytest.raises(ShapeError, match=r"route: expected ids in -1\.\.3"):
        route(leaves[0], ids, leaves[1], stack(), impl="fused_triton")
    with pytest.raises(ShapeError, match="ids int64"):
        torch.ops.sentei.route_triton(leaves[0], ids, *leaves[1:], 0)


def test_what_it_cannot_take_is_refused_and_auto_leaves_it_alone():
    (leaves, ids, stack), wide = drawn(), drawn(dtype=torch.float64)
    for given, told in (((leaves[0].double(), [torch.neg] * 4), "functions"),
                        ((wide[0][0], wide[2]()), "torch.float64")):
        with pytest.raises(ImplError, match=f"fused_triton.*{told}"):
            route(given[0], ids, leaves[1], given[1], impl="fused_triton")
    assert choose_impl("auto", leaves[0], ids, leaves[1], stack())[0] != "fused_triton"


def test_under_autocast_it_computes_what_it_does_in_its_dtype():
    leaves, ids, stack = drawn()
    with torch.autocast("cpu", HALF):
        y = route(leaves[0], ids, leaves[1], stack(), impl="fused_triton")
        assert choose_impl("fused_triton", leaves[0], ids, leaves[1], stack()) == (
            "fused_triton", f"asked for by name; experts of {HALF} under autocast")
    narrow, _, stack = drawn(dtype=HALF)
    assert torch.equal(y, route(narrow[0], ids, leaves[1], stack(), impl="fused_triton"))


def test_it_is_an_op_of_torch():
    (hidden, weights, up, down, gate), ids, stack = drawn(4, 1, 2, 3, 4, 5)
    arguments = hidden, ids, weights, up, down, gate, 0
    torch.library.opcheck(torch.ops.sentei.route_triton.default, arguments)
    products = torch.ops.sentei.route_triton(*arguments)[1].detach()
    given = [hidden.detach(), ids, weights.detach(), up.detach(), down.detach()]
    torch.library.opcheck(torch.ops.sentei.route_triton_backward.default, (
        torch.ones(4, 5), given, gate.detach(), products, 0, [True, False, True, True]))
    with pytest.raises(ImplError, match="first gradients only"):
        first, = torch.autograd.grad(route(hidden, ids, weights, stack(), impl="fused_triton").sum(), hidden,
                                     create_graph=True)
        first.sum().backward()
