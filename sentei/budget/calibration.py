"""One pass over calibration text in which every statistic that the rooms want is collected.

Nothing is kept of a token once it is read: a statistic is a sum (`sentei.conversion.statistics`), so memory does not
grow with the text, the order of the windows does not matter, and processes that share the windows add their sums up.
It does grow with the layers, 8 · F² bytes each and more: `Library` asks first, and reads some layers at a time.
"""

from collections.abc import Callable

import torch
from torch import nn

from sentei.conversion.layers import layers_of
from sentei.conversion.memory import available_memory, require_memory
from sentei.conversion.plan import Plan, convert, wanted
from sentei.conversion.rooms import WAYS
from sentei.conversion.statistics import Statistics, bytes_of

# Tokens that are read: a few for each dimension of what is widest in a small model.
TOKENS = 4096
# Tokens of a forward pass: of a longer window the attention would cost more than the rest.
AT_ONCE = 2048
# Of the memory there is: the rest is for what is built of the statistics, and for what comes beside.
HALF = 0.5
# How many times its own size a state takes once it is used: the inverse of a moment is kept.
USED = 2


def wanted_by_rooms(model: nn.Module, rooms: list[str], lever: str) -> dict[int, set[str]]:
    """The names of the statistics that any option of these rooms needs, by layer."""
    found = {}
    for layer in layers_of(model):
        names = {name for room in rooms for config in WAYS[room].options(layer, lever)
                 for name in WAYS[room].wants(config)}
        if names:
            found[layer.index] = names
    return found


@torch.no_grad()
def calibrate(model: nn.Module, tokens: torch.Tensor, names: dict[int, set[str]], *, share: tuple[int, int] = (0, 1),
              step: Callable[[], object] = lambda: None) -> Statistics:
    """The wanted statistics of the dense model over windows of text.

    Args:
        model: a transformers model; it is dense afterwards.
        tokens: int64 [N, T].
        names: those that are wanted, by layer, see `wanted_by_rooms`.
        share: this process's number and how many share the windows; `Statistics.merge` adds their results up.
        step: called after every piece of AT_ONCE tokens that is read.
    Returns:
        the sums over this process's share.
    Cost: a forward pass, and for a moment of width W 2 · W² operations a token in fp64; 8 · W² bytes.
    """
    convert(model, Plan())
    layers = layers_of(model)
    statistics = Statistics.empty(layers, names)
    handles = statistics.listen(layers)
    number, processes = share
    try:
        for row in tokens[number::processes]:
            for piece in row.split(AT_ONCE):
                model.get_decoder()(input_ids=piece[None], use_cache=False)
                step()
    finally:
        for handle in handles:
            handle.remove()
    return statistics


class Library:
    """The statistics of a model, collected when the first plan that wants any is built.

    All layers in one pass where they fit into HALF of the memory there is, else in as many passes as it takes, of
    neighbouring layers, each when one of its layers is built; the sums are the same. Of the passes the last is held.

    Args:
        model: a transformers model; dense after a pass.
        windows: int64 [N, T]; the first TOKENS tokens of them are read.
        lever: of the workload, see `sentei.conversion.rooms`.
    Raises:
        ResourceError: on reading, where one layer's do not fit; nothing is allocated then.
    """

    def __init__(self, model: nn.Module, windows: torch.Tensor, lever: str):
        self.model, self.lever = model, lever
        self.windows = windows[:-(-TOKENS // windows.shape[1]), :TOKENS]
        self.statistics = Statistics(read=self._read)

    def __call__(self, plan: Plan) -> Statistics | None:
        """The statistics, or None for a plan that wants none."""
        return self.statistics if wanted(plan) else None

    def _read(self, layer: int) -> Statistics:
        """Those of the group of layers that this one is in."""
        names = wanted_by_rooms(self.model, list(WAYS), self.lever)
        sizes = {each.index: USED * bytes_of(each, names[each.index]) for each in layers_of(self.model)
                 if each.index in names}
        require_memory("calibration", max(sizes.values(), default=0), "the statistics of one layer")
        group = next((group for group in _groups(sizes, int(HALF * available_memory())) if layer in group), [])
        return calibrate(self.model, self.windows, {index: names[index] for index in group})


def _groups(sizes: dict[int, int], most: int) -> list[list[int]]:
    """The layers in order, in groups of at most so many bytes together, or of one layer."""
    groups, taken = [], 0
    for layer, size in sizes.items():
        if not groups or taken + size > most:
            groups.append([])
            taken = 0
        groups[-1].append(layer)
        taken += size
    return groups
