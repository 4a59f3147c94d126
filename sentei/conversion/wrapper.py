"""Rooms put into transformers models and taken out again; `interface` is the door through which they are called."""

from dataclasses import replace

import torch
from torch import nn

from sentei.axes.connections import Connections
from sentei.conversion import cache
from sentei.conversion.interface import IMPLEMENTATION, register
from sentei.core.errors import UnsupportedError
from sentei.core.rules import All
from sentei.core.tracing import trace

# The attribute of a converted model that names the attention it had before.
BEFORE = "attention_before_sentei"
# And the one that holds the hook by which its caches become ours, where a room chooses pages.
HOOK = "cache_hook_of_sentei"


def install(model: nn.Module, new: dict[str, Connections]) -> None:
    """Puts rooms into attention modules and makes the model's attention ours.

    Args:
        model: a transformers model of a known family.
        new: by the attention module's path, e.g. "model.layers.3.self_attn"; each takes the module's scale.
    Raises:
        UnsupportedError: transformers did not take our attention, or a room was not reached by a forward pass.
        RuleError: a rule that does not fit the model, e.g. with a number for each of other heads.

    Whatever is raised, the model is then as it was, with its earlier rooms and attention.
    """
    register()
    earlier, implementation = rooms(model), model.config._attn_implementation
    try:
        _place(model, new, IMPLEMENTATION)
        missed = set(new) - _reached(model)
        if missed or model.config._attn_implementation != IMPLEMENTATION:
            raise UnsupportedError(
                "convert", expected="every converted layer to call transformers' attention interface",
                got=f"{len(missed)} of {len(new)} layers that do not, e.g. {min(missed, default='?')}",
                do="use a model of a supported family from transformers itself")
    except BaseException:
        _place(model, earlier, implementation)
        raise
    if not earlier:
        setattr(model, BEFORE, implementation)


def remove(model: nn.Module) -> None:
    """Takes all rooms out again; the model is transformers' own, on the attention it had before, e.g. sdpa."""
    if rooms(model):
        _place(model, {}, getattr(model, BEFORE))
        delattr(model, BEFORE)


def restore(model: nn.Module, earlier: dict[str, Connections], implementation: str) -> None:
    """Puts rooms back that were taken out, under the attention they had; nothing is called, so nothing can fail."""
    if earlier:
        setattr(model, BEFORE, model.config._attn_implementation)
        _place(model, earlier, implementation)


def _place(model: nn.Module, new: dict[str, Connections], implementation: str) -> None:
    """Makes `new` the model's only rooms, under that attention, and has caches of ours made for those with pages."""
    if hasattr(model, HOOK):
        getattr(model, HOOK).remove()
        delattr(model, HOOK)
    for path in rooms(model):
        del model.get_submodule(path).connections
    for path, room in new.items():
        module = model.get_submodule(path)
        room.scale = module.scaling
        module.connections = room.to(next(module.parameters()).device)
    use(model, implementation)
    layers = cache.pruned_layers(model)
    if layers:
        setattr(model, HOOK, cache.watch(model.get_decoder(), layers, IMPLEMENTATION))


def use(model: nn.Module, implementation: str) -> None:
    """Switches the whole model between "sdpa" (transformers' own) and "sentei"."""
    model.set_attn_implementation(implementation)


def rooms(model: nn.Module) -> dict[str, Connections]:
    """The rooms of a converted model, by the path of their attention module."""
    return {path.removesuffix(".connections"): module for path, module in model.named_modules()
            if isinstance(module, Connections)}


@torch.no_grad()
def _reached(model: nn.Module) -> set[str]:
    """The attention modules whose room a forward pass of two tokens in eval mode went through.

    Two tokens are few enough to read pages; so a second pass goes without them, through the rules for prompts.
    """
    token = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    modes = [(module, module.training) for module in model.modules()]
    paged = [(room, room.config) for room in rooms(model).values() if room.is_paged]
    try:
        with trace(model.eval()) as records:
            model(input_ids=token, use_cache=False)
            for room, config in paged:
                room.config = replace(config, decode=All())
            if paged:
                model(input_ids=token, use_cache=False)
    finally:
        for room, config in paged:
            room.config = config
        for module, mode in modes:
            module.training = mode
    return {path.removesuffix(".connections") for path in records.paths()}
