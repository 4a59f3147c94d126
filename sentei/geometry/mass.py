"""How few candidates hold a share of the mass."""

from collections.abc import Sequence

import torch

from sentei.core.errors import RuleError


def fewest(shares: torch.Tensor, masses: Sequence[float]) -> torch.Tensor:
    """How many of the largest shares [..., C] it takes to hold each of `masses` of their sum, int64 [len(masses), ...].

    Rows need not add up to 1; a row of zeros takes none. As the rule `Mass` counts, without its selection.

    Raises:
        RuleError: a mass that is not above 0 and at most 1.
    """
    if not masses or not all(0 < mass <= 1 for mass in masses):
        raise RuleError("fewest", expected="masses above 0 and at most 1", got=repr(masses), do="choose other masses")
    ordered = shares.sort(dim=-1, descending=True).values.cumsum(-1)
    total = ordered[..., -1:]
    return torch.stack([((ordered < mass * total).sum(-1) + 1) * (total[..., 0] > 0) for mass in masses])
