"""How a model whose layers have changed shape is written and read back: the rungs of a ladder.

    A   every layer alike: fewer layers, networks of one width or of as many experts, attentions of as many key/value
        heads. An ordinary checkpoint of a smaller model.
    B   layers that differ: the weights as they are, and `sentei.json`, which says what stands where. Its config.json
        has a name that transformers' Auto classes refuse (`families.marked`).
    C   weights as they were and rooms that choose for each input: an ordinary checkpoint of the dense model, and
        `sentei.json`.

A and C go together: the checkpoint is then the smaller model, which sentei makes faster still.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from sentei.axes.weights import Config as Weights
from sentei.conversion.layers import family_of, layer_of, paths_of, standing
from sentei.conversion.plan import Plan
from sentei.conversion.rooms import WAYS
from sentei.core.errors import UnsupportedError
from sentei.core.rules import Fixed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rung_of(model: nn.Module, plan: Plan) -> str:
    """The rung by which a model converted with this plan is written: "A", "B" or "C"."""
    if not plan.choosing(family_of(model), those=False).entries:
        return "C"
    return "B" if _shape(model, plan) is None else "A"


def may_be_plain(model: nn.Module, room: str) -> bool:
    """Whether an ordinary checkpoint can hold what a room changes in shape, where it does so in every layer alike."""
    return room in ("depth", "weights") or room == "heads" and _tells_heads(model)


def _tells_heads(model: nn.Module) -> bool:
    """Whether the model's config has a number of key/value heads."""
    return hasattr(model.config, "num_key_value_heads")


def _shape(model: nn.Module, plan: Plan) -> tuple[set[int], int | None, int | None] | None:
    """The layers that are gone, and of those left the networks' size and the key/value heads (None: as before).

    A network's size is its width, or how many experts it has. None where they are uneven.
    """
    gone, widths, heads = set(), {}, {}
    for entry in plan.choosing(family_of(model), those=False).entries:
        if entry.room == "depth" and entry.config.rule == Fixed(()) and entry.config.part == "block":
            gone.add(entry.layer)
        elif entry.room == "weights" and isinstance(entry.config, Weights):
            widths[entry.layer] = _size(model, entry.layer)
        elif entry.room == "heads" and _tells_heads(model):
            heads[entry.layer] = (standing(model, entry.layer, "k_proj").out_features
                                  // layer_of(model, entry.layer, ()).heads[2])
        else:
            return None
    left = set(range(model.config.num_hidden_layers)) - gone
    if not left or any(sizes and (set(sizes) != left or len(set(sizes.values())) > 1) for sizes in (widths, heads)):
        return None
    return gone, next(iter(widths.values()), None), next(iter(heads.values()), None)


def _size(model: nn.Module, layer: int) -> int:
    """The experts of a mixture, or a network's width."""
    if family_of(model).mixture is not None:
        return len(standing(model, layer, "experts").down_proj)
    return standing(model, layer, "down_proj").in_features


def plain(model: PreTrainedModel, plan: Plan) -> tuple[PreTrainedModel, Plan]:
    """The model of rung A: an ordinary one of its family that shares the weights, and what is left of the plan.

    Args:
        model: converted with `plan`, for which `rung_of` says "A".
    """
    (gone, size, heads), family = _shape(model, plan), family_of(model)
    left = [index for index in range(model.config.num_hidden_layers) if index not in gone]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(left)
    if size is not None:
        setattr(config, "intermediate_size" if family.mixture is None else family.mixture.number, size)
    if heads is not None:
        config.num_key_value_heads = heads
    for name in ("layer_types", "no_rope_layers"):
        kinds = getattr(config, name, None)
        if kinds is not None:
            setattr(config, name, [kinds[index] for index in left])
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, len(left))
    config._attn_implementation = "sdpa"
    made = type(model)._from_config(config, dtype=model.dtype, **family.options)
    numbers, state = {index: number for number, index in enumerate(left)}, {}
    for name, tensor in model.state_dict().items():
        head, found, rest = name.partition(f"{family.layers}.")
        if found and not head:
            index, _, rest = rest.partition(".")
            if int(index) not in numbers:
                continue
            name = f"{family.layers}.{numbers[int(index)]}.{rest}"
        state[name] = tensor
    made.load_state_dict(state, strict=True, assign=True)
    made.tie_weights()
    if model.can_generate():
        made.generation_config = model.generation_config
    chosen = [replace(entry, layer=numbers[entry.layer]) for entry in plan.choosing(family).entries]
    return made.eval(), Plan(tuple(chosen))


def reshape(model: nn.Module, plan: Plan) -> None:
    """Puts modules of the plan's shapes into a model, for good, their weights yet to be loaded.

    Raises:
        UnsupportedError: a room that is not written to files.
    """
    for entry in plan.choosing(family_of(model), those=False).entries:
        way = WAYS[entry.room]
        if way.blank is None:
            raise UnsupportedError("sentei.json", expected="rooms that are written to files", got=entry.room,
                                   do="write the folder again with sentei prune")
        layer = layer_of(model, entry.layer, ())
        for part in way.parts(entry.config):
            made = way.blank(layer, part, entry.config)
            for path, module in zip(paths_of(model, entry.layer, part), made, strict=False):
                model.set_submodule(path, module)
