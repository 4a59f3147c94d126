"""The layers of a transformers model and what stands in them: found by the family's row, swapped, and put back.

A module that is swapped out is kept, untouched, beside the model and not in it: it is in no state_dict and no memory is
copied. Putting it back gives the model that was, bit for bit.
"""

from typing import NamedTuple

from torch import nn

from sentei.conversion.families import FAMILIES, PARTS
from sentei.core.errors import UnsupportedError

# The attribute of a model that holds what stood in the places of modules of ours, by path.
ORIGINALS = "originals_of_sentei"


class Layer(NamedTuple):
    """One layer as the family made it, whatever stands in it now.

    Args:
        index: its number in the model, from 0.
        block: the layer itself.
        attention, network: its two parts.
        norms: by part, the norms before it and, in some families, behind it.
        kind: of its attention, as in transformers' `layer_types`: "full_attention" or "sliding_attention".
        leads: whether transformers reads the length of a cache from this layer's keys, the first of their kind.
    """

    index: int
    block: nn.Module
    attention: nn.Module
    network: nn.Module
    norms: dict[str, tuple[nn.Module, ...]]
    kind: str
    leads: bool

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and the size of a head."""
        attention = self.attention
        return (attention.q_proj.out_features // attention.head_dim,
                attention.k_proj.out_features // attention.head_dim, attention.head_dim)


def layer_of(model: nn.Module, index: int, needed: tuple[str, ...] = tuple(PARTS)) -> Layer:
    """Layer `index` of a model of a known family.

    Args:
        needed: the parts that must be the family's own; a model that was written without some has no others.
    Raises:
        UnsupportedError: the model's modules are not where its family keeps them.
    """
    family = FAMILIES[model.config.model_type]
    parts = {part: original_at(model, path) for part, (path, *_) in
             ((part, paths_of(model, index, part)) for part in PARTS)}
    for part, expected in (("attention", family.attention), ("network", family.network)):
        found = type(parts[part]).__name__ if parts[part] is not None else "nothing"
        if found != expected and part in needed:
            raise UnsupportedError("convert", expected=f"{expected} at {paths_of(model, index, part)[0]}", got=found,
                                   do="convert models of transformers itself, before wrapping them")
    norms = {part: tuple(original_at(model, path) for path in paths_of(model, index, part)[1:]) for part in PARTS}
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return Layer(index, model.get_submodule(f"model.layers.{index}"), **parts, norms=norms,
                 kind=kinds[index], leads=kinds.index(kinds[index]) == index)


def layers_of(model: nn.Module) -> list[Layer]:
    """Every layer of a model of a known family."""
    return [layer_of(model, index) for index in range(model.config.num_hidden_layers)]


def paths_of(model: nn.Module, index: int, part: str) -> tuple[str, ...]:
    """The paths of a part of a layer and of the norms around it, the part first."""
    family = FAMILIES[model.config.model_type]
    return tuple(f"model.layers.{index}.{name}" for name in (PARTS[part], *family.norms[part]))


def original_at(model: nn.Module, path: str) -> nn.Module | None:
    """What transformers put at a path, whatever stands there now; None where there is nothing."""
    held = originals(model)
    if path in held:
        return held[path]
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name, None)


def originals(model: nn.Module) -> dict[str, nn.Module]:
    """What stood in the places of modules of ours, by path; empty for a model as transformers made it."""
    return model.__dict__.get(ORIGINALS, {})


def swapped(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ours that stand in the places of others, by path."""
    return {path: model.get_submodule(path) for path in originals(model)}


def swap(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Makes `new` the only modules of ours: what stood elsewhere comes back. In the model's mode, train or eval."""
    for path, original in originals(model).items():
        model.set_submodule(path, original)
    held = {path: model.get_submodule(path) for path in new}
    for path, module in new.items():
        model.set_submodule(path, module.train(held[path].training))
    model.__dict__.pop(ORIGINALS, None)
    if held:
        model.__dict__[ORIGINALS] = held
