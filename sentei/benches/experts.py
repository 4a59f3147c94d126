"""Are mixtures of experts faster than transformers' experts backends?

All contenders of a case run in turn, in one process, on the same numbers; a ratio is the median over turns of a peer's
seconds ÷ ours. Outputs, and where there is a backward the gradients, are compared before anything is timed. In the
cases of few tokens every call reads other experts, of one of many copies, and the experts read until one's turn comes
again are more than the caches hold; a native loop that reads as many bytes as the chosen experts have goes in turn with
the rest: the bandwidth is ours as a share of what it
reaches. Python is in every figure.

st-moe-pytorch, where it is installed, chooses by itself and drops tokens: it does another sum of the same size, with
its own router, and is no peer to be compared outputs with.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from sentei.benches import cold
from sentei.kernels.routing import Stack, route
from sentei.measurement.latency import Comparison, measured
from sentei.measurement.outcome import today

PEERS = ("eager", "grouped_mm", "batched_mm")
OTHER = "st-moe-pytorch, its own choice"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: E experts of width F, K of them a token, model width D."""

    experts: int
    inner: int
    top: int
    width: int
    tokens: int
    backward: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        return (f"{self.experts} × {self.inner}, top {self.top}, width {self.width}, {self.tokens:,} "
                f"token{'s' * (self.tokens > 1)}, {'forward and backward' if self.backward else 'forward'}, "
                f"{str(self.dtype).removeprefix('torch.')}")

    @property
    def kind(self) -> str:
        """Whether the tokens are few, as in decoding, or many."""
        return "few" if self.tokens <= 64 else "many"

    @property
    def bytes(self) -> int:
        """Of one expert."""
        return 3 * self.inner * self.width * self.dtype.itemsize

    @property
    def operations(self) -> int:
        """Of floating point, a multiplication and an addition counted apart."""
        return self.tokens * self.top * 6 * self.inner * self.width * (3 if self.backward else 1)


def cases() -> dict[str, list[Case]]:
    """Every case, by a name that says whether its tokens are few or many, and its dtype."""
    shapes = {"large": (8, 2048, 2, 512), "small": (16, 96, 4, 576), "fine": (64, 512, 6, 1024)}
    kinds = [("large", 4096, True), ("small", 4096, False), ("small", 4096, True), ("fine", 4096, False)]
    kinds += [(name, tokens, False) for name in shapes for tokens in (1, 16)]
    made = [Case(**dict(zip(("experts", "inner", "top", "width"), shapes[name], strict=True)), tokens=tokens,
                 backward=backward, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16) for name, tokens, backward in kinds]
    names = [f"experts-{case.kind}-{str(case.dtype).removeprefix('torch.')}" for case in made]
    return {name: [case for case, own in zip(made, names, strict=True) if own == name] for name in sorted(set(names))}


CASES = cases()


class Subject:
    """The modules of a case and one call of each contender."""

    def __init__(self, case: Case):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        generator = torch.Generator().manual_seed(0)
        config = MixtralConfig(hidden_size=case.width, intermediate_size=case.inner, num_local_experts=case.experts)
        self.ids = torch.rand(case.tokens, case.experts, generator=generator).topk(case.top).indices
        self.choices = [self.ids] if case.kind == "many" else list(others(self.ids, case.experts, generator))
        read = len(self.choices) * len(self.ids.unique()) * case.bytes
        self.modules = []
        for _ in range(1 if case.kind == "many" else max(2, -(-cold.size() // read))):
            module = MixtralExperts(config).to(case.dtype)
            with torch.no_grad():
                for weight in module.parameters():
                    weight.copy_(torch.randn(weight.shape, generator=generator) * case.width ** -0.5)
            self.modules.append(module.requires_grad_(case.backward))
        self.hidden = torch.randn(case.tokens, case.width, generator=generator).to(case.dtype)
        self.weights = torch.rand(case.tokens, case.top, generator=generator).to(case.dtype)
        self.gradient = torch.randn(case.tokens, case.width, generator=generator).to(case.dtype)
        self.leaves = [tensor.requires_grad_(case.backward) for tensor in (self.hidden, self.weights)]
        self.stacks = [self.stack(module) for module in self.modules]
        self.case = case

    @staticmethod
    def stack(module) -> Stack:
        """The module's weights as `route` reads them."""
        return Stack.from_joint(module.gate_up_proj, module.down_proj)

    @property
    def calls(self) -> int:
        """How many calls, from number 0 on, read something else each."""
        return len(self.modules) * len(self.choices)

    def ours(self, number: int = 0) -> torch.Tensor:
        """A call of sentei."""
        choice, copy = divmod(number, len(self.modules))
        stack = self.stack(self.modules[copy]) if self.case.backward else self.stacks[copy]
        return self.finish(route(self.hidden, self.choices[choice], self.weights, stack))

    def theirs(self, name: str, number: int = 0) -> torch.Tensor:
        """A call of transformers' backend with that name."""
        choice, copy = divmod(number, len(self.modules))
        module = self.modules[copy]
        module.config._experts_implementation = name
        return self.finish(module(self.hidden, self.choices[choice], self.weights))

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """The backward, if there is one, into fresh gradients."""
        if self.case.backward:
            for leaf in (*self.leaves, *self.modules[0].parameters()):
                leaf.grad = None
            output.backward(self.gradient)
        return output

    def contenders(self) -> dict[str, Callable[[int], object]]:
        """Ours and the peers, by name, each a call with a number."""
        named = {"ours": self.ours}
        for name in PEERS:
            if name == "batched_mm" and self.case.kind == "many":
                continue  # it copies the weights of every token's experts: hundreds of gigabytes
            named[name] = lambda number, name=name: self.theirs(name, number)
        if self.case.backward and self.case.dtype == torch.float32 and self.case.experts == 8:
            named |= {} if find_spec("st_moe_pytorch") is None else {OTHER: st_moe(self)}
        return named

    def check(self) -> None:
        """Raises AssertionError where ours differs from eager's by more than the rounding of its dtype."""
        results = []
        for output in (self.ours(), self.theirs("eager")):
            leaves = (*self.leaves, *self.modules[0].parameters()) if self.case.backward else ()
            results.append([output.detach(), *(leaf.grad.clone() for leaf in leaves)])
        for found, expected in zip(*results, strict=True):
            gap = (found.float() - expected.float()).norm() / expected.float().norm()
            assert gap < (1e-5 if self.case.dtype == torch.float32 else 0.02), f"{self.case}: differs by {gap:.2g}"


def others(ids: torch.Tensor, experts: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The choice ids [T, K] with other experts in the place of those chosen, as often as none comes twice."""
    chosen, places = ids.unique(return_inverse=True)
    for group in torch.randperm(experts, generator=generator).split(len(chosen)):
        if len(group) == len(chosen):
            yield group[places]


def st_moe(subject: Subject) -> Callable[[int], None]:
    """st-moe-pytorch's layer of the same size."""
    from st_moe_pytorch import MoE

    case = subject.case
    # Its gated experts have two thirds of so many times the width, which here are the neurons of ours.
    layer = MoE(dim=case.width, num_experts=case.experts, gating_top_n=case.top,
                expert_hidden_mult=1.5 * case.inner / case.width)
    assert layer.experts.experts[0].net[-1].in_features == case.inner

    def call(_: int) -> None:
        layer.zero_grad()
        layer(subject.hidden.detach()[None])[0].sum().backward()

    return call


def turns(subject: Subject, runs: int) -> dict[str, list[float]]:
    """Seconds a call, turn by turn, of each contender, and of reading the chosen experts where tokens are few."""
    case, named = subject.case, subject.contenders()
    each, seconds = subject.calls, {name: [] for name in named}
    floats = len(subject.ids.unique()) * case.bytes // 4 // 128 * 128
    if case.kind == "few":
        seconds["read"] = []
        memory = torch.ones(cold.size() // 4)
        named["read"] = lambda number: read(memory, number * floats % memory.numel() // 128 * 128, floats)
    for turn in range(runs + 1):
        for name in seconds if turn % 2 else reversed(seconds):
            start = time.perf_counter()
            for number in range(each):
                named[name](number)
            seconds[name] += [(time.perf_counter() - start) / each] if turn else []
    return seconds


def read(memory: torch.Tensor, at: int, count: int) -> None:
    """Reads `count` floats of memory, from `at` on and then from its beginning, with torch's number of threads."""
    while count > memory.numel() - at:
        read(memory, at, memory.numel() - at)
        at, count = 0, count - (memory.numel() - at)
    cold.read(memory[at:at + count])


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case and peer: the keys of `sentei.benches.table`, gflops, and bandwidth where tokens are few.

    Args:
        names: of CASES.
        runs: timed turns a row.
        absent: told of st-moe-pytorch, if it is not installed.
    Raises:
        AssertionError: outputs or gradients differ; there is no ratio then.
    """
    if "experts-many-float32" in names and find_spec("st_moe_pytorch") is None:
        absent("st-moe-pytorch is not installed")
    for case in (case for name in names for case in CASES[name]):
        with torch.set_grad_enabled(case.backward):
            subject = Subject(case)
            subject.check()
            seconds = turns(subject, runs)
        ours, bare = seconds.pop("ours"), seconds.pop("read", [])
        shares = [spent / own for spent, own in zip(bare, ours, strict=False)]
        besides = {"bandwidth": statistics.median(shares)} if shares else {}
        for peer, theirs in seconds.items():
            timed = Comparison(dense=theirs, pruned=ours, date=today())
            yield measured("rooms", str(case), peer, timed, operations=case.operations) | besides
