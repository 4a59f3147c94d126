"""What each room has part in: the seconds that a plan saves, and the weights that are left."""

from torch import nn

from sentei.budget.proof import Proof
from sentei.conversion.layers import original_at, paths_of
from sentei.conversion.plan import Entry
from sentei.conversion.rooms import WAYS


def rooms_of(proof: Proof) -> dict[str, dict]:
    """The layers, seconds and share of every room of a proven plan; of the dense plan, nothing.

    What was measured is shared out as was foreseen: connections have what is left by the other rooms' seconds; where
    they have no part, the others have all.
    """
    dense, pruned = proof.comparison.seconds()
    saved, entries = dict(proof.candidate.saved), proof.candidate.plan.entries
    if any(entry.room == "connections" for entry in entries):
        saved["connections"] = dense - pruned - sum(saved.values())
    elif saved:
        scale = (dense - pruned) / max(sum(saved.values()), 1e-12)
        saved = {room: scale * seconds for room, seconds in saved.items()}
    return {room: {"layers": len({entry.layer for entry in entries if entry.room == room}), "seconds": seconds,
                   "share": seconds / (dense - pruned) if dense != pruned else 0.0}
            for room, seconds in sorted(saved.items())}


def kept_of(model: nn.Module, entry: Entry) -> float:
    """The share of the weights of the parts an entry concerns that is left in a model converted with it."""
    paths = [paths_of(model, entry.layer, part)[0] for part in WAYS[entry.room].parts(entry.config)]
    left, own = (sum(weight.numel() for module in modules for weight in module.parameters()) for modules in (
        [model.get_submodule(path) for path in paths], [original_at(model, path) for path in paths]))
    return left / own if own else 1.0
