"""A plan: which room prunes which layer, and how."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from sentei.axes import AXES
from sentei.axes.connections import Connections
from sentei.conversion import wrapper
from sentei.conversion.families import FAMILIES
from sentei.core.errors import FileError, RuleError, UnsupportedError

MAX_LAYERS = 1000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One room in one layer.

    Args:
        layer: its number in the model, from 0.
        room: a name in AXES.
        config: the room's configuration.
    Raises:
        RuleError: another room, or a configuration that is not that room's.
    """

    layer: int
    room: str
    config: object

    def __post_init__(self):
        if not _is_place(self.layer, self.room) or not isinstance(self.config, AXES[self.room].config):
            raise RuleError("Entry", expected=f"a layer from 0, a room ({', '.join(AXES)}) and that room's Config",
                            got=repr(self)[:200], do="see AXES for the rooms")

    def to_json(self) -> dict:
        """The entry as a JSON object."""
        return {"layer": self.layer, "room": self.room, "config": self.config.to_json()}

    @classmethod
    def from_json(cls, value: dict) -> "Entry":
        """The entry written by `to_json`; anything else is refused with a FileError."""
        layer, room = (value.get("layer"), value.get("room")) if isinstance(value, dict) else (None, None)
        if not _is_place(layer, room) or set(value) != {"layer", "room", "config"}:
            raise FileError("plan", expected=f"entries with layer, room ({', '.join(AXES)}) and config",
                            got=repr(value)[:200], do="write plans with sentei")
        return cls(layer=layer, room=room, config=AXES[room].config.from_json(value["config"]))


def _is_place(layer: object, room: object) -> bool:
    """Whether a model can have such a layer, and there is such a room."""
    return type(layer) is int and 0 <= layer < MAX_LAYERS and isinstance(room, str) and room in AXES


@dataclass(frozen=True)
class Plan:
    """The entries, at most one a layer and room; layers without one stay dense."""

    entries: tuple[Entry, ...] = ()

    def __post_init__(self):
        places = [(entry.layer, entry.room) for entry in self.entries]
        if len(set(places)) != len(places):
            raise RuleError("plan", expected="at most one entry a layer and room", got=str(places)[:200],
                            do="merge the entries")

    @classmethod
    def everywhere(cls, layers: Iterable[int], room: str, config: object) -> "Plan":
        """The same room with the same configuration in each of `layers`."""
        return cls(tuple(Entry(layer=layer, room=room, config=config) for layer in layers))

    def without_lookahead(self) -> "Plan":
        """The same plan with every choice made from the tokens up to a row alone, see the rooms' `Config`."""
        return Plan(tuple(replace(entry, config=entry.config.without_lookahead()) for entry in self.entries))

    def to_json(self) -> list[dict]:
        """The plan as a JSON array."""
        return [entry.to_json() for entry in self.entries]

    @classmethod
    def from_json(cls, value: list) -> "Plan":
        """The plan written by `to_json`; anything else is refused with a FileError."""
        if not isinstance(value, list) or len(value) > MAX_LAYERS * len(AXES):
            raise FileError("plan", expected=f"a JSON array of at most {MAX_LAYERS * len(AXES):,} entries",
                            got=f"{len(value):,}" if isinstance(value, list) else repr(value)[:200],
                            do="write plans with sentei")
        try:
            return cls(tuple(Entry.from_json(item) for item in value))
        except RuleError as error:
            raise FileError("plan", expected=error.expected, got=error.got, do="write plans with sentei") from error


def convert(model: nn.Module, plan: Plan) -> nn.Module:
    """Installs the plan's rooms in a transformers model, in place, and returns it.

    The weights are untouched; with rules that keep everything the model computes what it did. A model that was
    converted before gets the new plan instead of the old one; the empty plan gives the dense model back.

    Raises:
        UnsupportedError: another room than connections, a family not in the table, a layer that does not exist or is
            not of full attention, or attention that does not go through transformers' interface.
    Cost: a forward pass or two of two tokens, to see that every room is reached.
    """
    layers, rooms = prunable_layers(model), sorted({entry.room for entry in plan.entries} - {"connections"})
    if rooms:
        raise UnsupportedError("convert", expected="the room connections", got=", ".join(rooms),
                               do="build layers of other rooms with their from_dense")
    wrong = sorted({entry.layer for entry in plan.entries} - set(layers))
    if wrong:
        raise UnsupportedError("convert", expected=f"layers of full attention: {list(layers)}", got=f"layers {wrong}",
                               do="make the plan for this model")
    if not plan.entries:
        wrapper.remove(model)
        return model
    wrapper.install(model, {attention_path(model, entry.layer): Connections(entry.config) for entry in plan.entries})
    return model


def prunable_layers(model: nn.Module) -> tuple[int, ...]:
    """The layers whose connections may be pruned: those of full attention.

    Raises:
        UnsupportedError: the family is not in the table.
    """
    family = FAMILIES.get(getattr(model.config, "model_type", None))
    if family is None or type(model).__name__ != family.architecture:
        supported = ", ".join(family.architecture for family in FAMILIES.values())
        raise UnsupportedError(type(model).__name__, expected=f"one of {supported}",
                               got=repr(getattr(model.config, "model_type", None)),
                               do="load a causal language model of one of these families")
    return family.prunable_layers(model.config)


def attention_path(model: nn.Module, layer: int) -> str:
    """The path of a layer's attention module.

    Raises:
        UnsupportedError: the model's modules are not where its family keeps them.
    """
    attention = FAMILIES[model.config.model_type].attention
    path = f"model.layers.{layer}.self_attn"
    try:
        found = type(model.get_submodule(path)).__name__
    except AttributeError:
        found = "nothing"
    if found != attention:
        raise UnsupportedError("convert", expected=f"{attention} at {path}", got=found,
                               do="convert models of transformers itself, before wrapping them")
    return path
