"""How alike two runs are: of what either kept, the share that both kept, by layer and room, for tokens that match."""

from difflib import SequenceMatcher

import torch

from sentei.circuit.bits import unpack, unpack_rows
from sentei.circuit.run import Run

ROOMS = ("connections", "heads", "experts", "depth")


def aligned(first: Run, second: Run) -> list[tuple[int, int]]:
    """Pairs of places in order: those of the same token by the longest matching blocks, a shared prefix first; between
    such blocks, where as many tokens stand in both, those that stand in the same place ("cave" and "field")."""
    a, b = ([token.id for token in run.tokens] for run in (first, second))
    shared = shared_prefix(first, second)
    pairs = [(place, place) for place in range(shared)]
    for kind, start, stop, other, end in SequenceMatcher(None, a[shared:], b[shared:], autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and stop - start == end - other):
            pairs += [(shared + start + step, shared + other + step) for step in range(stop - start)]
    return pairs


def shared_prefix(first: Run, second: Run) -> int:
    """How many tokens the runs begin with in common."""
    count = 0
    for one, other in zip(first.tokens, second.tokens, strict=False):
        if one.id != other.id:
            break
        count += 1
    return count


def prefix_differences(first: Run, second: Run) -> int:
    """How many choices and weights differ within the shared prefix, over all layers; 0 proves it identical.

    Costs are left out, as they are made of the choices, and weights of connections whose rows span several tokens.
    """
    shared, different = shared_prefix(first, second), 0
    for layer in range(len(first.layers)):
        for part in ("experts.bits", "experts.ids", "experts.weights", "heads.bits", "heads.weights", "rank.kept",
                     "depth.bits", "depth.weights"):
            one, other = (run.get(layer, part) for run in (first, second))
            if one is not None and other is not None:
                different += int((one[:shared].int() != other[:shared].int()).sum())
        one, other = _even(*(kept_keys(run, layer, shared)[..., :shared] for run in (first, second)))
        different += int((one != other).sum())
        if all(_token_by_token(run, layer, shared) for run in (first, second)):
            one, other = _even(*(run.get(layer, "connections.weights")[:, :shared] for run in (first, second)))
            different += int((one != other).sum())
    return different


def _token_by_token(run: Run, layer: int, stop: int) -> bool:
    """Whether row t of a layer's connections is token t, for the first `stop` tokens."""
    end = 0
    for span in run.spans(layer):
        if span.first != end or span.block > 1:
            break
        end += span.queries
    return end >= stop > 0


def _even(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two [H, …] with as many heads each: one that chooses for several stands for each of them."""
    heads = max(len(one), len(other))
    return one.repeat_interleave(heads // len(one), 0), other.repeat_interleave(heads // len(other), 0)


def kept_keys(run: Run, layer: int, stop: int | None = None) -> torch.Tensor:
    """Bool [H, T, T]: the keys each head keeps for each of the first `stop` tokens, token by token; all where nothing
    was chosen."""
    tokens = len(run.tokens)
    stop = tokens if stop is None else stop
    choosers = max(run.layers[layer].choosers, 1)
    seen = torch.ones(stop, tokens, dtype=torch.bool)
    seen = seen.tril() if run.causal else seen
    keep = seen.expand(choosers, -1, -1).clone()
    start = 0
    packed = run.get(layer, "connections.bits")
    for span in run.spans(layer):
        widths = span.widths(tokens, run.causal)
        size = sum(-(-width // 8) for width in widths)
        units = unpack_rows(packed[:, start:start + size], widths, -(-tokens // span.unit))
        start += size
        full = units.repeat_interleave(span.block, 1)[:, :span.queries].repeat_interleave(span.unit, 2)[..., :tokens]
        here = slice(span.first, min(span.first + span.queries, stop))
        keep[:, here] &= full[:, :max(here.stop - here.start, 0)]
    return keep


def agreement(first: Run, second: Run, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Float [layers, ROOMS, pairs]: |both| ÷ |either| of what is kept, 1 where neither keeps anything.

    A key that has no partner in the other run counts as kept by one alone. NaN where a layer has nothing to choose.

    Args:
        pairs: of tokens of the first and the second run that are compared; keys are matched by `aligned`.
    """
    matched = aligned(first, second)
    partner = torch.full((len(first.tokens),), -1)
    for one, other in matched:
        partner[one] = other
    here, there = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    result = torch.full((len(first.layers), len(ROOMS), len(pairs)), torch.nan)
    for layer in range(len(first.layers)):
        result[layer, 0] = _edges(kept_keys(first, layer)[:, here], kept_keys(second, layer)[:, there], partner)
        for index, part, number in ((1, "heads.bits", first.layers[layer].kv_heads),
                                    (2, "experts.bits", first.layers[layer].experts), (3, "depth.bits", 2)):
            one, other = (run.get(layer, part) for run in (first, second))
            if one is not None and other is not None:
                one, other = (bits if bits.dim() == 2 else bits.unsqueeze(-1) for bits in (one[here], other[there]))
                result[layer, index] = _jaccard(unpack(one, number), unpack(other, number))
    return result


def _edges(one: torch.Tensor, other: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Float [pairs] of bool [H, pairs, T1] and [H, pairs, T2], whose keys are matched by int64 partner [T1]."""
    one, other = _even(one, other)
    mine = partner >= 0
    both = (one[..., mine] & other[..., partner[mine]]).sum((0, 2))
    either = one.sum((0, 2)) + other.sum((0, 2)) - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _jaccard(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Float [N] of bool [N, C]."""
    both, either = (one & other).sum(-1), (one | other).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
