"""connections: tokens keep earlier tokens.

| query | candidate | score used to choose | value if kept | usual rule |
| token (block) | earlier token (block) | q·k, or an estimate of it | the row v | All, TopK, Mass, Threshold |

    o_i = Σ_j softmax_j(scale · q_i·k_j) v_j      over the keys j of the blocks kept for i

Soft pruning is the softmax itself; this room makes it hard, block by block (token by token with a tile of 1 × 1).
A query block shares its choice, so the choice of its first rows has seen its later rows' queries (what that is worth
`Config.without_lookahead` tells); which keys are *permitted* is never affected. The last query block of a call is
always whole. Rows that come a few at a time after a cache, a token decoded, have a rule of their own (`Config.decode`),
over pages of 16 keys and with one choice a row.
References: Vaswani et al. 2017 (attention); XAttention 2503.16428, FlashPrefill 2603.06199, Quest 2406.10774
(estimates); Twilight 2502.02770 (mass instead of count).
"""

from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

from sentei.axes.axis import Axis
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.rules import MAX_K, All, Capacity, Certified, Rule, TopK, rule_from_json
from sentei.core.selection import Selection
from sentei.core.tracing import Span
from sentei.kernels import paging
from sentei.kernels.attention import Grid, Tiles, attend, choose_impl, merge
from sentei.kernels.attention.certify import attend_certified
from sentei.kernels.attention.compensate import attend_dropped
from sentei.kernels.attention.select import (
    Estimator,
    Sampled,
    Trailing,
    always_kept,
    choose,
    estimate,
    estimator_from_json,
    near,
    see_values,
    share_in_group,
)
from sentei.kernels.attention.tiles import MAX_BLOCK
from sentei.kernels.topk import Choice, attend_topk

# Rows that share a choice made without lookahead: fewer would starve the kernel, for more the choice would be older.
ROWS_WITHOUT_LOOKAHEAD = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """How connections are chosen.

    Args:
        rule: All is the dense layer. Certified is the kernel's: it makes every score, whatever the estimator, and the
            bound holds for every row.
        estimator: of the mass of a tile.
        criterion: what a tile is worth to the rows of its query block: "mass", their mean share of attention; "peak",
            the root mean square, which a few rows can raise; "output", the expected change of their output.
        tile: tokens of a query block and of a key block.
        window: tokens before a query block that are always kept.
        share: one choice a query "head", or one a KV "group".
        compensate: replace each dropped block by its mean key and value; not where `decode` drops pages.
        decode: the rule for rows that come a few at a time after a cache, in calls of one query block or less: pages
            of 16 keys, one choice a row and KV group (`sentei.kernels.paging`). All is the dense layer.
    """

    rule: Rule = field(default_factory=All)
    estimator: Estimator = field(default_factory=Sampled)
    criterion: str = "peak"
    tile: tuple[int, int] = (64, 64)
    window: int = 128
    share: str = "head"
    compensate: bool = False
    decode: Rule = field(default_factory=All)

    def __post_init__(self):
        sizes = (*self.tile, self.window)
        whole = all(type(size) is int and 0 <= size <= MAX_K for size in sizes)
        tiled = whole and len(self.tile) == 2 and all(1 <= size <= MAX_BLOCK for size in self.tile)
        checks = {
            # Capacity looks along the queries: what an earlier one keeps would depend on later ones.
            "rule a Rule that looks at each query alone": (isinstance(self.rule, Rule)
                                                           and not isinstance(self.rule, Capacity)),
            "estimator an Estimator": isinstance(self.estimator, Estimator),
            "criterion 'mass', 'peak' or 'output'": self.criterion in ("mass", "peak", "output"),
            f"tile two sizes from 1 to {MAX_BLOCK}, window from 0": tiled,
            "share 'head' or 'group'": self.share in ("head", "group"),
            "share 'head' and no compensation under Certified": not isinstance(self.rule, Certified) or (
                self.share == "head" and not self.compensate),
            "compensate a bool": isinstance(self.compensate, bool),
            "decode All, TopK, Mass or Threshold, of one number": paging.can_choose(self.decode),
        }
        for expected, holds in checks.items():
            if not holds:
                raise RuleError("connections.Config", expected=expected, got=repr(self), do="change that field")

    def without_lookahead(self) -> "Config":
        """The same rule, with no choice made from a later row than the first it is for.

        A few rows share a choice, made from the exact scores of the first of them and of one row in as many before,
        over as many rows as a query block here has; so it is `Trailing`, whatever the estimator here. Blocks that small
        run slower.

        Raises:
            RuleError: the criterion "output", whose scores see the values of the whole diagonal block.
        """
        if self.tile[0] == 1 or isinstance(self.estimator, Trailing):
            return self
        if self.criterion == "output":
            raise RuleError("without_lookahead", expected="the criterion 'peak' or 'mass'", got="'output'",
                            do="choose by the rows' shares of attention alone")
        rows = min(ROWS_WITHOUT_LOOKAHEAD, self.tile[0])
        return replace(self, estimator=Trailing(-(-self.tile[0] // rows) - 1), tile=(rows, self.tile[1]))

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {**asdict(self), "rule": self.rule.to_json(), "estimator": self.estimator.to_json(),
                "tile": list(self.tile), "decode": self.decode.to_json()}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("connections.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="write plans with sentei")
        tile = value["tile"]
        parts = {"rule": rule_from_json(value["rule"]), "estimator": estimator_from_json(value["estimator"]),
                 "tile": tuple(tile) if isinstance(tile, list) else (0, 0), "decode": rule_from_json(value["decode"])}
        try:
            return cls(**{**value, **parts})
        except RuleError as error:
            raise FileError("connections.Config", expected=error.expected, got=repr(value)[:200],
                            do="write plans with sentei") from error


class Connections(Axis):
    """Attention that computes only the tiles its rule keeps. It has no parameters.

    Inputs: query [B, Tq, H, D], key [B, Tk, G, D], value [B, Tk, G, Dv] and optionally lengths int64 [B, 2] (start
    and stop of the real keys) and the bounds of the key's pages (see `paging.Pages`; made when missing); returns
    [B, Tq, H, Dv]. Gradients flow through what is kept, not through the choice.

    Args:
        config: how to choose.
        causal: a query sees no later position.
        scale: on the scores; D**-0.5 by default.
        impl: the attention kernel, see `attend`.
    """

    def __init__(self, config: Config, *, causal: bool = True, scale: float | None = None, impl: str = "auto"):
        super().__init__(config.rule, unit=config.tile[1])
        self.config = config
        self.causal = causal
        self.scale = scale
        self.impl = impl

    def score(self, query, key, value, lengths=None, bounds=None):
        if self.reads_pages(query.shape[1]):
            return paging.score(query, key, self.pages(query, key, lengths, bounds), scale=self.scale_of(query),
                                impl=self.impl)
        grid, groups = self.grid(query, key, lengths), key.shape[2]
        grid.check("connections", query, key, value)
        heads = groups if self.config.share == "group" else query.shape[2]
        permitted = grid.permitted(query.device).expand(query.shape[0], heads, -1, -1)
        if self.is_dense(query, key, value, lengths):
            zeros = torch.zeros(permitted.shape, dtype=torch.float32, device=query.device)
            return zeros.masked_fill(~permitted, -torch.inf)
        pool = "rms" if self.config.criterion == "peak" else "mean"
        scores = estimate(self.config.estimator, query, key, grid, self.scale_of(query), pool=pool)
        if self.config.criterion == "output":
            scores = see_values(scores, value, grid)
        return share_in_group(scores, groups) if self.config.share == "group" else scores

    def forced(self, query, key, value, lengths=None, bounds=None):
        if self.reads_pages(query.shape[1]):
            return near(self.pages(query, key, lengths).grid, query.device, window=self.config.window)
        return always_kept(self.grid(query, key, lengths), query.device, window=self.config.window)

    def select(self, scores, query, key, value, lengths=None, bounds=None):
        if isinstance(self.rule, Certified) and not self.reads_pages(query.shape[1]):
            kept = self.certified(query, key, value, lengths)[1]
            return Selection.from_mask(kept, ~torch.isneginf(scores), unit=self.unit)
        if not self.reads_pages(query.shape[1]):
            return super().select(scores, query, key, value, lengths)
        # By the kernel: its rules and ours could part where two sums differ in their last bit.
        kept = self.attend_pages(query, key, value, lengths, bounds)[1]
        return Selection.from_mask(kept, ~torch.isneginf(scores), unit=paging.PAGE)

    def weigh(self, selection, scores, *inputs):
        return selection.weigh(scores.exp())

    def apply(self, selection, query, key, value, lengths=None, bounds=None):
        if self.reads_pages(query.shape[1]):
            return self.attend_pages(query, key, value, lengths, bounds, selection.mask())[0]
        return self.attend(self.tiles(selection, query, key, lengths), query, key, value)

    def attend(self, tiles: Tiles, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention over the tiles of a plan, and over what stands for the others where `compensate` says so."""
        scale = self.scale_of(query)
        if tiles.is_everything or not self.config.compensate:
            return attend(query, key, value, tiles, scale=scale, impl=self.impl)
        kept = attend(query, key, value, tiles, scale=scale, impl=self.impl, return_lse=True)
        return merge(*kept, *attend_dropped(query, key, value, tiles, scale=scale))[0]

    def shortcut(self, query, key, value, lengths=None, bounds=None):
        if self.reads_pages(query.shape[1]):
            return self.attend_pages(query, key, value, lengths, bounds)[0]
        grid = self.grid(query, key, lengths)
        if query.shape[1] <= self.config.tile[0]:
            return self.attend(Tiles(grid=grid), query, key, value)
        if isinstance(self.rule, Certified):
            return self.certified(query, key, value, lengths)[0]
        if self.is_by_token:
            return self.by_token(query, key, value, lengths)
        scores, forced = self.score(query, key, value, lengths), self.forced(query, key, value, lengths)
        return self.attend(choose(self.rule, scores, forced, grid), query, key, value)

    def certified(self, query, key, value, lengths=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The output where the rule is Certified, and the tiles that were computed, bool [B, H, QB, KB]."""
        return attend_certified(query, key, value, self.grid(query, key, lengths), self.rule.eps,
                                scale=self.scale_of(query))

    @property
    def is_by_token(self) -> bool:
        """Whether each token keeps its own k tokens by exact scores: then no score is ever written down."""
        c = self.config
        exact = c.tile == (1, 1) and c.criterion != "output" and isinstance(c.estimator, Sampled)
        return (exact and self.causal and isinstance(c.rule, TopK) and isinstance(c.rule.k, int)
                and c.share == "head" and not c.compensate)

    def by_token(self, query, key, value, lengths=None) -> torch.Tensor:
        """The output where `is_by_token`. A NaN among the scores gives NaN, where a selection would raise."""
        scale, before = self.scale_of(query), slice(0, -1)
        output, _, _ = attend_topk(query[:, before], key[:, before], value[:, before],
                                   Choice(self.config.rule.k, self.config.window), lengths=lengths, scale=scale,
                                   impl=self.impl)
        last = attend(query[:, -1:], key, value, Tiles(grid=self.grid(query[:, -1:], key, lengths)), scale=scale,
                      impl=self.impl)
        return torch.cat([output, last], 1)

    def account(self, selection, query, key, value, lengths=None, bounds=None):
        if self.reads_pages(query.shape[1]):
            cost = paging.cost(selection, query, key, value)
            return cost, *paging.choose_impl(self.impl, query, key, value)
        grid = self.grid(query, key, lengths)
        per_tile = grid.query_block * grid.key_block * (query.shape[-1] + value.shape[-1])
        per_choice = query.shape[2] // selection.ids.shape[1]
        kept, permitted = int(selection.count().sum()), int(selection.permitted.sum())
        scores = permitted * per_choice * grid.query_block * grid.key_block * query.shape[-1]
        choosing = 0 if self.is_dense(query, key, value, lengths) else round(scores * self.config.estimator.cost(grid))
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (query, query, key, value))
        cost = Cost(multiply_adds=kept * per_choice * per_tile, dense_multiply_adds=permitted * per_choice * per_tile,
                    bytes=moved, choosing=choosing)
        return cost, *choose_impl(self.impl, query, key, value, self.tiles(selection, query, key, lengths))

    def span(self, query, key, *others):
        block = 1 if self.reads_pages(query.shape[1]) else self.config.tile[0]
        return Span(queries=query.shape[1], keys=key.shape[1], block=block)

    @property
    def is_paged(self) -> bool:
        """Whether rows that come a few at a time choose pages."""
        return not isinstance(self.config.decode, All)

    def reads_pages(self, rows: int) -> bool:
        """Whether a call of so many query rows chooses pages."""
        return rows <= self.config.tile[0] and self.is_paged

    def attend_pages(self, query, key, value, lengths, bounds, kept=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of a call that reads pages, and its choice, which may be given."""
        return paging.attend(query, key, value, self.pages(query, key, lengths, bounds), scale=self.scale_of(query),
                             impl=self.impl, kept=kept)

    def pages(self, query, key, lengths, bounds=None) -> paging.Pages:
        """The pages of one call."""
        return paging.Pages(num_queries=query.shape[1], num_keys=key.shape[1], rule=self.config.decode,
                            window=self.config.window, causal=self.causal, lengths=lengths, bounds=bounds)

    def grid(self, query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor | None) -> Grid:
        """The grid of one call."""
        return Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=self.config.tile[0],
                    key_block=self.config.tile[1], causal=self.causal, lengths=lengths)

    def is_dense(self, query, key, value, lengths=None) -> bool:
        """True when nothing can be dropped, whatever the scores."""
        if isinstance(self.rule, All):
            return True
        permitted = self.grid(query, key, lengths).permitted(query.device)
        return bool((self.forced(query, key, value, lengths) | ~permitted).all())

    def tiles(self, selection: Selection, query: torch.Tensor, key: torch.Tensor, lengths=None) -> Tiles:
        """The kernel's plan for a selection; a selection that keeps everything is the dense plan."""
        return Tiles.from_selection(selection, self.grid(query, key, lengths))

    def scale_of(self, query: torch.Tensor) -> float:
        """The factor on the scores."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale


class SelfAttention(nn.Module):
    """A trainable self-attention layer around `Connections`: x [B, T, width] → [B, T, width].

    Args:
        config: how connections are chosen.
        width: of the input and the output.
        num_heads, num_kv_heads: H and G; G divides H.
        head_dim: D; width / H by default.
        causal: a token sees no later one.
        bias: on the four projections.
    """

    def __init__(self, config: Config, *, width: int, num_heads: int, num_kv_heads: int | None = None,
                 head_dim: int | None = None, causal: bool = True, bias: bool = False):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads or (head_dim is None and width % num_heads):
            raise ShapeError("connections", expected="KV heads that divide the heads, heads that divide the width",
                             got=f"{num_kv_heads}, {num_heads}, {width}", do="choose other sizes")
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.query = nn.Linear(width, num_heads * self.head_dim, bias=bias)
        self.key = nn.Linear(width, num_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(width, num_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(num_heads * self.head_dim, width, bias=bias)
        self.connections = Connections(config, causal=causal)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Attends within x [B, T, width]; lengths int64 [B, 2] mark the real tokens."""
        heads = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        return self.output(self.connections(*heads, lengths).flatten(-2))


def from_dense(layer: nn.MultiheadAttention, config: Config, *, causal: bool = True) -> SelfAttention:
    """The same layer with chosen connections; with the rule All it computes the same function.

    Raises:
        ShapeError: a layer with its own key or value width, bias_k, zero_attn or dropout.
    """
    plain = (layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn and not layer.dropout)
    if not plain:
        raise ShapeError("connections", expected="plain self-attention without dropout", got=repr(layer),
                         do="convert it by hand with SelfAttention")
    bias = layer.in_proj_bias is not None
    converted = SelfAttention(config, width=layer.embed_dim, num_heads=layer.num_heads, causal=causal, bias=bias)
    converted.to(device=layer.in_proj_weight.device, dtype=layer.in_proj_weight.dtype)
    with torch.no_grad():
        for index, project in enumerate((converted.query, converted.key, converted.value)):
            project.weight.copy_(layer.in_proj_weight.chunk(3)[index])
            if bias:
                project.bias.copy_(layer.in_proj_bias.chunk(3)[index])
        converted.output.weight.copy_(layer.out_proj.weight)
        if bias:
            converted.output.bias.copy_(layer.out_proj.bias)
    return converted
