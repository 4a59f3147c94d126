"""Choices that do not look at the input, the best to be found for a trained model: what dynamic ones have to beat.

- experts: one set of experts a layer, the one of the lowest loss on text that is searched, layer by layer;
- connections: for each head K places, relative ones or among the first, those with the most attention on that text;
- depth: for each layer the half of the tokens' places of the lowest loss on it, among a few candidates.

Nothing is trained for them, and none reads the text it is judged on.
"""

from dataclasses import dataclass
from itertools import combinations

import torch

from sentei.axes.connections import Connections
from sentei.axes.depth import Depth
from sentei.axes.experts import Experts
from sentei.core.rules import Fixed, Rule
from sentei.core.tracing import trace
from sentei.model import Transformer
from sentei.training.losses import window_losses

SINKS = 4  # first tokens that may be among the places


@dataclass(frozen=True)
class Places(Rule):
    """Keeps, in each head, the candidates that stand so far back, and some of the first, whatever the scores.

    Args:
        back: bool [H, C], how far back.
        first: bool [H, SINKS], places from the beginning.
    """

    back: torch.Tensor
    first: torch.Tensor

    def keep(self, scores, permitted, forced):
        """Bool like the scores."""
        far = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])
        kept = self.back[:, far.clamp(min=0)]
        kept[..., :SINKS] |= self.first[:, None]
        return kept & permitted | forced


def rooms(model: torch.nn.Module, kind: type) -> list:
    """The rooms of a model, in order."""
    return [module for module in model.modules() if isinstance(module, kind)]


def loads(model: Transformer, windows: torch.Tensor) -> list[torch.Tensor]:
    """How many bytes keep each expert, [E] a layer."""
    with torch.no_grad(), trace(model) as records:
        model(windows[:, :-1])
    return [record.selection.mask().flatten(0, -2).sum(0) for record in records if record.path.endswith(".experts")]


def best_pairs(model: Transformer, windows: torch.Tensor) -> list[Fixed]:
    """The pairs of the search."""
    layers = rooms(model, Experts)
    chosen = [Fixed(tuple(load.topk(2).indices.tolist())) for load in loads(model, windows)]
    for layer, rule in zip(layers, chosen, strict=True):
        layer.rule = rule
    for number, layer in enumerate(layers):
        losses = {}
        for pair in combinations(range(layer.num_experts), 2):
            layer.rule = Fixed(pair)
            losses[pair] = window_losses(model, windows).mean().item()
        chosen[number] = layer.rule = Fixed(min(losses, key=losses.get))
    for layer in layers:
        layer.rule = layer.config.rule
    return chosen


def with_rules(model: Transformer, kind: type, rules: list[Rule], windows: torch.Tensor) -> torch.Tensor:
    """The windows' losses with other rules in the rooms, which have their own again afterwards."""
    found = rooms(model, kind)
    before = [room.rule for room in found]
    for room, rule in zip(found, rules, strict=True):
        room.rule = rule
    losses = window_losses(model, windows)
    for room, rule in zip(found, before, strict=True):
        room.rule = rule
    return losses


def attention(model: Transformer, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean attention of each head [H] to what stands so far back [H, T], and to each of the first bytes [H, SINKS]."""
    seen: list[tuple] = []
    handles = [room.register_forward_pre_hook(lambda _, given: seen.append(given))
               for room in rooms(model, Connections)]
    with torch.no_grad():
        model(windows[:, :-1])
    for handle in handles:
        handle.remove()
    found = []
    for query, key, *_ in seen:
        size = query.shape[1]
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        shares = scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf).softmax(-1).mean(0)
        far = torch.arange(size)[:, None] - torch.arange(size)
        back = torch.stack([shares[:, far == distance].sum(-1) / size for distance in range(size)], -1)
        found.append((back, shares[..., :SINKS].mean(1)))
    return found


def best_places(heads: list[tuple[torch.Tensor, torch.Tensor]], kept: int) -> list[Places]:
    """The K places of each head with the most attention, its own byte among them."""
    rules = []
    for back, first in heads:
        worth = torch.cat([back, first], 1)
        worth[:, 0] = torch.inf
        chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(1, worth.topk(kept, 1).indices, True)
        rules.append(Places(chosen[:, :-SINKS], chosen[:, -SINKS:]))
    return rules


@dataclass(frozen=True)
class Tokens(Rule):
    """Keeps the tokens at the same places, whatever the scores.

    Args:
        places: bool [T].
    """

    places: torch.Tensor

    def keep(self, scores, permitted, forced):
        """Bool like the scores, [B, T, 1]."""
        return self.places[:scores.shape[-2], None] & permitted | forced


def halves(tokens: int, drawn: int = 4) -> list[Tokens]:
    """Halves of so many tokens: every other one from the first or second on, the first or last half, random ones."""
    places, generator = torch.arange(tokens), torch.Generator().manual_seed(0)
    found = [places % 2 == 0, places % 2 == 1, places < (tokens + 1) // 2, places >= tokens // 2]
    found += [torch.randperm(tokens, generator=generator) < (tokens + 1) // 2 for _ in range(drawn)]
    return [Tokens(half) for half in found]


def best_halves(model: Transformer, windows: torch.Tensor) -> list[Tokens]:
    """The halves of the lowest loss on windows, layer by layer, from every other token on."""
    layers, candidates = rooms(model, Depth), halves(windows.shape[1] - 1)
    chosen = [candidates[0]] * len(layers)
    for number in range(len(layers)):
        tried = [[*chosen[:number], candidate, *chosen[number + 1:]] for candidate in candidates]
        losses = [with_rules(model, Depth, rules, windows).mean().item() for rules in tried]
        chosen = tried[losses.index(min(losses))]
    return chosen
