"""The rooms. A new one is a file here, a line below, a row in the README and an example."""

from collections.abc import Callable
from typing import NamedTuple

from sentei.axes import channels, connections, depth, experts, heads, rank, weights
from sentei.axes.axis import Axis


class Room(NamedTuple):
    """One row of the table."""

    config: type
    axis: type[Axis]
    from_dense: Callable


AXES = {
    "connections": Room(connections.Config, connections.Connections, connections.from_dense),
    "experts": Room(experts.Config, experts.Experts, experts.from_dense),
    "heads": Room(heads.Config, heads.Heads, heads.from_dense),
    "rank": Room(rank.Config, rank.Rank, rank.from_dense),
    "channels": Room(channels.Config, channels.Channels, channels.from_dense),
    "depth": Room(depth.Config, depth.Depth, depth.from_dense),
    "weights": Room(weights.Config, weights.Weights, weights.from_dense),
}
