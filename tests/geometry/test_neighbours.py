"""The k largest inner products are nearest neighbours of lifted rows; with a bias, a power diagram."""

import torch

from sentei.geometry.mass import fewest
from sentei.geometry.neighbours import at_zero, lifted, nearest, same_sets


def test_lifted_rows_are_ordered_by_inner_product():
    x, rows, bias = torch.randn(500, 7), torch.randn(9, 7) * torch.arange(1, 10)[:, None], torch.randn(9)
    best = (x @ rows.T).topk(3).indices
    assert same_sets(best, nearest(at_zero(x), lifted(rows), 3)).all()
    assert not same_sets(best, nearest(x, rows, 3)).all()
    assert same_sets((x @ rows.T + bias).topk(3).indices, nearest(at_zero(x), lifted(rows, bias), 3)).all()
    assert not same_sets(best, nearest(at_zero(x), lifted(rows, bias), 3)).all()


def test_rows_of_one_length_need_no_lift():
    x, rows = torch.randn(200, 5), torch.nn.functional.normalize(torch.randn(6, 5), dim=-1)
    assert same_sets((x @ rows.T).topk(2).indices, nearest(x, rows, 2)).all()


def test_sets_have_no_order():
    assert same_sets(torch.tensor([[1, 2], [1, 3]]), torch.tensor([[2, 1], [1, 2]])).tolist() == [True, False]


def test_the_fewest_that_hold_the_mass():
    shares = torch.tensor([[0.5, 0.1, 0.4], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert fewest(shares, (0.9, 0.5, 1.0)).tolist() == [[2, 0, 1, 3], [1, 0, 1, 2], [3, 0, 1, 3]]
