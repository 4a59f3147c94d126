"""Mixtures of experts: `route` through a stack against transformers' experts backends and two small packages.

All peers of a row run in turn, in one process, on the same numbers; a row's ratio is the median over turns of the best
peer's seconds ÷ ours, the best being the peer with the smallest median. Outputs, and where there is a backward the
gradients, are compared before anything is timed. In the rows of few tokens the weights are cycled through many copies,
so that none is in the cache, and a native loop that reads as many bytes as the chosen experts have goes in turn with
the rest: the bandwidth is ours as a share of what it reaches. Python is in every figure.

st-moe-pytorch and soft-moe-pytorch, where they are installed, choose by themselves and drop tokens; they do another
sum of the same size, forward and backward, with their own routers, so they are shown and never the best peer.
"""

import argparse
import ctypes
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.publish import table, write_result
from sentei.kernels import native
from sentei.kernels.routing import Stack, choose_impl, route
from sentei.measurement.outcome import environment

PEERS = ("eager", "grouped_mm", "batched_mm")
COLD = 256 << 20  # bytes of weights that are cycled through, many times the cache
READ = torch.ones(COLD // 4)
OTHERS = ("st_moe_pytorch", "soft_moe_pytorch")


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


def cases() -> list[Case]:
    """Every row."""
    shapes = {"large": (8, 2048, 2, 512), "small": (16, 96, 4, 576), "fine": (64, 512, 6, 1024)}
    kinds = [("large", 4096, True), ("small", 4096, False), ("small", 4096, True), ("fine", 4096, False)]
    kinds += [(name, tokens, False) for name in shapes for tokens in (1, 16)]
    return [Case(**dict(zip(("experts", "inner", "top", "width"), shapes[name], strict=True)), tokens=tokens,
                 backward=backward, dtype=dtype)
            for name, tokens, backward in kinds for dtype in (torch.float32, torch.bfloat16)]


class Subject:
    """The modules of a case and one call of each contender."""

    def __init__(self, case: Case):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        generator = torch.Generator().manual_seed(0)
        config = MixtralConfig(hidden_size=case.width, intermediate_size=case.inner, num_local_experts=case.experts)
        copies = 1 if case.kind == "many" else max(2, COLD // (case.bytes * case.experts))
        self.modules = []
        for _ in range(copies):
            module = MixtralExperts(config).to(case.dtype)
            with torch.no_grad():
                for weight in module.parameters():
                    weight.copy_(torch.randn(weight.shape, generator=generator) * case.width ** -0.5)
            self.modules.append(module.requires_grad_(case.backward))
        self.hidden = torch.randn(case.tokens, case.width, generator=generator).to(case.dtype)
        self.ids = torch.rand(case.tokens, case.experts, generator=generator).topk(case.top).indices
        self.weights = torch.rand(case.tokens, case.top, generator=generator).to(case.dtype)
        self.gradient = torch.randn(case.tokens, case.width, generator=generator).to(case.dtype)
        self.leaves = [tensor.requires_grad_(case.backward) for tensor in (self.hidden, self.weights)]
        self.stacks = [self.stack(module) for module in self.modules]
        self.case = case

    @staticmethod
    def stack(module) -> Stack:
        return Stack.from_joint(module.gate_up_proj, module.down_proj)

    def ours(self, number: int = 0) -> torch.Tensor:
        stack = self.stack(self.modules[number]) if self.case.backward else self.stacks[number]
        return self.finish(route(self.hidden, self.ids, self.weights, stack))

    def theirs(self, name: str, number: int = 0) -> torch.Tensor:
        module = self.modules[number]
        module.config._experts_implementation = name
        return self.finish(module(self.hidden, self.ids, self.weights))

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """The backward, if there is one, into fresh gradients."""
        if self.case.backward:
            for leaf in (*self.leaves, *self.modules[0].parameters()):
                leaf.grad = None
            output.backward(self.gradient)
        return output

    def contenders(self) -> dict[str, Callable[[int], object]]:
        """Ours and the peers, by name, each a call of the copy with a number."""
        named = {"ours": self.ours}
        for name in PEERS:
            if name == "batched_mm" and self.case.kind == "many":
                continue  # it copies the weights of every token's experts: hundreds of gigabytes
            named[name] = lambda number, name=name: self.theirs(name, number)
        if self.case.backward and self.case.dtype == torch.float32 and self.case.experts == 8:
            named |= {name: call for name in OTHERS if (call := other(name, self)) is not None}
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


def other(name: str, subject: Subject) -> Callable[[int], object] | None:
    """A package's own layer of the same size, if it is installed."""
    if importlib.util.find_spec(name) is None:
        return None
    case = subject.case
    if name == "st_moe_pytorch":
        from st_moe_pytorch import MoE

        layer = MoE(dim=case.width, num_experts=case.experts, gating_top_n=case.top, expert_hidden_mult=4)
    else:
        from soft_moe_pytorch import SoftMoE

        layer = SoftMoE(dim=case.width, seq_len=case.tokens, num_experts=case.experts)

    def call(_: int) -> None:
        layer.zero_grad()
        output = layer(subject.hidden.detach()[None])
        (output[0] if isinstance(output, tuple) else output).sum().backward()

    return call


def read(at: int, count: int) -> None:
    """Reads `count` floats of READ, from `at` on and then from its beginning, with torch's number of threads."""
    while count > READ.numel() - at:
        read(at, READ.numel() - at)
        at, count = 0, count - (READ.numel() - at)
    native.load().sentei_read(ctypes.c_void_p(READ.data_ptr() + 4 * at), ctypes.c_int64(count),
                              ctypes.byref(ctypes.c_float()), ctypes.c_int64(torch.get_num_threads()))


def turns(subject: Subject, runs: int) -> dict[str, list[float]]:
    """Seconds a call, turn by turn, of each contender, and of reading the chosen experts where tokens are few."""
    case, named = subject.case, subject.contenders()
    each, seconds = len(subject.modules), {name: [] for name in named}
    floats = len(subject.ids.unique()) * case.bytes // 4 // 128 * 128
    if each > 1:
        seconds["read"] = []
        named["read"] = lambda number: read(number * floats % READ.numel() // 128 * 128, floats)
    for turn in range(runs + 1):
        for name in seconds if turn % 2 else reversed(seconds):
            start = time.perf_counter()
            for number in range(each):
                named[name](number)
            seconds[name] += [(time.perf_counter() - start) / each] if turn else []
    return seconds


def row(case: Case, runs: int) -> dict:
    """What was measured of a case."""
    with torch.set_grad_enabled(case.backward):
        subject = Subject(case)
        subject.check()
        chosen = choose_impl("auto", subject.hidden, subject.ids, subject.weights, subject.stacks[0])
        seconds = turns(subject, runs)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    best = min((name for name in medians if name in PEERS), key=medians.get)
    ratios = [peer / ours for peer, ours in zip(seconds[best], seconds["ours"], strict=True)]
    shares = [bare / ours for bare, ours in zip(seconds.get("read", []), seconds["ours"], strict=False)]
    return {"bench": "experts", "case": str(case), "impl": chosen[0], "peer": best, "medians": medians,
            "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            "gflops": case.operations / medians["ours"] / 1e9,
            "bandwidth": statistics.median(shares) if shares else None, "machine": environment()["processor"]}


def main() -> None:
    """Measures every case and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed turns a row")
    parser.add_argument("--only", default="", help="rows with these words, as 'few' or 'many float32'")
    options = parser.parse_args()
    lines = []
    for case in cases():
        if not set(options.only.split()) <= set(str(case).replace(",", "").split()) | {case.kind}:
            continue
        found = row(case, options.runs)
        print(json.dumps(found), flush=True)
        medians = found["medians"]
        others = ", ".join(f"{name} {1e3 * spent:,.2f}" for name, spent in medians.items()
                           if name not in ("ours", "read", found["peer"]))
        lines.append([found["case"], found["impl"], f"{1e3 * medians['ours']:,.2f}",
                      f"{found['peer']} {1e3 * medians[found['peer']]:,.2f}",
                      f"**{found['ratio']:.2f}** ({found['low']:.2f} to {found['high']:.2f})",
                      f"{found['bandwidth']:.0%} of reading" if found["bandwidth"] else f"{found['gflops']:.0f}",
                      others])
    head = ["case", "ours", "ours ms", "best peer ms", "best peer ÷ ours", "GFLOP/s, or bandwidth", "the others, ms"]
    write_result("-".join(["experts", *options.only.split()]), __doc__, [table(head, lines)])


if __name__ == "__main__":
    main()
