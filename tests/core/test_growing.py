"""What a cache holds: every append equals a concatenation, and what was returned before stays as it was."""

import pytest
import torch

from sentei.core.errors import ShapeError
from sentei.core.growing import GROWTH, Growing

MODES = {"grad": torch.enable_grad, "none": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("modes", [["none"], ["inference"], ["grad"], ["inference", "none"], ["none", "inference"],
                                   ["grad", "none"], ["none", "grad"]], ids="-".join)
def test_appending_is_concatenating(modes):
    growing, parts, returned = Growing(), [], []
    for step in range(40):
        with MODES[modes[step % len(modes)]]():
            parts.append(torch.randn(2, step % 3, 3, 4))
            returned.append(growing.append(parts[-1]))
    for step, rows in enumerate(returned):
        assert torch.equal(rows, torch.cat(parts[:step + 1], 1))


def test_an_append_seldom_copies():
    growing, places = Growing(torch.randn(1, 5, 2, 4)), set()
    with torch.no_grad():
        for _ in range(200):
            places.add(growing.append(torch.randn(1, 1, 2, 4)).data_ptr())
    assert 1 < len(places) <= 2 + torch.tensor(205 / 5).log() / torch.tensor(GROWTH).log()


def test_heads_lie_apart():
    with torch.no_grad():
        rows = Growing().append(torch.randn(2, 9, 3, 4))
    assert rows.stride(1) == 4 and rows.stride(3) == 1


def test_gradients_reach_every_row():
    growing, parts = Growing(), [torch.randn(1, 2, 1, 3, requires_grad=True) for _ in range(3)]
    loss = sum(growing.append(part).square().sum() for part in parts)
    for times, (part, found) in enumerate(zip(parts, torch.autograd.grad(loss, parts), strict=True)):
        torch.testing.assert_close(found, 2 * (3 - times) * part)


@pytest.mark.parametrize("rows", [torch.zeros(1, 1, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.float64),
                                  torch.zeros(2, 1, 1, 4)], ids=["batch", "dtype", "heads"])
def test_other_rows_are_refused(rows):
    growing = Growing(torch.zeros(2, 5, 3, 4))
    with torch.no_grad(), pytest.raises(ShapeError, match="begin a new cache"):
        growing.append(rows)
    assert growing.rows.shape[1] == 5
