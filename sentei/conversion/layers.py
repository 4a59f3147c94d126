"""The layers of a transformers model and what stands in them: found by the family's row, swapped, and put back.

A module that is swapped out is kept, untouched, beside the model and not in it: it is in no state_dict and no memory is
copied. Putting it back gives the model that was, bit for bit.
"""

import copy
from typing import NamedTuple

from torch import nn

from sentei.conversion.families import architectures, named
from sentei.conversion.family import PARTS, Family
from sentei.core.errors import UnsupportedError

# The attribute of a model that holds what stood in the places of modules of ours, by path.
ORIGINALS = "originals_of_sentei"


class Layer(NamedTuple):
    """One layer as the family made it, whatever stands in it now.

    Args:
        index: its number in the model, from 0.
        block: the layer itself.
        family: of the model.
        places: by part, its modules, as `Family.places` says.
        norms: by part, the norms before it and, in some families, behind it.
        kind: of its attention, as in transformers' `layer_types`: "full_attention" or "sliding_attention".
        leads: whether transformers reads the length of a cache from this layer's keys, the first of their kind.
    """

    index: int
    block: nn.Module
    family: Family
    places: dict[str, tuple[nn.Module, ...]]
    norms: dict[str, tuple[nn.Module, ...]]
    kind: str
    leads: bool

    @property
    def attention(self) -> nn.Module:
        """What calls transformers' attention function."""
        return self.places["attention"][0]

    @property
    def network(self) -> nn.Module:
        """The feed-forward network, or what its neurons are made in."""
        return self.places["network"][0]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and the size of a head."""
        heads, queries = self.attention.config.num_attention_heads, self.member("q_proj").out_features
        return heads, self.member("k_proj").out_features * heads // queries, queries // heads

    def member(self, name: str) -> nn.Module | None:
        """What `Family.members` calls so, or None: not every network has a gate."""
        place, _, own = self.family.members.get(name, ".").rpartition(".")
        paths = dict(zip((path for part in PARTS for path in self.family.places[part]),
                         (module for part in PARTS for module in self.places[part]), strict=True))
        return getattr(paths.get(place), own, None)

    def given(self, part: str) -> nn.Module:
        """What is given the residual stream as the part finds it."""
        return (*self.norms[part], *self.places[part])[0]

    def rebuilt(self, part: str, new: dict[str, nn.Module]) -> tuple[nn.Module, ...]:
        """The modules of a part with other members, by name: copies of those that hold them, which share the rest."""
        paths = {name: self.family.members[name].rpartition(".") for name in new}
        changed = {place for place, _, _ in paths.values()}
        made = {place: copied(module) if place in changed else module
                for place, module in zip(self.family.places[part], self.places[part], strict=True)}
        for name, (place, _, own) in paths.items():
            setattr(made[place], own, new[name])
        return tuple(made.values())


def copied(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and children, and can be given others."""
    made = copy.copy(module)
    made._parameters, made._modules = dict(module._parameters), dict(module._modules)
    return made


def family_of(model: nn.Module) -> Family:
    """The row of a transformers model.

    Raises:
        UnsupportedError: the family is not in the table, or another class of it.
    """
    kind = getattr(model.config, "model_type", None)
    family = named(kind)
    if family is None or type(model).__name__ != family.architecture:
        raise UnsupportedError(type(model).__name__, expected=f"one of {', '.join(architectures())}", got=repr(kind),
                               do="load a model of one of these families")
    return family


def layer_of(model: nn.Module, index: int, needed: tuple[str, ...] = PARTS) -> Layer:
    """Layer `index` of a model of a known family.

    Args:
        needed: the parts that must be the family's own; a model that was written without some has no others.
    Raises:
        UnsupportedError: the model's modules are not where its family keeps them.
    """
    family = named(model.config.model_type)
    places = {part: tuple(original_at(model, path) for path in places_of(model, index, part)) for part in PARTS}
    for part, expected in (("attention", family.attention), ("network", family.network)):
        found = type(places[part][0]).__name__ if places[part][0] is not None else "nothing"
        if found != expected and part in needed:
            raise UnsupportedError("convert", expected=f"{expected} at {places_of(model, index, part)[0]}", got=found,
                                   do="convert models of transformers itself, before wrapping them")
    norms = {part: tuple(original_at(model, path) for path in paths_of(model, index, part)[len(places[part]):])
             for part in PARTS}
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return Layer(index, model.get_submodule(f"{family.layers}.{index}"), family, places, norms, kind=kinds[index],
                 leads=family.causal and kinds.index(kinds[index]) == index)


def layers_of(model: nn.Module) -> list[Layer]:
    """Every layer of a model of a known family."""
    return [layer_of(model, index) for index in range(model.config.num_hidden_layers)]


def paths_of(model: nn.Module, index: int, part: str) -> tuple[str, ...]:
    """The paths of a part of a layer and of the norms around it, the part first."""
    family = named(model.config.model_type)
    return (*places_of(model, index, part),
            *(f"{family.layers}.{index}.{name}" for name in family.norms[part]))


def places_of(model: nn.Module, index: int, part: str) -> tuple[str, ...]:
    """The paths of the modules of a part of a layer, see `Family.places`."""
    family = named(model.config.model_type)
    return tuple(f"{family.layers}.{index}.{name}" for name in family.places[part])


def standing(model: nn.Module, index: int, member: str) -> nn.Module:
    """What stands now where a layer's family has a member, see `Family.members`."""
    family = named(model.config.model_type)
    return model.get_submodule(f"{family.layers}.{index}.{family.members[member]}")


def original_at(model: nn.Module, path: str) -> nn.Module | None:
    """What transformers put at a path, whatever stands there now; None where there is nothing."""
    held = originals(model)
    if path in held:
        return held[path]
    module = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


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
