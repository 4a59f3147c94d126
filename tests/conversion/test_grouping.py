"""Neurons put into experts, and their router: against least squares solved another way, and by construction."""

import pytest
import torch

from sentei.conversion.grouping import group
from sentei.conversion.statistics import Amplitudes

WIDTH, NEURONS, ROWS = 6, 20, 400


def text(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sums(x: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state = Amplitudes(WIDTH, sizes.shape[1])
    for rows in (slice(0, 150), slice(150, None)):
        part = Amplitudes(WIDTH, sizes.shape[1])
        part.see(x[rows], -sizes[rows])  # sizes have no sign
        state.merge(part)
    assert state.rows == ROWS
    return state.inputs, state.neurons


def test_the_router_is_ridge_regression_of_an_experts_size():
    x = text()
    sizes = (x @ text(1)[:NEURONS].T).abs() + 0.1
    found = group(*sums(x, sizes), unit=4, shared=1, damp=0.05)
    inside = torch.cat([found.shared, found.experts.flatten()]).sort().values
    assert inside.tolist() == list(range(NEURONS)) and found.experts.shape == (4, 4) and len(found.shared) == 4
    ridge = (0.05 * x.square().sum() / WIDTH).sqrt()
    rows = torch.cat([torch.cat([x, x.new_ones(ROWS, 1)], 1), torch.eye(WIDTH + 1, dtype=x.dtype)[:WIDTH] * ridge])
    targets = torch.cat([sizes[:, found.experts].sum(2), x.new_zeros(WIDTH, 4)])
    expected = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(torch.cat([found.weight.T, found.bias[None]]), expected)


def test_neurons_that_grow_in_the_same_direction_are_together_and_those_always_large_are_shared():
    x = text()
    directions = torch.eye(WIDTH, dtype=torch.float64)[:4]
    numbers = torch.Generator().manual_seed(2)
    order = torch.randperm(NEURONS, generator=numbers)
    kind = torch.arange(NEURONS).div(4, rounding_mode="floor")  # 4 of each of 4 directions, and 4 that are always large
    sizes = torch.where(kind < 4, (x @ directions.T)[:, kind.clamp(max=3)].clamp(min=0) * (1 + torch.rand(
        NEURONS, generator=numbers, dtype=torch.float64)), 50.0)[:, order]
    found = group(*sums(x, sizes), unit=4, shared=1)
    assert kind[order][found.shared].tolist() == [4] * 4
    assert sorted(tuple(kind[order][expert].tolist()) for expert in found.experts) == [(k,) * 4 for k in range(4)]
    best = (x @ found.weight.T + found.bias).argmax(1)
    right = (x[:, :4].argmax(1) == kind[order][found.experts[:, 0]][best]).double().mean()
    assert right > 0.9


@pytest.mark.parametrize("shared", [0, 2])
def test_constant_inputs_are_grouped_too(shared):
    found = group(*sums(torch.ones(ROWS, WIDTH, dtype=torch.float64), torch.ones(ROWS, NEURONS, dtype=torch.float64)),
                  unit=2, shared=shared)
    assert found.weight.isfinite().all() and len(found.experts) == NEURONS // 2 - shared
