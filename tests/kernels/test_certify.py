"""What is dropped is proved to be negligible: for every row, by exact scores in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import CASES, Case, drawn_cases, masked_attention, outcome

from sentei.core.errors import RuleError
from sentei.kernels import native
from sentei.kernels.attention import Grid, Tiles, fused_cpp
from sentei.kernels.attention.certify import attend_certified

PLAIN = [case for case in CASES if not case.softcap]
SPREAD = [Case(name="spread", queries=70, keys=90, tile=(16, 8), heads=4, groups=2, logits=6.0),
          Case(name="spread, padded", queries=64, keys=64, tile=(8, 16), logits=6.0, lengths=((5, 60), (0, 64)))]
EPS = (0.5, 0.01, 1e-6)
needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
every_way = pytest.mark.parametrize("natively", [
    pytest.param(True, marks=needs_library), False],
    ids=["native", "plain torch"])


def dropped_mass(case: Case, kept: torch.Tensor) -> torch.Tensor:
    """Float64 [B, H, Tq]: the softmax mass of the permitted keys in tiles that are not kept."""
    query, key, _ = (tensor.transpose(1, 2) for tensor in case.tensors())
    pairs = everything(case)
    scores = query @ key.repeat_interleave(case.heads // case.groups, 1).transpose(-1, -2) * 6 ** -0.5
    shares = scores.masked_fill(~pairs, -torch.inf).softmax(-1).nan_to_num(0)
    wide = kept.repeat_interleave(case.tile[0], 2)[:, :, :case.queries]
    wide = wide.repeat_interleave(case.tile[1], 3)[..., :case.keys]
    return (shares * ~wide).sum(-1)


def everything(case: Case) -> torch.Tensor:
    """The permitted pairs, whatever the case keeps."""
    return Case(**{**case.__dict__, "kept": None, "choices": None}).pairs()


def check(case: Case, eps: float, natively: bool, monkeypatch, dtype=torch.float32) -> torch.Tensor:
    if not natively:
        monkeypatch.setattr(native, "missing", lambda: "no library, for this test")
    tensors = case.tensors(dtype)
    output, kept = attend_certified(*tensors, case.grid(), eps, scale=6 ** -0.5)
    # The scores are fp32: a share may be off by some of their last bits, so eps is kept up to that.
    slack = 1 + 64 * torch.finfo(dtype).eps * max(1.0, case.logits)
    assert (dropped_mass(case, kept) <= eps * slack).all()
    assert output.dtype == dtype and not (kept & ~case.grid().permitted(kept.device)).any()
    exact = masked_attention(*(tensor.double() for tensor in tensors), everything(case), 6 ** -0.5)[0]
    widest = tensors[2].abs().max().item() if tensors[2].numel() else 0.0
    error = (output.double() - exact).abs().amax().item() if output.numel() else 0.0
    assert error <= 2 * eps * widest + 64 * torch.finfo(dtype).eps * max(1.0, case.logits) * max(widest, 1.0)
    return kept


@every_way
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("case", [case for case in PLAIN if case.logits <= 10] + SPREAD, ids=lambda case: case.name)
def test_no_row_loses_more_than_eps(case, eps, natively, machine, monkeypatch):
    check(case, eps, natively, monkeypatch)


@every_way
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn_cases(), eps=st.floats(1e-9, 0.99), logits=st.floats(0.0, 8.0))
def test_whatever_the_sizes(case, eps, logits, natively, machine):
    case = Case(**{**case.__dict__, "softcap": 0.0, "logits": logits})
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(case, eps, natively, monkeypatch)


@every_way
def test_a_larger_eps_drops_more_and_something_is_dropped(natively, monkeypatch):
    case = SPREAD[0]
    kept = [check(case, eps, natively, monkeypatch).sum().item() for eps in (0.9, 0.1, 1e-3, 1e-30)]
    permitted = case.grid().permitted(torch.device("cpu")).expand(case.batch, case.heads, -1, -1).sum().item()
    assert kept == sorted(kept) and kept[0] < kept[-1] == permitted


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_those_of_what_is_kept(natively, dtype, monkeypatch):
    if not natively:
        monkeypatch.setattr(native, "missing", lambda: "no library, for this test")
    case, kept = SPREAD[0], None

    def certified(query, key, value):
        nonlocal kept
        output, kept = attend_certified(query, key, value, case.grid(), 0.1, scale=6 ** -0.5)
        return output, torch.zeros(())

    found = outcome(certified, case.tensors(dtype))
    pairs = everything(case) & kept.repeat_interleave(16, 2).repeat_interleave(8, 3)[:, :, :case.queries, :case.keys]
    exact, plain = (outcome(lambda *qkv: (masked_attention(*qkv, pairs, 6 ** -0.5)[0], torch.zeros(())), case.tensors(
        kind)) for kind in (torch.float64, dtype))
    for got, true, other in zip(found, exact, plain, strict=True):
        errors = [(x.double() - true.double()).abs().max() for x in (got, other)]
        assert errors[0] <= 2 * errors[1] + 8 * torch.finfo(dtype).eps * true.abs().max().clamp(min=1)


@needs_library
def test_without_a_cut_that_bites_it_is_the_dense_kernel_bit_for_bit():
    case = SPREAD[0]
    output, kept = attend_certified(*case.tensors(torch.float32), case.grid(), 1e-30, scale=0.3)
    assert torch.equal(output, fused_cpp.attend(*case.tensors(torch.float32), Tiles(grid=case.grid()), scale=0.3))
    assert torch.equal(kept, case.grid().permitted(kept.device).expand_as(kept))


@every_way
def test_a_nan_is_not_dropped(natively, monkeypatch):
    if not natively:
        monkeypatch.setattr(native, "missing", lambda: "no library, for this test")
    case = SPREAD[0]
    query, key, value = case.tensors(torch.float32)
    key[:, 3] = torch.nan
    output, kept = attend_certified(query, key, value, case.grid(), 0.9, scale=0.3)
    assert kept[..., 0].all() and output.isnan().all()


@needs_library
def test_it_is_a_proper_op_of_torch():
    tensors = SPREAD[0].tensors(torch.float32)
    torch.library.opcheck(torch.ops.sentei.certify.default, (*tensors, None, [16, 8, 1, 0], 0.3, 5.0))


@pytest.mark.parametrize("eps", [0.0, 1.0, -1.0, float("nan")])
def test_an_eps_out_of_range_is_refused(eps):
    with pytest.raises(RuleError, match="Certified: expected eps above 0 and below 1"):
        attend_certified(*SPREAD[0].tensors(), SPREAD[0].grid(), eps, scale=0.3)


@every_way
def test_the_bound_holds_for_large_scores_of_halves(natively, monkeypatch):
    """Near 1,000 neighbouring bfloat16 numbers differ by 4: scores rounded to them would drop twice eps."""
    if not natively:
        monkeypatch.setattr(native, "missing", lambda: "no library, for this test")
    eps, keys = 0.0079, 64
    key, query = torch.zeros(1, keys, 1, 8), torch.tensor([1.0, 1.0] + [0.0] * 6).view(1, 1, 1, 8)
    key[..., 0], key[..., 1] = 1000.0, -6.1  # 993.9, 8.1 below the first, within a cut of 9; rounded 12 below it
    key[:, 0, :, 1] = 2.04
    key, query = key.bfloat16(), query.bfloat16()
    grid = Grid(num_queries=1, num_keys=keys, query_block=1, key_block=1)
    _, kept = attend_certified(query, key, key, grid, eps, scale=1.0)
    shares = (query.double() * key.double()).sum(-1)[0, :, 0].softmax(0)
    assert shares[~kept[0, 0, 0]].sum() <= eps
