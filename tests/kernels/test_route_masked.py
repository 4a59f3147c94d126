"""The dense layer with a mask as an implementation of `route`, and when it is taken by itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import check, drawn

from sentei.core.errors import ImplError
from sentei.kernels import gains, native
from sentei.kernels.routing import auto, choose_impl, masked, route
from sentei.kernels.routing.stack import ACTIVATIONS

needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(tokens=st.integers(0, 20), slots=st.integers(0, 4), experts=st.integers(1, 6),
       inner=st.sampled_from([0, 1, 2, 7, 16]), width=st.sampled_from([1, 3, 16]), outputs=st.sampled_from([1, 5, 16]),
       gated=st.booleans(), activation=st.sampled_from(sorted(ACTIVATIONS)), seed=st.integers(0, 99))
def test_is_as_near_to_fp64_as_the_definition(**case):
    check("masked", *drawn(**case))


def test_gradients_are_those_of_finite_differences():
    leaves, ids, stack = drawn(5, 3, 4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda hidden, weights, *_: route(hidden, ids, weights, stack(), impl="masked"),
                                    leaves, fast_mode=True)


@needs_library
def test_auto_computes_all_of_narrow_experts_where_a_token_keeps_many(monkeypatch):
    def chosen(tokens=64, experts=40, inner=1, slots=10, emptied=0, **changes):
        leaves, ids, stack = drawn(tokens, slots, experts, inner, **changes)
        ids = torch.rand(tokens, experts).argsort(1)[:, :slots]
        ids[:, slots - emptied:] = -1
        return choose_impl("auto", leaves[0], ids, leaves[1], stack())

    monkeypatch.setattr(gains, "gain", lambda *_: (1.3, "measured here"))
    assert chosen() == ("masked", "measured here: to compute all 40 experts is 1.30 times as fast as to visit what is "
                                  "kept")
    assert chosen(slots=9)[0] == "fused_cpp" and "at most 1.17 times" in chosen(slots=9)[1]
    assert chosen(slots=20, emptied=10)[0] == "masked" and chosen(slots=20, emptied=11)[0] == "fused_cpp"
    for other in ({"tokens": 63}, {"inner": auto.NARROW}):
        assert chosen(**other) == ("fused_cpp", "made for experts in a stack")
    assert chosen(dtype=torch.bfloat16)[0] != "masked"
    monkeypatch.setattr(auto, "LARGEST", 64 * 40 - 1)
    assert chosen() == ("fused_cpp", "made for experts in a stack")
    monkeypatch.undo()
    leaves, ids, stack = drawn(64, 10, 40, 1)
    monkeypatch.setattr(gains, "gain", lambda *_: (99.0, "measured here"))
    check("auto", leaves, ids, stack)


@needs_library
def test_the_numbers_are_read_once_to_choose_and_once_where_it_is_named(monkeypatch):
    asked, refusal = [], masked.refusal
    monkeypatch.setattr(masked, "refusal", lambda *given: asked.append(given) or refusal(*given))
    monkeypatch.setattr(gains, "gain", lambda *_: (99.0, "measured here"))
    leaves, ids, stack = drawn(64, 10, 40, 1)
    found = [route(leaves[0], ids, leaves[1], stack(), impl=impl) for impl in ("auto", "masked")]
    assert len(asked) == 2 and torch.equal(*found)


@needs_library
def test_both_ways_that_are_measured_are_the_same_sum():
    for gated in (False, True):
        for first, second in (auto._kept_and_all(40, 3, 17, 9, gated), auto._ours_and_torch(18, 40, 9, gated)):
            found, expected = first(), second()
            assert not found.requires_grad and not expected.requires_grad and found.dtype == expected.dtype
            near = 1e-3 if found.dtype == torch.float32 else 0.05
            torch.testing.assert_close(found, expected, rtol=near, atol=near * expected.abs().max().item())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 2, 3, 4], ids=["hidden", "up", "down", "gate"])
def test_what_is_not_finite_is_refused_and_auto_visits_what_is_kept(which, poison, monkeypatch):
    leaves, ids, stack = drawn(64, 3, 4, 2)
    monkeypatch.setattr(gains, "gain", lambda *_: (99.0, "measured here"))
    assert native.missing() or choose_impl("auto", leaves[0], ids, leaves[1], stack())[0] == "masked"
    with torch.no_grad():
        leaves[which][1] = poison
    assert choose_impl("auto", leaves[0], ids, leaves[1], stack())[0] != "masked"
    with pytest.raises(ImplError, match="masked: expected a call it can take, got NaN or infinity"):
        route(leaves[0], ids, leaves[1], stack(), impl="masked")


def test_a_product_that_overflows_where_it_is_not_kept_is_not_seen():
    leaves, ids, stack = drawn()
    ids[ids == 2] = 0
    with torch.no_grad():
        leaves[2][2] = leaves[4][2] = 1e30
    assert route(leaves[0], ids, leaves[1], stack(), impl="masked").isfinite().all()


@pytest.mark.parametrize("dtype, experts, got", [(torch.float32, [torch.neg] * 4, "functions"),
                                                 (torch.bfloat16, None, "torch.bfloat16")])
def test_what_it_cannot_take_is_refused(dtype, experts, got):
    leaves, ids, stack = drawn(dtype=dtype)
    assert got in masked.refusal(leaves[0], experts or stack())
    with pytest.raises(ImplError, match=f"masked: expected a call it can take, got .*{got}"):
        route(leaves[0], ids, leaves[1], experts or stack(), impl="masked")
