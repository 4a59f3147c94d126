"""Are the GPU kernels right, and faster than what a user could pick instead? Everything on one GPU, under 8 minutes.

Run from the repository's root: python -m benchmarks.gpu_check

First correctness: output, lse and gradients of the Triton kernels, and of FlexAttention on the same plan, at the sizes
of models, against masked attention in fp64, whose error in the same dtype they may double. A case that fails makes the
run fail, and its kernel is not timed. Then times, from events on the GPU: both run in turn, the level-2 cache is
flushed before each run, a ratio is the median over neighbouring pairs, peer ÷ ours. Compilation is not timed. A share
of the blocks counts every one that is permitted; the diagonal and block 0 are always among them. What the time did not
suffice for is listed, with its reason.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_routing
from benchmarks.publish import table, write_result
from sentei.benches.attention import drawn
from sentei.core.errors import ResourceError, SenteiError
from sentei.kernels.attention import Grid, Tiles, attend

BUDGET = 440  # seconds; a case that would start later is skipped
BF16 = torch.bfloat16
GOALS = {"sparse": "at least 1.3 times compiled FlexAttention with the same plan at 12.5 %, from 16k tokens",
         "exact": "at least 0.9 times torch's flash attention"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: a causal text of one row, and the share of its permitted blocks that is kept (None: the dense plan).

    window and softcap: as in Grid and attend, 0 for none.
    """

    heads: int = 32
    groups: int = 8
    width: int = 128
    tokens: int = 16384
    dtype: torch.dtype = BF16
    kept: float | None = None
    block: int = 128
    window: int = 0
    softcap: float = 0.0
    backward: bool = False
    device: str = "cuda"

    def __str__(self) -> str:
        what = "exact" if self.kept is None else f"{100 * self.kept:g} % of the blocks of {self.block}"
        limits = [f", a window of {self.window:,}"] * bool(self.window) + [f", soft cap {self.softcap:g}"] * bool(
            self.softcap)
        return (f"{what}{''.join(limits)}, {self.heads}/{self.groups} x {self.width}, {self.tokens:,} tokens, "
                f"{str(self.dtype).removeprefix('torch.')}{', forward and backward' if self.backward else ''}")

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Query [1, T, H, D], key and value [1, T, G, D]."""
        generator = torch.Generator(self.device).manual_seed(0)
        return tuple(torch.randn(1, self.tokens, heads, self.width, generator=generator, device=self.device).to(
            self.dtype).requires_grad_(self.backward) for heads in (self.heads, self.groups, self.groups))

    @cached_property
    def tiles(self) -> Tiles:
        """The plan."""
        grid = Grid(num_queries=self.tokens, num_keys=self.tokens, query_block=self.block, key_block=self.block,
                    window=self.window or None)
        if self.kept is None:
            return Tiles(grid=grid)
        return drawn(grid, self.groups, self.kept, self.device)

    def operations(self) -> float:
        """Floating-point operations of the forward, two a multiply-add."""
        tiles = self.tiles.listed(1, self.groups, torch.device(self.device))
        kept = (tiles.full_count.sum() + tiles.partial_count.sum() / 2).item() * self.heads / self.groups
        return 4 * kept * self.block ** 2 * self.width

    def run(self, impl: str) -> Callable[[], object]:
        """The call, with its gradients where the case says so."""
        return self.whole(lambda: attend(*self.tensors, self.tiles, softcap=self.softcap, impl=impl))

    def sdpa(self) -> Callable[[], object]:
        """torch's dense kernel on the same tensors."""
        def call() -> torch.Tensor:
            heads = (tensor.transpose(1, 2) for tensor in self.tensors)
            return scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=self.heads != self.groups)

        return self.whole(call)

    def whole(self, call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        """The call alone without gradients, or with those of its sum."""
        if not self.backward:
            return torch.no_grad()(call)
        return lambda: torch.autograd.grad(call().sum(), self.tensors)


SMALL = Case(heads=9, groups=3, width=64, block=64)
SHAPES = [Case(), SMALL]
RIGHT = [replace(shape, tokens=1061, dtype=dtype, kept=kept, backward=True) for shape, dtype, kept in (
    (Case(), BF16, 0.3), (SMALL, BF16, 0.3), (Case(), BF16, None), (SMALL, BF16, None))]
ALSO_RIGHT = [replace(shape, tokens=1061, dtype=dtype, kept=kept, backward=True) for shape, dtype, kept in (
    (SMALL, torch.float32, 0.3), (Case(), torch.float32, None), (SMALL, torch.float16, 0.3),
    (Case(heads=4, groups=1, width=256, block=64), BF16, 0.3), (Case(heads=4, groups=4, width=80), BF16, 0.3),
    (Case(heads=4, groups=4, width=80), BF16, None))]
LIMITED = [replace(shape, tokens=1061, dtype=dtype, kept=kept, window=window, softcap=softcap, backward=True)
           for shape, dtype, kept, window, softcap in (
               (Case(), BF16, None, 300, 0), (Case(), BF16, 0.3, 300, 0), (SMALL, BF16, None, 0, 30),
               (SMALL, BF16, 0.3, 500, 30), (SMALL, torch.float32, None, 200, 2), (SMALL, BF16, None, 1, 0))]
TIMED = {
    "sparse": [replace(shape, tokens=tokens, kept=0.125) for tokens in (16384, 32768, 65536) for shape in SHAPES],
    "exact": [replace(shape, tokens=tokens) for tokens in (4096, 16384, 65536) for shape in SHAPES],
    "backward": [replace(shape, tokens=16384, kept=kept, backward=True) for kept in (0.125, None) for shape in SHAPES],
    "window": [replace(shape, tokens=tokens, window=4096, softcap=softcap) for tokens in (16384, 65536)
               for softcap in (0, 50) for shape in SHAPES[:1]],
}
LAUNCHES = [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 4, 4)]
DECODED = [replace(shape, tokens=tokens, kept=0.125, block=16) for tokens in (16384, 65536) for shape in SHAPES]
PEERS = {"sparse": ("FlexAttention", "sdpa"), "exact": ("sdpa",), "backward": ("FlexAttention", "sdpa"),
         "window": ("FlexAttention",)}


def masked(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, lse and the gradients of both, from every score and a mask, in the dtype."""
    query, key, value = leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in case.tensors]
    tiles = case.tiles.listed(1, case.groups, query.device)
    pairs = tiles.mask().repeat_interleave(case.block, 2).repeat_interleave(case.block, 3)
    pairs = pairs[..., :case.tokens, :case.tokens].tril()
    pairs = (pairs.triu(1 - case.window) if case.window else pairs).repeat_interleave(case.heads // case.groups, 1)
    key, value = (tensor.repeat_interleave(case.heads // case.groups, 2).transpose(1, 2) for tensor in (key, value))
    scores = query.transpose(1, 2) @ key.transpose(-1, -2) * case.width ** -0.5
    scores = case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores
    scores = scores.masked_fill(~pairs, -torch.inf)
    wide = torch.promote_types(dtype, torch.float32)
    output = (scores.softmax(-1, dtype=wide).to(dtype) @ value).transpose(1, 2)
    return derived(output, scores.to(wide).logsumexp(-1).transpose(1, 2), leaves)


def derived(output: torch.Tensor, lse: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, lse and the gradients of one fixed loss of both."""
    generator = torch.Generator(output.device).manual_seed(2)
    loss = sum((part * torch.randn(part.shape, generator=generator, device=part.device).to(part.dtype)).sum()
               for part in (output, lse))
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


RESULTS = "output", "lse", "dq", "dk", "dv"


def errors(got, plain, exact, names=RESULTS) -> dict[str, list[float]]:
    """For every result: its error against fp64, and what it may be: twice that of the same dtype, and 4 roundings."""
    found = {}
    for name, one, other, true in zip(names, got, plain, exact, strict=False):
        error, allowed = ((x.double() - true).abs().max().item() for x in (one, other))
        step = 4 * torch.finfo(one.dtype).eps * max(1.0, true.abs().max().item())
        found[name] = [error if one.isfinite().all() else float("inf"), 2 * allowed + step]
    return found


def correctness(case: Case, impl: str) -> dict:
    """One row: whether the implementation computes the case."""
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors]
    got = derived(*attend(*leaves, case.tiles, softcap=case.softcap, impl=impl, return_lse=True), leaves)
    found = errors(got, masked(case, case.dtype), masked(case, torch.float64))
    return {"check": "correctness", "case": str(case), "impl": impl, "errors": found,
            "right": all(error <= allowed for error, allowed in found.values())}


def mixture_correctness(case: gpu_routing.Mixture) -> dict:
    """One row: whether the experts' kernel computes the case."""
    found = errors(case.results("fused_triton", case.dtype), case.results("eager", case.dtype),
                   case.results("eager", torch.float64), gpu_routing.NAMES)
    return {"check": "correctness", "case": str(case), "impl": "route in Triton", "errors": found,
            "right": all(error <= allowed for error, allowed in found.values())}


def pages_of(case: Case) -> torch.Tensor:
    """Int32 [1, G, 1, slots]: pages drawn at random, the last one always there."""
    pages = -(-case.tokens // case.block)
    slots = max(1, round(case.kept * pages))
    draw = torch.rand(1, case.groups, 1, pages, generator=torch.Generator().manual_seed(3))
    draw[..., -1] = 2
    return draw.topk(slots, -1).indices.sort(-1).values.int().to(case.device)


def decode(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """One row after a cache: over its pages by us, and over the whole cache by torch."""
    from sentei.kernels.attention.triton_pages import attend_pages

    query, key, value = case.tensors[0][:, -1:], *case.tensors[1:]
    pages, heads = pages_of(case), tuple(tensor.transpose(1, 2) for tensor in (query, key, value))
    return (lambda: attend_pages(query, key, value, pages, page=case.block, scale=case.width ** -0.5),
            lambda: scaled_dot_product_attention(*heads, enable_gqa=case.heads != case.groups))


def decode_correctness(case: Case) -> dict:
    """One row: whether decoding over pages is right; the plan of one row of single queries says the same in fp64."""
    output, lse = decode(case)[0]()
    query, key, value = (tensor.double() for tensor in (case.tensors[0][:, -1:], *case.tensors[1:]))
    grid = Grid(num_queries=1, num_keys=case.tokens, query_block=1, key_block=case.block)
    keep = torch.zeros(1, case.groups, 1, grid.num_key_blocks, dtype=torch.bool, device=query.device)
    tiles = Tiles.from_mask(keep.scatter_(-1, pages_of(case).long(), True), grid)
    exact, plain = (attend(*(tensor.to(dtype) for tensor in (query, key, value)), tiles, impl="eager", return_lse=True)
                    for dtype in (torch.float64, case.dtype))
    found = errors([output, lse], plain, exact)
    return {"check": "correctness", "case": f"decode, {case}", "impl": "attend_pages", "errors": found,
            "right": all(error <= allowed for error, allowed in found.values())}


def flex(case: Case) -> Callable[[], object]:
    """torch's compiled block-sparse kernel on the same plan, made before."""
    from sentei.kernels.attention.flex import block_mask, capped, compiled

    tiles = case.tiles.listed(1, case.groups, torch.device(case.device))
    mask, run, score_mod = block_mask(tiles, case.heads), compiled(), capped(case.softcap)

    def call() -> torch.Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in case.tensors)
        return run(query, key, value, score_mod, mask, enable_gqa=case.heads != case.groups)

    return case.whole(call)


def milliseconds(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> list[tuple[float, float]]:
    """The time of both in turn, `runs` times, the first to go changing, the level-2 cache flushed before each."""
    gpu = torch.cuda.is_available()
    flush = torch.empty(1 << 26 if gpu else 1, dtype=torch.int32, device="cuda" if gpu else "cpu")

    def timed(call: Callable[[], object]) -> float:
        flush.zero_()
        if not gpu:
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    for call in (ours, theirs, ours, theirs):
        call()
    pairs = []
    for number in range(runs):
        if number % 2:
            peer = timed(theirs)
            pairs.append((timed(ours), peer))
        else:
            pairs.append((timed(ours), timed(theirs)))
    return pairs


def speed(case: Case | gpu_routing.Mixture, kind: str, peer: str, runs: int) -> dict:
    """One row: how long we and the peer take."""
    if kind == "decode":
        ours, theirs = decode(case)
    elif kind == "experts":
        ours, theirs = case.run("fused_triton"), case.theirs(peer)
    else:
        ours, theirs = case.run("fused_triton"), flex(case) if peer == "FlexAttention" else case.sdpa()
    pairs = milliseconds(ours, theirs, runs)
    ratios = [peer_ms / own for own, peer_ms in pairs]
    own = statistics.median(own for own, _ in pairs)
    return {"check": "speed", "kind": kind, "case": str(case), "peer": peer, "ours_ms": own,
            "peer_ms": statistics.median(peer_ms for _, peer_ms in pairs), "ratio": statistics.median(ratios),
            "low": min(ratios), "high": max(ratios),
            "tflops": case.operations() / own / 1e9 if kind in ("sparse", "exact", "experts") else None}


def tuned(case: Case, runs: int) -> Iterator[dict]:
    """The forward as it is started, against other ways to start it."""
    from sentei.kernels.attention import triton_tiles

    tiles, given = case.tiles, tuple(tensor.detach() for tensor in case.tensors)
    plan = [] if tiles.is_everything else [getattr(tiles, name) for name in triton_tiles.PLAN]
    usual = triton_tiles.launch("forward", given[0], given[2])
    others = [triton_tiles.Launch(*start) for start in LAUNCHES if start != usual]
    calls = {start: lambda start=start: triton_tiles.forward(given, plan, tiles.grid, case.width ** -0.5, 0.0, start)
             for start in (usual, *others)}
    for other in others:
        pairs = milliseconds(calls[usual], calls[other], runs)
        yield {"check": "launch", "case": str(case), "usual": tuple(usual), "other": tuple(other),
               "ratio": statistics.median(theirs / own for own, theirs in pairs)}


def jobs(runs: int) -> Iterator[tuple[str, str, Callable[[], dict]]]:
    """What is to be done, the most telling first: its name, the kernel it is about, and the call that gives its row.

    Each call has a case of its own, whose tensors are gone with it.
    """
    for case in (*RIGHT, *LIMITED):
        yield f"correctness of {case}", "fused_triton", lambda case=case: correctness(replace(case), "fused_triton")
    for case in DECODED:
        yield f"correctness of decode, {case}", "decode", lambda case=case: decode_correctness(replace(case))
    for case in gpu_routing.RIGHT:
        yield f"correctness of {case}", "experts", lambda case=case: mixture_correctness(replace(case))
    for kind, cases in TIMED.items():
        for case in cases:
            for peer in PEERS[kind]:
                if case.kept is not None or case.window or peer != "FlexAttention":
                    yield (f"{kind} against {peer}: {case}", "fused_triton",
                           lambda case=case, kind=kind, peer=peer: speed(replace(case), kind, peer, runs))
    for case in DECODED:
        yield f"decode: {case}", "decode", lambda case=case: speed(replace(case), "decode", "sdpa, whole cache", runs)
    for case in gpu_routing.TIMED:
        for peer in gpu_routing.PEERS:
            yield (f"experts against {peer}: {case}", "experts",
                   lambda case=case, peer=peer: speed(replace(case), "experts", peer, runs))
    for case in (*RIGHT[:2], LIMITED[3]):
        yield f"correctness of FlexAttention, {case}", "flex", lambda case=case: correctness(replace(case), "flex")
    for case in ALSO_RIGHT:
        yield f"correctness of {case}", "fused_triton", lambda case=case: correctness(replace(case), "fused_triton")


def perform(todo, until: float, clock: Callable[[], float] = time.monotonic) -> tuple[list[dict], list[str]]:
    """The rows of the jobs, printed as they come, and the jobs that were not done with their reasons.

    Args:
        todo: as `jobs` gives them; a job whose kernel was wrong before is not done.
        until: on the clock; no job starts later.
    """
    rows, skipped, wrong = [], [], set()
    for name, kernel, call in todo:
        if clock() > until or kernel in wrong:
            skipped.append(f"{name}: {'no time was left' if kernel not in wrong else f'{kernel} is wrong'}")
            continue
        try:
            row = call()
        except (SenteiError, torch.OutOfMemoryError) as error:
            skipped.append(f"{name}: {error}")
            continue
        finally:
            torch.compiler.reset()  # it compiles FlexAttention for a few shapes only
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)
        rows.append(row)
        if not row.get("right", True):
            wrong.add(kernel)
    return rows, skipped


def page(rows: list[dict], skipped: list[str]) -> list[str]:
    """The parts of the written result."""
    checks = [[row["case"], row["impl"], "right" if row["right"] else "**wrong**", ", ".join(
        f"{name} {error:.2g} of {allowed:.2g}" for name, (error, allowed) in row["errors"].items())]
        for row in rows if row["check"] == "correctness"]
    parts = [table(["case", "kernel", "", "error of what it may be"], checks)]
    for kind in (*PEERS, "decode", "experts"):
        times = [[row["case"], row["peer"], f"{row['ours_ms']:.3f}", f"{row['peer_ms']:.3f}",
                  f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})",
                  "" if row["tflops"] is None else f"{row['tflops']:.0f}"]
                 for row in rows if row["check"] == "speed" and row["kind"] == kind]
        goal = f" Goal on an H100: {GOALS[kind]}." if kind in GOALS else ""
        head = ["case", "peer", "ours ms", "peer ms", "peer ÷ ours", "our TFLOP/s"]
        parts += [f"## {kind}{goal}", table(head, times)] if times else []
    return parts + (["Not done:\n\n" + "\n".join(f"- {line}" for line in skipped)] if skipped else [])


def main() -> int:
    """Checks and times everything and writes the page; 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed pairs a row")
    parser.add_argument("--tune", action="store_true", help="instead: other ways to start the forward")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        error = ResourceError("gpu_check", expected="a GPU that torch can use", got="none",
                              do="run it on a machine with one, with a torch built for it")
        print(error.lines(), file=sys.stderr)
        return error.exit_code
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.tune:
        for case in (replace(shape, kept=kept) for shape in SHAPES for kept in (0.125, None)):
            for row in tuned(case, arguments.runs):
                print(json.dumps(row), flush=True)
        return 0
    rows, skipped = perform(jobs(arguments.runs), time.monotonic() + BUDGET)
    import triton

    device = torch.cuda.get_device_name()
    facts = f"{device}, CUDA {torch.version.cuda}, triton {triton.__version__}."
    write_result(re.sub(r"[^a-z0-9]+", "-", f"gpu-{device}".lower()), __doc__, [facts, *page(rows, skipped)])
    return int(not all(row.get("right", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
