"""The door through which transformers calls a room: its attention function and its mask function.

Both are registered under one name: with the first alone transformers drops the causal mask silently. Modules without a
room run transformers' sdpa path, unchanged.
"""

import warnings

import torch

from sentei.conversion.families import named

IMPLEMENTATION = "sentei"


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
        attention_mask: None (plain: causal, or both ways in an encoder), bool [B, Tk] (padding), or a 4-D mask of
            another pattern.
    Returns:
        output [B, Tq, H, D] and None, as transformers expects.
    """
    room = getattr(module, "connections", None)
    lengths, understood = lengths_of(attention_mask)
    causal = getattr(module, "is_causal", True)
    obstacles = obstacles_of(extra, causal=causal)
    if not understood:
        obstacles.append("a mask that is not causal with padding at the ends" if causal else
                         "a mask of more than padding at the ends")
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
        if torch.compiler.is_compiling():
            _warn_compiled(" and ".join(obstacles))
    mask = _dense_mask(attention_mask, query.shape[2], key.shape[2], causal=causal)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **extra)


def mask_forward(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
                 **extra):
    """The mask transformers hands to `attention_forward`.

    Returns:
        None for plain attention, causal, whose last query sees the last key, or both ways in an encoder; the padding
        bool [B, Tk] when some keys are padding; and transformers' own 4-D mask for every other pattern (sliding
        windows, packed or prefix sequences, static caches, which have room behind their last key).
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    family = named(getattr(extra.get("config"), "model_type", None))
    plain = causal_mask_function if family is None or family.causal else bidirectional_mask_function
    ends_together = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    is_plain = mask_function is plain and ends_together and not kv_offset
    if not is_plain or (attention_mask is not None and attention_mask.shape[-1] != kv_length):
        # Where they do not, no mask means something else to sdpa (the first query sees the first key) than to us; and
        # to us it is never what is not plain.
        extra["allow_is_causal_skip"] = ends_together and extra.get("allow_is_causal_skip", True)
        extra["allow_is_bidirectional_skip"] = False
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                         kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, **extra)
    return None if attention_mask is None or attention_mask.all() else attention_mask


@torch.compiler.assume_constant_result
def _warn_compiled(obstacles: str) -> None:
    """Warns once, while a graph is made: no trace will tell what is dense in it."""
    warnings.warn(f"convert: expected attention that a room can take, got {obstacles}: this layer is dense in the "
                  "compiled model; do: pass attention_mask, or keep use_cache", stacklevel=2)


def obstacles_of(extra: dict, *, causal: bool = True) -> list[str]:
    """What no room can take, of what transformers hands to an attention, which is causal or not, beside the mask."""
    obstacles = []
    if extra.get("dropout"):
        obstacles.append("attention dropout")
    if extra.get("softcap"):
        obstacles.append("a soft cap on the scores")
    if extra.get("s_aux") is not None:
        obstacles.append("attention sinks")
    if extra.get("is_causal") not in (None, causal):
        obstacles.append("attention to later tokens" if causal else "attention to no later tokens")
    return obstacles


def lengths_of(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, bool]:
    """Start and stop of the real keys, int64 [B, 2], and whether the mask is no more than that."""
    if mask is None:
        return None, True
    if mask.dim() != 2:
        return None, False
    positions = torch.arange(mask.shape[1], device=mask.device)
    stop = torch.where(mask, positions + 1, 0).amax(-1)
    start = torch.minimum(torch.where(mask, positions, mask.shape[1]).amin(-1), stop)
    return torch.stack([start, stop], -1), bool((mask.sum(-1) == stop - start).all())


def _dense_mask(mask: torch.Tensor | None, num_queries: int, num_keys: int, *, causal: bool) -> torch.Tensor | None:
    """The 4-D mask transformers' sdpa path needs where ours is None or 2-D."""
    if mask is not None and mask.dim() == 4:
        return mask
    if mask is None and (not causal or num_queries in (1, num_keys)):
        return None
    shape = (num_queries, num_keys)
    permitted = torch.ones(shape, dtype=torch.bool, device="cpu" if mask is None else mask.device)
    permitted = (permitted.tril(num_keys - num_queries) if causal else permitted)[None, None]
    return permitted if mask is None else permitted & mask[:, None, None]
