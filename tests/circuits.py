"""Small models and circuits of them, for the tests of the circuit page; and what its text line should say."""

from functools import cache

import torch
from tiny import tiny_model

from sentei.axes import connections, depth, experts
from sentei.axes.experts.gates import Softmax
from sentei.circuit.agreement import kept_keys
from sentei.circuit.bits import Span, encode, pack, unpack
from sentei.circuit.capture import capture
from sentei.circuit.page import label
from sentei.circuit.recorder import Facts, Recorder
from sentei.circuit.run import Circuit, Run, Token
from sentei.conversion.plan import Plan, convert
from sentei.core.rules import Capacity, Mass, TopK
from sentei.core.selection import Selection
from sentei.core.trace_header import OBSERVED
from sentei.model import Config, Transformer
from sentei.model.slots import Routed

HOSTILE = ("</script><script>alert(1)</script>", "<!--<script>", "\u202eevil", "\x00", "x" * 10_000, "\ud800", "'\"`",
           "${alert(1)}", "javascript:alert(1)", "\u200b", "\u0301", "👩‍🚀", "\u2028", "", " ", "\n", "=1+1",
           "]]>", "&lt;")


def spelled(number: int) -> str:
    """A word for each number."""
    return f" w{number}"


def hostile(number: int) -> str:
    """A text out of HOSTILE for each number."""
    return HOSTILE[number % len(HOSTILE)]


def roomy(**changes) -> Transformer:
    """A model of every room that chooses token by token, whose blocks run some tokens only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(Config(**{
            "width": 32, "layers": 3, "heads": (4, 2), "feed_forward": Routed(
                neurons=64, room=experts.Config(rule=TopK(2), unit=16, gate=Softmax())),
            "connections": connections.Config(rule=Mass(0.6), tile=(1, 1), window=0),
            "depth": depth.Config(rule=Capacity(0.5)), **changes}))
        for block in model.blocks if model.config.depth else ():
            torch.nn.init.normal_(block.predictor.weight)
    return model.eval()


def tiled() -> torch.nn.Module:
    """A tiny Llama whose first two layers choose tiles of 4 by 4 tokens, and pages when it writes."""
    rooms = connections.Config(rule=TopK(2), tile=(4, 4), window=0, decode=TopK(1))
    return convert(tiny_model("llama"), Plan.everywhere([0, 1], "connections", rooms))


@cache
def observed(spell=spelled, lengths: tuple[int, int] = (9, 12)) -> Circuit:
    """Two prompts of a dense tiny Llama, with six tokens in common."""
    first = [*range(6), *range(40, 40 + lengths[0] - 6)]
    return capture(tiny_model("llama"), [first, [*range(6), *range(70, 70 + lengths[1] - 6)]], spell)


@cache
def controlled() -> Circuit:
    """Two prompts of a dense tiny Llama, and the control of the first, in which two tokens stand for one."""
    prompts = [[*range(6), 40, 41, 42], [*range(3), 70, *range(4, 6), 40, 41, 42], [*range(5), 77, 78, 40, 41, 42]]
    return capture(tiny_model("llama"), prompts, spelled)


@cache
def ran() -> Circuit:
    """A prompt of seven tokens and three written ones, of the model of every room."""
    return capture(roomy(), [list(range(7))], spelled, write=3)


def place(circuit: Circuit, number: int, layer: int, token: int) -> str:
    """How the page names a cell."""
    which = f"{'AB'[number]}, layer" if len(circuit.runs) > 1 else "Layer"
    return f"{which} {layer}, token {token} “{label(circuit.runs[number].tokens[token].text)}”"


def words(circuit: Circuit, number: int, layer: int, token: int) -> str:
    """What the text line should say of a cell, from the trace's own tensors."""
    run, is_observed = circuit.runs[number], circuit.kind == OBSERVED
    keeps, left = ("the mass lies in", "outside the mass") if is_observed else ("computed", "not computed")
    shape, depth_bits = run.layers[layer], run.get(layer, "depth.bits")
    ran_bits = 3 if depth_bits is None else int(depth_bits[token])
    seen = token + 1 if run.causal else len(run.tokens)
    parts = []
    if ran_bits & 1 or is_observed:
        kept = kept_keys(run, layer)[:, token, :seen]
        pairs = int(kept.sum()) * shape.heads // len(kept)
        parts.append(f"attention: {keeps} {pairs:,} of {seen * shape.heads:,} head-key pairs, "
                     f"{int(kept.any(0).sum()):,} of {seen:,} keys")
    groups, chosen = run.get(layer, "heads.bits"), run.get(layer, "experts.bits")
    if groups is not None:
        parts.append(f"KV heads: {keeps} {int(unpack(groups[token], shape.kv_heads).sum())} of {shape.kv_heads}")
    if chosen is not None and (ran_bits & 2 or is_observed):
        ids = [entry for entry in run.get(layer, "experts.ids")[token].tolist() if entry != 65535][:3]
        listed = ids if len(ids) < 2 else [", ".join(map(str, ids[:-1])) + f" and {ids[-1]}"]
        most = f", most in {listed[0]}" if ids else ""
        parts.append(f"feed-forward: {keeps} {int(unpack(chosen[token], shape.experts).sum())} of {shape.experts} "
                     f"{'neuron groups' if is_observed else 'experts'}{most}")
    if shape.rank:
        parts.append(f"rank: {int(run.get(layer, 'rank.kept')[token])} of {shape.rank} directions")
    skipped = [name for name, bit in (("attention", 1), ("feed-forward", 2)) if not ran_bits & bit]
    parts += [f"{' and '.join(skipped)} {left}"] if skipped else []
    done, dense = run.get(layer, "cost")[token].tolist()
    share = float(torch.tensor(done / dense, dtype=torch.float32)) if dense else 1.0
    parts.append(f"{int(share * 100 + 0.5)} % of the dense multiply-adds")
    return f"{place(circuit, number, layer, token)}: {'; '.join(parts)}."


def edge_words(circuit: Circuit, number: int, layer: int, token: int, head: int, key: int) -> str:
    """What the text line should say of one head and key of a cell."""
    run, is_observed = circuit.runs[number], circuit.kind == OBSERVED
    kept = kept_keys(run, layer)
    bits = run.get(layer, "depth.bits")
    state = "outside the mass" if is_observed else "not computed"
    chooser = head * len(kept) // run.layers[layer].heads
    if (is_observed or bits is None or int(bits[token]) & 1) and kept[chooser, token, key]:
        weight = edge_weight(run, layer, token, head, key)
        state = "kept, weight not among the strongest" if weight is None else f"kept, weight {weight:.3f}"
    return f"{place(circuit, number, layer, token)}, head {head}, key {key} “{label(run.tokens[key].text)}”: {state}."


def edge_weight(run: Run, layer: int, token: int, head: int, key: int) -> float | None:
    """The weight of a key where it is among the strongest; spans are walked one row after the other."""
    row, found = 0, None
    for span in run.spans(layer):
        if span.first <= token < span.first + span.queries:
            found = row + (token - span.first) // span.block, span.unit
        row += span.rows
    if found is None:
        return None
    chooser = head * run.layers[layer].choosers // run.layers[layer].heads
    ids = run.get(layer, "connections.ids")[chooser, found[0]].tolist()
    place_in = key // found[1]
    codes = run.get(layer, "connections.weights")[chooser, found[0]]
    return (int(codes[ids.index(place_in)]) / 255) ** 2 if place_in in ids else None


def large(tokens: int = 256, layers: int = 30, spell=spelled) -> Circuit:
    """Two observed prompts of random choices, of the shape of SmolLM2-135M: nothing in it can be squeezed."""
    random, runs = torch.Generator().manual_seed(0), []
    for number in range(2):
        recorder = Recorder(Facts(layers=layers, heads=9, kv_heads=3, pair=128,
                                  linear=((884_736, 2_654_208),) * layers))
        recorder.call(0, tokens)
        for layer in recorder.layers:
            seen = torch.ones(9, tokens, tokens, dtype=torch.bool).tril()
            keep = (torch.rand(seen.shape, generator=random) < 0.2) | torch.eye(tokens, dtype=torch.bool)
            chosen = Selection.from_mask(keep, seen).weigh(torch.rand(seen.shape, generator=random) ** 4)
            recorder.connect(layer, chosen, Span(first=0, queries=tokens, block=1, unit=1))
            groups = torch.rand(tokens, 16, generator=random)
            kept = Selection.from_mask(groups > 0.3, torch.ones_like(groups, dtype=torch.bool), unit=96)
            recorder.route(layer, kept.weigh(groups / groups.sum(-1, keepdim=True)), torch.arange(tokens))
            sizes, heads = torch.rand(tokens, 2, generator=random), torch.rand(tokens, 3, generator=random)
            layer.parts = {"depth.bits": (sizes > 0.3).long() @ torch.tensor([1, 2]), "depth.weights": encode(sizes),
                           "heads.bits": pack(heads > 0.1), "heads.weights": encode(heads)}
            layer.parts["depth.bits"] = layer.parts["depth.bits"].to(torch.uint8)
        ids = [*range(tokens // 3), *range(1000 * number, 1000 * number + tokens - tokens // 3)]
        words_of = tuple(Token(id=entry, text=spell(entry)) for entry in ids)
        runs.append(recorder.run(words_of, prompt=tokens, following=((" bat", 0.5), (" cat", 0.25))))
    return Circuit(kind=OBSERVED, model="random", rule="chance", runs=tuple(runs))
