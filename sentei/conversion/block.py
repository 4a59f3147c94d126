"""A decoder layer whose few rows go through it in three calls: before its attention, its pages, and after it.

A decoded token passes each layer once, and Python between a dozen small calls takes as long as they do. A layer is
taken where it is made of a norm, an attention with a room, a norm and a gated MLP, which `conversion.rows` has proven,
and where its own forward gives what the three calls give. Nothing is copied: whoever alters a part of it, or puts a
hook on one, gets the layer's own forward back.
"""

import inspect

import torch
from torch import nn

from sentei.conversion.altered import (
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
from sentei.conversion.linear import Choice, Steps, input_of
from sentei.conversion.rows import SCALES, NativeGated, NativeHeads, NativeNorm
from sentei.core.modes import is_plain_call
from sentei.kernels.linear import block

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
MADE_OF = (NativeNorm, NativeHeads, NativeNorm, NativeGated)
INPUTS = ["self", "hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache",
          "position_embeddings", "kwargs"]


class NativeBlock:
    """A decoder layer: h = x + attention(norm(x)), h + mlp(norm(h)); `parts` are the modules that were proven."""

    native_rows: Choice
    parts: tuple[nn.Module, ...]

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **named):
        """As the layer's own; see `NativeLinear.forward`."""
        output = None
        if type(hidden_states) is torch.Tensor and self.native_rows.takes(hidden_states) and is_plain_call():
            named_all = {"position_ids": position_ids, "use_cache": use_cache, **named}
            output = self._native(hidden_states, attention_mask, past_key_values, position_embeddings, named_all)
        return output if output is not None else super().forward(
            hidden_states, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache, position_embeddings=position_embeddings, **named)

    def _native(self, x, attention_mask, past_key_values, position_embeddings, named):
        found = self._modules
        parts = tuple(found[name] for name in PARTS)
        if any(part is not known or is_altered(part) for part, known in zip(parts, self.parts, strict=True)):
            return None
        first, attention, second, mlp = parts
        attend = attention_functions().get(attention.config._attn_implementation)
        heads, last, gated = (attention.heads(position_embeddings), plain_layers(attention._modules, ("o_proj",)),
                              mlp.layers())
        if attend is None or attention.training or None in (heads, last, gated):
            return None
        after = last[0], second.norm(), *gated, mlp.activation[1]
        made = block.before(x, first.norm(), *heads) if block.takes(x, *after) else None
        if made is None:
            return None
        query, key, value = made
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        attended, _ = attend(attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling,
                             **named)
        return block.after(attended.reshape(*x.shape[:-1], -1), x, *after)


def looks_like_a_block(module: nn.Module) -> bool:
    """Whether it is made of the parts, each of which runs natively."""
    return {name for name, _ in module.named_children()} == set(PARTS) and all(
        isinstance(getattr(module, name), kind) for name, kind in zip(PARTS, MADE_OF, strict=True))


def more_of(module: nn.Module, x: torch.Tensor) -> tuple:
    """What a decoder layer is called with beside the rows: no mask, positions or cache."""
    return None, None, None, False, turns(module.self_attn, x)[0]


@torch.no_grad()
def prove_block(module: nn.Module, mixin: type) -> str:
    """Switches the layer if in fp32 its own output is what the three calls give; else says why not."""
    if list(inspect.signature(type(module).forward).parameters) != INPUTS or any(
            True for _ in module.parameters(recurse=False)):
        return "another forward than transformers' decoder layers have"
    trial = in_float32(module, module.self_attn.config)
    tried = [input_of(trial, 4) * scale for scale in SCALES[:2]]
    expected = [trial(x, *more_of(trial, x)) for x in tried]
    switch(trial, mixin)
    for x, y in zip(tried, expected, strict=True):
        *_, embeddings = more_of(trial, x)
        found = trial._native(x, None, None, embeddings, {})
        if found is None or not near(found, y):
            return "another result than in native calls, on random rows"
    switch(module, mixin)
    return ""


def switch(module: nn.Module, mixin: type) -> None:
    """Gives the layer its class."""
    module.__class__ = native_class(mixin, type(module))
    module.parts = tuple(getattr(module, name) for name in PARTS)
    module.native_rows = all_rows(module, many=False)


KIND = Kind(NativeBlock, looks_like_a_block, prove_block, Steps(many=()), lambda module: input_of(module, 1).shape[-1],
            more_of)
