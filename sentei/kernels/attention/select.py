"""Estimates of the attention mass of each tile, from which a rule chooses.

An estimator scores every tile; what to keep is a rule's business (`core/rules.py`). The score of query block I and
key block J is the logarithm of the mean, over the block's rows (for `Trailing`, over rows up to its first), of the
share of the row's softmax that falls on J:

    share_iJ = Σ_{j∈J} exp(s_ij) / Σ_j exp(s_ij)          score_IJ = log mean_{i∈I} share_iJ

or of their root mean square, which a few rows that need J badly can raise (`pool`). Estimators differ only in how
they guess log Σ_{j∈J} exp(s_ij) for tiles wholly in the past. Tiles on the edge of what is permitted (the diagonal)
are scored exactly, so no score ever looks at a key the row may not see.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import pad

from sentei.core.errors import FileError, RuleError
from sentei.core.rules import All, Mass, Rule, Threshold, TopK
from sentei.kernels.attention import fused_cpp
from sentei.kernels.attention.tiles import MAX_BLOCK, Grid, Tiles

# Query blocks are scored in slabs whose dense scores would number about this many: the oracle then holds 128 MB in
# fp32, a pooled estimate stays in cache.
PAIRS_AT_ONCE = 1 << 25
PARAMETER = {All: None, TopK: "k", Mass: "mass", Threshold: "ratio"}  # of the rules that native code has too


class Estimator(ABC):
    """Guesses the log mass of tiles.

    Attributes:
        history: how many query blocks before its own a block is joined with.
    """

    history = 0

    @abstractmethod
    def log_mass(self, query: torch.Tensor, key: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Log Σ_{j∈J} exp(q_i·k_j) for full tiles.

        Args:
            query: [B, G, P, S, R, D]; P heads of a KV group, S query blocks, R rows, already scaled.
            key: [B, G, KB, key_block, D]; the ragged block filled with zeros.
            grid: the whole grid.
        Returns:
            [B, G, P, S, R', KB]; R' ≤ R rows, each standing for R / R' of them.
        """

    @abstractmethod
    def cost(self, grid: Grid) -> float:
        """Multiply-adds ÷ those of the dense scores."""

    def rows(self, exact: torch.Tensor) -> torch.Tensor:
        """Brings exact row scores [..., R, slots] to the R' rows of `log_mass`."""
        return exact

    def native(self, grid: Grid) -> tuple[str, int, int] | None:
        """The `rows` of `fused_cpp.estimate` with which it is this estimate; None where it has none."""
        return None

    def to_json(self) -> dict:
        """The estimator as a JSON object."""
        return {"name": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True)
class Pooled(Estimator):
    """Every row against the mean key of the block: n · exp(q·k̄) (a lower bound of the mass, by Jensen).

    Cost: 1 / key_block of the dense scores. Reference: pooled keys as in FlashPrefill, arXiv 2603.06199.
    """

    def cost(self, grid):
        return 1 / grid.key_block

    def log_mass(self, query, key, grid):
        mean = key.mean(-2)
        return torch.einsum("bgpsrd,bgkd->bgpsrk", query, mean).add_(_log(grid.key_block))

    def native(self, grid):
        return "pooled", 0, 1


@dataclass(frozen=True)
class Antidiagonal(Estimator):
    """Sums of scores along antidiagonals of stride × stride squares, which every row and column crosses once.

    Cost: 1 / stride of the dense scores. Reference: XAttention, arXiv 2503.16428.
    """

    stride: int = 8

    def __post_init__(self):
        _check_stride("Antidiagonal", self.stride, "choose a stride that divides both blocks, e.g. 8")

    def cost(self, grid):
        return 1 / self.stride

    def log_mass(self, query, key, grid):
        stride = self.stride
        if query.shape[-2] % stride or grid.key_block % stride:
            raise RuleError("Antidiagonal", expected=f"blocks that {stride} divides",
                            got=f"{query.shape[-2]} x {grid.key_block}", do="choose another stride or other blocks")
        folded_query = query.unflatten(-2, (-1, stride)).flip(-2).flatten(-2)
        folded_key = key.unflatten(-2, (-1, stride)).flatten(-2) / stride
        scores = torch.einsum("bgpsrd,bgkud->bgpsrku", folded_query, folded_key)
        return scores.logsumexp(-1).add_(_log(stride))

    def rows(self, exact):
        return exact.unflatten(-2, (-1, self.stride)).logsumexp(-2).sub_(_log(self.stride))

    def native(self, grid):
        return None if grid.query_block % self.stride or grid.key_block % self.stride else ("folded", 0, self.stride)


@dataclass(frozen=True)
class PageBounds(Estimator):
    """An upper bound of every score in the block from its per-channel minimum and maximum.

    q⁺·max + q⁻·min ≥ q·k for every key of the block. Cost: 2 / key_block of the dense scores.
    Reference: Quest, arXiv 2406.10774.
    """

    def cost(self, grid):
        return 2 / grid.key_block

    def log_mass(self, query, key, grid):
        low, high = key.amin(-2), key.amax(-2)
        bound = torch.einsum("bgpsrd,bgkd->bgpsrk", query.clamp(min=0), high)
        return bound.add_(torch.einsum("bgpsrd,bgkd->bgpsrk", query.clamp(max=0), low)).add_(_log(grid.key_block))

    def native(self, grid):
        return "bounds", 0, 1


class Exact(Estimator):
    """The true mass of some rows, which stand for all: every score of theirs.

    It sees single sharp keys (copying, induction), which estimates from mean keys do not.
    """

    @abstractmethod
    def sampled(self, rows: int) -> slice:
        """Which of a block's rows are scored: a first and a stride."""

    def cost(self, grid):
        return len(range(grid.query_block)[self.sampled(grid.query_block)]) / grid.query_block

    def log_mass(self, query, key, grid):
        scores = self.rows(query).flatten(2, 4) @ key.flatten(2, 3).transpose(-1, -2)
        mass = scores.unflatten(-1, key.shape[2:4]).logsumexp(-1)
        return mass.unflatten(2, (*query.shape[2:4], -1))

    def rows(self, exact):
        return exact[..., self.sampled(exact.shape[-2]), :]

    def native(self, grid):
        rows = self.sampled(grid.query_block)
        return "exact", rows.start, rows.step


@dataclass(frozen=True)
class Sampled(Exact):
    """The true mass, for one row in `stride`, in the middle of those it stands for. With stride 1 it is the oracle.

    Cost: 1 / stride of the dense scores.
    """

    stride: int = 8

    def __post_init__(self):
        _check_stride("Sampled", self.stride, "choose a stride below the query block, e.g. 8")

    def sampled(self, rows):
        first = self.stride // 2
        return slice(first, None, self.stride) if rows > first else slice(0, None, 1)


@dataclass(frozen=True)
class Trailing(Exact):
    """The true mass, for the first row of the query block and of the `history` blocks before it: without lookahead.

    Cost: 1 / query_block of the dense scores.
    """

    history: int = 15

    def __post_init__(self):
        if type(self.history) is not int or not 0 <= self.history <= MAX_BLOCK:
            raise RuleError("Trailing", expected=f"a history from 0 to {MAX_BLOCK} blocks",
                            got=repr(self.history)[:200], do="choose another, e.g. 15")

    def sampled(self, rows):
        return slice(0, None, rows)


ESTIMATORS = {"pooled": Pooled, "antidiagonal": Antidiagonal, "pagebounds": PageBounds, "sampled": Sampled,
              "trailing": Trailing}


def estimator_from_json(value: dict) -> Estimator:
    """The estimator written by `Estimator.to_json`; unknown names and keys are refused with a FileError."""
    parameters = dict(value) if isinstance(value, dict) else {}
    name = parameters.pop("name", None)
    kind = ESTIMATORS.get(name) if isinstance(name, str) else None
    if kind is None or set(parameters) != set(kind.__dataclass_fields__):
        raise FileError("estimator", expected=f"one of {', '.join(ESTIMATORS)} with its parameters",
                        got=repr(value)[:200], do="write plans with sentei")
    try:
        return kind(**parameters)
    except RuleError as error:
        raise FileError("estimator", expected=error.expected, got=error.got, do="write plans with sentei") from error


@torch.no_grad()
def estimate(
    estimator: Estimator, query: torch.Tensor, key: torch.Tensor, grid: Grid, scale: float, *, pool: str = "mean"
) -> torch.Tensor:
    """Log share of the attention mass of every tile, float32 or wider [B, H, QB, KB]; -inf where not permitted.

    Args:
        query: [B, Tq, H, D].
        key: [B, Tk, G, D].
        scale: on the scores.
        pool: how the rows of a block, and of its history, are joined: "mean" or "rms".
    Raises:
        ShapeError: tensors and grid do not fit.
    Cost: the estimator's, plus the edge tiles exactly; memory as PAIRS_AT_ONCE says, and some times the result's.
    """
    grid.check("estimate", query, key, key)
    if not grid.num_queries:
        return query.new_zeros(query.shape[0], query.shape[2], 0, grid.num_key_blocks)
    rows = None if fused_cpp.refusal(query, key, key) else estimator.native(grid)
    if rows:
        scores = fused_cpp.estimate(query, key, grid, scale=scale, rows=rows, square=pool == "rms")
    else:
        scores = _estimate(estimator, query, key, grid, scale, pool)
    return _with_history(scores, estimator.history, pool) if estimator.history else scores


def _estimate(estimator, query, key, grid, scale, pool):
    """`estimate` in plain torch, without history."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = key.shape[2]
    queries = pad(query, (0, 0, 0, 0, 0, -query.shape[1] % grid.query_block)).transpose(1, 2)
    queries = (queries.to(wide) * scale).unflatten(1, (groups, -1)).unflatten(3, (-1, grid.query_block))
    keys = pad(key, (0, 0, 0, 0, 0, -key.shape[1] % grid.key_block)).transpose(1, 2)
    keys = keys.to(wide).unflatten(2, (-1, grid.key_block))
    full, edge = grid.full(query.device), grid.permitted(query.device) & ~grid.full(query.device)
    size = max(1, PAIRS_AT_ONCE // max(1, query.shape[0] * query.shape[2] * grid.query_block * grid.num_keys))
    slabs = [
        _slab(estimator, queries[:, :, :, start:start + size], keys, grid, start,
              (full[:, :, start:start + size], edge[:, :, start:start + size]), pool)
        for start in range(0, grid.num_query_blocks, size)
    ]
    return torch.cat(slabs, 3).flatten(1, 2)


def _slab(estimator, queries, keys, grid, start, kinds, pool):
    """Log shares [B, G, P, S, KB] of some query blocks; no key block beyond their last permitted one is touched."""
    full, edge = kinds
    permitted = (full | edge)[:, :, None]
    some = permitted.flatten(0, -2).any(0).nonzero()
    seen = slice(0, int(some[-1]) + 1 if len(some) else 1)
    mass = estimator.log_mass(queries, keys[:, :, seen], grid)
    mass = mass.masked_fill_(~full[:, :, None, :, None, seen], -torch.inf)
    ids, exact = _edge_mass(estimator, queries, keys, grid, start, edge)
    if ids.shape[-1]:
        slots = ids.clamp(max=mass.shape[-1])[:, None, None, :, None].expand(*mass.shape[:-1], -1)
        # An empty slot points past the last tile, to a column that is cut off again.
        mass = pad(mass, (0, 1), value=-torch.inf).scatter(-1, slots, exact)[..., :-1]
    # A row that may see nothing has no shares; a NaN among the scores stays one, for the rule to refuse.
    shares = mass.softmax(-1).masked_fill(torch.isneginf(mass.amax(-1, keepdim=True)), 0)
    shares = shares.mean(-2) if pool == "mean" else shares.square_().mean(-2).sqrt_()
    return _log_shares(pad(shares, (0, keys.shape[2] - shares.shape[-1])), permitted)


def _with_history(scores, history, pool):
    """Log shares [B, H, QB, KB] of each block joined with those of the blocks before it; the first ones have fewer."""
    power, history = 1 if pool == "mean" else 2, min(history, scores.shape[2])
    shares = pad((power * scores).exp(), (0, 0, history, 0)).unfold(2, history + 1, 1).sum(-1)
    joined = torch.arange(1, scores.shape[2] + 1, device=scores.device).clamp(max=history + 1)
    return _log_shares((shares / joined[:, None]) ** (1 / power), ~torch.isneginf(scores))


def _log_shares(shares, permitted):
    """The logarithm of shares; -inf only where a tile is not permitted."""
    return shares.clamp(min=torch.finfo(shares.dtype).tiny).log().masked_fill(~permitted, -torch.inf)


def _edge_mass(estimator, queries, keys, grid, start, edge):
    """The tiles that need an element mask, by number and exactly.

    Returns:
        ids int64 [B or 1, S, slots] (KB where empty) and log mass [B, G, P, S, R', slots].
    """
    edge = edge[:, 0]
    slots = int(edge.sum(-1).max()) if edge.numel() else 0
    ids = torch.sort(~edge, dim=-1, stable=True).indices[..., :slots]
    ids = ids.where(torch.arange(slots, device=ids.device) < edge.sum(-1, keepdim=True), grid.num_key_blocks)
    batch, _, _, size, rows, _ = queries.shape
    rows_of_batch = torch.arange(batch, device=ids.device)
    gathered = keys.transpose(1, 2)[rows_of_batch[:, None, None], ids.clamp(max=grid.num_key_blocks - 1)]
    scores = torch.einsum("bgpsrd,bstgud->bgpsrtu", queries, gathered)
    within = torch.arange(grid.key_block, device=ids.device)
    key_positions = torch.where(ids[..., None] < grid.num_key_blocks, ids[..., None] * grid.key_block + within, -1)
    blocks = torch.arange(start, start + size, device=ids.device)
    positions = grid.offset + blocks[:, None] * grid.query_block + torch.arange(rows, device=ids.device)
    seen = grid.pairs(positions[None, :, :, None, None], key_positions[:, :, None],
                      rows_of_batch.view(-1, 1, 1, 1, 1))
    return ids, estimator.rows(scores.masked_fill(~seen[:, None, None], -torch.inf).logsumexp(-1))


@torch.no_grad()
def see_values(scores: torch.Tensor, value: torch.Tensor, grid: Grid) -> torch.Tensor:
    """From mass to the expected change of the output: score + log ‖v̄_J − ō_I‖.

    Dropping tile J from a row of output o moves the output by about share · (v̄_J − o); ō_I is guessed from the
    same shares and mean values.

    Args:
        scores: log shares [B, H, QB, KB].
        value: [B, Tk, G, Dv].
    Returns:
        the same shape; -inf stays -inf.
    """
    heads, groups = scores.shape[1], value.shape[2]
    values = pad(value, (0, 0, 0, 0, 0, -value.shape[1] % grid.key_block)).transpose(1, 2)
    mean = values.to(scores.dtype).unflatten(2, (-1, grid.key_block)).mean(-2).repeat_interleave(heads // groups, 1)
    output = scores.exp() @ mean
    distance = torch.cdist(output, mean)
    return scores + distance.clamp(min=torch.finfo(scores.dtype).tiny).log()


def share_in_group(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """One choice a KV group: log of the mean share over its query heads, [B, H, QB, KB] → [B, G, QB, KB]."""
    per_group = scores.shape[1] // groups
    return scores.unflatten(1, (groups, per_group)).logsumexp(2) - _log(per_group)


def near(grid: Grid, device: torch.device, *, window: int) -> torch.Tensor:
    """Bool [B or 1, 1, QB, KB]: tiles kept wherever they are permitted.

    The block of the first real key (the sink), every edge tile (the diagonal), and tiles within `window` tokens of the
    query block's first row.
    """
    start, _ = grid.bounds(device)
    first, _ = grid.query_span(device)
    key_first, key_last = grid.key_span(device)
    sink = (key_first <= start) & (start <= key_last)
    local = key_last >= (first - window)[:, None]
    return (sink | local | ~grid.full(device)) & grid.permitted(device)


def always_kept(grid: Grid, device: torch.device, *, window: int) -> torch.Tensor:
    """Bool [B or 1, 1, QB, KB]: tiles no rule may drop: `near`, and the last query block (it makes the next token)."""
    final = torch.arange(grid.num_query_blocks, device=device) == grid.num_query_blocks - 1
    return near(grid, device, window=window) | (final[:, None] & grid.permitted(device))


@torch.no_grad()
def choose(rule: Rule, scores: torch.Tensor, forced: torch.Tensor, grid: Grid) -> Tiles:
    """The plan of the tiles that `rule` keeps; keeping everything is the dense plan.

    It is `Tiles.from_selection` of the rule's selection, without a selection where native code has the rule. There
    shares are added up in double: a tile may differ where fp32 rounds across the edge of the rule.

    Args:
        scores: log shares [B, H or G, QB, KB]; -inf where not permitted.
        forced: bool [B or 1, 1, QB, KB]; see `always_kept`.
    Raises:
        RuleError: NaN or +inf among the scores, or a parameter that does not fit them.
    """
    parameters = _parameters(rule, scores)
    if parameters is None:
        return Tiles.from_selection(rule(scores, forced=forced), grid)
    tiles = fused_cpp.keep(scores, forced, grid, rule=type(rule).__name__, parameters=parameters)
    kept = tiles.full_count.sum() + tiles.partial_count.sum()
    return Tiles(grid=grid) if int(kept) == int((~torch.isneginf(scores)).sum()) else tiles


def _parameters(rule, scores):
    """The parameter of a rule for every head, where native code can take them; else None."""
    if type(rule) not in PARAMETER or scores.dtype != torch.float32 or fused_cpp.refusal(scores, scores, scores):
        return None
    name, heads = PARAMETER[type(rule)], scores.shape[1]
    value = 0.0 if name is None else getattr(rule, name)
    values = value if isinstance(value, tuple) else (value,) * heads
    return [float(value) for value in values] if len(values) == heads else None


def _check_stride(where: str, stride: int, do: str) -> None:
    if type(stride) is not int or not 1 <= stride <= MAX_BLOCK:
        raise RuleError(where, expected=f"a stride from 1 to {MAX_BLOCK}", got=repr(stride)[:200], do=do)


def _log(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float64).log())
