"""Rooms in the slots of the model: they train, generate as without a cache, and do not take padding for tokens."""

import json

import pytest
import torch

from sentei.axes import depth, experts
from sentei.axes.experts.gates import Choice, Softmax
from sentei.core.errors import FileError
from sentei.core.rules import Capacity, TopK
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
    kinds = {"experts": ["experts"], "choice": ["experts"], "depth": ["depth"], "both": ["experts", "depth"]}[room]
    assert all(any(kind in type_of(net, path) for path in records.paths()) for kind in kinds)


def type_of(net, path: str) -> str:
    return type(net.get_submodule(path)).__module__


@pytest.mark.parametrize("wrong", [{"neurons": 0}, {"neurons": "8"}, {}])
def test_a_mixture_that_is_not_one_is_refused(wrong):
    value = Routed().to_json()
    del value["neurons"]
    with pytest.raises(FileError, match="neurons from 1"):
        Routed.from_json({**value, **wrong})
