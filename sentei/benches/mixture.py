"""Is the whole layer, its router and its choice included, faster than transformers' block of the same weights?

The peer is the sparse block of Mixtral with each of its backends that can run; ours a `MixtureOfExperts` with the gate
Renormalised, in evaluation where tokens are few and in training where there is a backward. Outputs, and the gradient of
the input, are compared before anything is timed (in bfloat16 loosely: the block's router rounds too, and a near tie
then goes to another expert), and both run in turn on the same tokens: where these are few, on other ones each call, of
several copies of the layer, so that together they read more than the caches hold. What the kernel does alone, and how
near it is to the speed of memory, `experts` measures.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from sentei.axes.experts import Config, MixtureOfExperts
from sentei.axes.experts.gates import Renormalised
from sentei.benches import cold, experts
from sentei.benches.experts import PEERS, Case
from sentei.core.rules import TopK
from sentei.measurement.latency import LEAST, interleave, measured

INPUTS = 4  # of a layer, in turn
CASES = {name.replace("experts", "mixture"): cases for name, cases in experts.CASES.items()}


def pair(case: Case) -> tuple[MixtureOfExperts, nn.Module]:
    """Ours and the peer, of the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=case.width, intermediate_size=case.inner, num_local_experts=case.experts,
                           num_experts_per_tok=case.top)
    theirs = MixtralSparseMoeBlock(config)
    ours = MixtureOfExperts(Config(rule=TopK(case.top), gate=Renormalised(), unit=case.inner), width=case.width,
                            neurons=case.experts * case.inner)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=case.width ** -0.5)
        for mine, weight in ((ours.router.weight, theirs.gate.weight), (ours.up, theirs.experts.gate_up_proj),
                             (ours.down, theirs.experts.down_proj)):
            mine.copy_(weight)
    return tuple(layer.to(case.dtype).train(case.backward).requires_grad_(case.backward) for layer in (ours, theirs))


def step(layers: list[nn.Module], inputs: list[torch.Tensor], case: Case) -> Callable[[], list[torch.Tensor]]:
    """Calls of each layer on each input; the last answer, and the gradient of its input where there is a backward."""
    def call() -> list[torch.Tensor]:
        for layer in layers:
            for x in inputs:
                if case.backward:
                    layer.zero_grad()
                    x.grad = None
                output = layer(x)
                if case.backward:
                    output.square().sum().backward()
        return [output.detach(), *([x.grad] if case.backward else [])]
    return call


def implemented(layers: list[nn.Module], backend: str) -> list[nn.Module]:
    """The peers, set to one of transformers' backends."""
    for layer in layers:
        layer.experts.config._experts_implementation = backend
    return layers


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case and peer: the keys of `sentei.benches.table`, and gflops.

    Args:
        names: of CASES.
        runs: timed turns a row.
        absent: not used: transformers is always there.
    Raises:
        AssertionError: outputs or gradients differ; there is no ratio then.
    """
    for case in (case for name in names for case in CASES[name]):
        torch.manual_seed(0)
        few = case.kind == "few"
        whole = case.experts * case.bytes  # of which each call reads some
        copies = [pair(case) for _ in range(max(2, -(-cold.size() // whole)) if few else 1)]
        ours, theirs = ([layers[which] for layers in copies] for which in (0, 1))
        inputs = [torch.randn(1, case.tokens, case.width).to(case.dtype).requires_grad_(case.backward)
                  for _ in range(INPUTS if few else 1)]
        calls = len(copies) * len(inputs)
        with torch.set_grad_enabled(case.backward):
            mine = step(ours, inputs, case)
            for backend in PEERS if few else PEERS[:2]:
                peer = step(implemented(theirs, backend), inputs, case)
                for found, expected in zip(mine(), peer(), strict=True):
                    gap = (found.float() - expected.float()).norm() / expected.float().norm()
                    assert gap < (1e-5 if case.dtype == torch.float32 else 0.1), f"{case}: differs by {gap:.2g}"
                timed = interleave(peer, mine, runs=runs, least=LEAST if few else 0.0).per_call(calls, calls)
                yield measured("rooms", f"layer, {case}", f"block, {backend}", timed, operations=case.operations)
