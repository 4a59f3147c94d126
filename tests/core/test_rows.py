"""Rows: some of every slot of a batch, taken and added back; and their products with one vector."""

import pytest
import torch

from sentei.core.rows import add, dots, places_of, take

KEPT = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)


def test_places_are_in_order_with_others_behind_or_before():
    assert places_of(KEPT, 3).tolist() == [[1, 3, 4], [0, 1, 2], [2, 4, 0]]
    assert places_of(KEPT, 3, last=True).tolist() == [[1, 3, 4], [3, 4, 0], [3, 2, 4]]
    for last in (False, True):
        assert places_of(KEPT, 0, last=last).shape == (3, 0)


def by_hand(x, places):
    """Rows doubled and added to themselves, and the rest twice: where they are read through both ways."""
    rows = torch.stack([x[slot][places[slot]] for slot in range(len(x))])
    return 2 * x + torch.zeros_like(x).scatter_add(1, places[..., None].expand_as(rows), rows.sin())


def by_rows(x, places):
    rows, every = take(x, places)
    return add(2 * every, places, rows.sin())


@pytest.mark.parametrize("strided", [False, True])
def test_what_is_taken_and_added_is_as_by_hand_with_gradients_of_any_order(strided):
    places = places_of(KEPT, 3)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    x = (x.transpose(0, 1).contiguous().transpose(0, 1) if strided else x).requires_grad_()
    assert torch.equal(by_rows(x.detach(), places), by_hand(x.detach(), places))
    assert torch.equal(by_rows(x, places), by_hand(x, places))
    found, expected = (torch.autograd.grad(way(x, places).square().sum(), x)[0] for way in (by_rows, by_hand))
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(by_rows, (x, places), check_forward_ad=True)
    of_function = torch.func.grad(lambda given: by_rows(given, places).square().sum())(x.detach())
    torch.testing.assert_close(of_function, expected)
    assert torch.autograd.gradgradcheck(by_rows, (x, places))


def test_each_of_the_two_may_be_left_unread():
    places = places_of(KEPT, 3)
    for which in (0, 1):
        x = torch.randn(3, 5, 4, dtype=torch.float64).requires_grad_()
        found, = torch.autograd.grad(take(x, places)[which].sum(), x)
        expected = torch.zeros(3, 5).scatter(1, places, 1) if which == 0 else torch.ones(3, 5)
        assert torch.equal(found, expected[..., None].expand_as(x).double())


def test_an_update_is_added_in_the_dtype_of_what_it_is_added_to():
    x, update = torch.zeros(3, 5, 4, dtype=torch.bfloat16), torch.ones(3, 3, 4)
    assert add(x, places_of(KEPT, 3), update).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 500, 2048])
def test_products_of_rows_have_the_same_bits_whatever_stands_beside_them(dtype, width):
    x, weight = torch.randn(2, 1030, width).to(dtype), torch.randn(width).to(dtype).requires_grad_()
    together = dots(x, weight)
    some = torch.tensor([0, 1, 510, 1023, 1024, 1029])
    assert torch.equal(dots(x[:, some], weight), together[:, some])
    assert all(torch.equal(dots(x[1, i:i + 1], weight)[0], together[1, i]) for i in some)
    sizes = x.double().abs() @ weight.double().abs()
    assert ((together - x.double() @ weight.double()).abs() <= 8 * torch.finfo(dtype).eps * sizes).all()


def test_products_of_rows_have_gradients_of_any_order():
    x = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(dots(x, weight), x @ weight)
    assert torch.autograd.gradcheck(dots, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(dots, (x, weight))
    assert dots(x[:, :0], weight).shape == (2, 0)
