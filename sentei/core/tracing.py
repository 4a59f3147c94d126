"""Taps and traces: every selection a model makes, by module path, for as long as a `with` block lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from sentei.core.cost import Cost
from sentei.core.errors import SenteiError
from sentei.core.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens of one call of attention: the queries are the last `queries` of `keys` tokens.

    Args:
        queries, keys: how many tokens ask, and how many there are.
        block: neighbouring query tokens that share one query of the selection.
    """

    queries: int
    keys: int
    block: int = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One selection as it was made.

    Args:
        path: the tap's room in the model, e.g. "model.layers.3.self_attn.connections".
        selection: detached from the graph.
        cost: of computing what was kept, and of choosing it.
        impl: the kernel that ran.
        reason: why that kernel, when it was chosen automatically.
        room: its name, e.g. "connections".
        span: of the tokens its queries and candidates stand for, where that is not one token a query.
    """

    path: str
    selection: Selection
    cost: Cost
    impl: str
    reason: str
    room: str = ""
    span: Span | None = None


@dataclass(frozen=True, kw_only=True)
class Bypass:
    """One call that a room could not take, so that the layer ran dense.

    Args:
        path: the room's, as in a record.
        reason: what the room has no way to do, in words.
    """

    path: str
    reason: str


class Point(nn.Module):
    """A point in a room at which one can listen. It holds no state beyond who does, and at which path."""

    def __init__(self):
        super().__init__()
        self._listeners: list[tuple[object, str]] = []

    @property
    def is_heard(self) -> bool:
        """Whether anyone listens."""
        return bool(self._listeners)


@contextmanager
def listening(model: nn.Module, kind: type[Point], listener: object) -> Iterator[None]:
    """Puts the listener at every point of that kind in `model`, for as long as the block lasts.

    A point's path is that of its room, without the name of the point itself: that of its kind, in lower case.
    """
    attached = []
    for path, point in model.named_modules():
        if isinstance(point, kind):
            entry = listener, f".{path}".removesuffix(f".{kind.__name__.lower()}").removeprefix(".")
            point._listeners.append(entry)
            attached.append((point, entry))
    try:
        yield
    finally:
        for point, entry in attached:
            point._listeners = [other for other in point._listeners if other is not entry]


class Tap(Point):
    """The point in a room through which its selections pass."""

    def forward(self, selection: Selection, measure: Callable[[], tuple[Cost, str, str]], *, room: str = "",
                span: Span | None = None) -> Selection:
        """Returns the selection unchanged; `measure()` → (cost, impl, reason) is only called when someone listens."""
        if self.is_heard:
            cost, impl, reason = measure()
            detached = Selection(ids=selection.ids, weights=selection.weights.detach(), permitted=selection.permitted,
                                 num_candidates=selection.num_candidates, unit=selection.unit)
            for records, path in self._listeners:
                records.append(Record(path=path, selection=detached, cost=cost, impl=impl, reason=reason, room=room,
                                      span=span))
        return selection

    def bypass(self, reason: str) -> None:
        """Tells whoever listens that the layer runs dense this time, and why."""
        for records, path in self._listeners:
            records.bypasses.append(Bypass(path=path, reason=reason))


class Trace(list[Record]):
    """The records of one `with trace(model)` block, in the order they were made.

    `bypasses` lists the calls in which a layer with a room ran dense, because the room could not take them.
    """

    def __init__(self):
        super().__init__()
        self.bypasses: list[Bypass] = []

    def at(self, path: str) -> list[Record]:
        """The records of one room."""
        return [record for record in self if record.path == path]

    def paths(self) -> list[str]:
        """The rooms that made a selection, in order of first use."""
        return list(dict.fromkeys(record.path for record in self))

    def cost(self) -> Cost:
        """The sum over all records."""
        return sum((record.cost for record in self), Cost(multiply_adds=0, dense_multiply_adds=0))

    def density(self) -> float:
        """Multiply-adds performed ÷ dense, over all records; what is in `bypasses` is not counted.

        Raises:
            SenteiError: no selection was made inside the block, of which a density could be told.
        """
        if not self:
            reasons = ", ".join(dict.fromkeys(bypass.reason for bypass in self.bypasses))
            raise SenteiError("trace", expected="at least one selection inside the block",
                              got=f"none; layers ran dense because of {reasons}" if reasons else "none",
                              do="run a converted model inside the block, in eval mode and with its plain causal mask")
        return self.cost().density()


@contextmanager
def trace(model: nn.Module, into: Trace | None = None) -> Iterator[Trace]:
    """Records every selection made by `model` inside the block.

        with trace(model) as t:
            model(**inputs)
        t.density(), t.paths()

    Args:
        into: the trace to append to; a new one by default.
    Cost: memory for the selections (ids and weights); nothing is recomputed.
    """
    records = Trace() if into is None else into
    with listening(model, Tap, records):
        yield records
