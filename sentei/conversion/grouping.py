"""The neurons of a feed-forward network put into experts, and the router that foretells them, both in closed form.

The size of a neuron, |h_f| · ‖down_f‖, is foretold from the token by ridge regression on calibration text,

    size_f(x) ≈ w_f · (x, 1),      W = (Σ x₁ x₁ᵀ + λ)⁻¹ Σ x₁ sizeᵀ,

and so is an expert's, the sum over its neurons, by the sum of their rows: the router. Neurons belong together whose
foretold sizes rise and fall together, because that is all a router can see; those that are large whatever the token
are shared by all tokens.
References: MoEfication 2110.01786 (groups that act together), CMoE 2502.04416 (shared ones); the ridge is ours.
"""

from typing import NamedTuple

import torch


class Groups(NamedTuple):
    """Neurons in experts.

    Args:
        shared: int64 [S], the neurons that every token keeps.
        experts: int64 [E, U], the neurons of each expert.
        weight, bias: float64 [E, D] and [E], the router: the foretold size of each expert.
    """

    shared: torch.Tensor
    experts: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def group(inputs: torch.Tensor, sizes: torch.Tensor, *, unit: int, shared: int, damp: float = 0.01) -> Groups:
    """Experts of `unit` neurons, after `shared` times as many that all tokens keep.

    Args:
        inputs: float64 [D + 1, D + 1], Σ x₁ x₁ᵀ with x₁ = (x, 1).
        sizes: float64 [D + 1, F], Σ x₁ sizeᵀ; F - shared · unit is a multiple of unit.
        damp: the ridge, as a share of the mean diagonal of the inputs' part.
    Cost: (D + 1)³ / 3 + (D + 1) · F · (D + F) multiply-adds in fp64.
    """
    rows, width = inputs[-1, -1].clamp(min=1), len(inputs) - 1
    ridge = damp * inputs.diagonal()[:width].mean()
    raised = inputs.clone()
    raised.diagonal()[:width] += ridge
    rule = torch.cholesky_solve(sizes, torch.linalg.cholesky(raised))
    order = sizes[-1].argsort(descending=True, stable=True)
    always, free = order[:shared * unit].sort().values, order[shared * unit:]
    around = inputs - torch.outer(inputs[-1], inputs[-1]) / rows  # what is left of a constant is nothing
    foretold = rule[:, free].T @ around @ rule[:, free] / rows
    experts = free[_together(foretold, unit)]
    router = rule[:, experts].sum(2).T
    return Groups(always, experts, router[:, :width], router[:, width])


def _together(covariance: torch.Tensor, unit: int) -> torch.Tensor:
    """Int64 [E, unit]: the one that varies most, with those that go with it; then the same with the others."""
    spread = covariance.diagonal().clamp(min=0).sqrt()
    alike = covariance / (spread[:, None] * spread).clamp(min=torch.finfo(torch.float64).tiny)
    free, groups = torch.ones(len(spread), dtype=torch.bool, device=spread.device), []
    while bool(free.any()):
        first = int(spread.masked_fill(~free, -1).argmax())
        near = alike[first].masked_fill(~free, -torch.inf)
        near[first] = torch.inf
        chosen = near.topk(unit).indices
        free[chosen] = False
        groups.append(chosen.sort().values)
    return torch.stack(groups)
