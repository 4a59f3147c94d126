"""The native estimates against their definition in torch, whose own error in fp32 is the measure."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import CASES, Case, drawn_cases

from sentei.core.errors import RuleError, ShapeError
from sentei.core.rules import Threshold
from sentei.kernels import native
from sentei.kernels.attention import Grid, fused_cpp
from sentei.kernels.attention.select import Antidiagonal, Estimator, PageBounds, Pooled, Sampled, Trailing, estimate

needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
ALL = [Pooled(), PageBounds(), Antidiagonal(1), Antidiagonal(2), Antidiagonal(4), Sampled(1), Sampled(3), Sampled(8),
       Trailing(0), Trailing(2)]
LARGER = [
    Case(name="some blocks a run", queries=200, keys=200, tile=(64, 64), heads=6, groups=2),
    Case(name="rows left over", queries=78, keys=130, tile=(12, 24), heads=2, groups=1),
    Case(name="deep and sharp", queries=300, keys=300, tile=(8, 16), heads=3, groups=1, logits=4.0),
    Case(name="padded", queries=90, keys=90, tile=(32, 16), lengths=((17, 90), (0, 41))),
    Case(name="more heads than an item has", queries=70, keys=70, tile=(64, 64), heads=10, groups=1),
    Case(name="lengths beyond the keys", queries=16, keys=16, tile=(4, 2), lengths=((-3, 40), (20, 30))),
    Case(name="heads of a model", queries=130, keys=130, tile=(64, 64), heads=3, groups=1, widths=(64, 64)),
    Case(name="squares and a rest", queries=70, keys=70, tile=(16, 16), heads=2, groups=2, widths=(34, 34)),
]


def fits(estimator: Estimator, grid: Grid) -> bool:
    """Whether the definition takes these blocks; only a fold is choosy."""
    return grid.num_queries > 0 and estimator.native(grid) is not None


def check(estimator: Estimator, case: Case, dtype: torch.dtype, pool: str) -> None:
    """Shares are as near to fp64 as the definition's in fp32; what is not permitted is forbidden."""
    grid = case.grid()
    query, key, _ = (tensor.to(dtype) for tensor in case.tensors())
    found = estimate(estimator, query, key, grid, 0.4, pool=pool)
    expected = estimate(estimator, query.double(), key.double(), grid, 0.4, pool=pool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "missing", lambda: "a package without its native library")
        plain = estimate(estimator, query, key, grid, 0.4, pool=pool)
    assert found.dtype == torch.float32 and torch.equal(found.isneginf(), expected.isneginf())
    error, allowed = ((scores.double().exp() - expected.exp()).abs().max() for scores in (found, plain))
    assert error <= 2 * allowed + 16 * torch.finfo(torch.float32).eps, f"error {error:.2g}, in torch {allowed:.2g}"


@needs_library
@pytest.mark.parametrize("pool", ["mean", "rms"])
@pytest.mark.parametrize("estimator", ALL, ids=str)
@pytest.mark.parametrize("case", CASES + LARGER, ids=lambda case: case.name)
def test_shares_are_those_of_the_definition(case, estimator, pool, machine_or_pairs):
    if fits(estimator, case.grid()):
        check(estimator, case, torch.bfloat16 if native.takes_pairs() else torch.float32, pool)


@needs_library
@settings(deadline=None, max_examples=150, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn_cases())
def test_so_are_they_for_drawn_cases(case, machine_or_pairs):
    for estimator in ALL:
        if fits(estimator, case.grid()):
            check(estimator, case, torch.bfloat16, "rms")


@needs_library
@pytest.mark.parametrize("estimator", ALL, ids=str)
@pytest.mark.parametrize("width", [9, 10])
def test_strides_and_threads_do_not_matter(width, estimator, machine_or_pairs):
    dtype = torch.bfloat16 if native.takes_pairs() else torch.float32
    grid = Grid(num_queries=70, num_keys=70, query_block=8, key_block=4)
    query = torch.randn(2, 4, 70, width, dtype=dtype).transpose(1, 2)
    keys = [torch.randn(2, 70, width, 2, dtype=dtype).transpose(2, 3), *(
        torch.randn(2, 70, 2, width + gap, dtype=dtype)[..., gap // 2:gap // 2 + width] for gap in (1, 2, 3)),
        torch.randn(2, 2, 70, width + 1, dtype=dtype)[..., :width].transpose(1, 2),
        torch.randn(400, dtype=dtype).unfold(0, width, 1)[:280].view(2, 70, 2, width)]  # rows that overlap
    expected = [estimate(estimator, query.contiguous(), key.contiguous(), grid, 0.4) for key in keys]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for key, scores in zip(keys, expected, strict=True):
            assert torch.equal(estimate(estimator, query, key, grid, 0.4), scores) or native.takes_pairs() and (
                estimate(estimator, query, key, grid, 0.4).exp() - scores.exp()).abs().max() < 1e-5
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_a_nan_is_told_and_what_is_padding_is_not_read(estimator, machine_or_pairs):
    case = Case(name="padded", queries=16, keys=16, tile=(4, 4), lengths=((4, 16), (0, 10)))
    query, key, _ = case.tensors(torch.bfloat16 if native.takes_pairs() else torch.float32)
    expected = estimate(estimator, query, key, case.grid(), 0.4)
    padding = ~case.grid().real_keys(key.device)
    assert torch.equal(estimate(estimator, query, key.masked_fill(padding[..., None, None], torch.nan), case.grid(),
                                0.4), expected)
    key[0, 5] = torch.nan
    scores = estimate(estimator, query, key, case.grid(), 0.4)
    assert scores[0, :, 2:, 1].isnan().all() and torch.equal(scores[1], expected[1])
    with pytest.raises(RuleError, match="got NaN"):
        Threshold(0.1)(scores)


@needs_library
@pytest.mark.parametrize("rows", [("exact", 4, 8), ("pooled", 0, 1), ("bounds", 0, 1), ("folded", 0, 8)], ids=str)
def test_it_is_a_proper_op_of_torch(rows):
    query, key, _ = LARGER[0].tensors(torch.float32)
    numbered = [fused_cpp.ESTIMATES.index(rows[0]), *rows[1:]]
    torch.library.opcheck(torch.ops.sentei.estimate.default, (query, key, None, [64, 64, 1, 0], numbered, True, 0.3))


@needs_library
@pytest.mark.parametrize("rows", [("exact", -1, 1), ("exact", 4, 1), ("exact", 0, 0), ("folded", 0, 3)], ids=str)
def test_rows_that_no_query_block_has_are_refused(rows):
    query, key, _ = CASES[0].tensors(torch.float32)
    with pytest.raises(ShapeError, match="estimate: expected a first row below 4 and a stride that fits"):
        fused_cpp.estimate(query, key, CASES[0].grid(), scale=0.3, rows=rows, square=False)
