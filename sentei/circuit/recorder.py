"""From the records of a trace to the parts of a run: each is packed as it comes, so that no selection is kept whole."""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sentei.circuit.bits import NONE, Span, encode, pack, pack_rows, strongest, unpack, unpack_rows
from sentei.circuit.run import ATTENTION_RAN, FEED_FORWARD_RAN, Run, Shape, Token
from sentei.core.selection import Selection
from sentei.core.trace_header import EXPERT_WEIGHTS
from sentei.core.tracing import Bypass, Record

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def layer_of(path: str) -> int | None:
    """The first number in a module's path, which is its layer's; None without one."""
    found = _LAYER.search(path)
    return None if found is None else int(found[1])


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the picture needs to know of a model.

    Args:
        layers, heads, kv_heads: how many there are.
        pair: multiply-adds that one query and one key cost one head.
        linear: by layer, the weights of the linear layers of attention, and of all others.
        causal: a token sees no later one.
    """

    layers: int
    heads: int
    kv_heads: int
    pair: int = 0
    linear: tuple[tuple[int, int], ...] = ()
    causal: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> "Facts":
        """The facts of a model of transformers or of `sentei.model`; of any other what its modules tell."""
        config = getattr(model, "config", None)
        numbers = [layer_of(path) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        layers = max((number for number in numbers if number is not None), default=-1) + 1
        heads = getattr(config, "heads", None) or (
            getattr(config, "num_attention_heads", 1),
            getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1))
        width = getattr(config, "width", None) or getattr(config, "hidden_size", 0)
        size = getattr(config, "head_dim", None) or width // heads[0]
        linear = [[0, 0] for _ in range(layers)]
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and layer_of(path) is not None:
                linear[layer_of(path)][0 if "att" in path else 1] += module.weight.numel()
        causal = getattr(config, "causal", None)
        if causal is None:
            causal = any(getattr(module, "is_causal", False) for module in model.modules())
        return cls(layers=layers, heads=heads[0], kv_heads=heads[1], pair=2 * size, causal=causal,
                   linear=tuple(map(tuple, linear)))


@dataclass
class _Layer:
    """What has come of one layer: rows of connections, and per token what the other rooms kept."""

    rows: list[tuple[Span, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    experts: list[tuple[torch.Tensor, Selection]] = field(default_factory=list)
    number: int = 0
    unit: int = 0
    price: float = 0.0
    rank: dict[str, int] = field(default_factory=dict)
    directions: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    ran: list[torch.Tensor] = field(default_factory=list)
    sizes: list[torch.Tensor] = field(default_factory=list)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def held(self) -> torch.Tensor:
        """The tokens that the block ran so far, where depth is chosen."""
        return torch.cat(self.ran)


class Recorder:
    """Listens to a run, one call of the model after the other; it stands where a `Trace` would.

        recorder = Recorder(Facts.of(model))
        recorder.call(0, 7)
        with listening(model, Tap, recorder): model(tokens)
        run = recorder.run(tokens, prompt=7)

    Args:
        facts: of the model.
        row: of the batch.
    """

    def __init__(self, facts: Facts, row: int = 0):
        self.facts, self.row = facts, row
        self.bypasses: list[Bypass] = []
        self.layers = [_Layer() for _ in range(facts.layers)]
        self.start = self.stop = 0

    def call(self, start: int, stop: int) -> None:
        """The next records are of the tokens from start to stop."""
        self.start, self.stop = start, stop

    def append(self, record: Record) -> None:
        """Packs one record; rooms that do not choose token by token (heads, weights, channels) are left out."""
        index = layer_of(record.path)
        if index is None or not 0 <= index < len(self.layers):
            return
        take = {"depth": self._depth, "connections": self._connections, "experts": self._experts, "rank": self._rank}
        if record.room in take:
            take[record.room](self.layers[index], record)

    def _places(self, layer: _Layer) -> torch.Tensor:
        """The tokens of this call that reach the rooms inside the layer, int64 [N]."""
        here = torch.arange(self.start, self.stop)
        return here if not layer.ran else layer.held[layer.held >= self.start]

    def _depth(self, layer: _Layer, record: Record) -> None:
        chosen = _row(record.selection, self.row)
        layer.ran.append(torch.arange(self.start, self.stop)[chosen.count() > 0])
        layer.sizes.append(encode(chosen.weights.abs().sum(-1, keepdim=True).expand(-1, 2)))

    def _connections(self, layer: _Layer, record: Record) -> None:
        chosen, span = _row(record.selection, self.row), record.span
        placed = Span(first=self.start, queries=self.stop - self.start, block=min(span.block, span.queries),
                      unit=chosen.unit)
        if layer.ran and len(layer.held) < self.stop:
            placed = Span(first=self.start, queries=self.stop - self.start, block=1, unit=1)
            chosen = self._spread(layer, chosen, span.block)
        self.connect(layer, _shares(chosen), placed)

    def connect(self, layer: _Layer, chosen: Selection, span: Span) -> None:
        """Adds rows of connections, [H, R, K], of the tokens of a span."""
        widths = span.widths(self.stop, self.facts.causal)
        keep = chosen.mask()
        keep = torch.nn.functional.pad(keep, (0, max(max(widths, default=0) - keep.shape[-1], 0)))
        layer.rows.append((span, pack_rows(keep, widths), *strongest(chosen)))

    def _spread(self, layer: _Layer, chosen: Selection, block: int) -> Selection:
        """The same choice token by token, where a block ran some tokens only: the others have no row and no key."""
        here, held = self._places(layer) - self.start, layer.held
        full = chosen.dense_weights().repeat_interleave(block, 1)[:, :len(here)]
        full = full.repeat_interleave(chosen.unit, 2)[:, :, :len(held)]
        kept = chosen.mask().repeat_interleave(block, 1)[:, :len(here)]
        kept = kept.repeat_interleave(chosen.unit, 2)[:, :, :len(held)]
        if self.facts.causal:
            kept = kept & (held <= (here + self.start)[:, None])
        keep = kept.new_zeros(len(kept), self.stop - self.start, self.stop)
        weights = full.new_zeros(keep.shape)
        place = torch.meshgrid(torch.arange(len(kept)), here, held, indexing="ij")
        keep[place], weights[place] = kept, full
        return Selection.from_mask(keep, torch.ones_like(keep)).weigh(weights)

    def _experts(self, layer: _Layer, record: Record) -> None:
        chosen, places = _row(record.selection, self.row), self._places(layer)
        if chosen.ids.dim() == 2 and len(chosen.ids) == len(places):
            permitted = int(record.selection.permitted.sum())
            layer.price = record.cost.dense_multiply_adds / max(permitted, 1)
            self.route(layer, chosen, places)

    def route(self, layer: _Layer, chosen: Selection, places: torch.Tensor) -> None:
        """Adds the experts, [N, K], of the tokens at `places`."""
        layer.number, layer.unit = chosen.num_candidates, chosen.unit
        layer.experts.append((places, chosen))

    def _rank(self, layer: _Layer, record: Record) -> None:
        chosen, places = _row(record.selection, self.row), self._places(layer)
        if chosen.ids.dim() == 2 and len(chosen.ids) == len(places):
            layer.rank[record.path] = chosen.num_candidates
            layer.directions.append((places, chosen.count()))

    def run(self, tokens: tuple[Token, ...], *, prompt: int, following: tuple[tuple[str, float], ...] = ()) -> Run:
        """What was recorded, packed.

        Args:
            tokens: all of them; the calls reached to the last but the newest, which was not read, at most.
            prompt: how many were read at first.
            following: the likeliest next tokens.
        """
        count, tensors, shapes = self.stop, {}, []
        for index, layer in enumerate(self.layers):
            shape, parts = self._finished(layer, count)
            shapes.append(shape)
            linear = self.facts.linear[index] if self.facts.linear else (0, 0)
            parts["cost"] = self._cost(layer, shape, parts, linear)
            tensors |= {f"{index}.{name}": part for name, part in parts.items()}
        reasons = tuple(dict.fromkeys(bypass.reason for bypass in self.bypasses))
        return Run(tokens=tokens[:count], prompt=min(prompt, count), causal=self.facts.causal, layers=tuple(shapes),
                   tensors=tensors, following=following, bypasses=reasons)

    def _finished(self, layer: _Layer, count: int) -> tuple[Shape, dict[str, torch.Tensor]]:
        """The shape of a layer and its parts, but for the cost."""
        parts = dict(layer.parts)
        if layer.rows:
            self._fill(layer, count)
            spans, packed = _joined(layer.rows)
            parts |= {"connections.spans": spans} | packed
        if layer.experts:
            parts |= _experts_of(layer, count)
        if layer.rank:
            kept = torch.zeros(count, dtype=torch.int32)
            for places, number in layer.directions:
                kept.index_add_(0, places, number.to(torch.int32))
            parts["rank.kept"] = kept.to(torch.uint16)
        if layer.ran:
            bits = torch.zeros(count, dtype=torch.uint8)
            bits[layer.held] = ATTENTION_RAN | FEED_FORWARD_RAN
            parts |= {"depth.bits": bits, "depth.weights": torch.cat(layer.sizes)}
        choosers = len(parts["connections.bits"]) if layer.rows else 0
        return Shape(heads=self.facts.heads, kv_heads=self.facts.kv_heads, choosers=choosers, experts=layer.number,
                     unit=layer.unit, rank=sum(layer.rank.values())), parts

    def _fill(self, layer: _Layer, count: int) -> None:
        """Gives tokens that a block skipped alone, in a call of their own, rows that keep nothing."""
        held = set(layer.held.tolist()) if layer.ran else set(range(count))
        covered = {token for span, *_ in layer.rows for token in range(span.first, span.first + span.queries)}
        _, bits, ids, weights = layer.rows[0]
        for token in set(range(count)) - covered - held:
            span = Span(first=token, queries=1, block=1, unit=1)
            size = -(-span.widths(count, self.facts.causal)[0] // 8)
            layer.rows.append((span, bits.new_zeros(len(bits), size),
                               torch.full_like(ids[:, :1].int(), NONE).to(ids.dtype), torch.zeros_like(weights[:, :1])))
        layer.rows.sort(key=lambda row: row[0].first)

    def _cost(self, layer: _Layer, shape: Shape, parts: dict[str, torch.Tensor], linear: tuple[int, int]
              ) -> torch.Tensor:
        """Float32 [T, 2]: multiply-adds done and dense. Softmax, norms and the choosing itself are left out."""
        count = self.stop
        seen = torch.arange(1, count + 1) if self.facts.causal else torch.full((count,), count)
        dense_pairs = seen * shape.heads * self.facts.pair
        pairs = dense_pairs if not layer.rows else pairs_kept(
            layer.rows, count, shape, self.facts, parts.get("heads.bits")) * self.facts.pair
        feed_forward = dense_feed = torch.full((count,), float(linear[1]))
        if layer.experts:
            kept = torch.zeros(count)
            for places, chosen in layer.experts:
                kept[places] = chosen.count().float()
            price = layer.price or linear[1] / max(shape.experts, 1)
            rest = linear[1] if layer.price else 0
            feed_forward, dense_feed = kept * price + rest, torch.full((count,), shape.experts * price + rest)
        ran = parts.get("depth.bits", torch.full((count,), 3, dtype=torch.uint8))
        done = ((ran & ATTENTION_RAN > 0) * (pairs + linear[0]) + (ran & FEED_FORWARD_RAN > 0) * feed_forward)
        return torch.stack([done, dense_pairs + linear[0] + dense_feed], -1).float()


def pairs_kept(rows: list, count: int, shape: Shape, facts: Facts, groups: torch.Tensor | None) -> torch.Tensor:
    """Float [T]: pairs of a query head and a key that each token keeps, counting keys it may see alone."""
    kept = torch.zeros(count)
    for span, packed, *_ in rows:
        choosers = len(packed)
        weight = torch.full((count, choosers), shape.heads / choosers)
        if groups is not None:
            weight = weight * unpack(groups, shape.kv_heads)[:, torch.arange(choosers) * shape.kv_heads // choosers]
        stop = span.first + span.queries
        tokens = stop if facts.causal else count
        keep = unpack_rows(packed, span.widths(tokens, facts.causal), -(-tokens // span.unit))
        place = torch.arange(span.first, stop)
        units = torch.arange(keep.shape[-1]) * span.unit
        for row in range(span.rows):
            here = place[row * span.block:(row + 1) * span.block]
            last = here + 1 if facts.causal else torch.full_like(here, tokens)
            visible = (last[:, None].clamp(max=tokens) - units).clamp(0, span.unit).float()
            kept[here] += (visible @ keep[:, row].float().T * weight[here]).sum(-1)
    return kept


def _row(selection: Selection, row: int) -> Selection:
    """One row of the batch, on the CPU."""
    return Selection(ids=selection.ids[row].cpu(), weights=selection.weights[row].float().cpu(),
                     permitted=selection.permitted[row].cpu(), num_candidates=selection.num_candidates,
                     unit=selection.unit)


def _shares(chosen: Selection) -> Selection:
    """The same choice with weights that are shares of attention; with none where every weight is 1, a dense choice."""
    weights = chosen.weights / chosen.weights.sum(-1, keepdim=True).clamp(min=1)
    is_plain = bool((chosen.weights == 1)[chosen.ids >= 0].all())
    return replace(chosen, weights=torch.zeros_like(weights) if is_plain else weights)


def _joined(rows: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows of neighbouring calls of one granularity as one span, and all their bits and weights in a row."""
    spans: list[list[int]] = []
    for span, *_ in rows:
        last = spans[-1] if spans else None
        if last and last[2:] == [span.block, span.unit] and last[0] + last[1] == span.first and span.block == 1:
            last[1] += span.queries
        else:
            spans.append([span.first, span.queries, span.block, span.unit])
    names = ("connections.bits", "connections.ids", "connections.weights")
    choosers = max(len(bits) for _, bits, *_ in rows)  # a token that is decoded may choose for its whole group
    columns = list(zip(*rows, strict=True))[1:]
    return torch.tensor(spans, dtype=torch.int32), {
        name: torch.cat([part.to(torch.int32).repeat_interleave(choosers // len(part), 0) for part in parts], 1
                        ).to(parts[0].dtype) for name, parts in zip(names, columns, strict=True)}


def _experts_of(layer: _Layer, count: int) -> dict[str, torch.Tensor]:
    """The parts of `experts`, for all tokens; one that never came there kept none."""
    kept = min(layer.number, EXPERT_WEIGHTS)
    bits = torch.zeros(count, -(-layer.number // 8), dtype=torch.uint8)
    ids = torch.full((count, kept), NONE, dtype=torch.int32)
    weights = torch.zeros(count, kept, dtype=torch.uint8)
    for places, chosen in layer.experts:
        bits[places] = pack(chosen.mask())
        heaviest, codes = strongest(chosen, kept)
        ids[places], weights[places] = heaviest.to(torch.int32), codes
    return {"experts.bits": bits, "experts.ids": ids.to(torch.uint16), "experts.weights": weights}
