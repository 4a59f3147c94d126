"""A trace hears every selection while it lasts, changes nothing and leaves nothing behind."""

import pytest
import torch
from torch import nn

from sentei.core.cost import Cost
from sentei.core.errors import SenteiError
from sentei.core.rules import TopK
from sentei.core.selection import Selection
from sentei.core.tracing import Bypass, Record, Tap, trace


class Room(nn.Module):
    """A room of one tap, that scores by its parameter."""

    def __init__(self, k: int):
        super().__init__()
        self.rule, self.tap, self.measured = TopK(k), Tap(), 0
        self.gate = nn.Parameter(torch.tensor([3.0, 1.0, 2.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x * self.gate
        selection = self.rule(scores).weigh_softmax(scores)
        assert self.tap(selection, self.measure) is selection
        return selection.dense_weights()

    def measure(self) -> tuple[Cost, str, str]:
        self.measured += 1
        return Cost(multiply_adds=self.rule.k, dense_multiply_adds=4), "reference", "the only one"


class Model(nn.Module):
    """Two rooms in a row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Room(1), Room(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def x() -> torch.Tensor:
    return torch.ones(3, 4)


def listeners(model: nn.Module) -> int:
    return sum(len(tap._listeners) for tap in model.modules() if isinstance(tap, Tap))


def test_records_every_selection_by_its_rooms_path():
    model = Model()
    with trace(model) as t:
        model(x())
        model(x())
    assert [record.path for record in t] == ["layers.0", "layers.1"] * 2
    assert t.paths() == ["layers.0", "layers.1"]
    assert [record.selection.count().tolist() for record in t.at("layers.1")] == [[2, 2, 2]] * 2
    assert t.at("elsewhere") == []


def test_says_the_cost_and_the_kernel():
    model = Model()
    with trace(model) as t:
        model(x())
    first = t[0]
    assert isinstance(first, Record) and (first.impl, first.reason) == ("reference", "the only one")
    assert t.cost() == Cost(multiply_adds=3, dense_multiply_adds=8) and t.density() == 3 / 8


def test_an_empty_trace_tells_no_density():
    with trace(Model()) as t:
        pass
    assert (t.cost(), t.paths(), t.bypasses) == (Cost(multiply_adds=0, dense_multiply_adds=0), [], [])
    with pytest.raises(SenteiError, match="at least one selection inside the block, got none; run"):
        t.density()


def test_a_call_the_room_cannot_take_is_told_with_its_reason():
    model = Model()
    with trace(model) as t:
        model.layers[1].tap.bypass("dropout")
    assert (list(t), t.bypasses) == ([], [Bypass(path="layers.1", reason="dropout")])
    with pytest.raises(SenteiError, match="layers ran dense because of dropout"):
        t.density()
    model.layers[1].tap.bypass("nobody listens")
    assert len(t.bypasses) == 1


@pytest.mark.parametrize("name, path", [("tap", ""), ("a", "a.room"), ("bigtap", "bigtap.room")])
def test_a_room_at_the_root_has_the_empty_path(name, path):
    model = Room(1) if not path else nn.ModuleDict({name: nn.ModuleDict({"room": Room(1)})})
    with trace(model) as t:
        (model if not path else model[name]["room"])(x())
    assert t.paths() == [path]


def test_nothing_is_measured_when_nobody_listens():
    model = Model()
    model(x())
    assert [room.measured for room in model.layers] == [0, 0]


def test_the_output_does_not_depend_on_the_trace():
    model = Model()
    silent = model(x())
    with trace(model):
        assert torch.equal(model(x()), silent)


def test_records_are_off_the_graph_and_gradients_still_flow():
    model = Model()
    with trace(model) as t:
        model(x()).square().sum().backward()
    assert all(not record.selection.weights.requires_grad for record in t)
    assert model.layers[0].gate.grad is not None


def test_the_trace_ends_with_its_block_even_on_an_error():
    model = Model()
    with pytest.raises(RuntimeError, match="inside"), trace(model) as t:
        model(x())
        raise RuntimeError("inside")
    assert len(t) == 2 and listeners(model) == 0
    model(x())
    assert len(t) == 2


def test_traces_nest_and_end_one_by_one():
    model = Model()
    with trace(model) as outer:
        with trace(model) as inner:
            model(x())
        model(x())
    assert (len(outer), len(inner), listeners(model)) == (4, 2, 0)


def test_the_inner_of_two_silent_traces_ends_alone():
    model = Model()
    with trace(model) as outer:
        with trace(model) as inner:
            pass
        model(x())
    assert (len(outer), len(inner)) == (2, 0)


def test_a_trace_hears_its_own_model_only():
    ours, other = Model(), Model()
    with trace(ours) as t:
        other(x())
    assert len(t) == 0


def test_a_tap_has_no_state_to_save():
    assert list(Tap().state_dict()) == [] and list(Tap().parameters()) == []
    selection = Selection.from_mask(torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    assert Tap()(selection, lambda: pytest.fail("measured for nobody")) is selection
