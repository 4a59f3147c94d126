"""Attention to chosen pages in Triton's interpreter, against fp64."""

import importlib.util

import pytest
import torch

from sentei.core.errors import ShapeError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# B, R, H, G, Tk, D, Dv, page, slots, lengths, causal
SHAPES = [(2, 3, 6, 2, 150, 20, 33, 16, 5, ((3, 150), (0, 40)), True), (1, 1, 4, 4, 64, 64, 64, 7, 3, None, True),
          (2, 2, 4, 1, 300, 16, 16, 32, 9, None, False), (1, 1, 2, 1, 5000, 16, 16, 64, 79, None, True)]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_attends_to_its_pages_and_reads_no_other_key(shape, dtype):
    from sentei.kernels.attention.triton_pages import attend_pages

    batch, rows, heads, groups, keys, width, value_width, page, slots, lengths, causal = shape
    query, key, value = (torch.randn(size).to(dtype) for size in (
        (batch, rows, heads, width), (batch, keys, groups, width), (batch, keys, groups, value_width)))
    count = -(-keys // page)
    ids = torch.rand(batch, groups, rows, count).argsort(-1)[..., :slots].int()
    ids[torch.rand(ids.shape) < 0.3] = -1
    kept = torch.zeros(batch, groups, rows, count + 1, dtype=torch.bool)
    kept = kept.scatter_(-1, torch.where(ids < 0, count, ids).long(), True)[..., :count]
    kept, at = kept.repeat_interleave(page, -1)[..., :keys], torch.arange(keys)
    kept = kept & (at <= keys - rows + torch.arange(rows)[:, None]) if causal else kept
    bounds = None if lengths is None else torch.tensor(lengths)
    kept = kept & ((at >= bounds[:, :1]) & (at < bounds[:, 1:]))[:, None, None] if lengths else kept
    for tensor in (key, value):  # what no row keeps is NaN
        tensor[~kept.any(2).transpose(1, 2)] = torch.nan
    output, lse = attend_pages(query, key, value, ids, page=page, scale=0.3, causal=causal, lengths=bounds)
    wide = [x.double().nan_to_num(0).repeat_interleave(heads // groups, 2) for x in (key, value)]
    kept = kept.repeat_interleave(heads // groups, 1)
    scores = (torch.einsum("brhd,bthd->bhrt", query.double(), wide[0]) * 0.3).masked_fill(~kept, -torch.inf)
    shares = scores.softmax(-1).nan_to_num(0)
    exact = torch.einsum("bhrt,bthd->brhd", shares, wide[1])
    plain = torch.einsum("bhrt,bthd->brhd", shares.to(dtype).double(), wide[1]).to(dtype)
    step = 4 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1)
    assert (output - exact).abs().max() <= 2 * (plain - exact).abs().max() + step
    empty = ~kept.any(-1).transpose(1, 2)
    assert (output[empty] == 0).all() and torch.equal(lse.isneginf(), empty)
    torch.testing.assert_close(lse[~empty].double(), scores.logsumexp(-1).transpose(1, 2)[~empty], rtol=1e-5, atol=1e-5)


@needs_triton
def test_what_does_not_fit_is_refused():
    from sentei.kernels.attention.triton_pages import attend_pages

    query, key, ids = torch.ones(1, 1, 4, 16), torch.ones(1, 9, 2, 16), torch.zeros(1, 2, 1, 3, dtype=torch.int32)
    for wrong in ((query, key, key, ids.long()), (query, key, key, ids[:, :1]), (query[:, :, :3], key, key, ids)):
        with pytest.raises(ShapeError, match=r"attend_pages: expected query \[B, R, H, D\]"):
            attend_pages(*wrong, page=16, scale=0.3)
    for page, scale in ((0, 0.3), (16, -0.3)):
        with pytest.raises(ShapeError, match="a scale from 0"):
            attend_pages(query, key, key, ids, page=page, scale=scale)
