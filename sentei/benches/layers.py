"""A whole layer that chooses its keys, ours and the one of native-sparse-attention-pytorch, which is trained that way.

Both project, choose, attend and project back; theirs also attends to compressed keys and adds what three kinds of
attention give, so that the numbers are others and only the seconds are compared. Heads, widths, tokens, the blocks of
64 a query chooses and the window are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from sentei.axes.connections import Config, SelfAttention
from sentei.core.rules import TopK

BLOCK, WINDOW, COMPRESSED, STRIDE = 64, 128, 32, 16
PEER = "native-sparse-attention-pytorch"


@dataclass(frozen=True)
class Layer:
    """One shape, in the words of `sentei.benches.attention.Case`; `blocks` are chosen by a query."""

    heads: int
    groups: int
    width: int
    tokens: int
    blocks: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    operations: float | None = None

    def __str__(self) -> str:
        return (f"a layer that chooses {self.blocks} blocks of {BLOCK}, {self.heads}/{self.groups} x {self.width}, "
                f"{self.tokens:,} tokens")

    @cached_property
    def x(self) -> torch.Tensor:
        """Float32 [1, T, H · D]."""
        return torch.randn(1, self.tokens, self.heads * self.width, generator=torch.Generator().manual_seed(0))

    @cached_property
    def layer(self) -> SelfAttention:
        """Ours, with weights as they are drawn."""
        torch.manual_seed(0)
        return SelfAttention(Config(rule=TopK(self.blocks), window=WINDOW, share="group"), num_heads=self.heads,
                             width=self.x.shape[2], num_kv_heads=self.groups)

    def ours(self) -> torch.Tensor:
        """sentei's layer."""
        return self.layer(self.x)

    @cached_property
    def theirs(self) -> torch.nn.Module:
        """The peer's layer.

        Raises:
            ModuleNotFoundError: it is not installed.
        """
        from native_sparse_attention_pytorch import SparseAttention

        torch.manual_seed(0)
        return SparseAttention(
            dim=self.x.shape[2], dim_head=self.width, heads=self.heads, kv_heads=self.groups, causal=True,
            sliding_window_size=WINDOW, compress_block_size=COMPRESSED, compress_block_sliding_stride=STRIDE,
            selection_block_size=BLOCK, num_selected_blocks=self.blocks, use_triton_kernel=False)

    def peers(self) -> dict[str, tuple[Callable[[], torch.Tensor], bool]]:
        """As `sentei.benches.attention.peers`: their numbers are others."""
        return {PEER: (partial(lambda case: case.theirs(case.x), self), False)}


CASES = [Layer(9, 3, 64, 2048, 4)]
