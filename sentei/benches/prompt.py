"""What a layer is made of besides attention, for a prompt's many rows: sentei's native calls against transformers'.

The sizes are SmolLM2's: 576 wide, 1,536 between the layers of its MLP, 9 query and 3 key/value heads of 64. Peers are
transformers' own modules for Llama, and torch for a linear layer alone; of attention only what comes before it. Before
a case is timed the outputs are compared. Products of bfloat16 are made in float32 by ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from sentei.kernels.linear import linear
from sentei.kernels.linear import rows as native
from sentei.measurement.latency import interleave, measured

WIDTH, HIDDEN, HEADS, GROUPS, HEAD = 576, 1536, 9, 3, 64
DIFFER = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the largest number: torch rounds at every step


@dataclass(frozen=True)
class Case:
    """One layer, so many rows, and a dtype."""

    layer: str
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.layer}, {self.rows:,} rows, {str(self.dtype).removeprefix('torch.')}"

    def ways(self) -> "Ways":
        """What is timed, of the same weights every time."""
        torch.manual_seed(0)
        return LAYERS[self.layer](torch.randn(1, self.rows, WIDTH).to(self.dtype))


# The peer's call, ours, and the floating-point operations of each, where they are counted.
Ways = tuple[Callable[[], object], Callable[[], object], float | None]


def layer(outputs: int, width: int, dtype: torch.dtype) -> nn.Linear:
    """Weights without a bias."""
    return nn.Linear(width, outputs, bias=False).to(dtype)


def product(x: torch.Tensor, outputs: int = HIDDEN, width: int = WIDTH) -> Ways:
    """A linear layer."""
    own = layer(outputs, width, x.dtype)
    if width != WIDTH:
        x = torch.randn(*x.shape[:-1], width).to(x.dtype)
    return partial(own, x), partial(linear, x, own.weight, impl="fused_cpp"), 2.0 * x.numel() * outputs


def gated(x: torch.Tensor) -> Ways:
    """A gated MLP."""
    gate, up, down = (layer(*shape, x.dtype) for shape in ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)))
    layers = [(part.weight, None) for part in (gate, up, down)]
    return lambda: down(nn.functional.silu(gate(x)) * up(x)), partial(native.gated, x, *layers, "silu"), (
        6.0 * x.numel() * HIDDEN)


def norm(x: torch.Tensor) -> Ways:
    """An RMS norm."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    own = LlamaRMSNorm(WIDTH, 1e-5).to(x.dtype)
    return partial(own, x), partial(native.norm, x, own.weight, 1e-5, 0.0), None


def heads(x: torch.Tensor) -> Ways:
    """Queries, keys and values, turned."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layers = [layer(count * HEAD, WIDTH, x.dtype) for count in (HEADS, GROUPS, GROUPS)]
    angles = torch.randn(1, x.shape[1], HEAD // 2).repeat(1, 1, 2)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def own():
        query, key, value = (part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in layers)
        return *apply_rotary_pos_emb(query, key, cosine, sine), value

    given = [(part.weight, None) for part in layers]
    return own, partial(native.heads, x, *given, native.Turn(cosine, sine)), (
        2.0 * x.numel() * (HEADS + 2 * GROUPS) * HEAD)


LAYERS = {"linear 576 to 1,536": product, "linear 1,536 to 576": partial(product, outputs=WIDTH, width=HIDDEN),
          "linear 576 to 576": partial(product, outputs=WIDTH), "gated MLP": gated, "RMS norm": norm, "heads": heads}
CASES = {str(dtype).removeprefix("torch."): [Case(layer, count, dtype) for layer in LAYERS for count in (1024, 8000)]
         for dtype in (torch.float32, torch.bfloat16)}


def check(own: object, ours: object, dtype: torch.dtype) -> None:
    """
    Raises:
        AssertionError: a result differs from the peer's by more than rounding.
    """
    for peer, found in zip(*(part if isinstance(part, tuple) else (part,) for part in (own, ours)), strict=True):
        assert (found - peer).abs().max() <= DIFFER[dtype] * peer.abs().max(), "ours and the peer's outputs differ"


@torch.no_grad()
def measure(case: Case, runs: int) -> dict:
    """The row of a case, after its outputs were compared."""
    peer, ours, operations = case.ways()
    check(peer(), ours(), case.dtype)
    name = "torch F.linear" if case.layer.startswith("linear") else "transformers"
    return measured("prompt", str(case), name, interleave(peer, ours, runs=runs), operations=operations)


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case: the keys of `sentei.benches.table`.

    Args:
        names: of CASES.
        runs: timed pairs a row.
        absent: not used: torch and transformers are always there.
    """
    for case in (case for name in names for case in CASES[name]):
        yield measure(case, runs)
