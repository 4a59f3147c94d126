"""What a layer is made of besides attention, for a prompt's many rows: sentei's native calls against transformers'.

The sizes are SmolLM2's: 576 wide, 1,536 between the layers of its MLP, 9 query and 3 key/value heads of 64. Peers are
torch for a linear layer, transformers' modules for the MLP and the norm of Llama, and for the heads three linear layers
of torch and transformers' rotation. Of bfloat16 a second peer does the same with torch in float32, casts included,
which is faster where a processor has no fast products of pairs. Before a case is timed the outputs are compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from sentei.kernels.linear import linear
from sentei.kernels.linear import rows as native
from sentei.measurement.latency import interleave, measured

WIDTH, HIDDEN, HEADS, GROUPS, HEAD = 576, 1536, 9, 3, 64
CAST = "torch in float32, casts included"
DIFFER = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the largest number: torch rounds at every step


@dataclass(frozen=True)
class Case:
    """One layer, so many rows, and a dtype."""

    layer: str
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.layer}, {self.rows:,} rows, {str(self.dtype).removeprefix('torch.')}"

    @property
    def x(self) -> torch.Tensor:
        """Float [1, R, 576], the same every time."""
        return torch.randn(1, self.rows, WIDTH, generator=torch.Generator().manual_seed(0)).to(self.dtype)


@dataclass(frozen=True)
class Ways:
    """One layer's calls, of the same weights: ours, the peers' by name, and the floating-point operations of each."""

    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    operations: float | None = None


def layer(outputs: int, width: int, dtype: torch.dtype) -> nn.Linear:
    """Weights without a bias."""
    return nn.Linear(width, outputs, bias=False).to(dtype)


def in_float32(x: torch.Tensor, *weights: torch.Tensor, join: Callable) -> torch.Tensor:
    """What `join` makes of float32 copies, cast back."""
    return join(x.float(), *(weight.float() for weight in weights)).to(x.dtype)


def product(x: torch.Tensor, outputs: int = HIDDEN, width: int = WIDTH) -> Ways:
    """A linear layer."""
    weight = layer(outputs, width, x.dtype).weight
    if width != WIDTH:
        x = torch.randn(*x.shape[:-1], width).to(x.dtype)
    peers = {"torch F.linear": partial(F.linear, x, weight)}
    if x.dtype != torch.float32:
        peers[CAST] = partial(in_float32, x, weight, join=F.linear)
    return Ways(partial(linear, x, weight, impl="fused_cpp"), peers, 2.0 * x.numel() * outputs)


def gated(x: torch.Tensor) -> Ways:
    """A gated MLP."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    own = LlamaMLP(LlamaConfig(hidden_size=WIDTH, intermediate_size=HIDDEN)).to(x.dtype)
    weights = own.gate_proj.weight, own.up_proj.weight, own.down_proj.weight
    peers = {"transformers LlamaMLP": partial(own, x)}
    if x.dtype != torch.float32:
        peers[CAST] = partial(in_float32, x, *weights, join=lambda x, gate, up, down: F.linear(
            F.silu(F.linear(x, gate)) * F.linear(x, up), down))
    return Ways(partial(native.gated, x, *((weight, None) for weight in weights), "silu"), peers,
                6.0 * x.numel() * HIDDEN)


def norm(x: torch.Tensor) -> Ways:
    """An RMS norm."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    own = LlamaRMSNorm(WIDTH, 1e-5).to(x.dtype)
    return Ways(partial(native.norm, x, own.weight, 1e-5, 0.0), {"transformers LlamaRMSNorm": partial(own, x)})


def heads(x: torch.Tensor) -> Ways:
    """Queries, keys and values, turned."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    weights = [layer(count * HEAD, WIDTH, x.dtype).weight for count in (HEADS, GROUPS, GROUPS)]
    angles = torch.randn(1, x.shape[1], HEAD // 2).repeat(1, 1, 2)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def own() -> tuple[torch.Tensor, ...]:
        query, key, value = (F.linear(x, weight).unflatten(-1, (-1, HEAD)).transpose(1, 2) for weight in weights)
        return *apply_rotary_pos_emb(query, key, cosine, sine), value

    ours = partial(native.heads, x, *((weight, None) for weight in weights), native.Turn(cosine, sine))
    return Ways(ours, {"torch, transformers' rotation": own}, 2.0 * x.numel() * (HEADS + 2 * GROUPS) * HEAD)


LAYERS = {"linear 576 to 1,536": product, "linear 1,536 to 576": partial(product, outputs=WIDTH, width=HIDDEN),
          "linear 576 to 576": partial(product, outputs=WIDTH), "gated MLP": gated, "RMS norm": norm, "heads": heads}
CASES = {str(dtype).removeprefix("torch."): [Case(layer, count, dtype) for layer in LAYERS for count in (1024, 8000)]
         for dtype in (torch.float32, torch.bfloat16)}


def check(ours: object, peer: object, dtype: torch.dtype) -> None:
    """Compares results, one or several.

    Raises:
        AssertionError: a result differs from the peer's by more than rounding.
    """
    for found, own in zip(*(part if isinstance(part, tuple) else (part,) for part in (ours, peer)), strict=True):
        assert (found - own).abs().max() <= DIFFER[dtype] * own.abs().max(), "ours and the peer's outputs differ"


@torch.no_grad()
def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case and peer: the keys of `sentei.benches.table`.

    Args:
        names: of CASES.
        runs: timed pairs a row.
        absent: not used: torch and transformers are always there.
    """
    for case in (case for name in names for case in CASES[name]):
        torch.manual_seed(0)
        ways = LAYERS[case.layer](case.x)
        for name, peer in ways.peers.items():
            check(ways.ours(), peer(), case.dtype)
            timed = interleave(peer, ways.ours, runs=runs)
            yield measured("prompt", str(case), name, timed, operations=ways.operations)
