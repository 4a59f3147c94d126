"""What every option of every room costs and saves, in one currency: nats of quality and seconds of this machine.

The cost is what the workload's measure loses, in nats, with the option alone in the dense model: of a language model
the mean divergence KL(dense ‖ pruned) of the next token, e to the power of which is about the factor by which
perplexity grows; of an encoder −ln of the cosine of embeddings. The saving is by the clock, of one run of the workload.
Connections are not here: `sentei.budget.slack` tries their rules head by head.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from sentei.budget.judge import Judge, takes_attention
from sentei.budget.workload import Decode
from sentei.conversion.layers import Layer, layer_of, layers_of
from sentei.conversion.plan import Entry, Plan, convert, place
from sentei.conversion.rooms import WAYS
from sentei.conversion.statistics import Statistics
from sentei.measurement.quality import Measure

# Tokens that are read for the cost, and those of them, the last, on which the divergence is taken: it needs fewer than
# a difference of perplexities.
TOKENS, COMPARED = 192, 96
RUNS = 3
SPELL, TIMES = 0.2, 16  # seconds for which a layer is timed, or passes, whichever ends first
# Those whose work can be written to a file and read back.
ROOMS = tuple(room for room, way in WAYS.items() if way.stands == "in" and way.blank)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One option in one layer.

    Args:
        entry: what a plan would say.
        part: "attention" or "network".
        nats: what it costs alone; None, not measured, where it saves no more time than timing varies by.
        seconds: what it saves of one run of the workload; below zero where it is slower.
    """

    entry: Entry
    part: str
    nats: float | None
    seconds: float

    @property
    def pays(self) -> bool:
        """Whether it saves more time on this machine than timing varies by."""
        return self.nats is not None


def to_json(offers: list[Offer]) -> list[dict]:
    """The offers as a JSON array."""
    return [{**asdict(offer), "entry": offer.entry.to_json()} for offer in offers]


def from_json(value: list[dict]) -> list[Offer]:
    """The offers written by `to_json`."""
    return [Offer(**{**offer, "entry": Entry.from_json(offer["entry"])}) for offer in value]


def candidates(model: nn.Module, lever: str, rooms: tuple[str, ...] = ROOMS) -> list[tuple[Entry, str]]:
    """Every option that changes one part of one layer, with that part; those that keep everything are left out."""
    found = []
    for layer in layers_of(model):
        for room in rooms:
            for config in WAYS[room].options(layer, lever)[1:]:
                parts = WAYS[room].parts(config)
                if len(parts) == 1:
                    found.append((Entry(layer=layer.index, room=room, config=config), parts[0]))
    return found


def measure(judge: Judge, tokens: torch.Tensor, whole: Plan, rooms: tuple[str, ...] = ROOMS, *,
            step: Callable[[], object] = lambda: None) -> list[Offer]:
    """Tries every option of `rooms` in every layer.

    Args:
        judge: its model is dense afterwards; its workload is the one that is timed, on its window "calibrate".
        tokens: int64 [N, T], read up to TOKENS for the costs, of as many texts as the measure asks for; none that the
            rooms were calibrated on, which least squares fit better than others.
        whole: the plan against which options are timed, in which connections keep everything.
        step: called for every option.
    Returns:
        the offers, layer by layer.
    Cost: half a pass over TOKENS tokens an option that saves time, and for each distinct configuration and kind of
        layer a run of the whole workload where it decodes, RUNS of one layer where it reads a prompt; a reading.
    """
    entries = candidates(judge.model, judge.workload.lever, rooms)
    seen = next(filter(None, (judge.statistics(Plan((entry,))) for entry, _ in entries)), None)
    clock = _decoding_seconds if isinstance(judge.workload, Decode) else _prompt_seconds
    alike: dict[tuple, list[Entry]] = {}  # those that take as long: in layers of one kind
    for entry, _ in entries:
        alike.setdefault(_key(judge, entry), []).append(entry)
    seconds = clock(judge, alike, seen, whole)
    measure = judge.workload.measure
    ruler, offers = Ruler(judge.model, tokens[:measure.texts, :TOKENS], measure), []
    for entry, part in entries:
        (saved, varies), nats = seconds[_key(judge, entry)], None
        if saved > varies:
            place(judge.model, Plan((entry,)), seen)
            nats = ruler.nats(entry.layer)
        offers.append(Offer(entry=entry, part=part, nats=nats, seconds=saved))
        step()
    convert(judge.model, Plan())
    return offers


class Ruler:
    """How far a model has moved from the dense one on some texts, from any layer on.

    Args:
        model: dense.
        tokens: int64 [N, T].
        measure: by which it is told.
    Memory: the stream before each layer, [N, T, D], and the dense answers, e.g. log-probabilities [N, T, vocabulary].
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor, measure: Measure):
        self.model, self.measure, self.streams = model, measure, []
        layers = [layer.block for layer in layers_of(model)]
        handles = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in layers]
        try:
            self.dense = measure.answers(model, tokens, COMPARED)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, _, inputs: tuple, named: dict) -> None:
        self.streams.append(named["hidden_states"] if "hidden_states" in named else inputs[0])

    def nats(self, layer: int = 0) -> float:
        """What a model that is dense before `layer` has lost by now, in nats. Never below zero."""
        stream = self.streams[layer]
        with _beginning_at(self.model, layer, stream):
            found = self.measure.answers(self.model, None, COMPARED, inputs_embeds=stream)
        return self.measure.nats(self.dense, found)


@contextmanager
def _beginning_at(model: nn.Module, first: int, stream: torch.Tensor) -> Iterator[None]:
    """The layers before `first` do nothing, and it is given the stream, whatever stands before the layers."""
    *before, block = [layer.block for layer in layers_of(model)[:first + 1]]
    handle = block.register_forward_pre_hook(
        lambda _, inputs, named: ((), {**named, "hidden_states": stream}) if "hidden_states" in named
        else ((stream, *inputs[1:]), named), with_kwargs=True)
    try:
        for skipped in before:
            skipped.forward = lambda hidden_states, *inputs, **named: hidden_states
        yield
    finally:
        handle.remove()
        for skipped in before:
            vars(skipped).pop("forward", None)


Clocked = dict[tuple, tuple[float, float]]  # seconds that are saved in one layer, and what these vary by


def _key(judge: Judge, entry: Entry) -> tuple[str, object, str]:
    """What the time of an entry depends on: layers of one kind have one shape."""
    return entry.room, entry.config, layer_of(judge.model, entry.layer, ()).kind


def _decoding_seconds(judge: Judge, alike: dict[tuple, list[Entry]], seen: Statistics | None, whole: Plan) -> Clocked:
    """Saved in one layer: an option in every such layer that has it, against none, by the clock of the whole model.

    A layer on its own would be read from the processor's cache, which a whole model does not fit.
    """
    run = judge.run("calibrate")
    kept = [run.least(whole)]
    seconds = {key: run.least(_with(whole, entries)) for key, entries in alike.items()}
    kept += [run.least(whole), run.least(whole)]  # before and after all others
    convert(judge.model, Plan())
    return {key: ((min(kept) - seconds[key]) / len(entries), _variation(kept) / len(entries))
            for key, entries in alike.items()}


def _variation(taken: list[float]) -> float:
    """What seconds of the same work vary by: the least and the next. What comes late tells of others' work."""
    least, following, *_ = sorted(taken)
    return following - least


def _with(whole: Plan, entries: list[Entry]) -> Plan:
    """The plan with these entries; attention that is left out has no connections."""
    gone = {entry.layer for entry in entries if takes_attention(entry)}
    return Plan((*(entry for entry in whole.entries if entry.layer not in gone), *entries))


@torch.no_grad()
def _prompt_seconds(judge: Judge, alike: dict[tuple, list[Entry]], seen: Statistics | None, whole: Plan) -> Clocked:
    """Saved in one layer: the middle one, or the nearest that has the option, run on what a prompt gives it.

    In each of RUNS rounds, all options in turn and, once for them all, none.
    """
    layers = layers_of(judge.model)
    middle = len(layers) // 2
    chosen = {key: min(entries, key=lambda entry: abs(entry.layer - middle)) for key, entries in alike.items()}
    convert(judge.model, whole)
    inputs = _inputs_of(judge, [layers[number] for number in sorted({entry.layer for entry in chosen.values()})])

    def clock(number: int) -> float:
        positional, named = inputs[number]
        return _quickest(lambda block=layers[number].block: block(*positional, **named))

    kept, pruned = {number: [] for number in inputs}, {key: [] for key in chosen}
    for _ in range(RUNS):
        convert(judge.model, whole, seen)
        for number, taken in kept.items():
            taken.append(clock(number))
        for key, entry in chosen.items():
            convert(judge.model, _with(whole, [entry]), seen)
            pruned[key].append(clock(entry.layer))
    convert(judge.model, Plan())
    return {key: (min(kept[entry.layer]) - min(pruned[key]),
                  max(_variation(kept[entry.layer]), _variation(pruned[key]))) for key, entry in chosen.items()}


def _quickest(work: Callable[[], object]) -> float:
    """The least seconds that work takes, done for a SPELL: what else runs here only ever adds."""
    found: list[float] = []
    while sum(found) < SPELL and len(found) < TIMES:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _inputs_of(judge: Judge, layers: list[Layer]) -> dict[int, tuple[tuple, dict]]:
    """What layers are given, by number, when the model reads the first window "calibrate"."""
    found = {}

    def note(number: int) -> Callable:
        return lambda _, inputs, named: found.update({number: (inputs, named)})

    handles = [layer.block.register_forward_pre_hook(note(layer.index), with_kwargs=True) for layer in layers]
    try:
        judge.model.get_decoder()(input_ids=judge.windows["calibrate"][:1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
