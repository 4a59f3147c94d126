"""What each room has part in: the seconds that a plan saves, and the weights that are left."""

from torch import nn

from sentei.budget.proof import Proof
from sentei.conversion.layers import original_at, places_of
from sentei.conversion.plan import Entry
from sentei.conversion.rooms import WAYS
from sentei.core.rules import All, Threshold

# Under this name stands what keeping all saves: the same numbers, by native layers and exact attention.
NATIVE = "native"


def rooms_of(proof: Proof, whole: float) -> dict[str, dict]:
    """The layers, seconds and share of every room of a proven plan, and of native layers; of the dense plan, nothing.

    What was measured is shared out as was foreseen: connections have what is left by the others' seconds; where they
    drop nothing, the others have all.

    Args:
        whole: seconds with everything kept ÷ dense seconds, as measured before.
    """
    (dense, pruned), entries = proof.comparison.seconds(), proof.candidate.plan.entries
    if not entries:
        return {}
    total, choosing = dense - pruned, {entry.layer for entry in entries if _drops_connections(entry)}
    saved = {NATIVE: dense * (1 - whole), **proof.candidate.saved}
    if choosing:
        saved["connections"] = total - sum(saved.values())
    else:
        scale = total / (sum(saved.values()) or 1e-12)
        saved = {name: scale * seconds for name, seconds in saved.items()}
    layers = {name: {entry.layer for entry in entries if entry.room == name} for name in saved}
    layers |= {NATIVE: {entry.layer for entry in entries}, "connections": choosing}
    return {name: {"layers": len(layers[name]), "seconds": seconds, "share": seconds / total if total else 0.0}
            for name, seconds in sorted(saved.items())}


def _drops_connections(entry: Entry) -> bool:
    """Whether the entry prunes connections, of prompts or in decoding, and does not only hold what could."""
    return entry.room == "connections" and any(
        rule not in (All(), Threshold(0.0)) for rule in (entry.config.rule, entry.config.decode))


def kept_of(model: nn.Module, entry: Entry) -> float:
    """The share of the weights of the parts an entry concerns that is left in a model converted with it."""
    paths = [path for part in WAYS[entry.room].parts(entry.config) for path in places_of(model, entry.layer, part)]
    left, own = (sum(weight.numel() for module in modules for weight in module.parameters()) for modules in (
        [model.get_submodule(path) for path in paths], [original_at(model, path) for path in paths]))
    return left / own if own else 1.0
