"""The check that turns letters into sizes."""

import pytest
import torch

from sentei.core.errors import ShapeError
from sentei.core.shapes import check_shape


def test_returns_the_size_of_each_letter():
    assert check_shape("attend", "query", torch.zeros(2, 3, 4, 5), "B T H D", D=5) == {"B": 2, "T": 3, "H": 4, "D": 5}


def test_a_scalar_has_no_letters():
    assert check_shape("attend", "scale", torch.tensor(1.0), "") == {}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
def test_another_number_of_dimensions_is_refused(shape):
    with pytest.raises(ShapeError, match=r"attend: expected query \[T, D\], got \[.*\]; reshape query before the call"):
        check_shape("attend", "query", torch.zeros(shape), "T D")


def test_a_size_that_disagrees_is_refused():
    with pytest.raises(ShapeError, match=r"expected key \[T, D\] with T=3, D=4, got \[3, 5\]"):
        check_shape("attend", "key", torch.zeros(3, 5), "T D", T=3, D=4)
