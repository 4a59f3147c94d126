"""Every implementation of `attend` against masked attention, outputs and gradients, and its doors."""

from dataclasses import replace
from functools import partial

import oracle
import pytest
import torch
from hypothesis import given, settings
from oracle import CASES, Case, check_attend, drawn_cases

from sentei.core.errors import ImplError, ShapeError
from sentei.kernels.attention import IMPLS, Grid, Tiles, attend, choose_impl, eager, merge

# The others have files of their own: fused_cpp is fp32, fused_triton takes larger tiles, flex compiles every shape.
every_impl = pytest.mark.parametrize("impl", ["reference", "eager"])
any_tile = pytest.mark.parametrize("impl", ["reference", "eager", "fused_cpp"])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@every_impl
@every_case
def test_equals_masked_attention(impl, case):
    check_attend(partial(attend, impl=impl), case)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_case
def test_is_as_near_to_fp64_as_masked_attention_in_the_same_dtype(impl, case, dtype):
    check_attend(partial(attend, impl=impl), case, dtype)


@every_impl
@settings(deadline=None, max_examples=40, derandomize=True)
@given(case=drawn_cases())
def test_equals_masked_attention_whatever_the_sizes(impl, case):
    check_attend(partial(attend, impl=impl), case)


@every_impl
@pytest.mark.parametrize("case", [case for case in CASES if case.kept != 0 and 0 < case.queries <= 10],
                         ids=lambda case: case.name)
def test_gradients_are_those_of_finite_differences(impl, case):
    small = replace(case, heads=min(case.heads, 3), groups=1, choices=None)
    tiles = small.tiles()
    pick = small.tensors()[0].new_tensor([1.0, -0.5, 2.0, 0.3, -1.0])

    def loss(query, key, value):
        output, lse = attend(query, key, value, tiles, impl=impl, return_lse=True)
        return (output * pick).sum() + lse.masked_fill(lse.isneginf(), 0).square().sum()

    leaves = [tensor.requires_grad_() for tensor in small.tensors()]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("groups", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
def test_the_dense_plan_is_torchs_own_attention_bit_for_bit(dtype, causal, groups):
    case = Case(name="", queries=33, keys=33, tile=(8, 4), heads=4, groups=groups, causal=causal, kept=None)
    query, key, value = case.tensors(dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=causal, enable_gqa=groups != 4)
    assert torch.equal(attend(query, key, value, case.tiles()), expected.transpose(1, 2))


@every_impl
@pytest.mark.parametrize("lengths", [None, ((3, 33), (0, 33), (33, 33))], ids=["whole", "padded"])
@pytest.mark.parametrize("groups", [6, 3, 2, 1], ids=["multi-head", "pairs", "threes", "multi-query"])
def test_one_query_row_reads_the_keys_of_its_own_group(impl, groups, lengths):
    check_attend(partial(attend, impl=impl), Case(name="", queries=1, keys=33, tile=(1, 8), heads=6, groups=groups,
                                                  kept=None, lengths=lengths))


@every_impl
@pytest.mark.parametrize("name", ["ragged tails", "one choice a group", "padding both, grouped", "dense padded"])
def test_strides_do_not_matter(impl, name):
    case = case_named(name)
    tensors = case.tensors()
    strided = [tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for tensor in tensors]
    strided[1] = torch.stack([strided[1], strided[1]], -1)[..., 0]
    assert not any(tensor.is_contiguous() for tensor in strided)
    torch.testing.assert_close(attend(*strided, case.tiles(), impl=impl), attend(*tensors, case.tiles(), impl=impl),
                               rtol=1e-12, atol=1e-12)


@every_impl
@every_case
def test_nothing_uninitialised_is_read(impl, case, poison):
    check_attend(partial(attend, impl=impl), case)


@every_impl
def test_a_tile_that_is_dropped_is_not_read(impl):
    case = case_named("causal")
    query, key, value = case.tensors()
    keep = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    keep[..., 1] = False
    tiles = Tiles.from_mask(keep, case.grid())
    expected = attend(query, key, value, tiles, impl=impl)
    key[:, 3:6], value[:, 3:6] = torch.nan, torch.nan
    assert torch.equal(attend(query, key, value, tiles, impl=impl), expected)


@every_impl
@pytest.mark.parametrize("name", ["padding left", "padding both, grouped", "some queries keep nothing"])
def test_a_row_of_nan_stays_in_its_row(impl, name):
    case = case_named(name)
    case = replace(case, lengths=case.lengths or ((0, 12), (0, 12)))
    tensors = case.tensors()
    expected = attend(*tensors, case.tiles(), impl=impl)
    for tensor in tensors:
        tensor[0] = torch.nan
    assert torch.equal(attend(*tensors, case.tiles(), impl=impl)[1:], expected[1:])


@any_tile
@pytest.mark.parametrize("name", ["padding left", "padding both, grouped", "dense padded", "padding bidirectional"])
def test_a_nan_in_the_padding_reaches_no_output(impl, name):
    case = case_named(name)
    tensors = case.tensors(torch.float32)
    expected = attend(*tensors, case.tiles(), impl=impl)
    for row, (start, stop) in enumerate(case.lengths):
        for tensor in tensors[1:]:
            tensor[row, :start], tensor[row, stop:] = torch.nan, torch.nan
    assert torch.equal(attend(*tensors, case.tiles(), impl=impl), expected)


@any_tile
@pytest.mark.parametrize("name", ["causal", "grouped 3 to 1", "ragged tails", "bidirectional", "padding left"])
@pytest.mark.parametrize("at", [0, -1], ids=["first key", "last key"])
def test_a_nan_key_makes_nan_of_the_rows_that_keep_it_and_of_no_other_block(impl, name, at):
    case = case_named(name)
    query, key, value = case.tensors(torch.float32)
    key[:, at] = torch.nan
    keeps = case.pairs()[..., at].transpose(1, 2)
    output = attend(query, key, value, case.tiles(), impl=impl)
    assert output.isnan().all(-1)[keeps].all()
    touched = case.keep()[..., at // case.tile[1] if at == 0 else -1].repeat_interleave(case.tile[0], 2)
    touched = touched.repeat_interleave(case.heads // touched.shape[1], 1)[:, :, :case.queries].transpose(1, 2)
    assert output[~touched].isfinite().all()


@every_impl
def test_the_slot_in_the_batch_does_not_matter(impl):
    case = case_named("padding left")
    tensors, whole = case.tensors(), attend(*case.tensors(), case.tiles(), impl=impl)
    for row in range(case.batch):
        grid = replace(case.grid(), lengths=case.grid().lengths[row:row + 1])
        alone = attend(*(tensor[row:row + 1] for tensor in tensors), Tiles.from_mask(case.keep()[row:row + 1], grid),
                       impl=impl)
        torch.testing.assert_close(alone, whole[row:row + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 100, 500])
@pytest.mark.parametrize("name", ["causal", "padding left", "some queries keep nothing", "one choice a group"])
def test_the_size_of_the_runs_does_not_matter(name, at_once, monkeypatch):
    monkeypatch.setattr(eager, "SCORES_AT_ONCE", at_once)
    check_attend(partial(attend, impl="eager"), case_named(name))


@every_impl
@every_case
def test_two_disjoint_plans_merge_into_their_union(impl, case):
    half = torch.rand(case.keep().shape) < 0.5
    plans = [Tiles.from_mask(case.keep() & part, case.grid()) for part in (half, ~half)]

    def merged(*qkv):
        return merge(*(x for tiles in plans for x in attend(*qkv, tiles, impl=impl, return_lse=True)))

    expected = oracle.outcome(lambda *qkv: oracle.masked_attention(*qkv, case.pairs(), 6 ** -0.5), case.tensors())
    for got, true in zip(oracle.outcome(merged, case.tensors()), expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-9)


def test_merging_keeps_the_dtype_and_nothing_with_nothing_is_nothing():
    output, lse = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16), torch.full((1, 1, 1), -torch.inf)
    both, total = merge(output, lse, output, lse)
    assert both.dtype == torch.bfloat16 and both.tolist() == [[[[0.0, 0.0]]]] and total.tolist() == [[[-torch.inf]]]


Q, K, V = torch.ones(2, 8, 4, 6), torch.ones(2, 8, 2, 6), torch.ones(2, 8, 2, 5)
GRID = Grid(num_queries=8, num_keys=8, query_block=4, key_block=4)
DENSE = Tiles(grid=GRID)


def three_heads(batch: int = 2, heads: int = 3) -> Tiles:
    return Tiles.from_mask(torch.ones(batch, heads, 2, 2, dtype=torch.bool), GRID)


@pytest.mark.parametrize("query, key, value, tiles, message", [
    (Q[0], K, V, DENSE, r"expected query \[B, Tq, H, D\].*got \[8, 4, 6\].*bring the heads to dimension 2"),
    (Q, K[:1], V, DENSE, r"got \[2, 8, 4, 6\], \[1, 8, 2, 6\]"),
    (Q, K, V[:, :7], DENSE, r"\[2, 7, 2, 5\]"),
    (Q, K[..., :5], V, DENSE, r"\[2, 8, 2, 5\], \[2, 8, 2, 5\]"),
    (Q[:, :, :3], K, V, DENSE, "G dividing H"),
    (Q, K[:, :, :0], V[:, :, :0], DENSE, "G dividing H"),
    (Q.double(), K, V, DENSE, "expected one floating dtype, got torch.float64, torch.float32, torch.float32; convert"),
    (Q.long(), K.long(), V.long(), DENSE, "expected one floating dtype, got torch.int64"),
    (Q[:, :7], K, V, DENSE, "expected a grid of 7 queries and 8 keys, got 8 and 8; build the tiles"),
    (Q, K, V, Tiles(grid=replace(GRID, lengths=torch.zeros(3, 2, dtype=torch.int64))),
     r"expected lengths \[2, 2\], got \[3, 2\]; give one \(start, stop\)"),
    (Q, K, V, three_heads(), r"expected tiles of 2 rows and 4 or 2 heads, got \[2, 3, 2\]; build the tiles"),
    (Q, K, V, three_heads(batch=1, heads=4), r"expected tiles of 2 rows and 4 or 2 heads, got \[1, 4, 2\]"),
], ids=["dimensions", "batch", "values", "width", "heads", "no heads", "dtype", "integers", "grid", "lengths",
        "heads of the tiles", "rows of the tiles"])
def test_what_does_not_fit_is_refused(query, key, value, tiles, message):
    with pytest.raises(ShapeError, match="^attend: .*" + message):
        attend(query, key, value, tiles)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ShapeError, match="^attend: expected a finite scale, got -?(nan|inf)"):
        attend(Q, K, V, DENSE, scale=scale)


@any_tile
@pytest.mark.parametrize("scale", [0.0, -0.4])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_may_count_for_nothing_or_against(impl, scale, causal):
    """Torch's own causal kernel gives NaN there."""
    query, key, value = (torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf) if causal else scores
    tiles = Tiles(grid=Grid(num_queries=40, num_keys=40, query_block=16, key_block=16, causal=causal))
    torch.testing.assert_close(attend(query, key, value, tiles, scale=scale, impl=impl),
                               torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value))


def test_auto_says_what_it_chose_and_why():
    name, reason = choose_impl("auto", Q, K, V, DENSE)
    assert name in IMPLS and reason
    assert [choose_impl(impl, Q, K, V, DENSE) for impl in IMPLS] == [(impl, "asked for by name") for impl in IMPLS]


def test_an_unknown_implementation_is_refused():
    message = "attend: expected impl 'auto', 'reference', 'eager', 'fused_cpp', 'fused_triton', 'flex', got 'fast'"
    with pytest.raises(ImplError, match=message):
        attend(Q, K, V, DENSE, impl="fast")


@any_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_lse_is_float32_or_wider(impl, dtype):
    for queries in (8, 0):
        case = Case(name="", queries=queries, keys=8, tile=(4, 2))
        output, lse = attend(*case.tensors(dtype), case.tiles(), impl=impl, return_lse=True)
        assert (output.dtype, lse.dtype) == (dtype, torch.float32)


def test_merging_nothing_with_nothing_has_gradients_of_0():
    lses = [torch.full((1, 2, 1), -torch.inf, requires_grad=True) for _ in range(2)]
    outputs = [torch.zeros(1, 2, 1, 3, requires_grad=True) for _ in range(2)]
    output, lse = merge(outputs[0], lses[0], outputs[1], lses[1])
    assert torch.equal(output, torch.zeros(1, 2, 1, 3)) and lse.isneginf().all()
    gradients = torch.autograd.grad(output.sum(), [*lses, *outputs])
    assert all((gradient == 0).all() for gradient in gradients)
