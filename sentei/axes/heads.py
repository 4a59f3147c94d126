"""heads: query heads keep key/value heads.

| query | candidate | score used to choose | value if kept | usual rule |
|---|---|---|---|---|
| query head | key/value head | none, the map is fixed | attention with that head's k, v | Shared |

    o_h = attend(q_h, k_g, v_g)      g = ⌊h · G / H⌋

H key/value heads are multi-head attention (MHA), 1 is multi-query (MQA), what lies between grouped-query (GQA). The
arithmetic of attention is the same for all of them; what shrinks is the projection of keys and values, and the cache,
by 1 − G / H: groups of 4 save 75 %.
References: Vaswani et al. 2017, arXiv 1706.03762 (MHA); Shazeer 2019, arXiv 1911.02150 (MQA); Ainslie et al. 2023,
arXiv 2305.13245 (GQA, and turning MHA into it by mean-pooling).
"""

from dataclasses import dataclass

import torch
from torch import nn

from sentei.axes.axis import Axis
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.growing import Growing
from sentei.core.rules import MAX_K, Rule
from sentei.kernels.attention import Grid, Tiles, attend, choose_impl

BLOCK = 64
MERGES = ("mean", "joint")


@dataclass(frozen=True)
class Shared(Rule):
    """Query h of H keeps candidate ⌊h · C / H⌋, whatever the scores: neighbours share one."""

    def keep(self, scores, permitted, forced):
        queries, candidates = scores.shape[-2:]
        own = torch.arange(queries, device=scores.device) * candidates // max(queries, 1)
        return (own[:, None] == torch.arange(candidates, device=scores.device)) & permitted | forced


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many key/value heads there are.

    Args:
        num_kv_heads: G, which divides the query heads; None is as many as the layer has, the dense layer.
        merge: how fewer are made of those of a trained layer: their "mean", or "joint", the least squares of
            `sentei.conversion.rooms.heads`, which take a calibration pass.
    """

    num_kv_heads: int | None = None
    merge: str = "mean"

    def __post_init__(self):
        counts = self.num_kv_heads is None or type(self.num_kv_heads) is int and 1 <= self.num_kv_heads <= MAX_K
        if not counts or self.merge not in MERGES:
            raise RuleError("heads.Config", expected=f"num_kv_heads from 1, or None, merge one of {', '.join(MERGES)}",
                            got=repr(self), do="change that field")

    @property
    def rule(self) -> Rule:
        """The one rule of this room."""
        return Shared()

    def groups(self, num_heads: int) -> int:
        """G for a layer of so many query heads.

        Raises:
            ShapeError: it does not divide them.
        """
        groups = num_heads if self.num_kv_heads is None else self.num_kv_heads
        if groups < 1 or num_heads % groups:
            raise ShapeError("heads", expected=f"key/value heads that divide {num_heads}", got=str(groups),
                             do="choose another num_kv_heads")
        return groups

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {"num_kv_heads": self.num_kv_heads, "merge": self.merge}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; anything else is refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("heads.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="write plans with sentei")
        try:
            return cls(**value)
        except RuleError as error:
            raise FileError("heads.Config", expected=error.expected, got=repr(value)[:200],
                            do="write plans with sentei") from error


class Heads(Axis):
    """Attention whose query heads share key/value heads. It has no parameters.

    Inputs: query [B, Tq, H, D], key [B, Tk, G, D], value [B, Tk, G, Dv] and optionally lengths int64 [B, 2] (start and
    stop of the real keys); returns [B, Tq, H, Dv]. How many key/value heads there are, the tensors say.

    Args:
        config: the rule; see `Config`.
        causal: a query sees no later position.
        scale: on the scores; D**-0.5 by default.
        impl: the attention kernel, see `attend`.
    """

    def __init__(self, config: Config, *, causal: bool = True, scale: float | None = None, impl: str = "auto"):
        super().__init__(config.rule)
        self.causal = causal
        self.scale = scale
        self.impl = impl

    def score(self, query, key, value, lengths=None):
        self.grid(query, key, lengths).check("heads", query, key, value)
        return torch.zeros(query.shape[0], query.shape[2], key.shape[2], device=query.device)

    def select(self, scores, *inputs):
        if not isinstance(self.rule, Shared):
            raise RuleError("heads", expected="the rule Shared, as the kernels read it", got=repr(self.rule),
                            do="pool the key/value heads with heads.from_dense instead")
        return super().select(scores, *inputs)

    def apply(self, selection, query, key, value, lengths=None):
        return self.attend(query, key, value, lengths)

    def attend(self, query, key, value, lengths=None) -> torch.Tensor:
        """The kernel's attention, which reads a shared head where it lies."""
        tiles = Tiles(grid=self.grid(query, key, lengths))
        return attend(query, key, value, tiles, scale=self.scale, impl=self.impl)

    def shortcut(self, *inputs):
        return self.attend(*inputs) if isinstance(self.rule, Shared) else None

    def account(self, selection, query, key, value, lengths=None):
        grid = self.grid(query, key, lengths)
        start, stop = (bound.flatten(1) for bound in grid.bounds(query.device))
        if self.causal:
            stop = torch.minimum(stop, torch.arange(grid.num_queries, device=query.device) + grid.offset + 1)
        pairs = int((stop - start).clamp(min=0).expand(query.shape[0], grid.num_queries).sum())
        work = pairs * query.shape[2] * (query.shape[3] + value.shape[3])
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (query, query, key, value))
        cost = Cost(multiply_adds=work, dense_multiply_adds=work, bytes=moved)
        return cost, *choose_impl(self.impl, query, key, value, Tiles(grid=grid))

    def grid(self, query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor | None = None) -> Grid:
        """The grid of one call."""
        return Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=BLOCK, key_block=BLOCK,
                    causal=self.causal, lengths=lengths)


def cache_bytes(num_kv_heads: int, head_dim: int, dtype: torch.dtype, value_dim: int | None = None) -> int:
    """Bytes that one token's keys and values take in the cache of one layer."""
    return num_kv_heads * (head_dim + (head_dim if value_dim is None else value_dim)) * dtype.itemsize


def share_saved(num_heads: int, num_kv_heads: int) -> float:
    """The share of MHA's cache that so many key/value heads save: 1 − G / H."""
    return 1 - num_kv_heads / num_heads


class Cache:
    """The keys and values of earlier tokens of one layer; empty at first."""

    def __init__(self):
        self.keys, self.values = Growing(), Growing()

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds key [B, T, G, D] and value [B, T, G, Dv] behind the others; returns all of them. See `Growing`."""
        self.keys, self.values = self.keys.append(key), self.values.append(value)
        return self.keys.rows, self.values.rows

    def bytes(self) -> int:
        """What it holds now, without room to grow."""
        held = self.keys.rows, self.values.rows
        return sum(rows.numel() * rows.element_size() for rows in held if rows is not None)


class SharedAttention(nn.Module):
    """A trainable self-attention layer around `Heads`, MHA, GQA or MQA: x [B, T, width] → [B, T, width].

    Args:
        config: how many key/value heads.
        width: of the input and the output.
        num_heads: H.
        head_dim: D; width / H by default.
        causal: a token sees no later one.
        bias: on the four projections.
    Raises:
        ShapeError: key/value heads that do not divide the heads, or heads that do not divide the width.
    """

    def __init__(self, config: Config, *, width: int, num_heads: int, head_dim: int | None = None,
                 causal: bool = True, bias: bool = False):
        super().__init__()
        if head_dim is None and width % num_heads:
            raise ShapeError("heads", expected=f"heads that divide the width {width}", got=str(num_heads),
                             do="choose other sizes, or give head_dim")
        self.num_heads = num_heads
        self.num_kv_heads = config.groups(num_heads)
        self.head_dim = width // num_heads if head_dim is None else head_dim
        self.query = nn.Linear(width, num_heads * self.head_dim, bias=bias)
        self.key = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(num_heads * self.head_dim, width, bias=bias)
        self.heads = Heads(config, causal=causal)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None, cache: Cache | None = None) -> torch.Tensor:
        """Attends within x [B, T, width], and to what `cache` holds, to which x is then added.

        Args:
            lengths: int64 [B, 2], start and stop of the real tokens, those in the cache included.
            cache: of this layer; causal layers only.
        """
        query, key, value = (project(x).unflatten(-1, (-1, self.head_dim))
                             for project in (self.query, self.key, self.value))
        if cache is not None:
            if not self.heads.causal:
                raise ShapeError("heads", expected="a causal layer for a cache", got="a bidirectional one",
                                 do="compute all tokens at once")
            key, value = cache.append(key, value)
        return self.output(self.heads(query, key, value, lengths).flatten(-2))

    def cache_bytes(self) -> int:
        """Bytes a token takes in this layer's cache."""
        return cache_bytes(self.num_kv_heads, self.head_dim, self.key.weight.dtype)


@torch.no_grad()
def from_dense(layer: nn.MultiheadAttention | SharedAttention, config: Config, *, causal: bool = True
               ) -> SharedAttention:
    """The same layer with fewer key/value heads: the mean of each group of neighbours (arXiv 2305.13245, section 2.1).

    As many key/value heads as before, or groups of equal heads, change nothing. For others the mean is a start from
    which to train.

    Args:
        layer: MHA, or a layer of this room.
        causal: of an nn.MultiheadAttention, which does not say itself.
    Raises:
        ShapeError: key/value heads that do not divide those of the layer; a layer with its own key or value width,
            bias_k, zero_attn or dropout.
        RuleError: another merge than the mean.
    """
    if config.merge != "mean":
        raise RuleError("heads.from_dense", expected="the merge 'mean'", got=repr(config),
                        do="convert a pretrained model (sentei.conversion.plan) with calibration for 'joint'")
    if isinstance(layer, nn.MultiheadAttention):
        layer = _unpacked(layer, causal)
    groups = config.groups(layer.num_heads)
    if layer.num_kv_heads % groups:
        raise ShapeError("heads", expected=f"key/value heads that divide {layer.num_kv_heads}", got=str(groups),
                         do="choose another num_kv_heads")
    bias = layer.query.bias is not None
    pooled = SharedAttention(config, width=layer.query.in_features, num_heads=layer.num_heads,
                             head_dim=layer.head_dim, causal=layer.heads.causal, bias=bias)
    pooled.to(device=layer.query.weight.device, dtype=layer.query.weight.dtype)
    for name in ("query", "output"):
        getattr(pooled, name).load_state_dict(getattr(layer, name).state_dict())
    for name in ("key", "value"):
        for part in ("weight", "bias") if bias else ("weight",):
            rows = getattr(getattr(layer, name), part).unflatten(0, (groups, -1, layer.head_dim))
            getattr(getattr(pooled, name), part).copy_(_mean(rows).flatten(0, 1))
    return pooled


def _mean(heads: torch.Tensor) -> torch.Tensor:
    """The mean over dimension 1, exact where all are equal, whose sum would be rounded."""
    wide = heads if heads.dtype == torch.float64 else heads.float()
    first = wide[:, :1]
    return (first + (wide - first).mean(1, keepdim=True)).squeeze(1).to(heads.dtype)


def _unpacked(layer: nn.MultiheadAttention, causal: bool) -> SharedAttention:
    """The layer of torch with its joint projection taken apart."""
    plain = (layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn and not layer.dropout)
    if not plain:
        raise ShapeError("heads", expected="plain self-attention without dropout", got=repr(layer),
                         do="convert it by hand with SharedAttention")
    bias = layer.in_proj_bias is not None
    apart = SharedAttention(Config(), width=layer.embed_dim, num_heads=layer.num_heads, causal=causal, bias=bias)
    apart.to(device=layer.in_proj_weight.device, dtype=layer.in_proj_weight.dtype)
    for index, project in enumerate((apart.query, apart.key, apart.value)):
        project.weight.copy_(layer.in_proj_weight.chunk(3)[index])
        if bias:
            project.bias.copy_(layer.in_proj_bias.chunk(3)[index])
    apart.output.load_state_dict(layer.out_proj.state_dict())
    return apart
