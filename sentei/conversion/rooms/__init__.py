"""The rooms' ways into a pretrained layer. A new one is a file here and a line below.

Each file has the same six functions:

    parts(config)                       which parts of a layer it concerns: "attention", "network"
    wants(config)                       the statistics it needs from calibration, names in `statistics.KINDS`
    options(layer, lever)               the configurations worth trying for a workload, the one that keeps all first
    words(config)                       what is kept, in a few words
    blank(layer, part, config)          modules as `build` makes them, with weights that are yet to be loaded
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
        blank: None for a room that cannot be written to a file, or need not be.
    """

    parts: Callable[[object], tuple[str, ...]]
    wants: Callable[[object], tuple[str, ...]]
    options: Callable[[Layer, str], list]
    words: Callable[[object], str]
    build: Callable[[Layer, str, object, dict], tuple[nn.Module, ...]]
    stands: str = "in"
    blank: Callable[[Layer, str, object], tuple[nn.Module, ...]] | None = None


WAYS = {
    "connections": Way(connections.parts, connections.wants, connections.options, connections.words, connections.build,
                       "under"),
    "weights": Way(weights.parts, weights.wants, weights.options, weights.words, weights.build, blank=weights.blank),
    "experts": Way(experts.parts, experts.wants, experts.options, experts.words, experts.build, blank=experts.blank),
    "heads": Way(heads.parts, heads.wants, heads.options, heads.words, heads.build, blank=heads.blank),
    "depth": Way(depth.parts, depth.wants, depth.options, depth.words, depth.build, blank=depth.blank),
}
