"""A decoder layer whose few rows after a cache go through it in one native call.

A decoded token passes each layer once, and Python between a dozen small calls takes as long as they do. A layer is
taken where it is made of a norm, an attention with a room that reads pages, a norm and a gated MLP, which
`conversion.rows` has proven, and where its own forward gives what the one call gives. Nothing is copied: whoever alters
a part of it, puts a hook on one or listens to the room gets the layer's own forward.
"""

import inspect
from dataclasses import replace
from weakref import ref

import torch
from torch import nn

from sentei.axes.connections import Connections
from sentei.conversion import cache
from sentei.conversion.ahead import Foreseen, Given, Made, asked, guesses, is_prepared, note
from sentei.conversion.altered import (
    Answer,
    Kind,
    all_rows,
    attention_functions,
    in_float32,
    is_altered,
    native_class,
    near,
    plain_layers,
    turns,
)
from sentei.conversion.interface import IMPLEMENTATION, attention_forward, lengths_of, obstacles_of
from sentei.conversion.linear import Choice, NativeLinear, Steps, input_of
from sentei.conversion.rows import SCALES, NativeGated, NativeHeads, NativeNorm
from sentei.kernels import block
from sentei.kernels.linear.fused_cpp import FEW_ROWS, is_quiet
from sentei.kernels.paging import PAGE

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
MADE_OF = (NativeNorm, NativeHeads, NativeNorm, NativeGated)
INPUTS = ["self", "hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache",
          "position_embeddings", "kwargs"]
TOKENS = PAGE + 3  # before those that a layer is tried on


class NativeBlock:
    """A decoder layer: h = x + attention(norm(x)), h + mlp(norm(h)); `parts` are the modules that were proven."""

    native_rows: Choice
    parts: tuple[nn.Module, ...]
    known: Answer | None = None  # the weights, prepared

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **named):
        """As the layer's own; see `NativeLinear.forward`."""
        output = None
        if (type(hidden_states) is torch.Tensor and self.native_rows.takes(hidden_states) and is_quiet()
                and not obstacles_of(named)):
            given = Given(attention_mask, past_key_values, position_embeddings)
            output = asked(self, hidden_states, given)
            if output is None:
                output = self._native(hidden_states, given)
        return output if output is not None else super().forward(
            hidden_states, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache, position_embeddings=position_embeddings, **named)

    def _native(self, x, given):
        """Its output, and those of the layers that are guessed to follow it noted, or None."""
        lengths, understood = lengths_of(given.mask)
        if not understood or not isinstance(given.rotation, tuple):
            return None
        layers, held, steps = [], [], []
        for layer in guesses(self):
            if not isinstance(layer, NativeBlock) or layers and is_prepared(layer):
                break
            found = layer.step(x, given, lengths)
            if found is None or found[0] in held:  # two layers of one place in the cache wait for one another
                break
            for each, one in zip((layers, held, steps), (layer, *found), strict=True):
                each.append(one)
        outputs = block.decoder_layers(x, given.rotation, steps)
        if not outputs:
            return None
        held[0].grown(x.shape[1])
        noted, foreseen = given._replace(past=ref(given.past)), None
        for i, rows in reversed(list(enumerate(torch.stack(outputs)))):
            note(outputs[i], Made(ref(layers[i]), noted, rows, foreseen))
            buffers = steps[i].buffers
            foreseen = Foreseen(ref(layers[i]), outputs[i], ref(held[i]), ref(buffers.keys), buffers.length)
        return outputs[0]

    def step(self, x, given, lengths) -> tuple[cache.Paged, block.Step] | None:
        """Its layer of the cache and what one native call is told of it, or None where it takes its own forward."""
        if not self.native_rows.takes(x):
            return None
        if self.known is None or not self.known.holds():
            prepared = self._prepared(x, given.rotation)
            self.known = prepared and Answer.of(self, prepared)
            if prepared is None:
                return None
        attention = self._modules["self_attn"]
        choice = _choice_of(attention, x.shape[1], lengths)
        held = None if choice is None else cache.layer_of(given.past, attention.layer_idx)
        buffers = None if held is None else held.room_for(x.shape[1])
        return None if buffers is None else (held, block.Step(self.known.value, buffers, choice))

    def _prepared(self, x, position_embeddings) -> block.Prepared | None:
        """The weights for one native call, unless somebody has altered a part."""
        parts = tuple(self._modules[name] for name in PARTS)
        if any(part is not proven or is_altered(part) for part, proven in zip(parts, self.parts, strict=True)):
            return None
        first, attention, second, mlp = parts
        heads, joint, gated = (attention.heads(position_embeddings), plain_layers(attention._modules, ("o_proj",)),
                               mlp.layers())
        if None in (heads, joint, gated) or is_altered(attention.connections):
            return None
        return block.prepare(x, block.Before(first.norm(), *heads),
                             block.After(*joint, second.norm(), *gated, mlp.activation[1]))


def _choice_of(attention: nn.Module, rows: int, lengths: torch.Tensor | None) -> block.PageChoice | None:
    """How an attention's room chooses pages for so many rows, if it does, our function calls it and nobody looks on."""
    room = attention._modules.get("connections")
    if type(room) is not Connections or room.tap.is_heard or attention.training:
        return None
    if (attention_functions().get(attention.config._attn_implementation) is not attention_forward or not room.causal
            or not room.reads_pages(rows) or room.impl not in ("auto", "fused_cpp")
            or not isinstance(attention.scaling, float)):
        return None
    return block.PageChoice(room.config.decode, room.config.window, attention.scaling, lengths)


def looks_like_a_block(module: nn.Module) -> bool:
    """Whether it is made of the parts, each of which runs natively, and its room reads pages."""
    return {name for name, _ in module.named_children()} == set(PARTS) and all(
        isinstance(getattr(module, name), kind) for name, kind in zip(PARTS, MADE_OF, strict=True)) and (
        hasattr(module.self_attn, "connections") and module.self_attn.connections.is_paged)


def more_of(module: nn.Module, x: torch.Tensor) -> tuple:
    """What a decoder layer is called with beside the rows: no mask or positions, and a cache of some tokens."""
    return None, None, _some_cache(module.self_attn), True, turns(module.self_attn, x)[0]


def _some_cache(attention: nn.Module):
    """One of ours, in which random keys and values stand."""
    from transformers import DynamicCache

    made, weight, generator = DynamicCache(), attention.k_proj.weight, torch.Generator().manual_seed(TOKENS)
    groups = len(weight) // attention.head_dim
    states = (torch.randn(1, groups, TOKENS, width, generator=generator).to(weight.dtype)
              for width in (attention.head_dim, len(attention.v_proj.weight) // groups))
    cache.fill(made, (attention.layer_idx,))
    made.layers[attention.layer_idx].update(*states)
    return made


@torch.no_grad()
def prove_block(module: nn.Module, mixin: type) -> str:
    """Switches the layer if in fp32 its own output is what the one call gives; else says why not."""
    if list(inspect.signature(type(module).forward).parameters) != INPUTS or any(
            True for _ in module.parameters(recurse=False)):
        return "another forward than transformers' decoder layers have"
    room = module.self_attn.connections
    if not room.causal or room.impl not in ("auto", "fused_cpp"):
        return f"a room that is not causal, or asks for {room.impl}"
    rows, trial = min(4, room.config.tile[0]), in_float32(module, module.self_attn.config)
    tried = [input_of(trial, rows) * scale for scale in SCALES[:2]]
    mask = torch.ones(rows, TOKENS + rows, dtype=torch.bool).tril(TOKENS)[None, None]
    expected = [trial(x, mask, *more_of(trial, x)[1:]) for x in tried]
    switch(trial, mixin)
    trial.self_attn.config._attn_implementation = IMPLEMENTATION
    for x, y in zip(tried, expected, strict=True):
        *_, held, _, embeddings = more_of(trial, x)
        found = trial._native(x, Given(None, held, embeddings))
        if found is None:
            return "parts that one native call does not take"
        if not near(found, y):
            return "another result than in one native call, on random rows"
    switch(module, mixin)
    return ""


def switch(module: nn.Module, mixin: type) -> None:
    """Gives the layer its class."""
    module.__class__ = native_class(mixin, type(module))
    module.parts = tuple(getattr(module, name) for name in PARTS)
    module.native_rows = all_rows(module, many=False)


def settle(module: nn.Module) -> None:
    """Has the parts take the rows that the layer takes: then looking on, which takes their calls, changes no bit."""
    rows, reason = module.native_rows.most_rows, "part of a layer in one call"
    for part in (*module.parts, module.self_attn.o_proj):
        if type(part) is nn.Linear:
            outputs, width = part.weight.shape
            part.native_rows = Choice(path="", outputs=outputs, width=width, dtype=part.weight.dtype, most_rows=rows,
                                      reason=reason)
            part.__class__ = NativeLinear
        elif part.native_rows.most_rows < rows:
            part.native_rows = replace(part.native_rows, most_rows=rows, reason=reason)


def alike(module: nn.Module) -> tuple:
    """What decides what is measured; the parameter of a rule does not, as the cache in `more_of` has a page or two."""
    config = module.self_attn.connections.config
    return min(config.tile[0], FEW_ROWS), type(config.decode).__name__


KIND = Kind(NativeBlock, looks_like_a_block, prove_block, Steps(many=()), lambda module: input_of(module, 1).shape[-1],
            lambda module, x: (x, *more_of(module, x)), alike, settle)
