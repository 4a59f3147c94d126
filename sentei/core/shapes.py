"""One legend of letters for the whole house, the check that uses it, and the scale that follows from a width.

B batch, T tokens, Q queries, C candidates, K kept a query, D width, H heads, G key/value heads,
E experts, R rank, F hidden width, U unit (tokens a candidate stands for).
"""

import math

import torch

from sentei.core.errors import ShapeError


def check_shape(where: str, name: str, tensor: torch.Tensor, letters: str, **sizes: int) -> dict[str, int]:
    """Returns the size of each letter, e.g. `check_shape("attend", "query", query, "B T H D", D=64)`.

    Args:
        where: the function or room that asks, for the message.
        name: the argument's name.
        letters: one letter a dimension, separated by spaces.
        sizes: sizes already known; the tensor must agree.
    Raises:
        ShapeError: another number of dimensions, or a size that disagrees.
    """
    names = letters.split()
    found = dict(zip(names, tensor.shape, strict=False))
    agrees = tensor.dim() == len(names) and all(found[letter] == size for letter, size in sizes.items())
    if not agrees:
        known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        raise ShapeError(where, expected=f"{name} [{', '.join(names)}]" + (f" with {known}" if known else ""),
                         got=str(list(tensor.shape)), do=f"reshape {name} before the call")
    return found


def scale_of(where: str, scale: float | None, width: int) -> float:
    """The factor on attention's scores: `scale`, or width**-0.5 where it is None.

    Args:
        where: the function that asks, for the message.
        width: of a query; 0 counts as 1.
    Raises:
        ShapeError: NaN or infinity.
    """
    if scale is None:
        return 1 / math.sqrt(max(width, 1))
    if not math.isfinite(scale):
        raise ShapeError(where, expected="a finite scale", got=str(scale), do="leave it out for width**-0.5")
    return scale
