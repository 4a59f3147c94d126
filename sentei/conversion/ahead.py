"""Layers that run ahead: the first one called makes the rows of those that will be called after it, all in one go.

A model's loop calls its layers one by one, and after each of them Python starts with processor caches full of weights.
So a layer notes which layer took its rows last, and makes the rows of that one, too, of the next, and so on. Each is
given its own when it is called, if it is called with what was foreseen: with these rows, unchanged, and the same mask,
cache and turns. Otherwise it computes, and what was foreseen is lost; nothing has to be undone, since a cache shows new
tokens when the layer itself is called. A guess is used once: only who proved right is guessed again.

A layer is taken to be, when it is called, what it was when the first one was. So none is guessed that something is done
to before it is called (`is_prepared`): an offloaded one gets its weights only then.
"""

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class Given(NamedTuple):
    """What a layer is called with beside the rows, the same for every layer of a model."""

    mask: torch.Tensor | None
    past: object
    rotation: tuple[torch.Tensor, torch.Tensor]


class Foreseen(NamedTuple):
    """The output [B, T, I] of a layer, and where in a cache its tokens stand: weak references to the layer, its layer
    of the cache and the buffer of its keys, and how many tokens stood there before."""

    layer: weakref.ref
    output: torch.Tensor
    held: weakref.ref
    keys: weakref.ref
    length: int


class Made(NamedTuple):
    """Who made some rows, of what, a copy of them, and what the next layer makes of them if that was computed, too.

    Of the maker, and of the cache in what was given, these are weak references.
    """

    maker: weakref.ref
    given: Given
    rows: torch.Tensor
    foreseen: Foreseen | None


# By the id of the rows, with a weak reference to them: who keeps rows, or saves them, keeps nothing of this.
_MADE: dict[int, tuple[weakref.ref, Made]] = {}


def note(rows: torch.Tensor, made: Made) -> None:
    """Remembers where rows come from, for as long as there are these rows, and until they are asked after."""
    key = id(rows)
    _MADE[key] = weakref.ref(rows, lambda _: _MADE.pop(key, None)), made


def asked(layer: nn.Module, rows: torch.Tensor, given: Given) -> torch.Tensor | None:
    """The output that was foreseen for a layer, if it is called as foreseen; then its cache shows the new tokens.

    Who made the rows learns who took them as they were.
    """
    found, made = _MADE.pop(id(rows), (None, None))
    if found is None or found() is not rows or not _is_the_same(given, made.given) or not torch.equal(rows, made.rows):
        return None
    maker, foreseen = made.maker(), made.foreseen
    is_guessed = foreseen is not None and foreseen.layer() is layer
    if is_guessed and not _is_as_it_was(foreseen, rows.shape[1]):
        return None
    if maker is not None:
        vars(maker)["following"] = weakref.ref(layer)
    if not is_guessed:
        return None
    foreseen.held().grown(rows.shape[1])
    return foreseen.output


def guesses(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer, and those that followed it the last time, in order; a guess is gone when it is made."""
    while layer is not None:
        yield layer
        follows = vars(layer).pop("following", None)
        layer = None if follows is None else follows()


def is_prepared(layer: nn.Module) -> bool:
    """Whether something is done to a layer just before it is called, which a guess cannot know of."""
    return bool(layer._forward_pre_hooks) or "forward" in vars(layer)


def _is_as_it_was(foreseen: Foreseen, tokens: int) -> bool:
    """Whether in its cache stands what stood there, and behind it the new tokens."""
    held = foreseen.held()
    room = None if held is None else held.room_for(tokens)
    return room is not None and room.length == foreseen.length and room.keys is foreseen.keys()


def _is_the_same(given: Given, noted: Given) -> bool:
    return given.mask is noted.mask and given.rotation is noted.rotation and given.past is noted.past()
