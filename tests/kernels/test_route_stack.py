"""Every implementation of `route` through a `Stack`, and what the native one must leave alone."""

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import check, drawn, results, spoil

from sentei.core.errors import ImplError, ResourceError, ShapeError
from sentei.kernels import gains, native
from sentei.kernels.attention import Grid, Tiles, attend
from sentei.kernels.routing import IMPLS, Stack, auto, choose_impl, fused_cpp, route
from sentei.kernels.routing.stack import ACTIVATIONS

needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
every_impl = pytest.mark.parametrize("impl", [pytest.param(impl, marks=needs_library if impl == "fused_cpp" else ())
                                              for impl in IMPLS if impl in ("eager", "fused_cpp")])
HALF = torch.bfloat16


sizes = {"tokens": st.integers(0, 40), "slots": st.integers(0, 4), "experts": st.integers(1, 6),
         "inner": st.sampled_from([1, 2, 7, 16, 49, 130]), "width": st.sampled_from([1, 3, 16, 37, 260]),
         "outputs": st.sampled_from([1, 5, 16, 33, 100]), "gated": st.booleans(),
         "activation": st.sampled_from(sorted(ACTIVATIONS)), "dtype": st.sampled_from([torch.float32, HALF]),
         "seed": st.integers(0, 99)}


@every_impl
@settings(deadline=None, max_examples=60, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**sizes)
def test_is_as_near_to_fp64_as_the_definition(impl, machine, **case):
    check(impl, *drawn(**case))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("tokens, experts, inner, width, outputs", [
    (300, 3, 130, 300, 270), (700, 1, 97, 64, 513), (90, 8, 33, 520, 20), (0, 2, 3, 4, 5), (3, 2, 0, 4, 5),
    (3, 2, 5, 0, 4), (3, 2, 5, 4, 0)])
def test_blocks_and_what_is_left_of_them_are_right(dtype, tokens, experts, inner, width, outputs, machine):
    for gated in (True, False):
        check("fused_cpp", *drawn(tokens, 3, experts, inner, width, outputs, gated=gated, dtype=dtype))


@needs_library
@pytest.mark.parametrize("broken", [
    lambda fields: [*fields[:14], 1, *fields[15:]], lambda fields: [*fields[:19], 2, *fields[20:]],
    lambda fields: [*fields[:2], fields[0], *fields[3:]], lambda fields: [*fields[:4], fields[3], *fields[5:]],
], ids=["slots", "activation", "weights", "gate"])
def test_a_wrong_call_is_seen(broken, monkeypatch):
    made = fused_cpp._arguments

    def arguments(*given):
        fields, held = made(*given)
        return broken(fields), held

    monkeypatch.setattr(fused_cpp, "_arguments", arguments)
    with pytest.raises(AssertionError, match="result 0: error"):
        check("fused_cpp", *drawn())


@every_impl
@pytest.mark.parametrize("inner", [1, 9])
@pytest.mark.parametrize("tokens", [4, 80])
def test_nan_reaches_only_who_keeps_it(impl, inner, tokens):
    """A token that keeps nothing, an expert nobody keeps, and the weight of an empty slot are NaN."""
    leaves, ids, stack = drawn(tokens, inner=inner)
    ids[0], ids[1, 0] = -1, -1
    ids[ids == 2] = 1
    with torch.no_grad():
        leaves[0][0] = leaves[1][ids < 0] = torch.nan
        for weight in leaves[2:]:
            weight[2] = torch.nan
    output, with_gradients, *gradients = results(leaves, ids, stack, impl, torch.ones(tokens, 7))
    for one in (output, with_gradients, *gradients):
        assert one.isfinite().all()
    assert not output[0].any() and not gradients[0][0].any() and not gradients[1][ids < 0].any()


@every_impl
def test_nan_and_infinity_that_are_kept_reach_the_answer(impl):
    for poison in (torch.nan, torch.inf):
        leaves, ids, stack = drawn(6, 1, 2)
        ids[:, 0] = torch.tensor([0, 1, 0, 1, 0, 1])
        with torch.no_grad():
            leaves[0][2, 3] = poison
        y = route(leaves[0], ids, leaves[1], stack(), impl=impl)
        assert not y[2].isfinite().all() and y[[0, 1, 3, 4, 5]].isfinite().all()


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_strides_do_not_matter(impl, dtype):
    leaves, ids, stack = drawn(dtype=dtype)
    expected = route(leaves[0], ids, leaves[1], stack(), impl=impl)
    hidden = torch.stack([leaves[0]] * 3, -1)[..., 1]
    weights, other = leaves[1].T.contiguous().T, ids.T.contiguous().T
    wide = [torch.cat([torch.full_like(w, torch.nan), w, w], -1)[..., w.shape[2]:2 * w.shape[2]] for w in leaves[2:]]
    strided = Stack(up=wide[0], down=wide[1], gate=wide[2])
    assert torch.equal(route(hidden, other, weights, strided, impl=impl), expected)


@every_impl
def test_halves_of_one_weight_get_the_gradients_of_two(impl):
    (hidden, weights, joint, down), ids, stack = drawn(joint=True)
    apart = joint.detach().clone().requires_grad_()
    other = Stack(gate=apart[:, :9], up=apart[:, 9:], down=down)
    for experts in (stack(), other):
        route(hidden, ids, weights, experts, impl=impl).square().sum().backward()
    assert torch.equal(joint.grad, apart.grad)


@every_impl
def test_an_expert_may_be_kept_twice(impl):
    leaves, ids, stack = drawn(slots=3)
    ids[:] = ids[:, :1]
    check(impl, leaves, ids, stack)


@every_impl
def test_each_gradient_can_be_asked_for_alone(impl):
    leaves, ids, stack = drawn()
    every = torch.autograd.grad(route(leaves[0], ids, leaves[1], stack(), impl=impl).sum(), leaves)
    for leaf, expected in zip(leaves, every, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        found, = torch.autograd.grad(route(leaves[0], ids, leaves[1], stack(), impl=impl).sum(), leaf)
        assert torch.equal(found, expected)


@needs_library
@pytest.mark.parametrize("inner", [1, 130])
@pytest.mark.parametrize("tokens", [3, 200])
def test_the_number_of_threads_changes_nothing(inner, tokens, machine, monkeypatch):
    leaves, ids, stack = drawn(tokens, 80, 5, inner, 70, 200)
    every = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        every.append(results(leaves, ids, stack, "fused_cpp", torch.ones(tokens, 200)))
    for other in every[1:]:
        assert all(torch.equal(one, same) for one, same in zip(every[0], other, strict=True))


@needs_library
def test_auto_takes_stacks_to_the_native_kernel_and_the_rest_to_torch(monkeypatch):
    def chosen(experts=None, dtype=torch.float32, **changes):
        leaves, ids, stack = drawn(**{"dtype": dtype, **changes})
        return choose_impl("auto", leaves[0], ids, leaves[1], stack() if experts is None else experts)

    assert chosen(inner=16)[0] == "fused_cpp"
    leaves, ids, stack = drawn()
    turned = Stack(up=leaves[2].mT.contiguous().mT, down=leaves[3])
    for (name, reason), told in (
            (chosen([torch.neg] * 4), "functions"), (chosen(dtype=torch.float64), "torch.float64 on cpu"),
            (chosen(turned), "rows are not contiguous"),
            (chosen(drawn(dtype=HALF)[2]()), "experts of torch.bfloat16")):
        assert name == "eager" and told in reason
    monkeypatch.setattr(native, "takes_pairs", lambda: True)
    with torch.autocast("cpu"):
        for tokens, dtype in ((20, torch.float32), (255, torch.float32), (256, HALF)):
            assert chosen(tokens=tokens, inner=16)[1].endswith(f"experts of {dtype} under autocast")
        assert chosen() == ("fused_cpp", "made for experts in a stack; experts of torch.float32 under autocast")
    with torch.autocast("cpu", torch.float16):
        assert chosen(tokens=400)[1].endswith("experts of torch.float32 under autocast")
    monkeypatch.setattr(gains, "gain", lambda *_: (1.5, "measured here"))
    assert chosen(dtype=HALF, tokens=400)[0] == "eager" and chosen(dtype=HALF, tokens=4)[0] == "fused_cpp"
    monkeypatch.setattr(gains, "gain", lambda *_: (0.2, "measured here"))
    assert chosen(dtype=HALF, tokens=400) == (
        "fused_cpp", "measured here: torch's products of such experts in bfloat16 are 0.20 times as fast as ours")
    monkeypatch.setattr(native, "missing", lambda: "a package without its native library")
    assert chosen() == ("eager", "fused_cpp cannot take a package without its native library")


def test_what_is_measured_is_a_ratio_and_never_under_a_mode(monkeypatch):
    asked = []
    monkeypatch.setattr(gains, "gain", lambda case, ways: asked.append((case, gains.in_turn(*ways()))) or (1.0, ""))
    for inner, width in ((50, 400), (51, 401)):
        leaves, ids, stack = drawn(400, inner=inner, width=width, outputs=33, dtype=HALF)
        auto.fastest(leaves[0], ids, stack())
    assert [case[1:5] for case, _ in asked] == [(50, 384, 33, True), (51, 383, 33, True)]
    assert all(0 < gain < 1000 for _, gain in asked)
    monkeypatch.setattr(gains, "gain", None)
    leaves, ids, stack = drawn(dtype=HALF, tokens=400)
    with torch._subclasses.FakeTensorMode():
        assert auto.fastest(leaves[0], ids, stack())[0] == "fused_cpp"


@needs_library
def test_a_named_implementation_runs_or_raises():
    leaves, ids, stack = drawn(dtype=torch.float64)
    with pytest.raises(ImplError, match="fused_cpp: expected a call it can take, got torch.float64"):
        route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp")
    check("eager", leaves, ids, stack)


@every_impl
@pytest.mark.parametrize("wrong", [-2, 4, 2**62])
@pytest.mark.parametrize("inner", [0, 1, 9])
def test_an_expert_that_does_not_exist_is_refused(impl, wrong, inner):
    leaves, ids, stack = drawn(inner=inner)
    ids[3, 1] = wrong
    with pytest.raises(ShapeError, match=r"route: expected ids in -1\.\.3"):
        route(leaves[0], ids, leaves[1], stack(), impl=impl)


@needs_library
@pytest.mark.parametrize("pairs", [False, True], ids=["", "pairs"])
@pytest.mark.parametrize("gain", [0.5, 1.5], ids=["torch's products are slow", "torch's products are fast"])
@pytest.mark.parametrize("impl", ["auto", *(impl for impl in IMPLS if impl not in ("masked", "fused_triton"))])
def test_autocast_gives_narrow_answers_and_wide_gradients_as_near_as_narrow_products(impl, gain, pairs, monkeypatch):
    """Error against fp64 at most twice that of the same experts in bfloat16; who computed is told."""
    monkeypatch.setattr(gains, "gain", lambda *_: (gain, "measured here"))
    monkeypatch.setattr(native, "takes_pairs", lambda: pairs)
    found = []
    for dtype, narrow in ((torch.float64, False), (HALF, False), (torch.float32, True)):
        leaves, ids, stack = drawn(tokens=400, inner=auto.NARROW, dtype=dtype)
        for hidden in (leaves[0], leaves[0].bfloat16()) if narrow else leaves[:1]:
            with torch.autocast("cpu", HALF, enabled=narrow):
                told = choose_impl(impl, hidden, ids, leaves[1], stack())
                y = route(hidden, ids, leaves[1], stack(), impl=impl if narrow else "reference")
            assert y.dtype == (HALF if narrow else dtype)
            gradients = torch.autograd.grad(y.to(leaves[0].dtype).square().sum(), leaves)
            assert all(one.dtype == dtype for one in gradients)
            found.append([y, *gradients])
    exact, plain, *got = ([tensor.double() for tensor in each] for each in found)
    for each in got:
        for one, narrow, wide in zip(each, plain, exact, strict=True):
            assert (one - wide).norm() <= 2 * (narrow - wide).norm()
    asked = f"asked for by name; experts of {HALF} under autocast"
    assert told == ((impl, asked) if impl != "auto" else (
        "fused_cpp", "made for experts in a stack; experts of torch.float32 under autocast") if gain < 1 and not pairs
        else ("eager" if gain > 1 else "fused_cpp",
              f"measured here: torch's products of such experts in bfloat16 are {gain:.2f} times as fast as ours; "
              f"experts of {HALF} under autocast"))


@every_impl
def test_experts_of_another_dtype_than_the_tokens_are_refused_in_four_parts(impl):
    leaves, ids, _ = drawn()
    stack = drawn(dtype=HALF)[2]()
    for name in (impl, "auto", "reference"):
        with pytest.raises(ShapeError, match="route: expected experts of the tokens' dtype, on their device, got torch."
                           "float32 on cpu for torch.bfloat16 on cpu; convert the tokens or the experts"):
            route(leaves[0], ids, leaves[1], stack, impl=name)


@needs_library
def test_transforms_and_forward_gradients_are_those_of_the_definition():
    leaves, ids, stack = drawn()
    hidden, weights = leaves[0].detach(), leaves[1].detach()
    found, expected = (torch.func.jvp(lambda x, impl=impl: route(x, ids, weights, stack(), impl=impl), (hidden,),
                                      (hidden.flip(0),)) for impl in ("auto", "reference"))
    torch.testing.assert_close(found, expected)


@needs_library
def test_it_is_an_op_of_torch_where_torch_looks_on():
    leaves, ids, stack = drawn(dtype=HALF)
    hidden, weights, up, down, gate = leaves
    arguments = hidden, ids, weights, up, down, gate, 0, True
    torch.library.opcheck(torch.ops.sentei.route.default, arguments)
    saved = torch.ops.sentei.route(*arguments)[1]
    given = [leaf.detach() for leaf in (hidden, weights, up, down)]
    given.insert(1, ids)
    torch.library.opcheck(torch.ops.sentei.route_backward.default, (
        torch.ones(20, 7, dtype=HALF), given, gate.detach(), saved.detach(), 0, [True, False, True, True]))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert route(mode.from_tensor(hidden), ids, weights, stack(), impl="fused_cpp").shape == (20, 7)
    with pytest.raises(ImplError, match="a forward that saved"):
        torch.ops.sentei.route(*arguments[:-1], False)[0].sum().backward()
    with pytest.raises(ImplError, match="first gradients only"):
        first, = torch.autograd.grad(route(hidden, ids, weights, stack(), impl="fused_cpp").sum(), hidden,
                                     create_graph=True)
        first.sum().backward()


@needs_library
def test_a_compiled_graph_holds_it_whole():
    leaves, ids, stack = drawn()

    def step(hidden, weights):
        return route(hidden * 2, ids, weights, stack(), impl="fused_cpp") + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, plain = ([y := run(leaves[0], leaves[1]), *torch.autograd.grad(y.sum(), leaves)] for run in (compiled, step))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@needs_library
def test_running_out_of_memory_is_told(monkeypatch):
    leaves, ids, stack = drawn()
    monkeypatch.setattr(fused_cpp, "_library", lambda: lambda *_: 1)
    with pytest.raises(ResourceError, match="route: expected memory"), torch.no_grad():
        route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp")


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("width", [0, 3, 9])
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_tokens_of_another_width_than_the_experts_are_refused(impl, width, tokens):
    stack = Stack(up=torch.ones(2, 6, 8), down=torch.ones(2, 3, 6))
    ids, weights = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    with pytest.raises(ShapeError, match="as wide as the experts"):
        route(torch.ones(tokens, width), ids, weights, stack, impl=impl)


@needs_library
def test_room_goes_to_the_next_call_and_what_it_holds_does_not_count():
    count = fused_cpp.MANY
    rooms = [fused_cpp._room(count).fill_(float("nan")) for _ in range(2)]
    where = {room.data_ptr() for room in rooms}
    assert len(where) == 2, "two hold one room"
    del rooms
    assert fused_cpp._room(count).data_ptr() in where
    for dtype in (torch.float32, HALF):
        case = drawn(700, 3, 2, 97, 200, 300, dtype=dtype)
        spoil()
        check("fused_cpp", *case)


@needs_library
def test_the_backward_makes_no_zeros():
    """Autograd makes them for outputs that nobody asks gradients of: as many as the forward saved."""
    leaves, ids, stack = drawn(400)
    y = route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp")
    with torch.profiler.profile() as profile:
        y.backward(torch.ones_like(y))
    made = {event.name for event in profile.events()}
    assert any("backward" in name.lower() for name in made) and not any("zero" in name for name in made)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gradients_of_weights_that_are_held_are_nobody_elses_room(dtype):
    leaves, ids, stack = drawn(40, inner=130, width=600, outputs=600, dtype=dtype)
    assert all(leaf.numel() > fused_cpp.MANY for leaf in leaves[2:])

    def gradients(size: float) -> tuple[torch.Tensor, ...]:
        y = route(leaves[0], ids, leaves[1], stack(), impl="fused_cpp")
        return torch.autograd.grad(y, leaves, torch.full_like(y, size))

    held = gradients(1.0)
    before = [gradient.clone() for gradient in held]
    for other in (gradients(2.0), gradients(3.0)):
        assert not {gradient.data_ptr() for gradient in other} & {gradient.data_ptr() for gradient in held}
    assert all(torch.equal(*pair) for pair in zip(held, before, strict=True))


@needs_library
def test_room_is_not_kept_without_end():
    rooms = [fused_cpp._room(1 << 22) for _ in range(20)]  # 320 MiB, never touched
    kept = native.load().sentei_kept
    kept.restype = ctypes.c_int64
    before = kept()
    del rooms
    assert before < kept() <= 256 << 20


@needs_library
def test_attention_leaves_its_room_where_experts_do():
    rooms = [fused_cpp._room(1 << 22) for _ in range(16)]
    kept = native.load().sentei_kept
    kept.restype = ctypes.c_int64
    del rooms
    before = kept()
    query, key = torch.zeros(1, 5, 1, 64), torch.zeros(1, 80_000, 1, 64)  # packed, 20 MiB and as much of values
    grid = Grid(num_queries=5, num_keys=80_000, query_block=64, key_block=64)
    attend(query, key, key, Tiles(grid=grid), impl="fused_cpp")
    assert kept() != before and kept() <= 256 << 20


def test_room_that_is_lent_for_less_comes_back_whole():
    kept = native.load().sentei_kept
    kept.restype = ctypes.c_int64
    room = fused_cpp._room(1 << 23)
    del room
    before = kept()
    for count in (1 << 22, 1 << 21):
        room = fused_cpp._room(count)
        del room
        assert kept() >= before
