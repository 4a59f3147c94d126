"""A key/value cache that does not copy itself for every token and keeps the bounds of its pages, for pruned decoding.

transformers' own layer (`DynamicLayer`) makes a new tensor of all keys for each token. Ours writes into a buffer that
grows by a share of itself, and hands out views of it; beside it stand the lowest and the highest key of every whole
page of PAGE tokens, channel by channel, which the choice of pages reads (`sentei.kernels.paging`).
"""

from functools import cache

import torch
from torch import nn

from sentei.axes.connections import Connections
from sentei.kernels.block import Buffers
from sentei.kernels.paging import PAGE, bounds_of

# A full buffer grows to this much of what it must hold: then a token is copied five times at most, all in all.
GROWTH = 1.25


class Paged:
    """What our layer does otherwise than `DynamicLayer`, before which it stands in the order of inheritance.

    `keys` and `values` are views of the buffers. Whatever else assigns to them, e.g. a method we do not know, is
    noticed by the next update, which then starts new buffers from what it finds.

    Args:
        dtype: of what is kept; that of the first keys by default.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.kept_dtype = dtype
        self.buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # keys, values, bounds
        self.shown: torch.Tensor | None = None  # the view of `buffers` that `keys` is, unless someone changed it

    def lazy_initialization(self, key_states, value_states):
        """As `DynamicLayer`; the dtype is ours."""
        kept = (states[:, :, :0].to(self.kept_dtype or states.dtype) for states in (key_states, value_states))
        super().lazy_initialization(*kept)

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends key_states and value_states [B, G, T, D]; returns all keys and values.

        The keys carry the bounds of their pages as the attribute `pages`. Where gradients are wanted the tensors are
        new ones, without bounds, as those of `DynamicLayer`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        if torch.is_grad_enabled() and any(
                tensor.requires_grad for tensor in (self.keys, self.values, key_states, value_states)):
            return super().update(key_states.to(self.dtype), value_states.to(self.dtype), *args, **kwargs)
        if not self._fits(after):
            self._start(before, after, key_states, value_states)
        keys, values, bounds = self.buffers
        keys[:, :, before:after] = key_states
        values[:, :, before:after] = value_states
        if after // PAGE > before // PAGE:
            first, last = before // PAGE, after // PAGE
            bounds[:, :, first:last] = bounds_of(keys[:, :, first * PAGE:last * PAGE])
        return self._show(after)

    def room_for(self, rows: int) -> Buffers | None:
        """The buffers, if they have room for so many tokens more; who has written these there calls `grown`."""
        length = self.get_seq_length()
        return Buffers(*self.buffers, length) if self._fits(length + rows) else None

    def grown(self, rows: int) -> None:
        """Shows so many tokens more, which stand in the buffers."""
        self._show(self.keys.shape[2] + rows)

    def crop(self, *args):
        """As `DynamicLayer`; the buffers stay."""
        is_ours = self._is_ours()
        super().crop(*args)
        if is_ours:
            self._show(self.keys.shape[2])

    def reorder_cache(self, beam_idx):
        """As `DynamicLayer`, bounds included."""
        self._change(super().reorder_cache, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)), beam_idx)

    def batch_repeat_interleave(self, repeats):
        """As `DynamicLayer`, bounds included."""
        self._change(super().batch_repeat_interleave, lambda tensor: tensor.repeat_interleave(repeats, 0), repeats)

    def batch_select_indices(self, indices):
        """As `DynamicLayer`, bounds included."""
        self._change(super().batch_select_indices, lambda tensor: tensor[indices, ...], indices)

    def reset(self):
        """As `DynamicLayer`."""
        super().reset()
        self.buffers = self.shown = None

    def _is_ours(self) -> bool:
        return self.shown is not None and self.keys is self.shown

    def _fits(self, length: int) -> bool:
        """Whether the buffers are still what `keys` shows, have room, and may be written to."""
        if not self._is_ours() or length > self.buffers[0].shape[2]:
            return False
        # A compiled graph cannot ask; there torch itself refuses to write where it may not.
        return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not self.buffers[0].is_inference()

    def _start(self, before, after, key_states, value_states):
        """New buffers with room for `after` tokens and more, and the first `before` in them."""
        room = -(-int(after * GROWTH) // PAGE) * PAGE + PAGE
        batch, groups, _, width = key_states.shape
        keys, values = (states.new_empty(batch, groups, room, states.shape[3], dtype=self.dtype)
                        for states in (key_states, value_states))
        bounds = keys.new_empty(batch, groups, room // PAGE, 2, width)
        if before:
            keys[:, :, :before], values[:, :, :before] = self.keys, self.values
            bounds[:, :, :before // PAGE] = bounds_of(keys[:, :, :before])
        self.buffers = keys, values, bounds

    def _show(self, length):
        keys, values, bounds = self.buffers
        self.keys, self.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)
        self.keys.pages = bounds
        self.shown = self.keys
        return self.keys, self.values

    def _change(self, otherwise, change, argument):
        """Changes the batch of all three buffers, or calls what `DynamicLayer` has for it where they are not in use."""
        if self._is_ours() and self.keys.shape[2]:
            length = self.keys.shape[2]
            self.buffers = tuple(map(change, self.buffers))
            self._show(length)
        else:
            otherwise(argument)


@cache
def layer_class() -> type:
    """Our cache layer: a kind of transformers' `DynamicLayer`, with the same methods and one argument, `dtype`."""
    from transformers.cache_utils import DynamicLayer

    return type("PagedLayer", (Paged, DynamicLayer), {"__doc__": Paged.__doc__, "__module__": __name__})


def pruned_layers(model: nn.Module) -> tuple[int, ...]:
    """The layers of a converted model that read chosen pages of their cache."""
    return tuple(module.layer_idx for module in model.modules()
                 if isinstance(getattr(module, "connections", None), Connections) and module.connections.is_paged)


def layer_of(held: object, index: int) -> Paged | None:
    """Our layer of a cache that does nothing but ask its layers, neither of them altered; else None."""
    from transformers import DynamicCache

    if type(held) is not DynamicCache or held.offloading or "update" in vars(held) or index >= len(held.layers):
        return None
    layer = held.layers[index]
    return layer if type(layer) is layer_class() and "update" not in vars(layer) else None


def make(model: nn.Module, dtype: torch.dtype | None = None):
    """A cache for `model.generate(..., past_key_values=...)` whose pruned layers are ours.

    Args:
        model: converted; without this function it makes its caches itself.
        dtype: what pruned layers keep, e.g. bfloat16 under a float32 model: half the memory to hold and to read.
    """
    from transformers import DynamicCache

    made = DynamicCache(config=model.config)
    fill(made, pruned_layers(model), dtype)
    return made


def fill(held, layers: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Puts our layers in the place of a cache's plain ones, with what they hold.

    Args:
        held: a transformers cache. One that offloads its layers, and layers of another kind, are left alone.
        layers: which.
    Cost: a copy of what they hold, once.
    """
    from transformers.cache_utils import DynamicLayer

    places = getattr(held, "layers", None)
    if not layers or places is None or getattr(held, "offloading", False):
        return
    if held.layer_class_to_replicate is DynamicLayer:  # one without a config makes its layers as they are used
        places.extend(DynamicLayer() for _ in range(len(places), max(layers) + 1))
    for index in layers:
        if index < len(places) and type(places[index]) is DynamicLayer:
            plain, places[index] = places[index], layer_class()(dtype)
            if plain.get_seq_length():
                with torch.no_grad():
                    places[index].update(plain.keys.detach(), plain.values.detach())


def watch(decoder: nn.Module, layers: tuple[int, ...], implementation: str):
    """Has every cache that is handed to the decoder filled with our layers; returns the hook, to be removed.

    Args:
        decoder: the module that is called with `past_key_values`.
        implementation: the attention under which that is done, and no other.
    """
    def before(module, args, kwargs):
        if module.config._attn_implementation == implementation and kwargs.get("past_key_values") is not None:
            fill(kwargs["past_key_values"], layers)

    return decoder.register_forward_pre_hook(before, with_kwargs=True)
