"""What a cache holds: every append equals a concatenation, and what was returned before stays as it was."""

import math

import pytest
import torch

from sentei.core.errors import ShapeError
from sentei.core.growing import GROWTH, Growing

MODES = {"grad": torch.enable_grad, "none": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("modes", [["none"], ["inference"], ["grad"], ["inference", "none"], ["none", "inference"],
                                   ["grad", "none"], ["none", "grad"]], ids="-".join)
def test_appending_is_concatenating(modes):
    held, parts, returned = Growing(), [], []
    for step in range(40):
        with MODES[modes[step % len(modes)]]():
            parts.append(torch.randn(2, step % 3, 3, 4))
            held = held.append(parts[-1])
            returned.append(held.rows)
    for step, rows in enumerate(returned):
        assert torch.equal(rows, torch.cat(parts[:step + 1], 1))


def test_two_that_follow_the_same_rows_do_not_see_each_other():
    parts = torch.randn(5, 1, 2, 3, 4).unbind()
    with torch.no_grad():
        begun = Growing(parts[0]).append(parts[1])
        one, other = begun.append(parts[2]), begun.append(parts[3])
        again = one.append(parts[4])
    for found, which in ((begun, (0, 1)), (one, (0, 1, 2)), (other, (0, 1, 3)), (again, (0, 1, 2, 4))):
        assert torch.equal(found.rows, torch.cat([parts[part] for part in which], 1))


def test_an_append_seldom_copies():
    held, places = Growing(torch.randn(1, 5, 2, 4)), set()
    with torch.no_grad():
        for _ in range(200):
            held = held.append(torch.randn(1, 1, 2, 4))
            places.add(held.rows.data_ptr())
    assert 1 < len(places) <= 2 + math.log(205 / 5) / math.log(GROWTH)


def test_heads_lie_apart():
    with torch.no_grad():
        rows = Growing(torch.randn(2, 9, 3, 4)).append(torch.randn(2, 1, 3, 4)).rows
    assert rows.stride(1) == 4 and rows.stride(3) == 1


def test_gradients_reach_every_row():
    held, loss, parts = Growing(), 0.0, [torch.randn(1, 2, 1, 3, requires_grad=True) for _ in range(3)]
    for part in parts:
        held = held.append(part)
        loss = loss + held.rows.square().sum()
    for times, (part, found) in enumerate(zip(parts, torch.autograd.grad(loss, parts), strict=True)):
        torch.testing.assert_close(found, 2 * (3 - times) * part)


def test_a_graph_that_holds_earlier_rows_is_not_disturbed():
    query = torch.randn(4, requires_grad=True)
    with torch.no_grad():
        held = Growing(torch.randn(1, 3, 1, 4)).append(torch.randn(1, 1, 1, 4))
    loss, expected = (held.rows @ query).square().sum(), held.rows.clone()
    with torch.no_grad():
        held.append(torch.randn(1, 1, 1, 4))
    found, = torch.autograd.grad(loss, query)
    torch.testing.assert_close(found, 2 * (expected @ query).flatten() @ expected.flatten(0, 2))


def test_a_compiled_append_is_one_graph():
    def follow(rows, more):
        return Growing(rows).append(more).rows * 2

    rows, more = torch.randn(1, 3, 2, 4), torch.randn(1, 1, 2, 4)
    with torch.no_grad():
        found = torch.compile(follow, fullgraph=True, backend="eager")(rows, more)
    assert torch.equal(found, 2 * torch.cat([rows, more], 1))


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("rows", [torch.zeros(1, 1, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.float64),
                                  torch.zeros(2, 1, 1, 4)], ids=["batch", "dtype", "heads"])
def test_other_rows_are_refused(rows, tokens):
    held = Growing(torch.zeros(2, tokens, 3, 4))
    with torch.no_grad(), pytest.raises(ShapeError, match="begin a new cache"):
        held.append(rows)
