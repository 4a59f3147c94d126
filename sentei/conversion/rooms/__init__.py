"""The rooms' ways into a pretrained layer. A new one is a file here and a line below.

Each file has the same four functions:

    parts(config)                       which parts of a layer it concerns: "attention", "network"
    wants(config)                       the statistics it needs from calibration, names in `statistics.KINDS`
    options(layer, lever)               the configurations worth trying for a workload, the one that keeps all first
    build(layer, part, config, seen)    what stands in for the part and, where more is returned, for the norms around it

`build` leaves the original as it is, shares what it does not change, and returns the original itself where the
configuration keeps all. `lever` is the field of the connections' Config that the workload uses: "rule" for prompts,
"decode" for tokens after them. `seen` holds the states of the layer by name.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from sentei.conversion.layers import Layer
from sentei.conversion.rooms import connections, depth, experts, heads, weights


class Way(NamedTuple):
    """One row of the table.

    Args:
        stands: "in" the place of the part, or "under" it, as a child that the part calls.
    """

    parts: Callable[[object], tuple[str, ...]]
    wants: Callable[[object], tuple[str, ...]]
    options: Callable[[Layer, str], list]
    build: Callable[[Layer, str, object, dict], tuple[nn.Module, ...]]
    stands: str = "in"


WAYS = {
    "connections": Way(connections.parts, connections.wants, connections.options, connections.build, "under"),
    "weights": Way(weights.parts, weights.wants, weights.options, weights.build),
    "experts": Way(experts.parts, experts.wants, experts.options, experts.build),
    "heads": Way(heads.parts, heads.wants, heads.options, heads.build),
    "depth": Way(depth.parts, depth.wants, depth.options, depth.build),
}
