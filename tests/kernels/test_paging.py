"""Attention to chosen pages: every implementation against the definition in fp64, the choice included."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from sentei.core.errors import ImplError, RuleError, ShapeError
from sentei.core.rules import All, Capacity, Mass, Rule, Threshold, TopK
from sentei.kernels import native, paging
from sentei.kernels.paging import IMPLS, PAGE, Pages, bounds_of, fused_cpp

SCALE = 0.3
available = [name for name in IMPLS if name != "fused_cpp" or not native.missing()]
every_impl = pytest.mark.parametrize("impl", available)
needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes, what is permitted, the rule, and the standard deviation of the scaled scores."""

    rows: int
    keys: int
    rule: Rule
    heads: int = 2
    groups: int = 2
    width: int = 6
    window: int = 0
    causal: bool = True
    lengths: tuple[tuple[int, int], ...] | None = None
    has_bounds: bool = True
    logits: float = 2.0
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        batch = 1 if self.lengths is None else len(self.lengths)
        shapes = (self.rows, self.heads, self.width), (self.keys, self.groups, self.width), (self.keys, self.groups, 5)
        query, key, value = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
        # A run of pages that repeats itself makes ties.
        key[:, PAGE:3 * PAGE] = key[:, 3 * PAGE:5 * PAGE] if self.keys >= 5 * PAGE else key[:, PAGE:3 * PAGE]
        return [query * self.logits, key, value]

    def pages(self, key: torch.Tensor) -> Pages:
        return Pages(num_queries=self.rows, num_keys=self.keys, rule=self.rule, window=self.window, causal=self.causal,
                     lengths=None if self.lengths is None else torch.tensor(self.lengths),
                     bounds=bounds_of(key.transpose(1, 2)) if self.has_bounds else None)

    def expected(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, choice and scores in fp64, by the definition."""
        wide = [tensor.double() for tensor in tensors]
        pages = self.pages(wide[1])._replace(bounds=None)
        return (*paging.attend(*wide, pages, scale=SCALE, impl="reference"),
                paging.score(*wide[:2], pages, scale=SCALE, impl="reference"))

    def is_stable(self, scores: torch.Tensor, kept: torch.Tensor) -> bool:
        """Whether scores with an error as large as fp32 makes lead to the same choice; equal ones stay equal."""
        pages = self.pages(self.tensors()[1])._replace(bounds=None)
        size = 1e-5 * (1 + scores[~scores.isneginf()].abs().max()) if (~scores.isneginf()).any() else 0
        return all(torch.equal(pages.choose(scores + size * torch.sin(scores.nan_to_num(neginf=0) * factor)), kept)
                   for factor in (1e3, 2e4, -3e5))


def drawn_cases() -> st.SearchStrategy[Case]:
    rules = st.one_of(st.just(All()), st.integers(0, 7).map(TopK), st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]).map(Mass),
                      st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]).map(Threshold))

    @st.composite
    def case(draw) -> Case:
        rows = draw(st.integers(1, 8))
        keys = draw(st.integers(rows, 150))
        groups, batch = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 3))
        bounds = st.tuples(st.integers(0, keys), st.integers(0, keys + 5))
        return Case(rows=rows, keys=keys, rule=draw(rules), groups=groups, heads=groups * draw(st.integers(1, 6)),
                    width=draw(st.sampled_from([1, 6, 16, 20])), window=draw(st.sampled_from([0, 3, 16, 40])),
                    causal=draw(st.booleans()), has_bounds=draw(st.booleans()), seed=draw(st.integers(0, 99)),
                    lengths=tuple(draw(bounds) for _ in range(batch)) or None,
                    logits=draw(st.sampled_from([0.0, 1.0, 3.0, 60.0])))
    return case()


def by_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, case: Case, kept: torch.Tensor):
    """Masked softmax in the dtype it is given: a second definition, and the error that is allowed."""
    per_group = case.heads // case.groups
    positions, keys = torch.arange(case.keys - case.rows, case.keys)[:, None], torch.arange(case.keys)
    seen = (keys <= positions) if case.causal else torch.ones(case.rows, case.keys, dtype=torch.bool)
    seen = seen.expand(len(query), 1, -1, -1)
    if case.lengths is not None:
        start, stop = torch.tensor(case.lengths).T[:, :, None, None, None]
        seen = seen & (start <= keys) & (keys < stop)
    seen = seen & kept.repeat_interleave(PAGE, 3)[..., :case.keys]
    seen = seen.repeat_interleave(per_group, 1)
    key, value = (tensor.repeat_interleave(per_group, 2).transpose(1, 2) for tensor in (key, value))
    scores = (query.transpose(1, 2) @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) @ value).transpose(1, 2)


def check(impl: str, case: Case, dtype: torch.dtype) -> None:
    """The same choice as the definition, and an output as near to fp64 as masked attention in the same dtype."""
    tensors = case.tensors(dtype)
    exact, kept, scores = case.expected(tensors)
    pages = case.pages(tensors[1])
    found_scores = paging.score(*tensors[:2], pages, scale=SCALE, impl=impl)
    assert torch.equal(found_scores.isneginf(), scores.isneginf())
    torch.testing.assert_close(found_scores.double(), scores, rtol=1e-5, atol=1e-4)
    assume(case.is_stable(scores, kept))
    output, choice = paging.attend(*tensors, pages, scale=SCALE, impl=impl)
    assert torch.equal(choice, kept) and output.dtype == dtype
    given_choice = paging.attend(*tensors, pages, scale=SCALE, impl=impl, kept=choice)
    assert torch.equal(given_choice[0], output) and torch.equal(given_choice[1], choice)
    allowed = (by_mask(*tensors, case, kept).double() - exact).abs().max() if exact.numel() else 0
    # As for `attend`: it sums in another order than torch, and scales before the product. And a score is rounded, in
    # float32 at least, by a few units of its largest partial sum; so much of itself a weight is then off.
    norms = [tensor.double().norm(dim=-1).max() if tensor.numel() else 0 for tensor in tensors[:2]]
    rounded = 2 * torch.finfo(torch.float32).eps * norms[0] * norms[1] * SCALE
    floor = (4 * torch.finfo(dtype).eps + rounded) * (1 + tensors[2].double().abs().max())
    error = (output.double() - exact).abs().max() if exact.numel() else 0
    assert error <= 2 * allowed + floor, f"error {error}, eager has {allowed}"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(case=drawn_cases())
def test_output_and_choice_of_eager_are_those_of_the_definition(dtype, case):
    check("eager", case, dtype)


@needs_library
@pytest.mark.parametrize("number", range(0 if native.missing() else min(3, native.machines())))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn_cases())
def test_so_are_those_of_the_native_kernel_on_each_instruction_set(dtype, number, case, monkeypatch):
    monkeypatch.setattr(native, "MACHINE", number)
    check("fused_cpp", case, dtype)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(case=drawn_cases())
def test_the_definition_is_masked_attention(case):
    tensors = case.tensors()
    output, kept, _ = case.expected(tensors)
    torch.testing.assert_close(output, by_mask(*tensors, case, kept), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows, lengths", [(1, None), (4, ((3, 90), (0, 61)))])
def test_a_score_is_never_below_the_true_mass_and_sharp_for_a_page_of_one_key(rows, lengths):
    """Before the softmax over the pages: against the log mass of every page."""
    case = Case(rows=rows, keys=97, rule=All(), lengths=lengths, has_bounds=False)
    query, key, _ = case.tensors()
    scores = case.expected([query, key, key])[2]
    single = [PAGE * page for page in range(6)] + [96]
    alike = key.clone()
    for first in single:
        alike[:, first:first + PAGE] = key[:, first:first + 1]
    pages = case.pages(alike)
    masses = by_log_mass(query, alike, case)
    torch.testing.assert_close(paging.score(query, alike, pages, scale=SCALE, impl="reference"), masses)
    assert scores.shape == masses.shape


def by_log_mass(query, key, case):
    """The log share of each page, exactly, one head a group."""
    positions, keys = torch.arange(case.keys - case.rows, case.keys)[:, None], torch.arange(case.keys)
    seen = (keys <= positions).expand(len(query), 1, -1, -1)
    if case.lengths is not None:
        start, stop = torch.tensor(case.lengths).T[:, :, None, None, None]
        seen = seen & (start <= keys) & (keys < stop)
    scores = torch.einsum("bihd,bjhd->bhij", query, key).mul(SCALE).masked_fill(~seen, -torch.inf)
    padded = torch.nn.functional.pad(scores, (0, -case.keys % PAGE), value=-torch.inf)
    return padded.unflatten(-1, (-1, PAGE)).logsumexp(-1).log_softmax(-1)


@every_impl
def test_first_own_near_and_cut_pages_are_forced(impl):
    case = Case(rows=3, keys=100, rule=TopK(0), window=20, lengths=((0, 100), (32, 97)))
    kept = paging.attend(*(tensors := case.tensors(torch.float32)), case.pages(tensors[1]), scale=SCALE, impl=impl)[1]
    own = [97, 98, 99]
    for row, position in enumerate(own):
        near = set(range((position - 20) // PAGE, position // PAGE + 1))
        assert set(kept[0, 0, row].nonzero()[:, 0].tolist()) == near | {0}
        assert set(kept[1, 0, row].nonzero()[:, 0].tolist()) == near | {2}


@every_impl
def test_padding_may_hold_nan_and_ties_go_to_the_lower_page(impl):
    case = Case(rows=2, keys=120, rule=TopK(4), heads=4, lengths=((21, 120), (0, 99)), has_bounds=False)
    query, key, value = case.tensors(torch.float32)
    key[:] = key[:, :1]  # every page is alike
    expected = paging.attend(query, key, value, case.pages(key), scale=SCALE, impl=impl)
    for tensor in (key, value):
        tensor[0, :21] = tensor[1, 99:] = torch.nan
    pages = case.pages(key)._replace(bounds=bounds_of(key.transpose(1, 2)))
    found = paging.attend(query, key, value, pages, scale=SCALE, impl=impl)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])
    assert found[1][0, 0, 1].nonzero()[:, 0].tolist() == [1, 2, 3, 7]
    assert found[1][1, 0, 1].nonzero()[:, 0].tolist() == [0, 1, 2, 6]


@every_impl
def test_nan_and_overflow_are_refused_where_there_is_something_to_choose(impl):
    for number in (torch.nan, torch.inf):
        case = Case(rows=1, keys=120, rule=TopK(2), has_bounds=False)
        query, key, value = case.tensors(torch.float32)
        key[0, 40, 0, 0] = number
        with pytest.raises(RuleError, match="NaN"):
            paging.attend(query, key, value, case.pages(key), scale=SCALE, impl=impl)


@every_impl
def test_pages_whose_every_score_overflows_weigh_nothing(impl, machine):
    """A run of them, in fp32; in fp64 the scores are finite."""
    query, key, value = torch.full((1, 1, 2, 4), 1e10), torch.rand(1, 640, 1, 4) * 1e-10, torch.rand(1, 640, 1, 3)
    key[:, :320] = -1e30
    pages = Pages(num_queries=1, num_keys=640, rule=All(), window=0)
    settings = {"scale": SCALE, "kept": torch.ones(1, 1, 1, 640 // PAGE, dtype=torch.bool)}
    exact, _ = paging.attend(query.double(), key.double(), value.double(), pages, impl="reference", **settings)
    output, _ = paging.attend(query, key, value, pages, impl=impl, **settings)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-6)
    for keys, number in ((slice(5, 6), torch.nan), (slice(None), -1e30)):
        poisoned = key.clone()
        poisoned[:, keys] = number
        assert paging.attend(query, poisoned, value, pages, impl=impl, **settings)[0].isnan().all()


@every_impl
@pytest.mark.parametrize("keys", [1, PAGE, 200])
def test_a_row_does_not_know_later_rows_and_keys_nor_its_slot(impl, keys):
    """One call of several rows is as many calls of one row, over a cache that is shorter."""
    case = Case(rows=5, keys=keys + 4, rule=TopK(6), heads=4, lengths=((0, keys + 4), (min(7, keys), keys + 4)))
    query, key, value = case.tensors(torch.float32)
    together = paging.attend(query, key, value, case.pages(key), scale=SCALE, impl=impl)
    for row in range(5):
        seen = keys + row
        for slots in ([0, 1], [1, 0], [1]):
            alone = replace(case, rows=1, keys=seen, lengths=tuple(case.lengths[slot] for slot in slots))
            tensors = query[slots, row:row + 1], key[slots, :seen], value[slots, :seen]
            output, kept = paging.attend(*tensors, alone.pages(tensors[1]), scale=SCALE, impl=impl)
            assert torch.equal(kept[:, :, 0], together[1][slots, :, row, :kept.shape[3]])
            torch.testing.assert_close(output[:, 0], together[0][slots, row], rtol=1e-5, atol=1e-6)


@every_impl
def test_strides_and_a_buffer_with_room_do_not_matter(impl):
    case = Case(rows=2, keys=90, rule=Mass(0.5), heads=4)
    query, key, value = case.tensors(torch.float32)
    expected = paging.attend(query, key, value, case.pages(key), scale=SCALE, impl=impl)
    room = [torch.full((1, 2, 128, tensor.shape[3]), torch.nan) for tensor in (key, value)]
    for buffer, tensor in zip(room, (key, value), strict=True):
        buffer[:, :, :90] = tensor.transpose(1, 2)
    bounds = torch.full((1, 2, 8, 2, 6), torch.nan)
    bounds[:, :, :5] = bounds_of(key.transpose(1, 2))
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    apart = torch.stack([turned, turned], -1)[..., 0]
    views = [buffer[:, :, :90].transpose(1, 2) for buffer in room]
    for other in (turned, apart):
        found = paging.attend(other, *views, case.pages(key)._replace(bounds=bounds), scale=SCALE, impl=impl)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@every_impl
def test_keys_may_be_of_another_dtype_than_the_query(impl):
    case = Case(rows=2, keys=90, rule=TopK(3), heads=4)
    query, key, value = case.tensors(torch.float32)
    half = key.bfloat16(), value.bfloat16()
    found = paging.attend(query, *half, case.pages(half[0]), scale=SCALE, impl=impl)
    expected = paging.attend(query, half[0].float(), half[1].float(), case.pages(half[0].float()), scale=SCALE,
                             impl="reference")
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


@needs_library
def test_the_number_of_threads_changes_no_bit():
    case = Case(rows=3, keys=1500, rule=Mass(0.9), heads=6)
    tensors, threads = case.tensors(torch.float32), torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(paging.attend(*tensors, case.pages(tensors[1]), scale=SCALE, impl="fused_cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for found in results for one, other in zip(found, results[0], strict=True))


@needs_library
def test_the_other_pages_are_not_read():
    """Whatever stands in a page that is dropped; the fused kernel's promise, and what makes it fast."""
    case = Case(rows=1, keys=320, rule=TopK(4))
    query, key, value = case.tensors(torch.float32)
    pages = case.pages(key)
    output, kept = paging.attend(query, key, value, pages, scale=SCALE, impl="fused_cpp")
    dropped = ~kept[0].any(0)[0].repeat_interleave(PAGE)
    assert dropped.any()
    key[:, dropped] = value[:, dropped] = torch.nan
    assert torch.equal(paging.attend(query, key, value, pages, scale=SCALE, impl="fused_cpp")[0], output)


def test_gradients_are_those_of_eager_and_the_fused_kernel_refuses_them():
    case = Case(rows=2, keys=70, rule=TopK(3), heads=4, width=3, lengths=((0, 70), (66, 67)))
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]
    pages = case.pages(tensors[1].detach())
    assert paging.choose_impl("auto", *tensors)[0] == "eager"
    kept = paging.attend(*tensors, pages, scale=SCALE)[1]
    assert torch.autograd.gradcheck(lambda *leaves: paging.attend(*leaves, pages, scale=SCALE, kept=kept)[0], tensors)
    found = torch.autograd.grad(paging.attend(*tensors, pages, scale=SCALE)[0].square().sum(), tensors)
    expected = torch.autograd.grad(by_mask(*tensors, case, kept).square().sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.nan_to_num(0))
    if not native.missing():
        single = [tensor.detach().float().requires_grad_() for tensor in tensors]
        with pytest.raises(ImplError, match="fused_cpp: .*tensors that want gradients"):
            paging.attend(*single, case.pages(single[1].detach()), scale=SCALE, impl="fused_cpp")


@needs_library
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_whichever_tensor_wants_or_carries_a_gradient_keeps_the_fused_kernel_away(which):
    case = Case(rows=1, keys=40, rule=TopK(1))
    tensors = case.tensors(torch.float32)
    wanting = [tensor.clone().requires_grad_(place == which) for place, tensor in enumerate(tensors)]
    assert paging.choose_impl("auto", *wanting) == ("eager", "fused_cpp cannot take tensors that want gradients")
    with torch.no_grad():
        assert paging.choose_impl("auto", *wanting)[0] == "fused_cpp"
    with forward_ad.dual_level():
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        reason = "tensors that carry a forward gradient"
        assert paging.choose_impl("auto", *tensors) == ("eager", f"fused_cpp cannot take {reason}")
        with pytest.raises(ImplError, match=reason):
            paging.attend(*tensors, case.pages(tensors[1])._replace(bounds=None), scale=SCALE, impl="fused_cpp")


@needs_library
def test_a_compiled_function_keeps_it_in_one_graph_and_it_is_a_proper_op():
    case = Case(rows=2, keys=70, rule=Mass(0.5), heads=4, lengths=((0, 70), (5, 67)))
    tensors = case.tensors(torch.float32)
    pages = case.pages(tensors[1])

    def function(query, key, value):
        return paging.attend(query + 0, key, value, pages, scale=SCALE, impl="fused_cpp")[0] * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), function(*tensors))
    for task, kept in ((0, None), (1, torch.ones(2, 2, 2, 5, dtype=torch.bool)), (2, None)):
        made = torch.ops.sentei.pages(*tensors, pages.bounds, pages.lengths, kept, [task, 2, 0, 1], [SCALE, 0.5])
        fake = [tensor.to("meta") for tensor in tensors]
        kept = None if kept is None else kept.to("meta")
        shapes = torch.ops.sentei.pages(*fake, None, None, kept, [task, 2, 0, 1], [SCALE, 0.5])
        assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in shapes]


@every_impl
@pytest.mark.parametrize("rows, keys, batch", [(0, 20, 1), (2, 20, 0), (1, 16, 1)])
def test_nothing_in_gives_nothing_out(impl, rows, keys, batch):
    query, key, value = torch.ones(batch, rows, 4, 8), torch.ones(batch, keys, 2, 8), torch.ones(batch, keys, 2, 3)
    pages = Pages(num_queries=rows, num_keys=keys, rule=TopK(1), window=0)
    output, kept = paging.attend(query, key, value, pages, impl=impl)
    assert output.shape == (batch, rows, 4, 3) and kept.shape == (batch, 2, rows, -(-keys // PAGE))
    assert (output == 1).all() and kept.all(3).all() == (keys == 16 or not rows or not batch)


@needs_library
def test_python_and_cpp_mean_the_same_struct():
    assert native.load().sentei_paged_size() == fused_cpp._PAGED.size


def test_what_does_not_fit_is_refused():
    query, key = torch.ones(1, 2, 4, 8), torch.ones(1, 40, 2, 8)
    pages = Pages(num_queries=2, num_keys=40, rule=TopK(1), window=0)
    for wrong in (dict(num_keys=39), dict(num_queries=1), dict(lengths=torch.ones(2, 2, dtype=torch.int64)),
                  dict(lengths=torch.ones(1, 2)), dict(bounds=torch.ones(1, 2, 1, 2, 8)),
                  dict(bounds=torch.ones(1, 2, 2, 2, 8).bfloat16())):
        with pytest.raises(ShapeError, match="paging: expected"):
            paging.attend(query, key, key, pages._replace(**wrong))
    for tensors in ((query[0], key, key), (query, key, key.double()), (query[:, :, :3], key, key),
                    (query, key, key[:, 1:])):
        with pytest.raises(ShapeError, match="paging: expected"):
            paging.attend(*tensors, pages)
    for call in (partial(paging.attend, query, key, key), partial(paging.score, query, key)):
        with pytest.raises(ShapeError, match="paging: expected a finite scale, got inf"):
            call(pages, scale=torch.inf)
    for rule in (Capacity(0.5), TopK((1, 2)), None):
        with pytest.raises(RuleError, match="paging: expected All, TopK, Mass or Threshold, of one number"):
            paging.attend(query, key, key, pages._replace(rule=rule))
    with pytest.raises(ImplError, match="expected impl 'auto'"):
        paging.attend(query, key, key, pages, impl="cuda")
    if not native.missing():
        with pytest.raises(ImplError, match="float64"):
            paging.attend(query.double(), key.double(), key.double(), pages, impl="fused_cpp")
