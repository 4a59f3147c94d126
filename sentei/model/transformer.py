"""A small transformer with one slot a room: a decoder, or with `causal=False` an encoder.

    x ← x + attention(norm(x))        the slot `connections`, between q, k, v and the output projection
    x ← x + feed_forward(norm(x))     the slot `feed_forward`: a hidden width (dense), or the configuration of a room
    the slot `depth` decides which tokens those two lines change; None: all of them

RMSNorm before each sublayer (1910.07467), rotary positions (2104.09864), grouped key/value heads (2305.13245), a gated
feed-forward layer (2002.05202), no biases, and one matrix for embedding and logits (1608.05859).
"""

import copy
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.axis import Axis
from sentei.axes.connections import Config as Attended
from sentei.axes.connections import Connections
from sentei.axes.depth import Rows
from sentei.core.cost import Cost
from sentei.core.errors import FileError, RuleError, SenteiError, ShapeError, UnsupportedError, require
from sentei.core.rotation import rotate
from sentei.core.rules import All, Rule
from sentei.core.shapes import check_shape
from sentei.core.tracing import Trace
from sentei.model.slots import (
    DEPTHS,
    FEED_FORWARDS,
    INITIAL_SPREAD,
    LARGEST,
    dense_for,
    is_by_task,
    linear,
    slot_from_json,
    slot_of,
    slot_to_json,
)

ROTARY_BASE = 10_000.0
DEEPEST = 1024  # layers in a configuration, which may come from a file


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model and what stands in its slots.

    Args:
        vocabulary, width, layers: V, the width of the residual stream, and how many blocks.
        heads: H query heads and G key/value heads; H divides the width, G divides H.
        feed_forward: the hidden width, or the configuration of a room of FEED_FORWARDS.
        connections: which earlier tokens a token attends to.
        depth: None, or the configuration of a room of DEPTHS.
        causal: a token sees no later one (a decoder).
    """

    vocabulary: int = 257
    width: int = 128
    layers: int = 4
    heads: tuple[int, int] = (4, 4)
    feed_forward: object = 352
    connections: Attended = field(default_factory=Attended)
    depth: object = None
    causal: bool = True

    def __post_init__(self):
        paired = isinstance(self.heads, tuple) and len(self.heads) == 2
        sizes = (self.vocabulary, self.width, self.layers, *(self.heads if paired else (0,)))
        whole = all(type(size) is int and 1 <= size <= LARGEST for size in sizes)
        require("model.Config", self, {
            f"vocabulary, width, layers and two numbers of heads, whole and from 1 to {LARGEST}": paired and whole,
            f"at most {DEEPEST} layers": whole and self.layers <= DEEPEST,
            "heads (H, G): G divides H, H the width, and a head's width is even": whole and (
                self.heads[0] % self.heads[1] == 0 and self.width % (2 * self.heads[0]) == 0),
            f"feed_forward a hidden width, or a configuration of {', '.join(FEED_FORWARDS)}": (
                slot_of(FEED_FORWARDS, self.feed_forward) is not None
                and (type(self.feed_forward) is not int or 1 <= self.feed_forward <= LARGEST)),
            "connections a connections.Config": isinstance(self.connections, Attended),
            f"depth None, or a configuration of {', '.join(DEPTHS)}": slot_of(DEPTHS, self.depth) is not None,
            "causal a bool": isinstance(self.causal, bool),
        })

    def to_json(self) -> dict:
        """The configuration as a JSON object; a room in a slot stands there with its name as `room`."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**plain, "heads": list(self.heads), "connections": self.connections.to_json(),
                "feed_forward": slot_to_json(FEED_FORWARDS, self.feed_forward),
                "depth": slot_to_json(DEPTHS, self.depth)}

    @classmethod
    def from_json(cls, value: dict) -> "Config":
        """The configuration written by `to_json`; unknown or missing keys are refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__):
            raise FileError("model.Config", expected=f"the keys {', '.join(cls.__dataclass_fields__)}",
                            got=repr(value)[:200], do="correct the model's configuration")
        heads = value["heads"]
        parts = {"heads": tuple(heads) if isinstance(heads, list) else heads,
                 "connections": Attended.from_json(value["connections"]),
                 "feed_forward": slot_from_json(FEED_FORWARDS, value["feed_forward"]),
                 "depth": slot_from_json(DEPTHS, value["depth"])}
        try:
            return cls(**{**value, **parts})
        except SenteiError as error:
            raise FileError(error.where, expected=error.expected, got=error.got, do=error.do) from error


class Attention(nn.Module):
    """Self-attention with rotary positions around the room `connections`: x [B, N, width] → [B, N, width]."""

    def __init__(self, config: Config, impl: str):
        super().__init__()
        width, shared = config.width, config.width // config.heads[0] * config.heads[1]
        self.head_dim = width // config.heads[0]
        self.query, self.output = linear(width, width), linear(width, width, adds=config)
        self.key, self.value = linear(width, shared), linear(width, shared)
        self.connections = Connections(config.connections, causal=config.causal, impl=impl)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Attends within x, and to what the rows' cache holds."""
        query, key, value = (project(x).unflatten(-1, (-1, self.head_dim))
                             for project in (self.query, self.key, self.value))
        query, key = (rotate(heads, rows.positions, ROTARY_BASE) for heads in (query, key))
        positions = rows.positions
        if rows.cache is not None:
            held = not rows.cache.is_empty
            keys, values = rows.cache.extend(key, value, positions)
            if held:  # else these rows are all there is, and stand where their queries do, padding behind included
                key, value, positions = keys, values, rows.cache.positions
        return self.output(self.connections(query, key, value, real_span(positions)).flatten(-2))

    def potential(self, real: torch.Tensor, held: int) -> int:
        """Multiply-adds of the room for every permitted pair of all tokens; `real` bool [B, T], after `held` others."""
        keys = F.pad(real, (held, 0), value=True)
        grid = self.connections.grid(real, keys, real_span(torch.where(keys, 0, -1)))
        tiles = int(grid.permitted(real.device).expand(len(real), -1, -1, -1).sum())
        return tiles * grid.query_block * grid.key_block * 2 * self.query.out_features


class Block(nn.Module):
    """Attention and a feed-forward layer, as what they add to the residual stream; `impl` as in `attend`."""

    def __init__(self, config: Config, impl: str):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config, impl)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-6)
        slot = slot_of(FEED_FORWARDS, config.feed_forward)
        self.feed_forward, self.weights_in_room = slot.layer(config.feed_forward, config), slot.weights

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The change of x [B, N, width]."""
        attended = self.attention(self.attention_norm(x), rows)
        real = rows.positions >= 0
        mask = None if bool(real.all()) else real
        return attended + self.feed_forward(self.feed_forward_norm(x + attended), mask, rows.tasks)

    def potential(self, real: torch.Tensor, held: int) -> int:
        """What the rooms inside could cost; see `Attention.potential`."""
        return self.attention.potential(real, held) + int(real.sum()) * self.weights_in_room(self.feed_forward)


class Transformer(nn.Module):
    """The model: tokens int64 [B, T] → logits [B, T, V].

        model = Transformer(Config(width=64, layers=2))
        model.generate(tokens, 32)

    Args:
        config: its shape and slots.
        impl: the attention kernel, see `kernels.attention.attend`.
    """

    def __init__(self, config: Config, *, impl: str = "auto"):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_SPREAD)
        depth = slot_of(DEPTHS, config.depth)
        self.blocks = nn.ModuleList(
            depth.layer(config.depth, Block(config, impl), config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None, cache: list | None = None,
                tasks: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, V] for what follows each token.

        Args:
            tokens: int64 [B, T]; what stands in padding is not read by real tokens.
            lengths: int64 [B, 2], start and stop of the real tokens of each row of `tokens`.
            cache: of what came before, from `cache()`; it takes in these tokens.
            tasks: int64 [B], the task of each sequence, where experts are chosen by it.
        Raises:
            ShapeError: other shapes, or padding behind real tokens that go into a cache; tasks, where nothing is
                chosen by them, or none, where experts are.
            UnsupportedError: a cache for an encoder.
        """
        return F.linear(self.hidden(tokens, lengths, cache, tasks), self.embedding.weight)

    def hidden(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None, cache: list | None = None,
               tasks: torch.Tensor | None = None) -> torch.Tensor:
        """The states [B, T, width] that `forward` makes logits of."""
        sizes = check_shape("Transformer", "tokens", tokens, "B T")
        if lengths is not None:
            check_shape("Transformer", "lengths", lengths, "B S", B=sizes["B"], S=2)
            if cache is not None and bool((lengths[:, 1] < sizes["T"]).any()):
                raise ShapeError("Transformer", expected="padding in front alone, where a cache goes on",
                                 got="padding behind", do="move the padding to the front")
        if tasks is not None:
            check_shape("Transformer", "tasks", tasks, "B", B=sizes["B"])
        if (tasks is not None) != is_by_task(self.config.feed_forward):
            raise ShapeError("Transformer", expected="tasks where experts are chosen by them, and there alone",
                             got=f"{'no ' if tasks is None else ''}tasks for {self.config.feed_forward}",
                             do="name the task of each sequence, or leave tasks out")
        x = self.embedding(tokens)
        for index, layer in enumerate(self.blocks):
            x = layer(x, lengths, None if cache is None else cache[index], tasks)
        return self.norm(x)

    def cache(self) -> list:
        """An empty cache for `forward`, one part a layer; an encoder has none (UnsupportedError)."""
        if not self.config.causal:
            raise UnsupportedError("Transformer", expected="a causal model for a cache", got="an encoder",
                                   do="read all tokens in one call")
        return [slot_of(DEPTHS, self.config.depth).cache() for _ in self.blocks]

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, count: int, *, temperature: float = 0.0, rule: Rule | None = None,
                 generator: torch.Generator | None = None, lengths: torch.Tensor | None = None,
                 stop: int | None = None, tasks: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens and what the model writes after them, int64 [B, T + count].

        Args:
            tokens: int64 [B, T], T from 1; shorter prompts are padded in front, as `lengths` [B, 2] then says.
            count: how many to write, from 0.
            temperature: 0 takes the likeliest token; otherwise they are drawn from softmax(logits / temperature).
            rule: which tokens may be drawn, by default all: `TopK(40)`, or `Mass(0.9)`, which is top-p.
            generator: of the draws.
            stop: the token that ends a row; the rest of the row is filled with it.
            tasks: as for `forward`.
        Raises:
            SenteiError: an encoder, padding behind a prompt, an empty one, a temperature below 0.
        """
        length = check_shape("generate", "tokens", tokens, "B T")["T"]
        require("generate", (list(tokens.shape), count, temperature), {
            "a prompt of at least one token": length > 0, "a count from 0": type(count) is int and count >= 0,
            "a temperature from 0": 0 <= temperature < torch.inf})
        cache, read = self.cache(), tokens
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(count):
            logits = F.linear(self.hidden(read, lengths, cache, tasks)[:, -1], self.embedding.weight)
            read, lengths = draw(logits, temperature, All() if rule is None else rule, generator), None
            if stop is not None:
                read = torch.where(ended, stop, read)
                ended = ended | (read == stop)
            tokens, read = torch.cat([tokens, read[:, None]], 1), read[:, None]
        return tokens

    def extract(self, task: int) -> "Transformer":
        """The smaller model that answers as this one does for `task`, a copy: its experts are dense layers.

        They have the neurons that the task keeps, and where layers keep different numbers as many as the widest.

        Raises:
            RuleError: experts that are not chosen by the task, or none.
            ShapeError: no such task.
        Reference: Kudugunta et al. 2021, arXiv 2110.03742.
        """
        if not is_by_task(self.config.feed_forward):
            raise RuleError("extract", expected="experts with a Task gate", got=repr(self.config.feed_forward),
                            do="choose experts by the task, not by the token")
        mixtures = [layer.block.feed_forward for layer in self.blocks]
        hidden = max(1, *(mixture.extract(task).up_proj.out_features for mixture in mixtures))
        config = replace(self.config, feed_forward=hidden)
        small = copy.deepcopy(self, {id(mixture): dense_for(mixture, task, hidden, config) for mixture in mixtures})
        small.config = config
        return small

    def size(self) -> tuple[int, int]:
        """How many parameters there are and how many bytes they take; a shared one counts once."""
        sizes = [(parameter.numel(), parameter.element_size()) for parameter in self.parameters()]
        return sum(number for number, _ in sizes), sum(number * bytes_each for number, bytes_each in sizes)

    def cost(self, records: Trace, tokens: torch.Size) -> Cost:
        """What one forward pass cost (`multiply_adds`, two FLOPs each) and could have cost (`dense_multiply_adds`).

        Rooms tell of themselves in the records; every other linear layer, and the logits, run for each token.
        Normalisation, rotation and softmax are no multiply-adds of matrices and are left out. Rooms inside a room that
        skips tokens are told of some alone: what they could have cost is that of all tokens, and of the keys that a
        cache holds.

        Args:
            records: of a trace around that one pass.
            tokens: the shape [B, T] of what it read.
        """
        rows, itemsize = tokens.numel(), self.embedding.weight.element_size()
        plain = [module.weight.shape for name, module in self.named_modules()
                 if isinstance(module, nn.Linear) and not _in_a_room(self, name)] + [self.embedding.weight.shape]
        work = sum(rows * out * into for out, into in plain)
        moved = sum(out * into + rows * (out + into) for out, into in plain) * itemsize
        return sum((record.cost for record in records),
                   Cost(multiply_adds=work, dense_multiply_adds=work + self.unseen(records), bytes=moved))

    def unseen(self, records: Trace) -> int:
        """What the rooms inside the depth slots could have cost for the tokens they were not shown."""
        missing = 0
        for record in records:
            layer = self.get_submodule(record.path)
            if layer not in self.blocks:
                continue
            inside = [other for other in records if other.path.startswith(f"{record.path}.")]
            held = max((other.span.keys - other.span.queries for other in inside if other.span is not None), default=0)
            missing += layer.block.potential((record.selection.permitted > 0).view(-1, record.selection.ids.shape[1]),
                                             held) - sum(other.cost.dense_multiply_adds for other in inside)
        return missing


def draw(logits: torch.Tensor, temperature: float, rule: Rule, generator: torch.Generator | None) -> torch.Tensor:
    """One token a row, int64 [B], from logits [B, V]: the likeliest at temperature 0, ties to the lower number."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    kept = rule(scores[:, None]).mask()[:, 0]
    return torch.multinomial(scores.masked_fill(~kept, -torch.inf).softmax(-1), 1, generator=generator)[:, 0]


def real_span(positions: torch.Tensor) -> torch.Tensor | None:
    """Int64 [B, 2], start and stop of the real ones among positions [B, P], which stand together; None if all are."""
    real = positions >= 0
    if bool(real.all()):
        return None
    start, count = real.byte().argmax(1), real.sum(1)
    return torch.stack([start, start + count], 1)


def _in_a_room(model: nn.Module, path: str) -> bool:
    """Whether the module at `path` belongs to a room, which accounts for its own weights."""
    names = path.split(".")
    return any(isinstance(model.get_submodule(".".join(names[:end])), Axis) for end in range(1, len(names)))
