"""Is the native attention faster than what a user could pick instead? Exact, block-sparse, and with the backward.

Every case is the same call for ours and for the peer: same tensors, dtype, threads and permitted pairs; for
FlexAttention also the same tiles, as its own BlockMask. Of bfloat16 tensors sdpa is timed as it is and with casts to
float32 and back, which a user would make where that is faster. Compilation is not timed. Both run in turn; a ratio is
the median over neighbouring pairs, peer ÷ ours. Before a case is timed its outputs are compared; on a difference
there is no ratio, but an error. A share of the blocks counts every block that is permitted: the diagonal and block 0
are in it, and the rest is drawn at random among those wholly in the past. A whole layer that chooses is timed beside
another's, see `sentei.benches.layers`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from sentei.benches import layers
from sentei.kernels.attention import Grid, Tiles, attend
from sentei.kernels.attention.flex import block_mask, compiled
from sentei.measurement.latency import LEAST, interleave, measured

BLOCK = 64
# Outputs of both are sums of some thousand products of unit normals: this is 20 times what fp32 kernels differ by here.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """One shape: what is attended to, and the share of the permitted blocks that is kept (1 is exact attention)."""

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

    @property
    def grid(self) -> Grid:
        """Square tiles of BLOCK."""
        return Grid(num_queries=self.tokens, num_keys=self.tokens, query_block=BLOCK, key_block=BLOCK,
                    causal=self.causal)

    @cached_property
    def tiles(self) -> Tiles:
        """The plan; every tile is named, also where all are kept."""
        return drawn(self.grid, self.groups, self.kept)

    @property
    def operations(self) -> int:
        """Floating-point operations of the forward: two products, two operations a multiply-add."""
        tiles = (self.tiles.full_count.sum() + self.tiles.partial_count.sum()).item() * self.heads // self.groups
        return 4 * tiles * BLOCK * BLOCK * self.width

    def ours(self) -> torch.Tensor:
        """sentei's own kernel, whatever `auto` would choose."""
        return attend(*self.tensors, self.tiles, impl="fused_cpp")


def drawn(grid: Grid, groups: int, share: float, device: str = "cpu") -> Tiles:
    """A plan of that share of the permitted tiles, drawn at random; partial ones and the first of a row always are."""
    permitted, full = (blocks(torch.device("cpu")) for blocks in (grid.permitted, grid.full))
    draw = torch.rand(1, groups, *permitted.shape[-2:], generator=torch.Generator().manual_seed(1))
    draw.masked_fill_(~full, 2.0)[..., 0] = 2.0  # before all others
    draw.masked_fill_(~permitted, -1.0)
    least = draw.flatten(2).topk(max(round(share * permitted.sum().item()), 1)).values[..., -1, None, None]
    return Tiles.from_mask((draw >= least).to(device), grid)


def sdpa(case: Case) -> torch.Tensor:
    """torch's dense kernel."""
    heads = (tensor.transpose(1, 2) for tensor in case.tensors)
    return scaled_dot_product_attention(*heads, is_causal=case.causal, enable_gqa=case.heads != case.groups).transpose(
        1, 2)


def sdpa_in_float32(case: Case) -> torch.Tensor:
    """The same on copies in float32, made in the call: faster where a processor has no bfloat16 arithmetic."""
    heads = (tensor.float().transpose(1, 2) for tensor in case.tensors)
    return scaled_dot_product_attention(*heads, is_causal=case.causal, enable_gqa=case.heads != case.groups).transpose(
        1, 2).to(case.dtype)


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
    "layer": layers.CASES,
}


def peers(case: Case | layers.Layer) -> dict[str, tuple[Callable[[], torch.Tensor], bool]]:
    """What else a user could call, by name: the call, and whether it computes the same numbers."""
    if isinstance(case, layers.Layer):
        return case.peers()
    found = {"torch sdpa": (partial(sdpa, case), case.kept == 1)}
    if case.dtype != torch.float32:
        found["torch sdpa, cast to float32"] = partial(sdpa_in_float32, case), case.kept == 1
    if case.kept < 1 and not case.backward:
        found["compiled FlexAttention"] = partial(flex, case, block_mask(case.tiles, case.heads)), True
    return found


def with_backward(call: Callable[[], torch.Tensor], case: Case) -> Callable[[], object]:
    """The call, and where the case says so the gradients of its sum of squares."""
    if not case.backward:
        return torch.no_grad()(call)
    return lambda: torch.autograd.grad(call().float().square().sum(), case.tensors)


def agree(ours: object, theirs: object, dtype: torch.dtype) -> None:
    """Raises AssertionError where outputs, or gradients, differ by more than TOLERANCE."""
    found, expected = (result if isinstance(result, tuple) else (result,) for result in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=TOLERANCE[dtype])


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case and peer, as it is measured: the keys of `sentei.benches.table`, and gflops.

    Args:
        names: of CASES.
        runs: timed pairs a row, or more until they took `LEAST` seconds.
        absent: told why a peer that cannot run here has no row.
    Raises:
        AssertionError: outputs or gradients differ by more than TOLERANCE; there is no ratio then.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    for case in (case for name in names for case in CASES[name]):
        torch.compiler.reset()  # it compiles FlexAttention for a few shapes only
        ours = with_backward(case.ours, case)
        for peer, (call, same) in peers(case).items():
            theirs = with_backward(call, case)
            try:
                result = theirs()
            except (BackendCompilerFailed, ModuleNotFoundError) as error:  # no C++ compiler, or no such package
                absent(f"{peer} cannot run here: {str(error).strip().splitlines()[0]}")
                continue
            if same:
                agree(ours(), result, case.dtype)
            yield measured("attention", str(case), peer, interleave(theirs, ours, runs=runs, least=LEAST),
                           operations=case.operations)
