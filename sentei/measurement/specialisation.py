"""Who does the work: load, dead experts, who works together, and what an expert is for, from the records of a trace.

    with trace(model) as records:
        model(**inputs)
    for path, load in loads(records).items(): ...

Tokens of one text are alike, so that a thousand of them tell less than a thousand draws would: the bounds here take
tokens for independent, and hold for tokens drawn far apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sentei.core.errors import RuleError, ShapeError
from sentei.core.selection import Selection
from sentei.core.tracing import Record, Trace

ROOMS = ("experts", "neurons", "sparing")


@dataclass(frozen=True, kw_only=True)
class Load:
    """How one layer uses its experts.

    Args:
        tokens: that were allowed an expert.
        counts: tokens that kept each expert.
        entropy: of the counts' shares ÷ log E: 1 when even, 0 when one expert does everything.
        variation: standard deviation of the counts ÷ their mean.
        violation: largest count ÷ mean count - 1 (MaxVio of arXiv 2408.15664).
        dropped: the share of the tokens that kept nothing.
        confidence: mean share of the largest weight in its token's weights.
        bounds: what each expert's rate of use stays below, at the level asked for, for all experts at once.
        dead: experts whose bound is below a small part of the mean rate.
        unknown: experts that no token kept, of which there are too few tokens to say more.
    """

    tokens: int
    counts: tuple[int, ...]
    entropy: float
    variation: float
    violation: float
    dropped: float
    confidence: float
    bounds: tuple[float, ...]
    dead: tuple[int, ...]
    unknown: tuple[int, ...]


def loads(records: Trace, *, level: float = 0.95, part: float = 0.01) -> dict[str, Load]:
    """The load of every layer of experts in a trace, over all its calls; other rooms are left out.

    Args:
        level: of the bounds (Clopper and Pearson 1934, one-sided, Bonferroni over a layer's experts).
        part: an expert is dead if its rate is surely below this part of the layer's mean rate.
    """
    if not 0 < level < 1 or not 0 < part < 1:
        raise RuleError("loads", expected="level and part above 0 and below 1", got=f"{level!r}, {part!r}",
                        do="choose others, e.g. 0.95 and 0.01")
    found = dict.fromkeys(record.path for record in records if record.room in ROOMS)
    return {path: _load(records.at(path), level, part) for path in found}


def _load(records: Sequence[Record], level: float, part: float) -> Load:
    kept = torch.cat([_kept(record.selection) for record in records])
    tokens, number = kept.shape
    counts = kept.sum(0)
    mean = float(counts.double().mean())
    largest = torch.cat([_largest(record.selection) for record in records])
    bounds = tuple(rate_bound(count, tokens, 1 - (1 - level) / number) for count in counts.tolist())
    gone = dead(counts, tokens, level=level, part=part)
    return Load(tokens=tokens, counts=tuple(counts.tolist()), entropy=entropy(counts), violation=violation(counts),
                variation=float(counts.double().std(correction=0)) / mean if mean > 0 else 0.0,
                dropped=float((~kept.any(-1)).double().mean()) if tokens else 0.0,
                confidence=float(largest.mean()) if len(largest) else 0.0, bounds=bounds, dead=gone,
                unknown=tuple(e for e, count in enumerate(counts.tolist()) if count == 0 and e not in gone))


def entropy(counts: torch.Tensor) -> float:
    """The entropy of the shares of counts [E] ÷ log E; 0 if there are none, and 1 for one expert with some."""
    total = float(counts.sum())
    if total == 0 or len(counts) == 1:
        return float(total > 0)
    shares = counts.double() / total
    return float(torch.special.entr(shares).sum() / math.log(len(counts)))


def violation(counts: torch.Tensor) -> float:
    """The largest of the counts [E] ÷ their mean - 1; 0 if there are none."""
    total = float(counts.sum())
    return float(counts.max()) * len(counts) / total - 1 if total else 0.0


def dead(counts: torch.Tensor, tokens: int, *, level: float = 0.95, part: float = 0.01) -> tuple[int, ...]:
    """The experts whose rate is surely below `part` of the mean rate, from counts [E] over so many tokens; see `loads`.

    Cost: a bound for each expert whose count is below that part, and for no other.
    """
    small, each = part * float(counts.double().mean()) / max(tokens, 1), 1 - (1 - level) / max(len(counts), 1)
    return tuple(e for e, count in enumerate(counts.tolist())
                 if count < small * tokens and rate_bound(int(count), tokens, each) < small)


def rate_bound(hits: int, draws: int, level: float = 0.95) -> float:
    """What a rate is below, at this level, after `hits` in so many draws; exact (Clopper and Pearson 1934).

    Without a hit it is 1 - (1 - level)^(1 / draws), near 3 / draws at 0.95: the rule of three.

    Cost: hits · 60 terms of the binomial distribution.
    """
    if hits >= draws:
        return 1.0
    if hits == 0:
        return -math.expm1(math.log1p(-level) / draws)
    i = torch.arange(hits + 1, dtype=torch.float64)
    choose = math.lgamma(draws + 1) - torch.lgamma(i + 1) - torch.lgamma(draws - i + 1)
    low, high = hits / draws, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        at_most = torch.logsumexp(choose + i * math.log(middle) + (draws - i) * math.log1p(-middle), 0).exp()
        low, high = (middle, high) if at_most > 1 - level else (low, middle)
    return high


def coactivation(records: Sequence[Record]) -> torch.Tensor:
    """How much more often two experts are kept together than if they were independent, [E, E]; 1 is chance.

    P(i and j) ÷ (P(i) P(j)); 0 where one of them is never kept. The diagonal is 1 ÷ P(i).
    """
    kept = torch.cat([_kept(record.selection) for record in records]).double()
    together, alone = kept.T @ kept / max(1, len(kept)), kept.mean(0)
    expected = alone[:, None] * alone
    return torch.where(expected > 0, together / expected.clamp(min=1e-300), 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Specialisation:
    """What experts have to do with labels: a domain a sequence, or the token itself (vocabulary).

    Args:
        labels: int64 [L], those that occur.
        tokens: int64 [L], how many have it.
        rates: float64 [L, E], the share of a label's tokens that keep an expert.
        information: bits that the label tells of one kept expert.
        by_chance: the same for shuffled labels, one number a shuffle: few tokens a label look informative.
    """

    labels: torch.Tensor
    tokens: torch.Tensor
    rates: torch.Tensor
    information: float
    by_chance: torch.Tensor

    @property
    def excess(self) -> float:
        """Information above the mean of the shuffles."""
        return self.information - float(self.by_chance.mean())

    @property
    def chance(self) -> float:
        """How often shuffled labels tell as much; never below 1 ÷ (shuffles + 1)."""
        return (1 + int((self.by_chance >= self.information).sum())) / (1 + len(self.by_chance))

    def lift(self) -> torch.Tensor:
        """Float64 [L, E]: a label's rate ÷ the rate over all tokens; 0 where the expert is never kept."""
        overall = (self.rates * self.tokens[:, None]).sum(0) / self.tokens.sum().clamp(min=1)
        return torch.where(overall > 0, self.rates / overall.clamp(min=1e-300), 0.0)


def specialisation(records: Sequence[Record], labels: Sequence[torch.Tensor], *, shuffles: int = 100,
                   seed: int = 0) -> Specialisation:
    """What the experts of one layer have to do with labels.

    Args:
        records: of one path, e.g. `trace.at(path)`.
        labels: one int64 tensor a record: [..., T], one a token, or [...], one a sequence. Then whole sequences are
            shuffled, as their tokens are alike for other reasons.
        shuffles, seed: of the null model.
    Raises:
        ShapeError: labels of another shape, or another number of them.
    """
    kept, names, groups = [], [], []
    for record, label in zip(records, labels, strict=True):
        selection = record.selection
        shape = selection.permitted.shape
        a_token = label.shape == shape
        if label.dtype != torch.int64 or not (a_token or label.shape == shape[:-1]):
            raise ShapeError("specialisation", expected=f"labels int64 {list(shape)} or {list(shape[:-1])}",
                             got=f"{label.dtype} {list(label.shape)}", do="give one label a token or a sequence")
        first = sum(len(group.unique()) for group in groups)
        rows = torch.arange(shape.numel() if a_token else label.numel())
        group = (rows.view(shape) if a_token else rows.view(label.shape).unsqueeze(-1).expand(shape)).flatten()
        real = selection.permitted.flatten() > 0
        kept.append(_kept(selection).double())
        names.append((label if a_token else label.unsqueeze(-1).expand(shape)).flatten()[real])
        groups.append(group[real].unique(return_inverse=True)[1] + first)
    kept, names, groups = (torch.cat(parts) for parts in (kept, names, groups))
    found, index, tokens = names.unique(return_inverse=True, return_counts=True)
    joint = kept.new_zeros(len(found), kept.shape[1]).index_add(0, index, kept)
    generator = torch.Generator().manual_seed(seed)
    of_group = torch.zeros(int(groups.max()) + 1 if len(groups) else 0, dtype=torch.int64).scatter(0, groups, index)
    by_chance = []
    for _ in range(shuffles):
        other = of_group[torch.randperm(len(of_group), generator=generator)][groups]
        by_chance.append(_information(torch.zeros_like(joint).index_add(0, other, kept)))
    return Specialisation(labels=found, tokens=tokens, rates=joint / tokens[:, None], information=_information(joint),
                          by_chance=torch.tensor(by_chance, dtype=torch.float64))


def _information(joint: torch.Tensor) -> float:
    """Mutual information, in bits, of the rows and columns of a table of counts."""
    shares = joint / joint.sum().clamp(min=1)
    expected = shares.sum(1, keepdim=True) * shares.sum(0, keepdim=True)
    return float(torch.special.xlogy(shares, shares / expected.clamp(min=1e-300)).sum() / math.log(2))


def _kept(selection: Selection) -> torch.Tensor:
    """Bool [N, E]: what each token that was allowed an expert kept."""
    return selection.mask().flatten(0, -2)[selection.permitted.flatten() > 0]


def _largest(selection: Selection) -> torch.Tensor:
    """Float64 [N]: the share of the largest weight, of each token that kept something."""
    weights = selection.weights.double().flatten(0, -2)
    total = weights.sum(-1)
    kept = total > 0
    return weights[kept].amax(-1) / total[kept] if kept.any() else total[kept]
