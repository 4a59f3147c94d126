"""Where the slack is: for every layer and head, how little attention costs how much.

One dense pass over calibration text. In each layer every option is tried on the dense model's own queries, keys and
values: its density a head, the change of the layer's output, and the seconds it takes here. The error of head h is

    e_h = ‖W_o,h (o_h - õ_h)‖² / ‖x‖²

the change it makes in what the layer adds to the residual stream, against that stream.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from sentei.axes.connections import Config, Connections
from sentei.budget.workload import Workload
from sentei.conversion.layers import layer_of
from sentei.conversion.plan import Plan, convert
from sentei.conversion.rooms.connections import rules
from sentei.core.rules import Rule, rule_from_json
from sentei.core.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Option:
    """One rule in one layer.

    Args:
        rule: the same for every head.
        density: kept ÷ permitted tiles, a head.
        error: e_h, a head.
        seconds: of choosing and attending, the median over the calibration windows; of one token where decoded.
    """

    rule: Rule
    density: list[float]
    error: list[float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LayerSlack:
    """A layer's options, from the dearest to the cheapest; the first keeps everything."""

    layer: int
    options: list[Option]


def to_json(slack: list[LayerSlack]) -> list[dict]:
    """The slack as a JSON array."""
    return [{"layer": layer.layer, "options": [{**asdict(option), "rule": option.rule.to_json()}
                                               for option in layer.options]} for layer in slack]


def from_json(value: list[dict]) -> list[LayerSlack]:
    """The slack written by `to_json`."""
    return [LayerSlack(layer=layer["layer"],
                       options=[Option(**{**option, "rule": rule_from_json(option["rule"])})
                                for option in layer["options"]]) for layer in value]


def options(workload: Workload) -> list[Rule]:
    """The rules tried in every layer, the one that keeps everything first."""
    return rules(workload.lever)


def whole_plan(workload: Workload, layers: tuple[int, ...], config: Config) -> Plan:
    """The plan in which every layer keeps everything, the first of its options: all of it natively."""
    return Plan.everywhere(layers, "connections", replace(config, **{workload.lever: options(workload)[0]}))


@torch.no_grad()
def measure(
    model: nn.Module, workload: Workload, tokens: torch.Tensor, layers: tuple[int, ...], config: Config, *,
    rules: list[Rule], step: Callable[[], object] = lambda: None
) -> list[LayerSlack]:
    """Tries every rule in every layer of `layers`.

    Args:
        model: a transformers model; it is dense again afterwards.
        workload: says which field of the config the rules are for, and what is read of a window.
        tokens: int64 [N, T] calibration windows, read one by one.
        layers: the prunable ones.
        config: everything but the rule.
        rules: the one that keeps everything first.
        step: called after every layer of every window (N · len(layers) times).
    Cost: N passes, each with every rule's attention on top.
    """
    prefixes = [workload.prefix(model, row) for row in tokens]
    convert(model, Plan.everywhere(layers, "connections", replace(config, **{workload.lever: rules[0]})))
    found = {layer: [] for layer in layers}
    handles = []
    try:
        for layer in layers:
            own = layer_of(model, layer, ("attention",))
            probe = PROBES[workload.lever](own.member("o_proj"), config, rules, found[layer], step)
            handles.append(own.block.register_forward_pre_hook(probe.before, with_kwargs=True))
            handles.append(own.attention.connections.register_forward_pre_hook(probe))
        for row, prefix in zip(tokens, prefixes, strict=True):
            workload.sample(model, row, prefix)
    finally:
        for handle in handles:
            handle.remove()
        convert(model, Plan())
    return [LayerSlack(layer=layer, options=_average(rules, found[layer])) for layer in layers]


class _Probe:
    """Tries every rule on the inputs one layer's room receives, for a prompt."""

    def __init__(self, last: nn.Linear, config: Config, rules: list[Rule], found: list, step: Callable):
        self.last, self.config, self.rules, self.found, self.step = last, config, rules, found, step
        self.stream = 1.0

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Notes the size of the residual stream the layer is given, before any norm."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.stream = hidden.float().square().sum(-1).mean().item()

    def __call__(self, module: Connections, inputs: tuple) -> None:
        """Measures every rule; called before the room itself runs, dense."""
        measured, dense = [], None
        for rule in self.rules:
            selection, output, seconds = self.attempt(rule, module, inputs)
            dense = output if dense is None else dense
            kept = selection.count().double().mean(0).sum(-1) / selection.permitted.double().mean(0).sum(-1)
            per_head = output.shape[2] // len(kept)
            measured.append((kept.repeat_interleave(per_head), self._error(dense - output), seconds))
        self.found.append(measured)
        self.step()

    def attempt(self, rule: Rule, module: Connections, inputs: tuple) -> tuple[Selection, torch.Tensor, float]:
        """The choice, the output and the seconds of both."""
        room = Connections(replace(self.config, rule=rule), causal=module.causal, scale=module.scale)
        start = time.perf_counter()
        scores = room.score(*inputs)
        selection = rule(scores, forced=room.forced(*inputs), unit=room.unit)
        output = room.apply(selection, *inputs)
        return selection, output, time.perf_counter() - start

    def _error(self, change: torch.Tensor) -> torch.Tensor:
        """Float64 [H]: what the change [B, T, H, D] of each head adds to the stream, squared, against the stream."""
        weight = self.last.weight.unflatten(1, (change.shape[2], -1))
        moments = torch.einsum("bthd,bthe->hde", change, change).float() / (change.shape[0] * change.shape[1])
        gram = torch.einsum("ohd,ohe->hde", weight, weight).float()
        return ((moments * gram).sum((1, 2)) / self.stream).double()


class _PagesProbe(_Probe):
    """The same for rows that are decoded; the seconds are those of the last row alone.

    They are the least of RUNS: a call of a tenth of a millisecond that loses the processor to another process once
    takes a hundred times as long, and that is not what the rule costs.
    """

    RUNS = 9

    def attempt(self, rule, module, inputs):
        """As for a prompt."""
        room = Connections(replace(self.config, decode=rule), causal=module.causal, scale=module.scale)
        query, *others = inputs
        seconds = []
        for _ in range(self.RUNS):
            start = time.perf_counter()
            room(query[:, -1:], *others)
            seconds.append(time.perf_counter() - start)
        selection = room.select(room.score(*inputs), *inputs)
        return selection, room.apply(selection, *inputs), min(seconds)


PROBES = {"rule": _Probe, "decode": _PagesProbe}


def _average(rules: list[Rule], found: list) -> list[Option]:
    """The means over the windows, and the median seconds."""
    averaged = []
    for index, rule in enumerate(rules):
        densities, errors, seconds = zip(*(window[index] for window in found), strict=True)
        averaged.append(Option(rule=rule, density=torch.stack(densities).mean(0).tolist(),
                               error=torch.stack(errors).mean(0).tolist(), seconds=sorted(seconds)[len(seconds) // 2]))
    return averaged
