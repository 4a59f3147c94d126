"""Rooms inside transformers models, through transformers' own doors.

The attention function and the mask function are registered under one name: with the first alone transformers drops
the causal mask silently. Modules without a room run transformers' sdpa path, unchanged.
"""

from dataclasses import replace

import torch
from torch import nn

from sentei.axes.connections import Connections
from sentei.conversion import cache
from sentei.conversion import native as native_rows
from sentei.core.errors import UnsupportedError
from sentei.core.rules import All
from sentei.core.tracing import trace

IMPLEMENTATION = "sentei"
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
        _place(model, new)
        use(model, IMPLEMENTATION)
        missed = set(new) - _reached(model)
        if missed or model.config._attn_implementation != IMPLEMENTATION:
            raise UnsupportedError(
                "convert", expected="every converted layer to call transformers' attention interface",
                got=f"{len(missed)} of {len(new)} layers that do not, e.g. {min(missed, default='?')}",
                do="use a model of a supported family from transformers itself")
    except BaseException:
        _place(model, earlier)
        use(model, implementation)
        raise
    if not earlier:
        setattr(model, BEFORE, implementation)


def remove(model: nn.Module) -> None:
    """Takes all rooms out again; the model is transformers' own, on the attention it had before, e.g. sdpa."""
    if rooms(model):
        _place(model, {})
        use(model, getattr(model, BEFORE))
        delattr(model, BEFORE)


def _place(model: nn.Module, new: dict[str, Connections]) -> None:
    """Makes `new` the model's only rooms, and has caches of ours made for those that choose pages."""
    if hasattr(model, HOOK):
        getattr(model, HOOK).remove()
        delattr(model, HOOK)
    for path in rooms(model):
        del model.get_submodule(path).connections
    for path, room in new.items():
        module = model.get_submodule(path)
        room.scale = module.scaling
        module.connections = room.to(next(module.parameters()).device)
    layers = cache.pruned_layers(model)
    native_rows.remove(model)
    if new:
        native_rows.install(model, most_rows=None if layers else 0)
    if layers:
        setattr(model, HOOK, cache.watch(model.get_decoder(), layers, IMPLEMENTATION))


def use(model: nn.Module, implementation: str) -> None:
    """Switches the whole model between "sdpa" (transformers' own) and "sentei"."""
    model.set_attn_implementation(implementation)


def rooms(model: nn.Module) -> dict[str, Connections]:
    """The rooms of a converted model, by the path of their attention module."""
    return {path.removesuffix(".connections"): module for path, module in model.named_modules()
            if isinstance(module, Connections)}


def register() -> None:
    """Makes "sentei" known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_forward)


def attention_forward(module, query, key, value, attention_mask, scaling=None, **extra):
    """Attention of one layer as transformers calls it.

    Args:
        module: the attention module; its room, if any, is `module.connections`.
        query: [B, H, Tq, D] after rotary embedding; key, value: [B, G, Tk, D] with the cache in front. From a cache of
            ours they may be of another dtype, and the key has the bounds of its pages as an attribute.
        attention_mask: None (plain causal), bool [B, Tk] (padding), or a 4-D mask of another pattern.
    Returns:
        output [B, Tq, H, D] and None, as transformers expects.
    """
    room = getattr(module, "connections", None)
    lengths, obstacles = _read(attention_mask, extra)
    takes = room is not None and not obstacles
    bounds = getattr(key, "pages", None)
    # Only the kernels of pages read keys of another dtype than the query's.
    if key.dtype != query.dtype and not (takes and room.reads_pages(query.shape[2])):
        key, value, bounds = key.to(query.dtype), value.to(query.dtype), None
    if takes:
        if scaling is not None:
            room.scale = scaling  # the module's own, which may have been changed since it was converted
        output = room(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), lengths, bounds)
        return output.contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if room is not None:
        room.tap.bypass(" and ".join(obstacles))
    mask = _dense_mask(attention_mask, query.shape[2], key.shape[2])
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **extra)


def mask_forward(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
                 **extra):
    """The mask transformers hands to `attention_forward`.

    Returns:
        None for plain causal attention, the padding bool [B, Tk] when some keys are padding, and transformers' own
        4-D mask for every other pattern (sliding windows, packed or prefix sequences, static caches).
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    is_plain = (mask_function is causal_mask_function and isinstance(q_offset, int) and not kv_offset
                and q_offset + q_length == kv_length)
    if not is_plain or (attention_mask is not None and attention_mask.shape[-1] != kv_length):
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                         kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, **extra)
    return None if attention_mask is None or attention_mask.all() else attention_mask


def _read(mask: torch.Tensor | None, extra: dict) -> tuple[torch.Tensor | None, list[str]]:
    """The lengths that a mask stands for, and what in this call no room can take."""
    lengths, understood = _lengths(mask)
    obstacles = []
    if extra.get("dropout"):
        obstacles.append("attention dropout")
    if extra.get("softcap"):
        obstacles.append("a soft cap on the scores")
    if extra.get("s_aux") is not None:
        obstacles.append("attention sinks")
    if extra.get("is_causal") is False:
        obstacles.append("attention to later tokens")
    if not understood:
        obstacles.append("a mask that is not causal with padding at the ends")
    return lengths, obstacles


def _lengths(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, bool]:
    """Start and stop of the real keys, int64 [B, 2], and whether the mask is no more than that."""
    if mask is None:
        return None, True
    if mask.dim() != 2:
        return None, False
    positions = torch.arange(mask.shape[1], device=mask.device)
    stop = torch.where(mask, positions + 1, 0).amax(-1)
    start = torch.minimum(torch.where(mask, positions, mask.shape[1]).amin(-1), stop)
    return torch.stack([start, stop], -1), bool((mask.sum(-1) == stop - start).all())


def _dense_mask(mask: torch.Tensor | None, num_queries: int, num_keys: int) -> torch.Tensor | None:
    """The 4-D mask transformers' sdpa path needs where ours is None or 2-D."""
    if mask is not None and mask.dim() == 4:
        return mask
    if mask is None and num_queries in (1, num_keys):
        return None
    device = "cpu" if mask is None else mask.device
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return causal[None, None] if mask is None else causal[None, None] & mask[:, None, None]


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
