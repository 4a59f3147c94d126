"""Choosing by inner products as a search for nearest neighbours, and with a bias as a power diagram.

    |x - w|² - r² = |x|² - 2 (x·w + b)      with the power  r² = |w|² + 2 b

So the k largest x·w + b are the k least powers of the spheres around w with radius r; and, with one coordinate more for
each w, √(M - r²), the k nearest points in the ordinary sense, which any k-nearest-neighbour index finds.
References: Aurenhammer 1987 (power diagrams); Bachrach et al. 2014 (inner products by one coordinate more).
"""

import torch

from sentei.core.shapes import check_shape


def nearest(points: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k rows [E, D] nearest to each point [N, D], int64 [N, k], the nearest first; distances in fp64."""
    sizes = check_shape("nearest", "points", points, "N D")
    check_shape("nearest", "rows", rows, "E D", D=sizes["D"])
    distances = torch.cdist(points.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(k, largest=False).indices


def lifted(rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Rows [E, D + 1] in fp64 whose order by distance from (x, 0) is that of x·w + b, the largest first.

    Args:
        rows: w [E, D].
        bias: b [E]; 0 by default.
    """
    rows = rows.double()
    powers = rows.square().sum(-1) + (0 if bias is None else 2 * bias.double())
    return torch.cat([rows, (powers.max() - powers).sqrt()[:, None]], 1)


def at_zero(points: torch.Tensor) -> torch.Tensor:
    """Points [N, D + 1] in fp64 with a last coordinate of 0, for `lifted` rows."""
    return torch.cat([points.double(), points.new_zeros(len(points), 1, dtype=torch.float64)], 1)


def same_sets(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Bool [N]: whether two choices [N, k] are the same, whatever their order."""
    return (one.sort(-1).values == other.sort(-1).values).all(-1)
