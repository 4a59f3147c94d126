"""Choices and weights come back from their packed form as they went in."""

import pytest
import torch

from sentei.circuit.bits import NONE, Span, decode, encode, pack, pack_rows, strongest, unpack, unpack_rows
from sentei.core.selection import Selection


@pytest.mark.parametrize("number", [1, 7, 8, 9, 63])
def test_bits_come_back(number):
    keep = torch.rand(3, 4, number, generator=torch.Generator().manual_seed(number)) > 0.5
    assert torch.equal(unpack(pack(keep), number), keep)
    assert pack(keep).shape[-1] == -(-number // 8)


def test_the_first_candidate_is_the_lowest_bit():
    assert pack(torch.tensor([True, False, False, True] + [False] * 5)).tolist() == [9, 0]


@pytest.mark.parametrize(("span", "tokens", "causal", "widths"), [
    (Span(first=0, queries=5, block=1, unit=1), 5, True, [1, 2, 3, 4, 5]),
    (Span(first=0, queries=5, block=2, unit=2), 5, True, [1, 2, 3]),
    (Span(first=33, queries=2, block=1, unit=16), 35, True, [3, 3]),
    (Span(first=0, queries=3, block=2, unit=2), 3, False, [2, 2]),
])
def test_rows_are_as_wide_as_what_they_may_see(span, tokens, causal, widths):
    assert span.rows == len(widths) and span.widths(tokens, causal) == widths


def test_ragged_rows_come_back():
    widths = list(range(1, 20))
    keep = torch.rand(2, 19, 19, generator=torch.Generator().manual_seed(0)) > 0.5
    keep &= torch.arange(19) < torch.tensor(widths)[:, None]
    packed = pack_rows(keep, widths)
    assert packed.shape == (2, sum(-(-width // 8) for width in widths))
    assert torch.equal(unpack_rows(packed, widths, 19), keep)


def test_weights_come_back_within_their_code():
    weights = torch.linspace(0, 1, 1001)
    assert (decode(encode(weights)) - weights).abs().max() < 0.004
    assert (decode(encode(torch.tensor([1e-4]))) - 1e-4).abs() < 1e-4
    assert encode(torch.tensor([-1.0, 2.0, torch.nan])).tolist() == [0, 255, 0]


def test_the_strongest_are_the_heaviest_kept():
    chosen = Selection.from_mask(torch.tensor([[True, False, True, True]]), torch.ones(1, 4, dtype=torch.bool))
    chosen = chosen.weigh(torch.tensor([[0.1, 0.9, 0.5, 0.2]]))
    ids, codes = strongest(chosen, 2)
    assert ids.tolist() == [[2, 3]] and codes.tolist() == encode(torch.tensor([[0.5, 0.2]])).tolist()
    ids, codes = strongest(chosen, 5)
    assert ids.tolist() == [[2, 3, 0, NONE, NONE]] and codes[0, 3:].tolist() == [0, 0]
