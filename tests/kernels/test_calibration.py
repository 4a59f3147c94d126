"""Statistics of linear layers: sums that do not depend on the batches; and the sweep, against its definition."""

import pytest
import torch
from torch import nn

from sentei.core.errors import RuleError
from sentei.kernels.linear.calibration import Calibration, calibrate, sweep

D, OUT = 8, 3


def inputs(rows: int = 200) -> torch.Tensor:
    x = torch.randn(rows, D, dtype=torch.float64)
    return x @ torch.randn(D, D, dtype=torch.float64) + 0.1 * x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_order_and_the_size_of_the_batches_do_not_matter(dtype):
    x, gradient = inputs().to(dtype), torch.randn(200, OUT).to(dtype)
    whole, parts = Calibration(D, OUT), Calibration(D, OUT)
    whole.see(x.view(4, 50, D))
    whole.see_gradient(x, gradient)
    for part in reversed(torch.arange(200).split(7)):
        parts.see(x[part])
        parts.see_gradient(x[part], gradient[part])
    assert whole.rows == parts.rows == 200
    torch.testing.assert_close(whole.gram, x.double().T @ x.double(), rtol=1e-13, atol=1e-11)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-13, atol=1e-11)
    torch.testing.assert_close(parts.fisher, whole.fisher, rtol=1e-13, atol=1e-11)


def test_one_pass_feeds_every_layer_and_ends_with_the_block():
    first, second = nn.Linear(D, 5), nn.Linear(5, OUT)
    x = torch.randn(4, 6, D)
    with calibrate({"first": first, "second": second}) as seen:
        for part in x:
            second(first(part).relu()).square().sum().backward()
    second(first(x)).sum().backward()
    assert seen["first"].rows == seen["second"].rows == seen["second"].rows_with_gradients == 24
    hidden = first(x).relu().flatten(0, 1).double()
    torch.testing.assert_close(seen["second"].gram, hidden.T @ hidden, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), calibrate({"first": first}) as seen:
        first(x)
    assert seen["first"].rows == 24 and seen["first"].fisher is None
    with pytest.raises(ZeroDivisionError), calibrate({"first": first}):
        first(1 / 0)
    assert not first._forward_hooks


def test_an_input_that_is_always_0_is_independent_of_the_others():
    x = inputs()
    x[:, 2] = 0
    calibration = Calibration(D, OUT)
    calibration.see(x)
    inverse, others = calibration.inverse(0), [0, 1, 3, 4, 5, 6, 7]
    torch.testing.assert_close(inverse[others][:, others], (x[:, others].T @ x[:, others]).inverse(), rtol=1e-6, atol=0)
    assert inverse[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("rows, damp", [(0, 0.01), (3, 0)], ids=["no rows", "few rows"])
def test_what_cannot_be_inverted_is_refused(rows, damp):
    calibration = Calibration(D, OUT)
    if rows:
        calibration.see(inputs(rows))
        assert calibration.inverse(0.01).isfinite().all()
    with pytest.raises(RuleError, match=f"Calibration: expected finite inputs that span.*{rows} rows, damp {damp}"):
        calibration.inverse(damp)


def test_inputs_that_are_no_numbers_are_refused():
    calibration = Calibration(D, OUT)
    calibration.see(inputs().masked_fill(torch.rand(200, D) < 0.01, torch.nan))
    with pytest.raises(RuleError, match="finite inputs"):
        calibration.inverse(0.01)


def by_definition(weight, x, kept) -> torch.Tensor:
    """Column by column: what is dropped is made up for by a least-squares fit of the columns that follow."""
    weight = weight.clone()
    for j in range(D):
        dropped = (weight[:, j] * ~kept[:, j])[:, None] * x[:, j]
        weight[:, j] *= kept[:, j]
        if j + 1 < D:
            weight[:, j + 1:] += torch.linalg.lstsq(x[:, j + 1:], dropped.T).solution.T
    return weight


def check_sweep(function) -> None:
    torch.manual_seed(0)
    x, weight, kept = inputs(), torch.randn(OUT, D, dtype=torch.float64), torch.rand(OUT, D) < 0.5
    calibration = Calibration(D, OUT)
    calibration.see(x)
    for width in (1, 3, 4, D, 100):
        moved, mask = function(weight, calibration.inverse(0), lambda _, columns: kept[:, columns], width)
        assert torch.equal(mask, kept) and (moved[~kept] == 0).all()
        torch.testing.assert_close(moved, by_definition(weight, x, kept), rtol=1e-6, atol=1e-7)


def test_the_sweep_is_a_fit_of_what_follows_column_by_column():
    check_sweep(sweep)


def unmoved(weight, inverse, choose, width):
    return weight.where(choose(weight, slice(0, D)), 0), choose(weight, slice(0, D))


def by_the_gram(weight, inverse, choose, width):
    return sweep(weight, inverse.inverse(), choose, width)


def only_within_a_block(weight, inverse, choose, width):
    blocks = torch.block_diag(*(inverse[part][:, part] for part in torch.arange(D).split(width)))
    return sweep(weight, blocks, choose, width)


@pytest.mark.parametrize("mutant", [unmoved, by_the_gram, only_within_a_block], ids=lambda mutant: mutant.__name__)
def test_a_wrong_sweep_is_rejected(mutant):
    with pytest.raises(AssertionError):
        check_sweep(mutant)


def test_the_saliency_of_a_column_is_its_least_loss_once_those_before_are_settled():
    x, weight = inputs(), torch.randn(OUT, D, dtype=torch.float64)
    calibration = Calibration(D, OUT)
    calibration.see(x)
    told = []

    def choose(saliency, columns):
        told.append(saliency)
        return torch.ones_like(saliency, dtype=torch.bool)

    moved, _ = sweep(weight, calibration.inverse(0), choose, 1)
    assert torch.equal(moved, weight), "what is kept is left"
    for j, saliency in enumerate(told):
        for o in range(OUT):
            target = x[:, j] * weight[o, j]
            rest = x[:, j + 1:]
            left = target - rest @ torch.linalg.lstsq(rest, target).solution if j + 1 < D else target
            torch.testing.assert_close(saliency[o, 0], left.square().sum(), rtol=1e-6, atol=1e-8)
