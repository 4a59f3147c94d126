"""All that a trace and the weights tell of the experts of a model, in one call.

    with trace(model) as records:
        model(tokens)
    for path, found in diagnose(model, records, {"domain": [domains], "vocabulary": [tokens]}).items(): ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from sentei.axes.experts import Experts
from sentei.core.tracing import Trace
from sentei.geometry.subspaces import Comparison, alignments, compare, overlaps
from sentei.kernels.routing.stack import ACTIVATIONS
from sentei.measurement.specialisation import Load, Specialisation, coactivation, loads, specialisation

PROBES = 256  # tokens of which experts' answers are compared


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """What one layer's experts do, and how alike they are.

    Args:
        load: entropy, variation, violation, dead experts with their bounds, and the router's confidence.
        together: [E, E], see `coactivation`.
        labels: by name, what the experts have to do with the labels.
        weights: principal angles between experts, as the overlap of their subspaces, beside the null models; None of
            one expert, or where a layer's weights are not beside its room.
        answers: linear CKA of the experts' answers to PROBES tokens drawn from a normal distribution, beside the same.
    """

    load: Load
    together: torch.Tensor
    labels: dict[str, Specialisation]
    weights: Comparison | None
    answers: Comparison | None


def diagnose(model: nn.Module, records: Trace, labels: Mapping[str, Sequence[torch.Tensor]] | None = None, *,
             draws: int = 20, seed: int = 0) -> dict[str, Diagnosis]:
    """Every diagnostic of every layer of experts in a trace of `model`, by the room's path.

    Args:
        labels: by name, e.g. "domain" or "vocabulary": one tensor a call of the model, see `specialisation`.
        draws: of each null model of likeness.
        seed: of the draws, the tokens and the shuffled labels.
    Raises:
        ShapeError: labels that do not fit the calls.
    Cost: 1 + 2 · draws times the singular values of each expert's neurons, in fp64.
    """
    found = {}
    for path, load in loads(records).items():
        own = records.at(path)
        weights, answers = _likeness(model, path, draws, seed)
        found[path] = Diagnosis(
            load=load, together=coactivation(own), weights=weights, answers=answers,
            labels={name: specialisation(own, given, seed=seed) for name, given in (labels or {}).items()})
    return found


@torch.no_grad()
def _likeness(model: nn.Module, path: str, draws: int, seed: int) -> tuple[Comparison | None, Comparison | None]:
    """Of the experts of the room at `path`, whose layer holds their weights: by weights, and by answers."""
    room, layer = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    up, down = getattr(layer, "up", None), getattr(layer, "down", None)
    if not isinstance(room, Experts) or not isinstance(up, torch.Tensor) or room.num_experts < 2:
        return None, None
    stack = room.stack(up.float(), down.float())
    neurons = torch.cat([*([] if stack.gate is None else [stack.gate]), stack.up, stack.down.mT], -1)
    x = torch.randn(PROBES, stack.up.shape[2], generator=torch.Generator().manual_seed(seed)).to(up.device)
    answers = partial(_answers, x, room.activation, stack.gate is not None)
    return (compare(neurons, overlaps, draws=draws, seed=seed),
            compare(neurons, lambda own: alignments(answers(own)), draws=draws, seed=seed))


def _answers(x: torch.Tensor, activation: str, gated: bool, neurons: torch.Tensor) -> torch.Tensor:
    """What experts of neurons [E, F, (gate, up and down) · D] answer to x [N, D]: [E, N, D]."""
    *firsts, down = neurons.split([x.shape[1]] * (1 + gated) + [neurons.shape[-1] - (1 + gated) * x.shape[1]], -1)
    products = [x @ first.mT for first in firsts]
    acts = ACTIVATIONS[activation](products[0])
    return (acts * products[1] if gated else acts) @ down
