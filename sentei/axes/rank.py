"""rank: tokens keep rank-one directions of a low-rank change to a layer.

| query | candidate | score used to choose | value if kept | usual rule |
|---|---|---|---|---|
| token | rank-one direction (a_r, b_r) | log(|a_r·x| · ‖b_r‖) | the row s b_r, weighed by a_r·x | All, TopK |

    y = W x + c + s Σ over the directions r kept of  (a_r·x) b_r        s = α / R,  or α / √R

All is plain LoRA, as two products. The logarithm keeps the order of the sizes and makes Mass and Threshold speak of
shares of their sum. Choosing needs every a_r·x, so that a rule saves at most the second product: this room tells which
directions a token needs, and hardly saves time.
References: Hu et al. 2021, arXiv 2106.09685 (LoRA); Kalajdzievski 2023, arXiv 2312.03732 (α / √R).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.axis import Axis
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, ShapeError, UnsupportedError
from sentei.core.precision import are_alike
from sentei.core.rules import MAX_K, All, Capacity, Rule, rule_from_json
from sentei.core.selection import Selection

SCALINGS = {"rank": lambda alpha, rank: alpha / rank, "root": lambda alpha, rank: alpha / rank**0.5}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What an adapter is, and how its directions are chosen.

    Args:
        rule: All is plain LoRA.
        rank: R, the number of directions.
        alpha: α, the numerator of the scale.
        scaling: "rank" for α / R, "root" for α / √R (rank-stabilised).
        dropout: share of the adapter's inputs that training zeroes.
    """

    rule: Rule = field(default_factory=All)
    rank: int = 8
    alpha: float = 16.0
    scaling: str = "rank"
    dropout: float = 0.0

    def __post_init__(self):
        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        checks = {
            # Capacity looks along the tokens: what an earlier one keeps would depend on later ones.
            "rule a Rule that looks at each token alone": (isinstance(self.rule, Rule)
                                                           and not isinstance(self.rule, Capacity)),
            "rank a whole number from 1": type(self.rank) is int and 1 <= self.rank <= MAX_K,
            "alpha a finite number": is_number(self.alpha) and abs(self.alpha) < float("inf"),
            f"scaling one of {', '.join(SCALINGS)}": isinstance(self.scaling, str) and self.scaling in SCALINGS,
            "dropout from 0 and below 1": is_number(self.dropout) and 0 <= self.dropout < 1,
        }
        for expected, holds in checks.items():
            if not holds:
                raise RuleError("rank.Config", expected=expected, got=repr(self), do="change that field")

    @property
    def scale(self) -> float:
        """s, the factor on the adapter."""
        return SCALINGS[self.scaling](self.alpha, self.rank)

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {**asdict(self), "rule": self.rule.to_json()}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("rank.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="write plans with sentei")
        rule = rule_from_json(value["rule"])
        try:
            return cls(**{**value, "rule": rule})
        except RuleError as error:
            raise FileError("rank.Config", expected=error.expected, got=repr(value)[:200],
                            do="write plans with sentei") from error


class Rank(Axis):
    """The change Σ (a_r·x) b_r, with the directions a rule keeps. It has no parameters.

    Inputs: x [..., I], a [R, I], b [O, R] and optionally `onto` [..., O], to which the change is added; or, for E
    layers at once, x [E, T, I], a [E, R, I], b [E, O, R] and `onto` [E, T, O]. Returns [..., O]. Gradients flow
    through what is kept, not through the choice.

    Args:
        config: how to choose, and the scale.
    """

    def __init__(self, config: Config):
        super().__init__(config.rule)
        self.scale = config.scale

    def score(self, x, a, b, onto=None):
        _check(x, a, b, onto)
        if isinstance(self.rule, All):
            return torch.zeros(*x.shape[:-1], a.shape[-2], device=x.device)
        with torch.no_grad():
            return self.sizes(_project(x, a), b)

    def select(self, scores, x, a, b, onto=None):
        return super().select(scores, x, a, b, onto).weigh(_project(x, a))

    def apply(self, selection, x, a, b, onto=None):
        if _is_everything(selection):
            return self.two_products(selection.weights, b, onto)
        return self.kept_rows(selection, b, onto)

    def account(self, selection, x, a, b, onto=None):
        kept, permitted = int(selection.count().sum()), int(selection.permitted.sum())
        work = x.shape[-1] + b.shape[-2]
        output = x.numel() // max(x.shape[-1], 1) * b.shape[-2]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (x, a, b)) + output * x.element_size()
        # The projections of what is dropped were made to choose, and for nothing else.
        cost = Cost(multiply_adds=kept * work, dense_multiply_adds=permitted * work, bytes=moved,
                    choosing=(permitted - kept) * x.shape[-1])
        if _is_everything(selection):
            return cost, "two_products", "every direction is kept"
        return cost, "kept_rows", "the second product reads the rows that are kept"

    def shortcut(self, x, a, b, onto=None):
        _check(x, a, b, onto)
        projected = _project(x, a)
        if isinstance(self.rule, All):
            return self.two_products(projected, b, onto)
        selection = self.rule(self.sizes(projected.detach(), b.detach())).weigh(projected)
        return self.apply(selection, x, a, b, onto)

    def sizes(self, projected: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[..., R]: the number that chooses, in float32 or wider; finite where a size is 0, which forbids nothing."""
        wide = torch.promote_types(projected.dtype, torch.float32)
        least = torch.finfo(wide).tiny
        norms = torch.linalg.vector_norm(b, dim=-2, keepdim=True, dtype=wide)
        norms = norms[0] if b.dim() == 2 else norms
        return projected.to(wide).abs().clamp(min=least).log() + norms.clamp(min=least).log()

    def two_products(self, weights: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """onto + s · weights · bᵀ for weights [..., R]; scale and sum are taken inside the product."""
        if onto is None:
            return (F.linear(weights, b) if b.dim() == 2 else weights @ b.mT) * self.scale
        if b.dim() == 3:
            return torch.baddbmm(onto, weights, b.mT, alpha=self.scale)
        flat = onto.reshape(-1, onto.shape[-1]), weights.reshape(-1, weights.shape[-1])
        return torch.addmm(*flat, b.t(), alpha=self.scale).view(onto.shape)

    def kept_rows(self, selection: Selection, b: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """onto + s · Σ over what is kept of its weight times its row of bᵀ; nothing is read of what is not kept."""
        ids, weights = selection.ids, selection.weights
        rows, kept = b.mT.flatten(0, -2).to(weights.dtype).contiguous(), ids >= 0
        if b.dim() == 3:
            ids = ids + selection.num_candidates * torch.arange(len(b), device=b.device)[:, None, None]
        counts = kept.sum(-1).flatten()
        change = F.embedding_bag(ids[kept], rows, counts.cumsum(0) - counts, mode="sum",
                                 per_sample_weights=weights[kept] * self.scale)
        change = change.view(*selection.ids.shape[:-1], b.shape[-2])
        return change if onto is None else onto.to(change.dtype) + change


class Adapter(nn.Module):
    """A frozen weight [..., O, I] and the factors A [..., R, I] and B [..., O, R] of its change: what layers share."""

    def adopt(self, config: Config) -> None:
        """Gives the weight new factors: A as torch draws a linear layer, B of zeros, of its dtype and on its device."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        *lead, outputs, inputs = self.weight.shape
        bound = 1 / max(inputs, 1) ** 0.5
        self.config = config
        self.a = nn.Parameter(self.weight.new_empty(*lead, config.rank, inputs).uniform_(-bound, bound))
        self.b = nn.Parameter(self.weight.new_zeros(*lead, outputs, config.rank))
        self.rank = Rank(config)
        self.register_buffer("merged", None, persistent=False)

    @torch.no_grad()
    def merge(self) -> None:
        """Computes W + s·BA, with which the layer then runs as fast as without an adapter.

        The weight stays beside it, untouched: `unmerge` is exact, and the state_dict is the same either way. While
        merged the adapter is not trained, and changes of it are not seen.

        Raises:
            RuleError: a rule other than All, whose choice depends on the token.
        Cost: the weight once more in memory.
        """
        self.merged = None
        self.merged = self.whole()

    def whole(self) -> torch.Tensor:
        """W + s·BA, through which gradients reach the factors; the merged weight, where there is one.

        Raises:
            RuleError: as `merge` does.
        """
        if self.merged is not None:
            return self.merged
        if not isinstance(self.rank.rule, All):
            raise RuleError("rank", expected="the rule All to merge", got=repr(self.rank.rule),
                            do="merge adapters that keep every direction")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        change = self.b.to(wide) @ self.a.to(wide) * self.rank.scale
        return (self.weight.to(wide) + change).to(self.weight.dtype)

    def unmerge(self) -> None:
        """Undoes `merge`, to the bit."""
        self.merged = None

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None, expert: int | None = None) -> torch.Tensor:
        """x through the weight and its adapter, of one expert or of all; or through the merged weight."""
        weight = self.weight if self.merged is None else self.merged
        weight = weight if expert is None else weight[expert]
        y = F.linear(x, weight, bias) if weight.dim() == 2 else x @ weight.mT
        if self.merged is not None:
            self.rank.tap.bypass("merged weights")
            return y
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        return self.rank(x, a, b, y)


class LowRank(Adapter, nn.Linear):
    """A linear layer with an adapter: x [..., I] → [..., O]. Its weight and bias keep their names.

    Args:
        layer: whose weight and bias it takes over, as they are, without a gradient.
        config: of the adapter.
    """

    def __init__(self, layer: nn.Linear, config: Config):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.adopt(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer and its adapter."""
        return self.run(x, self.bias)


class LowRankStack(Adapter):
    """E linear layers of one shape with an adapter each: x [E, T, I] → [E, T, O].

    It is a sequence of E functions [N, I] → [N, O] as well, of which `kernels.routing.route` takes such: an adapter
    then costs what its own tokens cost, and nothing is computed for experts that nobody keeps.

    Args:
        weight: [E, O, I], taken over as it is, without a gradient.
        config: of each adapter.
    Raises:
        ShapeError: a weight of other dimensions, or of no expert.
    """

    def __init__(self, weight: torch.Tensor, config: Config):
        super().__init__()
        if weight.dim() != 3 or not len(weight):
            raise ShapeError("rank", expected="weight [E, O, I], at least one expert", got=str(list(weight.shape)),
                             do="stack the experts along the first dimension")
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.adopt(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every expert on its own rows of x [E, T, I]."""
        return self.run(x)

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, e: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Expert e, a function from [N, I] to [N, O]."""
        if not -len(self) <= e < len(self):
            raise IndexError(e)
        return lambda x: self.run(x, expert=e)


def from_dense(layer: nn.Linear, config: Config) -> LowRank:
    """The same layer with an adapter: a new one, which changes nothing yet, or that of the layer with another rule.

    Raises:
        ShapeError: the layer's adapter has another rank.
        UnsupportedError: a subclass of nn.Linear, whose own forward would be lost; a merged layer.
    """
    if type(layer) not in (nn.Linear, LowRank) or getattr(layer, "merged", None) is not None:
        raise UnsupportedError("rank", expected="an nn.Linear, or a layer with an adapter that is not merged",
                               got=repr(layer)[:200], do="name other layers, or unmerge first")
    adapted = LowRank(layer, config)
    if isinstance(layer, LowRank):
        if layer.a.shape != adapted.a.shape:
            raise ShapeError("rank", expected=f"an adapter of rank {config.rank}", got=str(len(layer.a)),
                             do="keep the rank of the layer")
        with torch.no_grad():
            adapted.a.copy_(layer.a)
            adapted.b.copy_(layer.b)
    return adapted.train(layer.training)


def _is_everything(selection: Selection) -> bool:
    return selection.ids.numel() > 0 and bool((selection.count() == selection.num_candidates).all())


def _project(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """[..., R]: a_r·x, the number that weighs."""
    return F.linear(x, a) if a.dim() == 2 else x @ a.mT


def _check(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None) -> None:
    # A layer calls this for every token it decodes, so that the usual case must be told in few steps.
    stacked = a.dim() == 3 and b.dim() == 3 and x.dim() == 3 and len(a) == len(b) == len(x)
    fits = ((stacked or a.dim() == b.dim() == 2 and x.dim() >= 1)
            and b.shape[-1] == a.shape[-2] and x.shape[-1] == a.shape[-1]
            and (onto is None or onto.shape == (*x.shape[:-1], b.shape[-2])))
    if not fits:
        raise ShapeError("rank", expected="x [..., I], a [R, I], b [O, R] and onto [..., O], or all with E in front",
                         got=", ".join(str(list(t.shape)) for t in (x, a, b, onto) if t is not None),
                         do="give tensors that fit")
    if not are_alike(x, a, b, onto):
        raise ShapeError("rank", expected="one floating dtype and one device",
                         got=", ".join(f"{t.dtype} on {t.device}" for t in (x, a, b, onto) if t is not None),
                         do="convert them")
