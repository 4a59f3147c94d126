"""Attention over the k best keys: every implementation against a stable sort in fp64, ties and bad numbers included."""

import ctypes
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import masked_attention, outcome

from sentei.core.errors import ImplError, RuleError, ShapeError
from sentei.core.rules import TopK
from sentei.kernels import native
from sentei.kernels.attention import Grid
from sentei.kernels.topk import IMPLS, Choice, attend_topk, choose_impl, fused_cpp

needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
every_impl = pytest.mark.parametrize("impl", ["reference", "eager", pytest.param("fused_cpp", marks=needs_library)])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `attend_topk`; whole numbers make every sum exact, so that ties are ties in any order of summing."""

    queries: int
    keys: int
    k: int
    window: int | None = None
    heads: int = 4
    groups: int = 2
    width: int = 6
    causal: bool = True
    lengths: tuple[tuple[int, int], ...] = ((0, 10**6),)
    spread: float = 2
    logits: float = 1.0

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        query, key = (torch.randn(len(self.lengths), tokens, heads, self.width, generator=generator).mul(self.spread)
                      .round() for tokens, heads in ((self.queries, self.heads), (self.keys, self.groups)))
        value = torch.randn(len(self.lengths), self.keys, self.groups, 5, generator=generator)
        return [(query * self.logits).to(dtype), key.to(dtype), value.to(dtype)]

    def arguments(self) -> dict:
        return {"k": Choice(self.k, self.window), "causal": self.causal, "lengths": torch.tensor(self.lengths),
                "scale": 0.5}

    def kept(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Bool [B, H, Tq, Tk] from the rule TopK over all scores at once."""
        scores = 0.5 * torch.einsum("bihd,bjhd->bhij", query, key.repeat_interleave(self.heads // self.groups, 2))
        places, keys = torch.arange(self.queries)[:, None] + self.keys - self.queries, torch.arange(self.keys)
        start, stop = (bound.view(-1, 1, 1, 1) for bound in torch.tensor(self.lengths).unbind(-1))
        permitted = (start <= keys) & (keys < stop) & ((keys <= places) | torch.tensor(not self.causal))
        forced = None if self.window is None else (keys == start) | (keys >= places - self.window)
        scores = scores.masked_fill(~permitted.expand_as(scores), -torch.inf)
        return TopK(self.k)(scores, forced=forced).mask()


CASES = [
    Case(queries=30, keys=30, k=4),
    Case(queries=7, keys=300, k=32),
    Case(queries=150, keys=150, k=9, causal=False),
    Case(queries=40, keys=20, k=5, lengths=((3, 18), (0, 20), (7, 7))),
    Case(queries=130, keys=130, k=200, heads=2, groups=1),
    Case(queries=64, keys=257, k=1),
    Case(queries=90, keys=90, k=12, window=5, lengths=((0, 90), (4, 71))),
    Case(queries=20, keys=60, k=3, window=9),
    Case(queries=12, keys=12, k=0),
    Case(queries=0, keys=12, k=3),
    Case(queries=3, keys=0, k=3),
    Case(queries=50, keys=400, k=7, spread=0),  # nothing but ties
    Case(queries=40, keys=400, k=16, width=16, logits=1e4),
    Case(queries=20, keys=170, k=16, heads=1, groups=1, width=256),
]


@st.composite
def drawn_cases(draw) -> Case:
    keys, groups, causal = draw(st.integers(0, 140)), draw(st.integers(1, 2)), draw(st.booleans())
    span = st.tuples(st.integers(0, keys), st.integers(0, keys + 3)).map(sorted).map(tuple)
    return Case(queries=draw(st.integers(0, 60)), keys=keys, k=draw(st.integers(0, 12) | st.integers(0, keys + 5)),
                window=draw(st.none() | st.integers(0, 20)) if causal else None, groups=groups,
                heads=groups * draw(st.integers(1, 2)), width=draw(st.integers(1, 20)), causal=causal,
                lengths=tuple(draw(st.lists(span, min_size=1, max_size=2))), spread=draw(st.sampled_from([0, 0.5, 3])))


def check(attend, case: Case, dtype: torch.dtype) -> None:
    """Raises AssertionError unless the keys are those of a stable sort, and output, lse and gradients as near to fp64,
    over the same keys, as twice plain masked attention in the same dtype and some rounding steps."""
    tensors = case.tensors(dtype)
    pairs = case.kept(*(tensor.double() for tensor in tensors[:2]))
    ids = attend(*tensors, **case.arguments())[2]
    assert ids.dtype == torch.int32 and ids.shape[-1] == case.arguments()["k"].slots(case.keys)
    slots = torch.where(pairs, torch.arange(case.keys), case.keys).sort(-1).values[..., :ids.shape[-1]]
    assert torch.equal(ids.long(), torch.where(slots < case.keys, slots, -1).transpose(1, 2)), "other keys"
    exact = outcome(lambda *qkv: masked_attention(*qkv, pairs, 0.5), [tensor.double() for tensor in tensors])
    plain = outcome(lambda *qkv: masked_attention(*qkv, pairs, 0.5), tensors)
    got = outcome(lambda *qkv: attend(*qkv, **case.arguments())[:2], tensors)
    for name, value, other, true in zip(("output", "lse", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert value.shape == true.shape and torch.equal(value.isneginf(), true.isneginf()), name
        if not value.numel():
            continue
        finite = ~true.isneginf()
        true = true.masked_fill(~finite, 0)
        error, allowed = ((x.double().masked_fill(~finite, 0) - true).abs().amax() for x in (value, other))
        # In fp64 plain attention is the truth itself, and has no error that says how much may be.
        steps = 64 if dtype == torch.float64 else 4
        step = steps * torch.finfo(dtype).eps * true.abs().amax().clamp(min=1)
        assert error <= 2 * allowed + step, f"{name}: error {error:.3g}, plain attention {allowed:.3g} + {step:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_definition_and_plain_torch_keep_the_keys_of_a_stable_sort(impl, case):
    check(IMPLS[impl], case, torch.float64)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_does_the_native_kernel(case, dtype, machine):
    if dtype != torch.float32 and case.logits > 1:
        case = replace(case, logits=64.0)  # whole numbers that bfloat16 holds
    check(fused_cpp.attend_topk, case, dtype)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@settings(deadline=None, max_examples=40, derandomize=True)
@given(case=drawn_cases())
def test_so_do_both_for_drawn_cases(impl, case):
    check(IMPLS[impl], replace(case, queries=min(case.queries, 12)), torch.float64)


@needs_library
@settings(deadline=None, max_examples=150, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn_cases())
def test_so_does_the_native_kernel_for_drawn_cases(case, machine):
    check(fused_cpp.attend_topk, case, torch.float32)


@needs_library
@pytest.mark.parametrize("order", ["rising", "falling", "one far above", "no numbers"])
def test_scores_in_any_order_are_sorted(order, machine):
    """Rising: every key is better than all before. One far above: a bisection would need many steps."""
    place = torch.arange(3000.0)
    scores = {"rising": place, "falling": -place, "one far above": torch.where(place == 77, 1e30, place % 97),
              "no numbers": torch.where(place == 5, -torch.inf, place % 7)}[order]
    query, key = torch.ones(1, 3000, 1, 1), scores.view(1, -1, 1, 1)
    ids = attend_topk(query, key, key.clamp(min=-9), 20, scale=1.0, impl="fused_cpp")[2]
    for row in (0, 19, 63, 700, 2999):
        found = ids[0, row, 0][ids[0, row, 0] >= 0].tolist()
        permitted = [j for j in range(row + 1) if scores[j] > -torch.inf]
        assert found == sorted(sorted(permitted, key=lambda j: (-scores[j], j))[:20])


@pytest.mark.parametrize("impl", ["reference", "eager"])  # fused_cpp takes no fp64; see the checks above
def test_gradients_are_true_in_fp64(impl):
    case = Case(queries=5, keys=6, k=3, lengths=((1, 6),))
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]
    with torch.no_grad():
        tensors[0] += torch.rand_like(tensors[0])  # without ties, so that a small step changes no choice
    assert torch.autograd.gradcheck(lambda *qkv: attend_topk(*qkv, **case.arguments(), impl=impl)[0], tensors)


@every_impl
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("choice", [3, Choice(9, 2), Choice(1, 4), Choice(0, 0)], ids=str)
def test_a_query_that_sees_a_nan_or_infinity_is_nan_and_no_other(impl, choice, bad, machine):
    query, key, value = (torch.rand(1, 40, 2, 4) + 0.1 for _ in range(3))
    key[0, 20, 0] = bad
    clean = [tensor.clone() for tensor in (query, key, value)]
    clean[1][0, 20, 0] = 0.1
    output, lse, ids = attend_topk(query, key, value, choice, impl=impl)
    expected = attend_topk(*clean, choice, impl=impl)
    broken = bad != -torch.inf
    for found, true in zip((output, lse), expected, strict=False):
        assert torch.equal(found[:, :20], true[:, :20]) and torch.equal(found[:, :, 1], true[:, :, 1])
        assert bool(found[:, 20:, 0].isnan().all()) == broken
    assert bool((ids[:, 20:, 0] == -1).all()) == broken and not (ids[:, 20:, 0] == 20).any()


@every_impl
def test_a_query_that_asks_for_no_key_does_not_mind_a_nan(impl):
    output, lse, ids = attend_topk(*(torch.full((1, 9, 2, 4), torch.nan) for _ in range(3)), 0, impl=impl)
    assert not output.any() and lse.isneginf().all() and ids.shape[-1] == 0


@every_impl
def test_no_other_number_is_read(impl):
    case = Case(queries=20, keys=20, k=4, lengths=((2, 17),))
    tensors = [tensor.float() for tensor in case.tensors()]
    expected = attend_topk(*tensors, **case.arguments(), impl=impl)
    tensors[1][:, [0, 1, 17, 18]], tensors[2][:, [0, 1, 17, 18]] = torch.nan, torch.nan
    for j in set(range(20)) - set(expected[2].flatten().tolist()):
        tensors[2][:, j] = torch.nan
    for found, true in zip(attend_topk(*tensors, **case.arguments(), impl=impl), expected, strict=True):
        assert torch.equal(found, true)


@needs_library
def test_strides_and_threads_do_not_matter():
    case = CASES[6]
    tensors = case.tensors(torch.float32)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    spread = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in tensors]
    results = [outcome(lambda *qkv: fused_cpp.attend_topk(*qkv, **case.arguments())[:2], given)
               for given in (tensors, turned, spread)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        results.append(outcome(lambda *qkv: fused_cpp.attend_topk(*qkv, **case.arguments())[:2], tensors))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_library
@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_it_is_a_proper_op_of_torch(case):
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    sizes = [case.k, -1 if case.window is None else case.window, int(case.causal)]
    torch.library.opcheck(torch.ops.sentei.topk.default, (*tensors, torch.tensor(case.lengths), sizes, 0.3))


@needs_library
def test_gradients_of_gradients_are_refused_and_not_wrong():
    query, key, value = (tensor.requires_grad_() for tensor in CASES[0].tensors(torch.float32))
    first, = torch.autograd.grad(attend_topk(query, key, value, 3)[0].square().sum(), query, create_graph=True)
    with pytest.raises(ImplError, match="fused_cpp: expected first gradients only"):
        torch.autograd.grad(first.sum(), key)


@needs_library
def test_python_and_cpp_mean_the_same_struct():
    assert native.load().sentei_topk_size() == ctypes.sizeof(fused_cpp._TopK)
    assert native.load().sentei_topk_backward_size() == ctypes.sizeof(fused_cpp._Backward)


@needs_library
def test_a_vector_longer_than_there_can_be_is_a_lack_of_memory_in_a_thread_too():
    """In a process of its own: an exception that no thread catches ends it."""
    code = """if True:
        import ctypes
        from sentei.kernels import native
        from sentei.kernels.topk import fused_cpp
        call = fused_cpp._TopK(batch=1, queries=1, keys=1, heads=2, groups=1, threads=2, machine=0, slots=2**62)
        print(native.load().sentei_topk(ctypes.byref(call)))"""
    root = Path(native.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@needs_library
def test_what_it_cannot_take_is_refused_by_name_and_left_by_auto(monkeypatch):
    tensors = CASES[0].tensors()
    with pytest.raises(ImplError, match="fused_cpp: expected tensors it can take, got torch.float64 on cpu"):
        attend_topk(*tensors, 3, impl="fused_cpp")
    assert choose_impl("auto", *tensors)[0] == "eager"
    assert choose_impl("auto", *(tensor.float() for tensor in tensors))[0] == "fused_cpp"
    monkeypatch.setattr(native, "missing", lambda: "a package without its native library")
    assert choose_impl("auto", *(tensor.float() for tensor in tensors)) == (
        "eager", "fused_cpp cannot take a package without its native library")


@pytest.mark.parametrize("arguments, error, message", [
    ({"k": -1}, RuleError, "k and window as whole numbers"), ({"k": 2.0}, RuleError, "k and window as whole numbers"),
    ({"k": 3, "impl": "fast"}, ImplError, "impl 'auto', 'reference'"),
    ({"k": 3, "lengths": torch.zeros(2, 2)}, ShapeError, "lengths int64"),
    ({"k": 3, "scale": torch.nan}, ShapeError, "a finite scale, got nan"),
    ({"k": Choice(3, 1), "causal": False}, RuleError, "a window of causal attention"),
], ids=str)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        attend_topk(*CASES[0].tensors(), **arguments)
    with pytest.raises(ShapeError, match="G dividing H"):
        attend_topk(*CASES[0].tensors()[:2], torch.zeros(1, 3, 2, 5, dtype=torch.float64), 3)


def test_the_grid_and_the_choice_agree_on_what_is_forced():
    grid = Grid(num_queries=4, num_keys=6, query_block=1, key_block=1)
    forced = Choice(2, 1).forced(torch.arange(4) + grid.offset, grid)[0]
    assert forced.int().tolist()[0] == [1, 1, 1, 1, 1, 1] and forced.int().tolist()[3] == [1, 0, 0, 0, 1, 1]
