"""How few candidates hold a share of the mass."""

import torch

from sentei.core.errors import RuleError


def fewest(shares: torch.Tensor, mass: float) -> torch.Tensor:
    """How many of the largest shares [..., C] it takes to hold `mass` of their sum, int64 [...].

    Rows need not add up to 1; a row of zeros takes none. As the rule `Mass` counts, without its selection.

    Raises:
        RuleError: a mass that is not above 0 and at most 1.
    """
    if not 0 < mass <= 1:
        raise RuleError("fewest", expected="a mass above 0 and at most 1", got=repr(mass), do="choose another mass")
    ordered = shares.sort(dim=-1, descending=True).values.cumsum(-1)
    total = ordered[..., -1:]
    return ((ordered < mass * total).sum(-1) + 1) * (total[..., 0] > 0)
