"""Rules: from scores to a selection.

A score is a logit: higher is better, and minus infinity forbids. Rules know nothing of rooms; hard pruning is
the rule `Fixed`, block-sparse is a unit and no rule. A parameter may be one number, or one a head (a tuple that
is laid along dimension -3 of the scores).
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

import torch

from sentei.core.errors import FileError, RuleError
from sentei.core.selection import Selection

PerHead = float | tuple[float, ...]
MAX_K = 2**31 - 1


class Rule(ABC):
    """Decides which candidates each query keeps."""

    def __call__(self, scores: torch.Tensor, *, forced: torch.Tensor | None = None, unit: int = 1) -> Selection:
        """The selection for `scores`.

        Args:
            scores: float [..., Q, C]; -inf forbids the candidate.
            forced: bool, broadcastable to `scores`; kept whatever the score, where permitted.
            unit: how many tokens a candidate stands for; only recorded.
        Returns:
            A selection of weight 1; ties go to the lower candidate number.
        Raises:
            RuleError: NaN or +inf among the scores, or a parameter that does not fit them.
        """
        if torch.isnan(scores).any() or torch.isposinf(scores).any():
            raise bad_scores(type(self).__name__)
        permitted = ~torch.isneginf(scores)
        forced = torch.zeros_like(permitted) if forced is None else forced.expand_as(permitted) & permitted
        return Selection.from_mask(self.keep(scores, permitted, forced), permitted, unit=unit)

    @abstractmethod
    def keep(self, scores: torch.Tensor, permitted: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        """Bool [..., Q, C]: what to keep; `forced` is a part of it."""

    def to_json(self) -> dict:
        """The rule as a JSON object: its name in lower case and its parameters."""
        return {"name": type(self).__name__.lower(),
                **{key: list(item) if isinstance(item, tuple) else item for key, item in asdict(self).items()}}


@dataclass(frozen=True)
class All(Rule):
    """Keeps every permitted candidate: the dense layer."""

    def keep(self, scores, permitted, forced):
        return permitted


@dataclass(frozen=True)
class TopK(Rule):
    """Keeps the k highest scores, forced candidates first and never fewer than they; ties go to the lower number."""

    k: int | tuple[int, ...]

    def __post_init__(self):
        _check_range("TopK", "k", self.k, 0, MAX_K)
        if not all(isinstance(k, int) for k in (self.k if isinstance(self.k, tuple) else (self.k,))):
            raise RuleError("TopK", expected="k as a whole number", got=repr(self.k), do="choose another k")

    def keep(self, scores, permitted, forced):
        rank = _rank(scores, forced)
        return (rank < _per_head(self.k, rank, "TopK")) | forced


@dataclass(frozen=True)
class Mass(Rule):
    """Keeps the fewest candidates whose softmax shares add up to `mass` (top-p); forced ones count first.

    `mass` 1 keeps every permitted candidate. A larger mass keeps a superset.
    """

    mass: PerHead

    def __post_init__(self):
        _check_range("Mass", "mass", self.mass, 0, 1)

    def keep(self, scores, permitted, forced):
        shares = _shares(scores)
        mass = _per_head(self.mass, shares, "Mass")
        order = _order(scores, forced)
        sorted_shares = shares.gather(-1, order)
        before = sorted_shares.cumsum(-1) - sorted_shares
        wanted = (before < mass) | (mass >= 1)
        return torch.zeros_like(permitted).scatter(-1, order, wanted) | forced


@dataclass(frozen=True)
class Threshold(Rule):
    """Keeps the candidates whose softmax share is at least `ratio` of the query's largest; 0 keeps all."""

    ratio: PerHead

    def __post_init__(self):
        _check_range("Threshold", "ratio", self.ratio, 0, 1)

    def keep(self, scores, permitted, forced):
        shares = _shares(scores)
        if shares.shape[-1] == 0:
            return permitted
        return (shares >= _per_head(self.ratio, shares, "Threshold") * shares.amax(-1, keepdim=True)) | forced


@dataclass(frozen=True)
class Capacity(Rule):
    """Each candidate keeps the share `capacity` of its queries with the highest scores (expert choice, depth).

    The number is rounded up, but k ÷ n of n queries is k and not, by rounding of the quotient, one more.
    It looks along the queries, so in a causal model a later query can push an earlier one out.
    """

    capacity: PerHead

    def __post_init__(self):
        _check_range("Capacity", "capacity", self.capacity, 0, 1)

    def keep(self, scores, permitted, forced):
        queries = permitted.sum(-2, keepdim=True).double()
        slots = torch.ceil(_per_head(self.capacity, queries, "Capacity") * queries - 1e-9)
        rank = _rank(scores.transpose(-1, -2), forced.transpose(-1, -2)).transpose(-1, -2)
        return (rank < slots) | forced


@dataclass(frozen=True)
class Fixed(Rule):
    """Keeps the same candidates whatever the scores: hard pruning, in every room.

    Args:
        ids: the kept candidate numbers, the same for every query.
    """

    ids: tuple[int, ...]

    def __post_init__(self):
        is_tuple = isinstance(self.ids, tuple)
        if not is_tuple or not all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in self.ids):
            raise RuleError("Fixed", expected="a tuple of candidate numbers from 0", got=repr(self.ids)[:200],
                            do="name candidates that exist")

    def keep(self, scores, permitted, forced):
        if self.ids and max(self.ids) >= scores.shape[-1]:
            raise RuleError("Fixed", expected=f"ids in 0..{scores.shape[-1] - 1}", got=repr(self.ids)[:200],
                            do="name candidates that exist")
        keep = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        keep[list(self.ids)] = True
        return keep | forced


RULES = {"all": All, "topk": TopK, "mass": Mass, "threshold": Threshold, "capacity": Capacity, "fixed": Fixed}


def rule_from_json(value: dict) -> Rule:
    """The rule written by `Rule.to_json`; unknown names and keys are refused.

    Raises:
        FileError: not a rule, or a parameter outside its range.
    """
    parameters = dict(value) if isinstance(value, dict) else {}
    name = parameters.pop("name", None)
    rule = RULES.get(name) if isinstance(name, str) else None
    if rule is None or set(parameters) != set(rule.__dataclass_fields__):
        raise FileError("rule", expected=f"one of {', '.join(RULES)} with its parameters", got=repr(value)[:200],
                        do="write plans with sentei")
    try:
        return rule(**{key: tuple(item) if isinstance(item, list) else item for key, item in parameters.items()})
    except RuleError as error:
        raise FileError("rule", expected=error.expected, got=error.got, do="write plans with sentei") from error


def bad_scores(rule: str) -> RuleError:
    """What a rule says of NaN or +inf among its scores."""
    return RuleError(rule, expected="finite scores, or -inf to forbid", got="NaN or +inf",
                     do="look for overflow before the scores")


def _check_range(where: str, name: str, value: PerHead, low: float, high: float) -> None:
    items = value if isinstance(value, tuple) else (value,)
    numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)
    if not items or not numbers or not all(low <= item <= high for item in items):
        raise RuleError(where, expected=f"{name} from {low} to {high}, one number or one a head", got=repr(value)[:200],
                        do=f"choose another {name}")


def _per_head(value: PerHead, like: torch.Tensor, where: str) -> torch.Tensor:
    """`value` in the dtype of `like` [..., H, Q, C], against which it broadcasts."""
    if not isinstance(value, tuple):
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    if like.dim() < 3 or like.shape[-3] != len(value):
        raise RuleError(where, expected=f"scores [..., H={len(value)}, Q, C]", got=str(list(like.shape)),
                        do="give one number, or one a head")
    return torch.tensor(value, dtype=like.dtype, device=like.device)[:, None, None]


def _shares(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the candidates in fp32 or wider; a row with nothing permitted is all 0."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.nan_to_num(wide.softmax(-1), nan=0.0)


def _order(scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Candidates from first to last choice: forced ones, then by score, ties by number."""
    return torch.sort(scores.masked_fill(forced, torch.inf), dim=-1, descending=True, stable=True).indices


def _rank(scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """The place of each candidate in `_order`, from 0."""
    order = _order(scores, forced)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, places)
