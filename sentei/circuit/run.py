"""What a trace holds: the tokens of one to three runs and, layer by layer, what each token used.

A tensor of a layer is named "LAYER.PART"; a part that is missing was not chosen there, so all of it ran. T tokens,
H heads that choose, R rows of choices, K weights kept, E experts, G key/value heads.

| part | dtype and shape | what it says |
|---|---|---|
| connections.spans | int32 [S, 4] | first token, tokens, tokens a row, tokens a candidate |
| connections.bits | uint8 [H, bytes] | the candidates kept, rows one after the other, see `bits` |
| connections.ids, .weights | uint16, uint8 [H, R, K] | the heaviest candidates of a row and their weights |
| experts.bits | uint8 [T, ⌈E / 8⌉] | the experts a token kept |
| experts.ids, .weights | uint16, uint8 [T, K] | the heaviest of them and their weights |
| heads.bits, .weights | uint8 [T, ⌈G / 8⌉], [T, G] | the key/value heads a token kept, and their sizes |
| rank.kept | uint16 [T] | directions of low-rank adapters a token kept |
| depth.bits, .weights | uint8 [T], [T, 2] | bit 0 attention ran, bit 1 the feed-forward layer; their sizes |
| cost | float32 [T, 2] | multiply-adds done, and of the dense layer |
"""

from dataclasses import dataclass, field

import torch

from sentei.circuit.bits import Span

ATTENTION_RAN, FEED_FORWARD_RAN = 1, 2


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token: its number in the vocabulary and the text it stands for."""

    id: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What there is to choose from in a layer; 0 where nothing is chosen.

    Args:
        heads, kv_heads: query heads, and key/value heads.
        choosers: the heads that choose connections: heads, or key/value heads that choose for their group.
        experts, unit: experts, and neurons each.
        rank: directions of all adapters together.
    """

    heads: int
    kv_heads: int
    choosers: int = 0
    experts: int = 0
    unit: int = 0
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One prompt and what followed, through all layers.

    Args:
        tokens: what was read, and what was written after it.
        prompt: how many of them were read.
        causal: a token sees no later one.
        layers: what there is to choose from in each.
        tensors: see the module.
        following: the likeliest next tokens and their probabilities.
        bypasses: why calls of a layer ran dense though it has a room.
    """

    tokens: tuple[Token, ...]
    prompt: int
    causal: bool
    layers: tuple[Shape, ...]
    tensors: dict[str, torch.Tensor]
    following: tuple[tuple[str, float], ...] = ()
    bypasses: tuple[str, ...] = ()

    def get(self, layer: int, part: str) -> torch.Tensor | None:
        """A part of a layer, None where nothing was chosen."""
        return self.tensors.get(f"{layer}.{part}")

    def spans(self, layer: int) -> list[Span]:
        """The granularities of a layer's connections, in the order of their tokens."""
        found = self.get(layer, "connections.spans")
        names = ("first", "queries", "block", "unit")
        return [] if found is None else [Span(**dict(zip(names, row, strict=True))) for row in found.tolist()]


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """A trace: one run, two to compare, or three: the last is the control, of a prompt that means what the first does.

    Args:
        kind: RAN, what rooms kept, or OBSERVED, what a rule would keep of a dense model.
        model: its name and where it comes from.
        rule: what chose, in words.
        versions: of what made it, by name.
        date: of the run, as text.
        runs: one to three, with the same layers.
    """

    kind: str
    model: str
    rule: str
    runs: tuple[Run, ...]
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
