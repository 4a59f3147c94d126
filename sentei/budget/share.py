"""What each room has part in: the seconds that a plan saves, and the weights that are left or used."""

from dataclasses import dataclass

from torch import nn

from sentei.budget.judge import Judgement
from sentei.budget.proof import Proof
from sentei.budget.solver import mean
from sentei.conversion.layers import layer_of, original_at, places_of
from sentei.conversion.plan import Entry
from sentei.conversion.rooms import WAYS
from sentei.core.rules import All, Threshold, TopK

# Under these names stand what keeping all saves, the same numbers by native layers and exact attention; and what was
# measured beyond what was foreseen, or short of it, which is no room's doing.
NATIVE, UNFORESEEN = "native", "unforeseen"


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """Seconds of one run of the workload as told before the proof: dense, with all kept, and with the plan."""

    dense: float
    whole: float
    plan: float


def rooms_of(proof: Proof, foreseen: Foreseen) -> dict[str, dict]:
    """The layers, seconds and share of every room of a proven plan; of the dense plan, nothing.

    Each has what it was foreseen to save, in seconds of the proof (a machine is not as fast every hour: all are scaled
    by the two dense times); what the measured saving differs by stands under UNFORESEEN, below zero where it is less.
    Shares are of the measured saving; together they are 1.
    """
    (dense, pruned), entries = proof.comparison.seconds(), proof.candidate.plan.entries
    if not entries:
        return {}
    total, choosing = dense - pruned, {entry.layer for entry in entries if drops_connections(entry)}
    saved = {NATIVE: foreseen.dense - foreseen.whole, **proof.candidate.saved}
    if choosing:
        saved["connections"] = foreseen.dense - foreseen.plan - sum(saved.values())
    saved = {name: seconds * dense / foreseen.dense for name, seconds in saved.items()}
    saved[UNFORESEEN] = total - sum(saved.values())
    layers = {name: {entry.layer for entry in entries if entry.room == name} for name in saved}
    layers |= {NATIVE: {entry.layer for entry in entries}, "connections": choosing}
    return {name: {"layers": len(layers[name]), "seconds": seconds, "share": seconds / total if total else 0.0}
            for name, seconds in sorted(saved.items())}


def drops_connections(entry: Entry) -> bool:
    """Whether the entry prunes connections, of prompts or in decoding, and does not only hold what could."""
    return entry.room == "connections" and any(
        rule not in (All(), Threshold(0.0)) for rule in (entry.config.rule, entry.config.decode))


def kept_of(model: nn.Module, entry: Entry, judged: Judgement) -> float:
    """What is left of an entry's candidates: of connections those kept, as judged; of the weights of a part the share.

    Of experts the share of its neurons that a token computes; of a mixture's own, those it was judged to keep.
    """
    if entry.room == "connections":
        return mean(judged.density[entry.layer])
    if entry.room == "experts" and entry.layer in judged.experts:
        return judged.experts[entry.layer]
    if entry.room == "experts" and isinstance(entry.config.rule, TopK):
        neurons = layer_of(model, entry.layer, ()).member("down_proj").in_features
        return min(1.0, (entry.config.rule.k + entry.config.shared) * entry.config.unit / neurons)
    paths = [path for part in WAYS[entry.room].parts(entry.config) for path in places_of(model, entry.layer, part)]
    left, own = (sum(weight.numel() for module in modules for weight in module.parameters()) for modules in (
        [model.get_submodule(path) for path in paths], [original_at(model, path) for path in paths]))
    return left / own if own else 1.0
