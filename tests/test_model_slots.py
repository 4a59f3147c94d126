"""Rooms in the slots of the model: they train, generate as without a cache, and do not take padding for tokens."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sentei.axes import depth, experts
from sentei.axes.experts.gates import Choice, Softmax, Task
from sentei.core.errors import FileError, RuleError, ShapeError
from sentei.core.rules import Capacity, Mass, TopK
from sentei.core.tracing import trace
from sentei.model import Config, Routed, Transformer


def test_padding_takes_no_expert_s_room():
    """A capacity that is full of padding would drop real tokens."""
    room = experts.Config(rule=TopK(1), gate=Softmax(0.5), unit=8)
    routed = Routed(neurons=32, room=room)
    net = Transformer(Config(vocabulary=40, width=16, layers=2, heads=(2, 1), feed_forward=routed)).double()
    tokens, lengths = torch.randint(0, 40, (2, 12)), torch.tensor([[5, 12], [0, 8]])
    padded = net(tokens, lengths)
    for row, (start, stop) in enumerate(lengths.tolist()):
        torch.testing.assert_close(padded[row, start:stop], net(tokens[row:row + 1, start:stop])[0])


ROOMS = {
    "experts": {"feed_forward": Routed(neurons=32, room=experts.Config(rule=TopK(2), gate=Softmax(), unit=8))},
    "capacity": {"feed_forward": Routed(neurons=32, room=experts.Config(rule=TopK(1), gate=Softmax(1.0), unit=8))},
    "choice": {"feed_forward": Routed(neurons=32, room=experts.Config(rule=Capacity(0.5), gate=Choice(), unit=8))},
    "depth": {"depth": depth.Config(rule=Capacity(0.5))},
    "both": {"feed_forward": Routed(neurons=32, room=experts.Config(unit=16)), "depth": depth.Config()},
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_in_the_slots_train_and_generate_as_without_a_cache(room):
    config = Config(vocabulary=40, width=16, layers=2, heads=(2, 1), **ROOMS[room])
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    torch.manual_seed(0)
    net, tokens = Transformer(config).double(), torch.randint(0, 40, (2, 12))
    for block in (part for part in net.modules() if isinstance(part, depth.Depth)):
        torch.nn.init.normal_(block.predictor.weight)  # as if trained: slots of the batch keep other numbers of tokens
    net.train()(tokens).square().mean().backward()
    moved = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert all("predictor" in name or "router" in name for name in moved)
    net.eval()
    with torch.no_grad():
        cache = net.cache()
        parts = torch.cat([net(part, cache=cache) for part in tokens.split([5, 1, 4, 2], 1)], 1)
        torch.testing.assert_close(parts, net(tokens), rtol=1e-9, atol=1e-9)
        later = tokens.clone()
        later[:, 8:] = 3
        # An expert's product has other rows when later tokens change, and rounds otherwise.
        torch.testing.assert_close(net(later)[:, :8], net(tokens)[:, :8], rtol=1e-9, atol=1e-9)
    with trace(net) as records:
        net(tokens)
    kinds = {"depth": ["depth"], "both": ["experts", "depth"]}.get(room, ["experts"])
    assert all(any(kind in type_of(net, path) for path in records.paths()) for kind in kinds)


NESTED = {"depth": (24, Capacity(0.5)), "experts in depth": (Routed(neurons=24, room=experts.Config(
    rule=TopK(2), gate=Softmax(), unit=4)), Capacity(0.5)), "shared experts in depth": (Routed(
        neurons=24, room=experts.Config(rule=TopK(1), gate=Softmax(), unit=4, shared=2)), Capacity(0.5)),
    "experts in a depth that keeps nothing": (Routed(neurons=24, room=experts.Config(
        rule=TopK(2), gate=Softmax(), unit=4)), TopK(0))}


@pytest.mark.parametrize("room", NESTED)
def test_a_room_in_a_room_could_cost_what_torch_counts_of_the_dense_twin(room):
    """And what it does cost is what torch counts of itself, without the router, which chooses (a gate's sums are no
    product of torch's), and the sum of the experts' answers, which is one for torch alone. 64 tokens of 128 fill a
    tile."""
    feed_forward, rule = NESTED[room]
    shape = {"vocabulary": 40, "width": 16, "layers": 2, "heads": (2, 1), "causal": False}
    net = Transformer(Config(**shape, feed_forward=feed_forward, depth=depth.Config(rule=rule))).double()
    twin, x = Transformer(Config(**shape, feed_forward=24)).double(), torch.randint(0, 40, (3, 128))
    found = []
    for model in (net, twin):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.train()(x)
        found.append(counter.get_total_flops())
    with torch.no_grad(), trace(net) as records:
        net(x)
    cost = net.cost(records, x.shape)
    assert 2 * cost.dense_multiply_adds == found[1]
    by_experts = sum(record.cost.choosing + 16 * int(record.selection.count().sum()) for record in records
                     if record.room == "experts")
    assert 2 * (cost.multiply_adds + by_experts) == found[0] < found[1]


def test_padding_could_cost_nothing_in_a_room_in_a_room():
    config = Config(vocabulary=40, width=16, layers=2, heads=(2, 1), depth=depth.Config(rule=Capacity(0.5)),
                    feed_forward=Routed(neurons=24, room=experts.Config(rule=TopK(2), gate=Softmax(), unit=4)))
    net, x = Transformer(config).double().train(), torch.randint(0, 40, (2, 64))
    could = []
    for lengths in (None, torch.tensor([[0, 64], [0, 64]]), torch.tensor([[0, 64], [0, 34]])):
        with torch.no_grad(), trace(net) as records:
            net(x, lengths)
        could.append(net.cost(records, x.shape).dense_multiply_adds)
    block = sum(part.weight.numel() for part in net.blocks[0].block.modules() if isinstance(part, torch.nn.Linear))
    assert could[0] == could[1] and could[1] - could[2] == 2 * 30 * (3 * 24 * 16 + block)


BY_TASK = {
    "two experts": (experts.Config(rule=TopK(2), gate=Task(3), unit=8), None),
    "layers that keep different numbers": (experts.Config(rule=Mass(0.5), gate=Task(3), unit=8, shared=1), None),
    "tokens that skip blocks": (experts.Config(rule=TopK(2), gate=Task(3), unit=8, metric="cosine"),
                                depth.Config(rule=Capacity(0.5))),
}


def by_task(kind: str) -> Transformer:
    torch.manual_seed(0)
    room, skipped = BY_TASK[kind]
    net = Transformer(Config(vocabulary=40, width=16, layers=2, heads=(2, 1), depth=skipped,
                             feed_forward=Routed(neurons=48, room=room))).double().eval()
    for name, parameter in net.named_parameters():
        if "router" in name or "predictor" in name:
            torch.nn.init.normal_(parameter)
    return net


@pytest.mark.parametrize("kind", BY_TASK)
def test_a_task_is_a_smaller_model_of_its_own(kind):
    net, tokens, lengths = by_task(kind), torch.randint(0, 40, (3, 12)), torch.tensor([[0, 12], [4, 12], [1, 12]])
    tasks = torch.tensor([2, 0, 1])
    answers, written = net(tokens, lengths, tasks=tasks), net.generate(tokens, 6, lengths=lengths, tasks=tasks)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    for row, task in enumerate(tasks.tolist()):
        small = net.extract(task)
        assert small.size()[0] < net.size()[0] and type(small.config.feed_forward) is int and not small.training
        again = Transformer(Config.from_json(json.loads(json.dumps(small.config.to_json())))).double().eval()
        again.load_state_dict(small.state_dict())
        for model in (small, again):
            start = int(lengths[row, 0])
            torch.testing.assert_close(model(tokens[row:row + 1, start:]), answers[row:row + 1, start:])
            assert torch.equal(model.generate(tokens[row:row + 1, start:], 6), written[row:row + 1, start:])
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items()), "a copy"
    other = net(tokens, lengths, tasks=(tasks + 1) % 3)
    assert not torch.allclose(other[0], answers[0], rtol=1e-3)
    net.train()(tokens, tasks=tasks).square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in net.named_parameters() if "router" in name)
    assert net.extract(0).training


def test_tasks_are_asked_for_where_experts_are_chosen_by_them_and_there_alone():
    net, tokens = by_task("two experts"), torch.randint(0, 40, (2, 5))
    plain = Transformer(Config(vocabulary=40, width=16, layers=1, heads=(2, 1)))
    for model, tasks, told in ((net, None, "got no tasks for"), (plain, torch.tensor([0, 1]), "got tasks for"),
                               (net, torch.tensor([0]), r"tasks \[B\] with B=2"), (net, torch.tensor([0, 3]), "0 to 2"),
                               (net, torch.tensor([0.0, 1.0]), "int64")):
        with pytest.raises(ShapeError, match=told):
            model(tokens, tasks=tasks)
    for task in (-1, 3, 1.0):
        with pytest.raises(ShapeError, match="tasks int64 from 0 to 2"):
            net.extract(task)
    with pytest.raises(RuleError, match="extract: expected experts with a Task gate"):
        plain.extract(0)


def type_of(net, path: str) -> str:
    return type(net.get_submodule(path)).__module__


@pytest.mark.parametrize("wrong", [{"neurons": 0}, {"neurons": "8"}, {}])
def test_a_mixture_that_is_not_one_is_refused(wrong):
    value = Routed().to_json()
    del value["neurons"]
    with pytest.raises(FileError, match="neurons from 1"):
        Routed.from_json({**value, **wrong})
