"""Small rooms of depth, what they kept, and the same by hand."""

import torch
from torch import nn

from sentei.axes.axis import Axis
from sentei.axes.depth import Config, Depth, Rows, Transformer
from sentei.core.rules import Capacity
from sentei.core.selection import Selection
from sentei.core.tracing import trace

B, T, D = 3, 16, 8
PADDED = torch.tensor([[0, 16], [5, 16], [2, 13]])
LEFT = torch.tensor([[0, 16], [5, 16], [9, 16]])


class Network(nn.Sequential):
    """A block that looks at each row alone."""

    def __init__(self):
        super().__init__(nn.Linear(D, 12), nn.SiLU(), nn.Linear(12, D))
        self.given = []

    def forward(self, hidden, rows):
        self.given.append((hidden.shape, rows))
        return super().forward(hidden)


class Selecting(Depth):
    """By way of a selection without a trace, too."""

    shortcut = Axis.shortcut


def room(rule=None, *, kind=Depth, network=False, threshold=0.5, train=False) -> Depth:
    """In fp64, with a random gate and predictor."""
    block = Network() if network else Transformer(width=D, num_heads=2, hidden=12, rotary=50.0)
    config = Config(rule=Capacity(0.4) if rule is None else rule, threshold=threshold)
    made = kind(config, block, width=D, work=None if network else block.work).double().train(train)
    nn.init.normal_(made.predictor.weight)
    return made


def hidden(tokens: int = T) -> torch.Tensor:
    return torch.randn(B, tokens, D, dtype=torch.float64)


def selection_of(depth: Depth, *inputs) -> Selection:
    with trace(depth) as records:
        depth(*inputs)
    return records[0].selection


def real(lengths, tokens: int = T) -> torch.Tensor:
    places = torch.arange(tokens)
    return (places >= lengths[:, :1]) & (places < lengths[:, 1:])


def by_hand(depth: Depth, x, kept, lengths=None) -> torch.Tensor:
    """Slot by slot: the rows kept, alone, through the block, weighed by the gate and added back."""
    output = x.clone()
    for slot in range(len(x)):
        places = kept[slot].nonzero()[:, 0]
        if len(places):
            start = 0 if lengths is None else int(lengths[slot, 0])
            update = depth.block(x[slot, places][None], Rows(positions=(places - start)[None]))[0]
            output[slot, places] = x[slot, places] + depth.gate(x[slot, places]) * update
    return output
