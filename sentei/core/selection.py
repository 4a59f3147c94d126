"""What each query keeps, and with what weight.

Letters: Q queries, C candidates, K kept slots. Leading dimensions (batch, heads) are free.
"""

from dataclasses import dataclass, replace

import torch

from sentei.core.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The candidates each query keeps.

    Args:
        ids: int64 [..., Q, K]; ascending candidate numbers, -1 where a slot is empty.
        weights: float [..., Q, K]; what a kept candidate counts, 0 where a slot is empty.
        permitted: int64 [..., Q]; how many candidates the query was allowed to keep.
        num_candidates: C.
        unit: how many tokens (neurons, rows) one candidate stands for.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    permitted: torch.Tensor
    num_candidates: int
    unit: int = 1

    def __post_init__(self):
        if self.ids.shape != self.weights.shape or self.ids.shape[:-1] != self.permitted.shape:
            raise ShapeError("Selection", expected="ids and weights [..., Q, K], permitted [..., Q]",
                             got=f"{list(self.ids.shape)}, {list(self.weights.shape)}, {list(self.permitted.shape)}",
                             do="build selections with a rule or with Selection.from_mask")

    @classmethod
    def from_mask(cls, keep: torch.Tensor, permitted: torch.Tensor, *, unit: int = 1) -> "Selection":
        """A selection of weight 1 from two bool masks [..., Q, C]; what is not permitted is never kept.

        Cost: one stable sort of Q·C booleans, where not everything is kept.
        """
        keep = keep & permitted
        count = keep.sum(-1)
        least, width = (int(number) for number in count.aminmax()) if count.numel() else (0, 0)
        if least == keep.shape[-1]:
            ids = torch.arange(width, device=keep.device).expand(keep.shape)
            return cls(ids=ids, weights=torch.ones(keep.shape, device=keep.device), permitted=permitted.sum(-1),
                       num_candidates=width, unit=unit)
        ids = torch.sort(~keep, dim=-1, stable=True).indices[..., :width]
        filled = torch.arange(width, device=keep.device) < count.unsqueeze(-1)
        ids = torch.where(filled, ids, -1)
        return cls(ids=ids, weights=filled.to(torch.get_default_dtype()), permitted=permitted.sum(-1),
                   num_candidates=keep.shape[-1], unit=unit)

    @property
    def is_everything(self) -> bool:
        """Whether every query keeps every candidate. Cost: a look at the ids, if there are as many slots."""
        if self.ids.shape[-1] != self.num_candidates:
            return False
        return bool((self.ids == torch.arange(self.num_candidates, device=self.ids.device)).all())

    def mask(self) -> torch.Tensor:
        """Bool [..., Q, C]: true where the candidate is kept."""
        if self.is_everything:
            return torch.ones(self.ids.shape, dtype=torch.bool, device=self.ids.device)
        mask = torch.zeros(*self.ids.shape[:-1], self.num_candidates + 1, dtype=torch.bool, device=self.ids.device)
        slots = torch.where(self.ids < 0, self.num_candidates, self.ids)
        return mask.scatter(-1, slots, True)[..., :-1]

    def count(self) -> torch.Tensor:
        """Int64 [..., Q]: candidates kept by each query."""
        return (self.ids >= 0).sum(-1)

    def density(self) -> float:
        """Kept ÷ permitted, over all queries; 1.0 when nothing was permitted."""
        permitted = int(self.permitted.sum())
        return int(self.count().sum()) / permitted if permitted else 1.0

    def load(self) -> torch.Tensor:
        """Int64 [..., C]: how many queries keep each candidate."""
        return self.mask().sum(-2)

    def flip(self) -> "Selection":
        """The candidates' view: queries become candidates and candidates become queries (expert choice).

        `permitted` then counts the queries that keep the candidate: who was merely allowed is not stored.
        """
        keep = self.mask().transpose(-1, -2)
        flipped = Selection.from_mask(keep, keep, unit=1)
        return flipped.weigh(self.dense_weights().transpose(-1, -2))

    def dense_weights(self) -> torch.Tensor:
        """Float [..., Q, C]: the weights, 0 where a candidate is not kept."""
        if self.is_everything:
            return self.weights
        dense = self.weights.new_zeros(*self.ids.shape[:-1], self.num_candidates + 1)
        slots = torch.where(self.ids < 0, self.num_candidates, self.ids)
        return dense.scatter(-1, slots, self.weights)[..., :-1]

    def weigh(self, weights: torch.Tensor) -> "Selection":
        """The same choice, weighed by `weights` [..., Q, C]: the number that chose need not be the one that weighs."""
        if self.is_everything:
            return replace(self, weights=weights)
        taken = weights.gather(-1, self.ids.clamp(min=0))
        return replace(self, weights=torch.where(self.ids < 0, torch.zeros_like(taken), taken))

    def weigh_softmax(self, scores: torch.Tensor) -> "Selection":
        """The same choice, weighed by the softmax of `scores` [..., Q, C] over what is kept; an empty query gets 0."""
        if self.is_everything:
            return replace(self, weights=scores.softmax(-1))
        empty = self.ids < 0
        taken = scores.gather(-1, self.ids.clamp(min=0)).masked_fill(empty, -torch.inf)
        weights = taken.softmax(-1)
        return replace(self, weights=torch.where(empty, torch.zeros_like(weights), weights))
