"""A plan: which room prunes which layer, and how."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from sentei.axes import AXES
from sentei.conversion import layers as placing
from sentei.conversion import native, wrapper
from sentei.conversion.family import Family
from sentei.conversion.rooms import WAYS
from sentei.conversion.statistics import Statistics
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

    def standing(self, where: str) -> "Plan":
        """The entries of rooms that stand "in" the place of a part, or "under" one."""
        return Plan(tuple(entry for entry in self.entries if WAYS[entry.room].stands == where))

    def choosing(self, family: Family, *, those: bool = True) -> "Plan":
        """The entries that choose for each input among a model's weights as they are; or the others.

        These are the rooms under a part, and those of a mixture whose tokens skip experts.
        """
        return Plan(tuple(entry for entry in self.entries if those == (
            WAYS[entry.room].stands == "under" or entry.room == "experts" and family.mixture is not None)))

    @classmethod
    def everywhere(cls, layers: Iterable[int], room: str, config: object) -> "Plan":
        """The same room with the same configuration in each of `layers`."""
        return cls(tuple(Entry(layer=layer, room=room, config=config) for layer in layers))

    def without_lookahead(self) -> "Plan":
        """The same plan with every choice made from the tokens up to a row alone, see the rooms' `Config`."""
        return Plan(tuple(replace(entry, config=entry.config.without_lookahead()) if entry.room == "connections"
                          else entry for entry in self.entries))

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


def convert(model: nn.Module, plan: Plan, statistics: Statistics | None = None) -> nn.Module:
    """Installs the plan's rooms in a transformers model, in place, and returns it.

    The weights are untouched: a room that changes some stands in for the original module, which is kept and put back
    by the next plan. With configurations that keep everything the model computes what it did. Whatever the plan's
    rooms, layers that are left run natively where that was measured faster (`conversion.native`). A model that was
    converted before gets the new plan instead of the old one; the empty plan gives the dense model back, bit for bit.

    Args:
        statistics: of a calibration pass, for rooms that want some (`wanted`).
    Raises:
        UnsupportedError: a room without a way into pretrained models, a family not in the table, a layer that does not
            exist or is not of full attention where connections are pruned, attention that does not go through
            transformers' interface, or statistics that are missing.
        RuleError: two rooms in one place, or a configuration that does not fit the model.
    Cost: what the rooms' `build` costs, once for each set of statistics; where connections are pruned a forward pass or
        two of two tokens, to see that every room is reached; and once what `conversion.native.install` costs.

    Whatever is raised, the model is then as it was.
    """
    return _become(model, plan, statistics, native.install if plan.entries else _stay)


def place(model: nn.Module, plan: Plan, statistics: Statistics | None = None) -> nn.Module:
    """As `convert`, with the plan's rooms alone: what is left is transformers' own, and plain to train."""
    return _become(model, plan, statistics, _stay)


def complete(model: nn.Module, plan: Plan) -> nn.Module:
    """Makes a model whose weights already have the shapes of a plan what `convert` with the plan would have made it.

    Args:
        model: as `export` has written it, or healed; changed in place and returned.
        plan: what it was made by, or what of that is left; even of an empty one the layers run natively, where faster.
    Raises:
        UnsupportedError, RuleError: as `convert`.
    """
    return _become(model, plan.choosing(placing.family_of(model)), None, native.install)


def _stay(model: nn.Module) -> None:
    """Leaves the layers as they are."""


def _become(model: nn.Module, plan: Plan, statistics: Statistics | None, finish: Callable[[nn.Module], object]
            ) -> nn.Module:
    """Takes out what was installed, puts the plan's rooms in and has `finish` see to the rest; all of it or none."""
    _check_layers(model, plan)
    earlier, implementation = (placing.swapped(model), wrapper.rooms(model)), model.config._attn_implementation
    was_native = native.is_installed(model)
    try:
        wrapper.remove(model)  # before anything is built: what is built is made of the plain modules
        native.remove(model)
        placing.swap(model, _inside(model, plan, statistics or Statistics()))
        _attach(model, plan)
        finish(model)
    except BaseException:
        wrapper.remove(model)
        native.remove(model)
        placing.swap(model, earlier[0])
        wrapper.restore(model, earlier[1], implementation)
        if was_native:
            native.install(model)
        raise
    return model


def wanted(plan: Plan) -> dict[int, set[str]]:
    """The statistics a plan's rooms need, names by layer."""
    found: dict[int, set[str]] = {}
    for entry in plan.entries:
        if entry.room in WAYS:
            found.setdefault(entry.layer, set()).update(WAYS[entry.room].wants(entry.config))
    return {layer: names for layer, names in found.items() if names}


def _check_layers(model: nn.Module, plan: Plan) -> None:
    prunable, every = prunable_layers(model), range(model.config.num_hidden_layers)
    others = sorted({entry.room for entry in plan.entries} - set(WAYS))
    if others:
        raise UnsupportedError("convert", expected=f"the rooms {', '.join(WAYS)}", got=", ".join(others),
                               do="build layers of other rooms with their from_dense")
    for expected, layers, rooms in (
            ("layers of full attention", prunable, [name for name, way in WAYS.items() if way.stands == "under"]),
            ("layers", every, [name for name, way in WAYS.items() if way.stands == "in"])):
        wrong = sorted({entry.layer for entry in plan.entries if entry.room in rooms} - set(layers))
        if wrong:
            raise UnsupportedError("convert", expected=f"{expected}: {list(layers)}", got=f"layers {wrong}",
                                   do="make the plan for this model")


def _inside(model: nn.Module, plan: Plan, statistics: Statistics) -> dict[str, nn.Module]:
    """What the plan puts in the places of the model's own modules, by path."""
    found: dict[str, nn.Module] = {}
    for entry in plan.entries:
        way = WAYS[entry.room]
        if way.stands == "under":
            continue
        layer = placing.layer_of(model, entry.layer)
        for part in way.parts(entry.config):
            paths = placing.paths_of(model, entry.layer, part)
            if paths[0] in found:
                raise RuleError("convert", expected="one room in each place", got=f"two at {paths[0]}",
                                do="leave one of the entries out")
            modules = statistics.once((layer.block, part, entry.room, entry.config),
                                      partial(_built, layer, part, entry, statistics))
            found |= {path: module for path, module in zip(paths, modules, strict=False)
                      if module is not placing.original_at(model, path)}
    return found


def _built(layer: placing.Layer, part: str, entry: Entry, statistics: Statistics) -> tuple[nn.Module, ...]:
    """What an entry puts in the place of a part; only then are its statistics looked up, and read where need be."""
    way = WAYS[entry.room]
    wants = set(way.wants(entry.config))
    seen = statistics.of(entry.layer) if wants else {}
    missing = sorted(wants - set(seen))
    if missing:
        raise UnsupportedError("convert", expected=f"statistics of layer {entry.layer}: {', '.join(missing)}",
                               got="none", do="calibrate (sentei.budget.calibration) and pass them on")
    return way.build(layer, part, entry.config, seen)


def _attach(model: nn.Module, plan: Plan) -> None:
    """Installs the rooms that stand under an attention module, or takes those out that are there."""
    entries = [entry for entry in plan.entries if WAYS[entry.room].stands == "under"]
    if not entries:
        wrapper.remove(model)
        return
    new = {}
    for entry in entries:
        path = attention_path(model, entry.layer)
        standing = type(model.get_submodule(path)).__name__
        if standing != placing.family_of(model).attention:
            raise RuleError("convert", expected=f"an attention for the room {entry.room} at {path}", got=standing,
                            do="leave one of the entries out")
        layer = placing.layer_of(model, entry.layer, ("attention",))
        new[path], = WAYS[entry.room].build(layer, "attention", entry.config, {})
    wrapper.install(model, new)


def prunable_layers(model: nn.Module) -> tuple[int, ...]:
    """The layers whose connections may be pruned: those of full attention.

    Raises:
        UnsupportedError: see `layers.family_of`.
    """
    return placing.family_of(model).prunable_layers(model.config)


def attention_path(model: nn.Module, layer: int) -> str:
    """The path of a layer's attention module.

    Raises:
        UnsupportedError: the model's modules are not where its family keeps them.
    """
    placing.layer_of(model, layer, ("attention",))
    return placing.paths_of(model, layer, "attention")[0]
