"""Experts in bfloat16 whose numbers can be multiplied as pairs, and those whose numbers cannot."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import check, drawn, results, spoil

from sentei.kernels import native
from sentei.kernels.routing import Stack, route
from sentei.kernels.routing.stack import ACTIVATIONS

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
HALF = torch.bfloat16


@settings(deadline=None, max_examples=60, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(1, 90), slots=st.integers(1, 4), experts=st.integers(1, 6),
       inner=st.sampled_from([2, 8, 26, 50, 98, 130]), width=st.sampled_from([2, 16, 38, 260]),
       outputs=st.sampled_from([2, 6, 16, 34, 100]), gated=st.booleans(),
       activation=st.sampled_from(sorted(ACTIVATIONS)), seed=st.integers(0, 99))
def test_is_as_near_to_fp64_as_the_definition(machine_or_pairs, **case):
    check("fused_cpp", *drawn(dtype=HALF, **case))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens, experts, inner, width, outputs", [
    (300, 3, 130, 600, 270), (700, 1, 98, 64, 514), (90, 8, 34, 520, 20), (1100, 2, 250, 36, 30)])
def test_blocks_and_what_is_left_of_them_are_right(tokens, experts, inner, width, outputs, gated, machine_or_pairs):
    spoil()
    check("fused_cpp", *drawn(tokens, 3, experts, inner, width, outputs, gated=gated, dtype=HALF))


@pytest.mark.skipif(native.missing() or native.machines() <= 3, reason="a processor without products of pairs")
def test_pairs_are_taken_where_all_is_even_and_begins_where_floats_may(monkeypatch):
    """As numbers between two products are rounded where they are pairs, the two ways can be told from each other."""
    def is_paired(leaves, ids, stack) -> bool:
        check("fused_cpp", leaves, ids, stack)
        found = []
        for machine in (2, 3):
            monkeypatch.setattr(native, "MACHINE", machine)
            found.append(results(leaves, ids, stack, "fused_cpp", torch.ones(len(ids), leaves[3].shape[1])))
        forward, backward = (not torch.equal(found[0][which], found[1][which]) for which in (1, 2))
        assert forward == backward, "one of them alone"
        return forward

    sizes = {"tokens": 80, "inner": 50, "width": 40, "outputs": 36}
    assert is_paired(*drawn(**sizes, dtype=HALF)) and not is_paired(*drawn(**sizes))
    for name, size in (("inner", 51), ("width", 41), ("outputs", 37)):
        assert not is_paired(*drawn(**sizes | {name: size}, dtype=HALF))
    leaves, ids, _ = drawn(**sizes, dtype=HALF)

    def placed(which: int, first: int, apart: int):
        """The leaves, the numbers of one of them `first` from the beginning, its rows so much longer."""
        tensor = leaves[which].detach()
        room = torch.full((*tensor.shape[:-1], tensor.shape[-1] + apart), torch.nan, dtype=HALF)
        room[..., first:first + tensor.shape[-1]] = tensor
        moved = [*leaves[:which], room[..., first:first + tensor.shape[-1]].requires_grad_(), *leaves[which + 1:]]
        return moved, ids, lambda: Stack(up=moved[2], down=moved[3], gate=moved[4])

    for which in (0, 2, 3, 4):
        assert is_paired(*placed(which, 2, 4))
        assert not is_paired(*placed(which, 1, 2)), "begins between two floats"
        assert not is_paired(*placed(which, 0, 1)), "an odd number from row to row"


@pytest.mark.skipif(native.missing() or native.machines() <= 3, reason="a processor without products of pairs")
@pytest.mark.parametrize("tokens", range(1, 9))
def test_few_rows_are_pairs_of_any_numbers(tokens, monkeypatch):
    """Of odd sizes, which begin anywhere: pairs or not, what is rounded between two products tells them apart."""
    leaves, ids, stack = drawn(tokens, 1, experts=1, inner=77, width=135, outputs=67, dtype=HALF)
    ids[:] = 0
    found = []
    for machine in (2, 3):
        monkeypatch.setattr(native, "MACHINE", machine)
        check("fused_cpp", leaves, ids, stack)
        with torch.no_grad():
            found.append(route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp"))
    assert not torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_row_of_few_depends_on_nothing_but_itself(dtype, machine_or_pairs):
    leaves, ids, stack = drawn(8, 1, experts=1, inner=77, width=135, outputs=67, dtype=dtype)
    ids[:] = 0
    hidden, weights = leaves[:2]
    one_by_one = [route(hidden[i:i + 1], ids[:1], weights[i:i + 1], stack(), impl="fused_cpp") for i in range(8)]
    for rows in range(1, 9):
        assert torch.equal(route(hidden[:rows], ids[:rows], weights[:rows], stack(), impl="fused_cpp"),
                           torch.cat(one_by_one[:rows]))


@torch.no_grad()
@pytest.mark.parametrize("inner", [1, 10])
@pytest.mark.parametrize("tokens", [3, 60])
def test_weights_of_any_dtype_count_what_they_are(inner, tokens):
    leaves, ids, stack = drawn(tokens, 2, inner=inner, dtype=HALF)
    narrow = leaves[1]
    expected = route(leaves[0], ids, narrow.float(), stack(), impl="fused_cpp")
    for weights in (narrow, narrow.T.contiguous().T, narrow.double()):
        assert torch.equal(route(leaves[0], ids, weights, stack(), impl="fused_cpp"), expected), weights.dtype


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [5, 83])
def test_what_is_not_finite_reaches_only_who_keeps_it(tokens, poison, machine_or_pairs):
    """A token that keeps nothing, an expert nobody keeps, the weight of an empty slot; and one token of an expert."""
    leaves, ids, stack = drawn(tokens, inner=10, outputs=6, dtype=HALF)
    ids[0], ids[1, 0] = -1, -1
    ids[ids == 2] = 1
    with torch.no_grad():
        leaves[0][0] = leaves[1][ids < 0] = poison
        for weight in leaves[2:]:
            weight[2] = poison
    for one in results(leaves, ids, stack, "fused_cpp", torch.ones(tokens, 6)):
        assert one.isfinite().all()
    ids[2], ids[3] = torch.tensor([3, 3]), torch.tensor([0, 1])
    ids[4:][ids[4:] == 3] = 0
    with torch.no_grad():
        leaves[0][2, 5] = poison
    bare, output, of_hidden, of_weights, *of_experts = results(leaves, ids, stack, "fused_cpp", torch.ones(tokens, 6))
    others = torch.arange(tokens) != 2
    for one in (bare, output, of_hidden, of_weights):
        assert one[others].isfinite().all() and not (one[2].isfinite().all() and one is not of_hidden)
    for one in of_experts:
        assert one[:3].isfinite().all() and not one[3].isfinite().all()


def test_the_number_of_threads_changes_nothing(machine_or_pairs, monkeypatch):
    leaves, ids, stack = drawn(200, 80, 5, 130, 70, 200, dtype=HALF)
    every = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        every.append(results(leaves, ids, stack, "fused_cpp", torch.ones(200, 200)))
    for other in every[1:]:
        assert all(torch.equal(one, same) for one, same in zip(every[0], other, strict=True))


def test_each_gradient_can_be_asked_for_alone(machine_or_pairs):
    leaves, ids, stack = drawn(70, inner=26, width=40, outputs=36, dtype=HALF)
    every = torch.autograd.grad(route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp").sum(), leaves)
    for leaf, expected in zip(leaves, every, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        found, = torch.autograd.grad(route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp").sum(), leaf)
        assert torch.equal(found, expected)
