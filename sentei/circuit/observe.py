"""A dense model, observed: everything is computed, and a rule says what of it holds the mass.

Soft pruning is the softmax itself. Of each of these the fewest parts that hold the mass are kept:

- connections: the shares of attention of each head and token, over its keys;
- heads: the lengths of what each key/value head's group adds to the stream, over the groups;
- experts: the feed-forward layer's neurons in GROUPS of neighbours, each by Σ |activation| · ‖its column of `down`‖;
- depth: how far each sublayer moves a token, ‖change‖ / ‖stream before‖, over all sublayers of all layers.

Nothing is skipped, and nothing says that skipping it would leave the answer as it is: a run of the pruned model does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sentei.circuit.bits import Span, encode, pack
from sentei.circuit.recorder import Facts, Recorder, layer_of
from sentei.core.errors import UnsupportedError
from sentei.core.rules import Rule
from sentei.core.selection import Selection

GROUPS = 16


@dataclass
class _Seen:
    """What the hooks of one layer have seen in the call under way."""

    entered: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    attention: tuple[nn.Linear, torch.Tensor] | None = None
    last: tuple[nn.Linear, torch.Tensor] | None = None


class Observer(Recorder):
    """A recorder that looks at a dense model of transformers itself; see `watching`.

    Args:
        facts: of the model.
        rule: what is kept of the shares; it is given their logarithms.
    """

    def __init__(self, facts: Facts, rule: Rule):
        super().__init__(facts)
        self.rule = rule
        self.seen = [_Seen() for _ in self.layers]
        self.moves: list[list[torch.Tensor]] = [[] for _ in self.layers]
        self.groups: list[list[torch.Tensor]] = [[] for _ in self.layers]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks every layer of `model`, on transformers' eager attention, for the length of a block."""
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        hooks = []
        try:
            for path, module in model.named_modules():
                index = layer_of(path)
                if index is None or index >= len(self.layers):
                    continue
                seen = self.seen[index]
                if path.endswith(f".{index}"):
                    hooks.append(module.register_forward_pre_hook(_enter(seen), with_kwargs=True))
                    hooks.append(module.register_forward_hook(lambda *_, index=index: self._leave(index)))
                elif isinstance(module, nn.Linear):
                    hooks.append(module.register_forward_pre_hook(_linear(seen)))
                else:
                    hooks.append(module.register_forward_hook(_attention(seen)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            model.set_attn_implementation(before)

    def _leave(self, index: int) -> None:
        """Chooses what holds the mass of the layer that has just run."""
        seen, layer = self.seen[index], self.layers[index]
        if seen.shares is None or seen.attention is None or seen.last is None:
            raise UnsupportedError("trace", expected="layers whose attention returns its shares, and linear layers",
                                   got=f"layer {index} without", do="trace a model of transformers' own, or one "
                                   "converted by sentei")
        count = self.stop - self.start  # what lies behind is padding
        shares = seen.shares[0, :, :count, :self.stop].float()
        span = Span(first=self.start, queries=self.stop - self.start, block=1, unit=1)
        self.connect(layer, self.keep(shares), span)
        attention, down = ((layer, inputs[0, :count].float()) for layer, inputs in (seen.attention, seen.last))
        moved = self._heads(index, *attention)
        stream = seen.entered[0, :count].float()
        self._feed_forward(index, *down)
        change = down[1] @ down[0].weight.float().T
        lengths = torch.stack([moved.norm(dim=-1) / stream.norm(dim=-1).clamp(min=1e-9),
                               change.norm(dim=-1) / (stream + moved).norm(dim=-1).clamp(min=1e-9)], -1)
        self.moves[index].append(lengths)
        seen.shares = seen.attention = seen.last = seen.entered = None

    def keep(self, shares: torch.Tensor) -> Selection:
        """What the rule keeps of shares [..., Q, C], weighed by them; a share of 0 is not kept."""
        return self.rule(shares.log()).weigh(shares)

    def _heads(self, index: int, output: nn.Linear, joined: torch.Tensor) -> torch.Tensor:
        """Notes the size of each key/value head's part of the output, and returns the whole of it, [T, width]."""
        heads, groups = self.facts.heads, self.facts.kv_heads
        parts = joined.unflatten(-1, (heads, -1))
        weight = output.weight.float().unflatten(1, (heads, -1))
        added = torch.einsum("thd,whd->thw", parts, weight).unflatten(1, (groups, -1)).sum(2)
        self.groups[index].append(added.norm(dim=-1))
        return added.sum(1)

    def _feed_forward(self, index: int, down: nn.Linear, neurons: torch.Tensor) -> None:
        """Notes the groups of neurons that hold the mass of each token's feed-forward layer."""
        sizes = neurons.abs() * down.weight.float().norm(dim=0)
        unit = -(-sizes.shape[-1] // GROUPS)
        padded = torch.nn.functional.pad(sizes, (0, unit * GROUPS - sizes.shape[-1]))
        shares = padded.unflatten(-1, (GROUPS, unit)).sum(-1)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)
        chosen = self.keep(shares)
        places = torch.arange(self.start, self.stop)
        self.route(self.layers[index], Selection(ids=chosen.ids, weights=chosen.weights, permitted=chosen.permitted,
                                                 num_candidates=chosen.num_candidates, unit=unit), places)

    def run(self, tokens, *, prompt, following=()):
        """What was observed, packed; see `Recorder.run`."""
        moves = torch.stack([torch.cat(part) for part in self.moves], 1)
        shares = moves.flatten(1) / moves.flatten(1).sum(-1, keepdim=True).clamp(min=1e-30)
        kept = self.keep(shares).mask().unflatten(-1, (-1, 2))
        for index, layer in enumerate(self.layers):
            sizes = torch.cat(self.groups[index])
            groups = sizes / sizes.sum(-1, keepdim=True).clamp(min=1e-30)
            layer.parts = {
                "depth.bits": (kept[:, index, 0] + 2 * kept[:, index, 1]).to(torch.uint8),
                "depth.weights": encode(moves[:, index]),
                "heads.bits": pack(self.keep(groups).mask()), "heads.weights": encode(groups)}
        return super().run(tokens, prompt=prompt, following=following)


def _enter(seen: _Seen):
    def hook(module, args, kwargs):
        seen.entered = args[0] if args else kwargs["hidden_states"]
    return hook


def _linear(seen: _Seen):
    def hook(module, args):
        seen.last = module, args[0].detach()
    return hook


def _attention(seen: _Seen):
    """The module that returns shares [B, H, Q, K]: the linear layer that ran last in it is its output's."""
    def hook(module, args, output):
        if isinstance(output, tuple) and len(output) > 1 and torch.is_tensor(output[1]) and output[1].dim() == 4:
            seen.shares, seen.attention = output[1].detach(), seen.last
    return hook
