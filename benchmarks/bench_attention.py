"""Is the native attention faster than what a user could pick instead? Exact, block-sparse, and with the backward.

Run from the repository's root: python -m benchmarks.bench_attention

Every case is the same call for ours and for the peer: same tensors, dtype, threads and permitted pairs; for
FlexAttention also the same tiles, as its own BlockMask. Compilation is not timed. Both run in turn; a ratio is the
median over neighbouring pairs, peer ÷ ours. Before a case is timed its outputs are compared; on a difference there is
no ratio, but an error. A share of the blocks is drawn at random among those wholly in the past; the diagonal and block
0 are always there.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.publish import table, write_result
from sentei.kernels.attention import Grid, Tiles, attend
from sentei.kernels.attention.flex import block_mask, compiled
from sentei.measurement.latency import interleave
from sentei.measurement.outcome import environment

BLOCK = 64
# Outputs of both are sums of some thousand products of unit normals: this is 20 times what fp32 kernels differ by here.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """One shape: what is attended to, and the share of the past blocks that is kept (1 is exact attention)."""

    heads: int
    groups: int
    width: int
    tokens: int
    dtype: torch.dtype = torch.float32
    causal: bool = True
    kept: float = 1.0
    backward: bool = False

    def __str__(self) -> str:
        what = "exact" if self.kept == 1 else f"{100 * self.kept:g} % of the blocks"
        return (f"{what}, {self.heads}/{self.groups} x {self.width}, {self.tokens:,} tokens, "
                f"{str(self.dtype).removeprefix('torch.')}{'' if self.causal else ', bidirectional'}"
                f"{', forward and backward' if self.backward else ''}")

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Query [1, T, H, D], key and value [1, T, G, D]."""
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(1, self.tokens, heads, self.width, generator=generator).to(self.dtype).requires_grad_(
            self.backward) for heads in (self.heads, self.groups, self.groups))

    @cached_property
    def tiles(self) -> Tiles:
        """The plan; every tile is named, also where all are kept."""
        grid = Grid(num_queries=self.tokens, num_keys=self.tokens, query_block=BLOCK, key_block=BLOCK,
                    causal=self.causal)
        draw = torch.rand(1, self.groups, grid.num_query_blocks, grid.num_key_blocks,
                          generator=torch.Generator().manual_seed(1)) < self.kept
        draw[..., 0] = True
        return Tiles.from_mask(draw | ~grid.full(draw.device), grid)

    @property
    def operations(self) -> int:
        """Floating-point operations of the forward: two products, two operations a multiply-add."""
        tiles = (self.tiles.full_count.sum() + self.tiles.partial_count.sum()).item() * self.heads // self.groups
        return 4 * tiles * BLOCK * BLOCK * self.width

    def ours(self) -> torch.Tensor:
        """sentei's own kernel, whatever `auto` would choose."""
        return attend(*self.tensors, self.tiles, impl="fused_cpp")


def sdpa(case: Case) -> torch.Tensor:
    """torch's dense kernel."""
    heads = (tensor.transpose(1, 2) for tensor in case.tensors)
    return scaled_dot_product_attention(*heads, is_causal=case.causal, enable_gqa=case.heads != case.groups).transpose(
        1, 2)


def flex(case: Case, mask) -> torch.Tensor:
    """torch's compiled block-sparse kernel on the same tiles."""
    query, key, value = (tensor.transpose(1, 2) for tensor in case.tensors)
    return compiled()(query, key, value, block_mask=mask, enable_gqa=case.heads != case.groups).transpose(1, 2)


BF16 = torch.bfloat16
SHAPES = [Case(9, 3, 64, 8448), Case(32, 8, 128, 4096), Case(14, 2, 64, 4096), Case(4, 1, 256, 4096),
          Case(12, 12, 32, 512, causal=False)]
CASES = {
    "exact": [*SHAPES, *(replace(case, dtype=BF16) for case in SHAPES)],
    "sparse": [Case(9, 3, 64, 8448, dtype, kept=kept) for dtype in (torch.float32, BF16)
               for kept in (0.5, 0.25, 0.125)],
    "backward": [Case(9, 3, 64, 4096, kept=kept, backward=True) for kept in (1.0, 0.125)],
}


def peers(case: Case, name: str) -> Iterator[tuple[str, Callable[[], torch.Tensor], bool]]:
    """What else a user could call: its name, the call, and whether it computes the same numbers."""
    yield "torch sdpa", partial(sdpa, case), case.kept == 1
    if name == "sparse":
        yield "compiled FlexAttention", partial(flex, case, block_mask(case.tiles, case.heads)), True


def with_backward(call: Callable[[], torch.Tensor], case: Case) -> Callable[[], object]:
    """The call, and where the case says so the gradients of its sum of squares."""
    if not case.backward:
        return torch.no_grad()(call)
    return lambda: torch.autograd.grad(call().float().square().sum(), case.tensors)


def rows(names: list[str], runs: int) -> Iterator[dict]:
    """One row for every case and peer.

    Raises:
        AssertionError: outputs or gradients differ by more than TOLERANCE.
    """
    machine = environment()
    for name in names:
        for case in CASES[name]:
            torch.compiler.reset()  # it compiles FlexAttention for a few shapes only
            ours = with_backward(case.ours, case)
            for peer, call, same in peers(case, name):
                theirs = with_backward(call, case)
                if same:
                    found, expected = (result if isinstance(result, tuple) else (result,)
                                       for result in (ours(), theirs()))
                    for one, other in zip(found, expected, strict=True):
                        torch.testing.assert_close(one, other, rtol=0.02, atol=TOLERANCE[case.dtype])
                timed = interleave(theirs, ours, runs=runs)
                peer_s, ours_s = timed.seconds()
                ratios = timed.ratios()
                yield {"bench": "attention", "case": str(case), "peer": peer, "ours_s": ours_s, "peer_s": peer_s,
                       "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
                       "gflops": case.operations / ours_s / 1e9, "machine": machine["processor"]}


def main() -> None:
    """Measures the cases asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"which of {', '.join(CASES)}; all")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs a row")
    arguments = parser.parse_args()
    lines = []
    for row in rows(arguments.cases, arguments.runs):
        print(json.dumps(row), flush=True)
        lines.append([row["case"], row["peer"], f"{1000 * row['ours_s']:,.1f}", f"{1000 * row['peer_s']:,.1f}",
                      f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})", f"{row['gflops']:.0f}"])
    head = ["case", "peer", "ours ms", "peer ms", "peer ÷ ours", "our forward GFLOP/s"]
    write_result("attention", __doc__, [table(head, lines)])


if __name__ == "__main__":
    main()
