"""depth: tokens keep, or skip, a whole block.

| query | candidate | score used to choose | value if kept | usual rule |
| token | the block itself (one candidate) | x·gate | block(x) | Capacity along the tokens, then a predictor |

    y_t = x_t + r_t · block(x)_t  for the tokens kept,   y_t = x_t  for the others,      r_t = x_t · gate + bias

Mixture-of-Depths. The score r chooses and weighs, which puts the gate on the path of the gradient; a block that was
converted starts with gate 0 and bias 1, and so as it was. Kept rows are gathered, computed and added back; the others
cost nothing. Attention inside the block sees kept tokens alone, at their own positions.

In training `Capacity` looks along the sequence: whether a token is kept depends on later ones. In evaluation a causal
predictor, a logistic regression on x ÷ its root mean square without a gradient into x, says whether the token would
have been kept. It is linear because the score it imitates is linear. It sees no size because the first block reads
embeddings a hundredth of what the last one reads, and one rate could teach only one of them. Skipped tokens have no
keys and values in the block's cache, as in the paper; the cache knows which positions it holds.
Reference: Raposo et al. 2024, arXiv 2404.02258.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.axis import Axis
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.growing import Cache
from sentei.core.precision import in_full, widened
from sentei.core.rotation import rotate
from sentei.core.rows import add, dots, places_of, take
from sentei.core.rules import All, Capacity, Rule, bad_scores, rule_from_json
from sentei.core.selection import Selection
from sentei.core.shapes import check_shape
from sentei.kernels.attention import Grid, Tiles, attend

TILE = 64  # the block size for which `attend` measures its dense plan
TINY = 1e-6  # added to the mean square of what the predictor reads
PARTS = ("attention", "network", "block")


@dataclass(frozen=True, kw_only=True)
class Config:
    """How depth is chosen.

    Args:
        rule: Capacity is the share of the tokens that is kept, along the sequence in training and by the predictor in
            evaluation. All is the dense block and Fixed(()) no block at all. A token has one candidate, which every
            rule that looks at a token alone keeps, unless it keeps nothing.
        threshold: the probability from which the predictor keeps a token; 0 keeps every one.
        part: what the block is in a pretrained layer: its "attention", its "network", or the whole "block" of both.
    """

    rule: Rule = field(default_factory=All)
    threshold: float = 0.5
    part: str = "block"

    def __post_init__(self):
        plain = isinstance(self.rule, Rule) and not (
            isinstance(self.rule, Capacity) and isinstance(self.rule.capacity, tuple))
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        checks = {"rule a Rule, of one number if Capacity": plain,
                  "threshold from 0 to 1": number and 0 <= self.threshold <= 1,
                  f"part one of {', '.join(PARTS)}": self.part in PARTS}
        for expected, holds in checks.items():
            if not holds:
                raise RuleError("depth.Config", expected=expected, got=repr(self), do="change that field")

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {**asdict(self), "rule": self.rule.to_json()}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("depth.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="write plans with sentei")
        try:
            return cls(**{**value, "rule": rule_from_json(value["rule"])})
        except RuleError as error:
            raise FileError("depth.Config", expected=error.expected, got=repr(value)[:200],
                            do="write plans with sentei") from error


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a block is told of the rows it is given, in ascending order.

    A slot of the batch with fewer rows than another is padded with zeros: behind its rows, where causality alone hides
    them; before them where the cache holds rows, so that the last row is the last token of every slot.

    Args:
        positions: int64 [B, N], of the rows among the real tokens of the sequence; -1 for padding.
        cache: of the block, to which it adds the rows' keys and values; None outside generation.
        tasks: int64 [B], the task of each sequence, for a block that routes by it; or None.
    """

    positions: torch.Tensor
    cache: Cache | None = None
    tasks: torch.Tensor | None = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention among these rows and those in the cache; [B, N, H, D] and [B, N, G, D] → [B, N, H, D]."""
        lengths = None
        if self.cache is not None:
            is_first = self.cache.is_empty
            keys, values = self.cache.extend(key, value, self.positions)
            if not is_first:
                key, value, real = keys, values, (self.cache.positions >= 0).sum(1)
                if int(real.min()) < key.shape[1]:
                    lengths = torch.stack([key.shape[1] - real, torch.full_like(real, key.shape[1])], 1)
        grid = Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=TILE, key_block=TILE,
                    lengths=lengths)
        return attend(query, key, value, Tiles(grid=grid))


Block = Callable[[torch.Tensor, Rows], torch.Tensor]
Work = Callable[[torch.Tensor, torch.Tensor], int]


class Depth(Axis):
    """A residual block that only some tokens pass: x [B, T, D] → [B, T, D], optionally with lengths, cache and tasks.

    Inputs: x; lengths int64 [B, 2], start and stop of the real tokens (padding is never kept); a `Cache`, in
    evaluation, to which the rows kept are added; tasks, which the block is told (`Rows`). With a cache a token's choice
    and output are those without one, if x has the same bits (see `predict`).

    Args:
        config: how to choose.
        block: from hidden [B, N, D] and `Rows` to the update [B, N, D], without the residual. A block that looks at
            other rows does so through `Rows`; one attention a block may use the cache.
        width: D.
        work: from the rows computed [B] and those in the cache [B] to multiply-adds; by default those of the block's
            linear layers, once a row.
    Raises:
        RuleError: NaN among the scores; or a cache in training, where the choice needs the whole sequence.
    """

    def __init__(self, config: Config, block: Block, *, width: int, work: Work | None = None):
        super().__init__(config.rule)
        self.config = config
        self.block = block
        self.gate = nn.Linear(width, 1)
        self.predictor = nn.Linear(width, 1)
        nn.init.zeros_(self.predictor.weight)  # at probability one half, which the usual threshold keeps
        nn.init.zeros_(self.predictor.bias)
        self.work = self.linear_work if work is None else work

    def score(self, x, lengths=None, cache=None, tasks=None):
        self.check(x, lengths)
        if lengths is None:
            return self.gated(x)
        padding = ~real_tokens(lengths, x)[..., None]
        return self.gated(x.masked_fill(padding, 0)).masked_fill(padding, -torch.inf)

    def check(self, x: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Raises a ShapeError unless the inputs fit together and this room."""
        sizes = check_shape("depth", "x", x, "B T D", D=self.gate.in_features)
        if lengths is not None:
            check_shape("depth", "lengths", lengths, "B P", B=sizes["B"], P=2)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """The gate's scores [B, T, 1] of x, in fp32 or wider, under autocast too."""
        with in_full(x):
            return dots(widened(x), widened(self.gate.weight[0])).unsqueeze(-1) + widened(self.gate.bias)

    def select(self, scores, x, lengths=None, cache=None, tasks=None):
        if not self.looks_along:
            return super().select(scores, x, lengths, cache)
        if self.training and cache is not None:
            raise RuleError("depth", expected="no cache while Capacity looks along the sequence", got="a cache",
                            do="call eval() before generating")
        if self.training:
            return super().select(scores, x, lengths, cache)
        kept, permitted = self.chosen(x, lengths), ~scores.isneginf()
        if kept is None or not bool((scores.isfinite() | ~permitted).all()):
            raise bad_scores("depth")
        return Selection.from_mask(kept[..., None], permitted)

    def weigh(self, selection, scores, *inputs):
        return selection.weigh(scores)

    def apply(self, selection, x, lengths=None, cache=None, tasks=None):
        return self.passed(selection.mask()[..., 0], selection.dense_weights(), x, lengths, cache, tasks)

    def shortcut(self, x, lengths=None, cache=None, tasks=None):
        """The same where tokens are compared, but that the gate is asked again of the rows kept, whose gradient then
        needs no others; and where a predictor chooses it is asked of them alone."""
        kept = None if self.training and cache is not None or not self.looks_along else self.chosen(x, lengths)
        return None if kept is None else self.passed(kept, None, x, lengths, cache, tasks)

    @torch.no_grad()
    def chosen(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor | None:
        """Bool [B, T] of what `select` keeps; None where it refuses."""
        if self.training:
            scores = self.score(x, lengths)
            permitted = scores > -torch.inf
            kept = self.rule.keep(scores, permitted, torch.zeros_like(permitted)) & permitted
            return kept[..., 0] if bool((scores < torch.inf).all()) else None
        self.check(x, lengths)
        logits, permitted = self.predict(x)[..., 0], self.positions(x, lengths, None) >= 0
        cut = torch.logit(torch.tensor(self.config.threshold, dtype=torch.float64)).item()
        return (logits >= cut) & permitted if bool((logits.isfinite() | ~permitted).all()) else None

    def passed(self, kept: torch.Tensor, weights: torch.Tensor | None, x, lengths, cache, tasks) -> torch.Tensor:
        """x with the update of the rows kept, bool [B, T], weighed by `weights` [B, T, 1]; if None, by the gate."""
        counts, positions = kept.sum(1), self.positions(x, lengths, cache)
        least, rows = (int(number) for number in counts.aminmax()) if len(counts) else (0, 0)
        places = places_of(kept, rows, last=cache is not None and not cache.is_empty)
        hidden, rest = take(x, places) if least < x.shape[1] else (x, x)
        own = positions.gather(1, places)
        if least < rows:  # others are computed and count 0 (see Rows)
            real = kept.gather(1, places)
            hidden, own = hidden.where(real[..., None], 0), own.where(real, -1)
        weights = self.gated(hidden) if weights is None else weights.gather(1, places[..., None])
        if least < rows:
            weights = weights.where(real[..., None], 0)
        if not bool(weights.isfinite().all()):
            raise bad_scores("depth")
        if cache is not None:
            cache.show((positions >= 0).sum(1))
        if rows == 0:
            return x.clone()
        update = weights * self.block(hidden, Rows(positions=own, cache=cache, tasks=tasks))
        return x + update.to(x.dtype) if hidden is x else add(rest, places, update)

    def account(self, selection, x, lengths=None, cache=None, tasks=None):
        counts, tokens = selection.count().sum(1), selection.permitted.sum(1)
        none = torch.zeros_like(tokens)
        held = none if cache is None or cache.positions is None else (cache.positions >= 0).sum(1)
        seen = none if cache is None or cache.seen is None else cache.seen
        by_predictor = self.looks_along and not self.training
        choosing = int(tokens.sum()) * x.shape[-1] * (2 if by_predictor else 1)
        # A slot is padded to as many rows as any keeps, and padding is computed.
        rows = counts.amax().expand_as(counts) if counts.numel() else counts
        cost = Cost(multiply_adds=self.work(rows, held), dense_multiply_adds=self.work(tokens, seen),
                    bytes=2 * x.numel() * x.element_size(), choosing=choosing)
        if not self.looks_along:
            return cost, "eager", "each token alone"
        return cost, "eager", ("by the predictor, from the token alone" if by_predictor
                               else "along the sequence, later tokens included")

    @property
    def looks_along(self) -> bool:
        """Whether the rule compares tokens, so that generation needs the predictor."""
        return isinstance(self.rule, Capacity) and self.rule.capacity < 1

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., 1] of x [..., D] that a token is among those kept; no gradient reaches x.

        Summed row by row, and not by a matrix product: for the same bits of x a token's logit has the same bits
        whatever stands beside it. What comes before may round x otherwise in a prompt than in generation, and then a
        token whose logit is within that of the threshold may be kept in the one and not in the other.
        """
        x = x.detach()
        size = (torch.linalg.vector_norm(x, dim=-1) * x.shape[-1] ** -0.5).square()
        return (dots(x, self.predictor.weight[0]) * (size + TINY).rsqrt()).unsqueeze(-1) + self.predictor.bias

    def predictor_loss(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The predictor's binary cross-entropy, a mean over the real tokens, against what the rule keeps of x.

        It trains the predictor alone and may be added to any loss, once a call of the block. Cost: the choice again.
        """
        with torch.no_grad():
            scores = self.score(x, lengths)
            kept, permitted = self.rule(scores).mask(), ~scores.isneginf()
        logits, wanted = self.predict(x[permitted[..., 0]]), kept[permitted].to(x.dtype)
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], wanted, reduction="sum")
        return loss / permitted.sum().clamp(min=1)

    def positions(self, x: torch.Tensor, lengths: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        """Int64 [B, T]: the place of each token among the real ones of its sequence; -1 for padding."""
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        if lengths is not None:
            places = (places - lengths[:, :1]).where(real_tokens(lengths, x), -1)
        if cache is None or cache.seen is None:
            return places
        return (places + cache.seen[:, None]).where(places >= 0, -1)

    def linear_work(self, rows: torch.Tensor, held: torch.Tensor) -> int:
        """Multiply-adds of the block's linear layers for `rows` [B]; whatever else it does is not counted."""
        modules = self.block.modules() if isinstance(self.block, nn.Module) else ()
        return int(rows.sum()) * sum(part.weight.numel() for part in modules if isinstance(part, nn.Linear))


def real_tokens(lengths: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Bool [B, T]: the tokens between start and stop."""
    places = torch.arange(x.shape[1], device=x.device)
    return (places >= lengths[:, :1]) & (places < lengths[:, 1:])


class Transformer(nn.Module):
    """Pre-norm causal attention and a feed-forward network, as a block: the update, without the residual.

    Args:
        width: D, which num_heads divides.
        num_heads: H.
        hidden: F, of the network.
        rotary: the base of rotary positions; None for none.
        bias: on the linear layers.
        activation: of the network.
    """

    def __init__(self, *, width: int, num_heads: int, hidden: int, rotary: float | None = None, bias: bool = True,
                 activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu):
        super().__init__()
        if width % num_heads or (rotary is not None and width // num_heads % 2):
            raise ShapeError("depth", expected="heads that divide the width, into even parts if rotary",
                             got=f"{num_heads}, {width}", do="choose other sizes")
        self.num_heads, self.rotary, self.activation = num_heads, rotary, activation
        self.before_attention, self.before_network = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.projections = nn.Linear(width, 3 * width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The update of hidden [B, N, D]."""
        query, key, value = self.projections(self.before_attention(hidden)).unflatten(
            -1, (3, self.num_heads, -1)).unbind(2)
        if self.rotary is not None:
            query, key = (rotate(heads, rows.positions, self.rotary) for heads in (query, key))
        attended = self.output(rows.attend(query, key, value).flatten(-2))
        return attended + self.down(self.activation(self.up(self.before_network(hidden + attended))))

    def work(self, rows: torch.Tensor, held: torch.Tensor) -> int:
        """Multiply-adds for `rows` [B] after `held` [B]: linear layers once a row, 2 · D a pair of rows that attend."""
        width = self.output.in_features
        linear = sum(part.weight.numel() for part in (self.projections, self.output, self.up, self.down))
        pairs = rows * held + rows * (rows + 1) // 2
        return int(rows.sum()) * linear + int(pairs.sum()) * 2 * width


def from_dense(layer: nn.TransformerEncoderLayer, config: Config) -> Depth:
    """The same layer, causal, as a block that only some tokens pass; a rule that keeps all computes the same function.

    Any other residual block becomes `Depth(config, block, width=D)`, with `start_as_dense`.

    Raises:
        ShapeError: a layer that is not pre-norm, not batch first, or has dropout.
    """
    attention = layer.self_attn
    dropout = max(attention.dropout, *(part.p for part in (layer.dropout, layer.dropout1, layer.dropout2)))
    if not layer.norm_first or dropout or not attention.batch_first:
        raise ShapeError("depth", expected="a pre-norm layer, batch first and without dropout", got=repr(layer)[:200],
                         do="wrap it by hand with Depth")
    block = Transformer(width=attention.embed_dim, num_heads=attention.num_heads, hidden=layer.linear1.out_features,
                        bias=layer.linear1.bias is not None, activation=layer.activation)
    pairs = {"before_attention": layer.norm1, "before_network": layer.norm2, "output": attention.out_proj,
             "up": layer.linear1, "down": layer.linear2}
    like = layer.linear1.weight
    converted = Depth(config, block, width=attention.embed_dim, work=block.work)
    converted.to(device=like.device, dtype=like.dtype)
    for name, part in pairs.items():
        block.get_submodule(name).load_state_dict(part.state_dict())
    block.before_attention.eps, block.before_network.eps = layer.norm1.eps, layer.norm2.eps
    joint = {"weight": attention.in_proj_weight, "bias": attention.in_proj_bias}
    block.projections.load_state_dict({name: part for name, part in joint.items() if part is not None})
    return start_as_dense(converted)


def start_as_dense(depth: Depth) -> Depth:
    """Sets gate 0 and bias 1, in place: every update counts 1, bit for bit, until the gate is trained."""
    nn.init.zeros_(depth.gate.weight)
    nn.init.ones_(depth.gate.bias)
    return depth
