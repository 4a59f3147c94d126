"""Choices and weights in few bytes: eight choices a byte, the lowest bit first, and weights as their square roots.

Rows of choices may be ragged: under causality a row ends with its own token, and each row fills whole bytes.
"""

from dataclasses import dataclass

import torch

from sentei.core.selection import Selection
from sentei.core.trace_header import STRONGEST

NONE = 65535  # an id that is none; ids are uint16


@dataclass(frozen=True, kw_only=True)
class Span:
    """Neighbouring query tokens of one granularity, as rows of choices.

    Args:
        first, queries: the query tokens, from position `first` on.
        block: tokens that share a row; the last row may be ragged.
        unit: tokens that one candidate stands for.
    """

    first: int
    queries: int
    block: int
    unit: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return -(-self.queries // self.block)

    def widths(self, tokens: int, causal: bool) -> list[int]:
        """How many candidates each row can have: all there are of `tokens`, or those up to its last token."""
        stop = self.first + self.queries
        last = [min(self.first + (row + 1) * self.block, stop) if causal else tokens for row in range(self.rows)]
        return [-(-token // self.unit) for token in last]


def pack(keep: torch.Tensor) -> torch.Tensor:
    """Bool [..., N] as uint8 [..., ⌈N / 8⌉]; candidate 0 is the lowest bit of byte 0."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[-1] % 8))
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (padded.unflatten(-1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, number: int) -> torch.Tensor:
    """Bool [..., number] of uint8 [..., ⌈number / 8⌉]."""
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return ((packed.unsqueeze(-1) & powers) > 0).flatten(-2)[..., :number]


def pack_rows(keep: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Bool [H, R, N] as uint8 [H, Σ ⌈width / 8⌉]: of each row the bytes that its width needs."""
    packed = pack(keep)
    rows = [packed[:, row, :-(-width // 8)] for row, width in enumerate(widths)]
    return torch.cat(rows, 1) if rows else packed.flatten(1)


def unpack_rows(packed: torch.Tensor, widths: list[int], number: int) -> torch.Tensor:
    """Bool [H, R, number]: what `pack_rows` packed."""
    rows, start = [], 0
    for width in widths:
        row = unpack(packed[:, start:start + -(-width // 8)], width)
        rows.append(torch.nn.functional.pad(row, (0, number - width)))
        start += -(-width // 8)
    return torch.stack(rows, 1) if rows else packed.new_zeros(len(packed), 0, number, dtype=torch.bool)


def encode(weights: torch.Tensor) -> torch.Tensor:
    """Weights as uint8, 255 · √w, so that small ones keep their first digits; w is cut to 0 … 1."""
    return (weights.float().nan_to_num(0).clamp(0, 1).sqrt() * 255).round().to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """What `encode` wrote, within 0.004 of a weight of 1 and less below."""
    return (codes.float() / 255) ** 2


def strongest(selection: Selection, number: int = STRONGEST) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids, uint16 [..., Q, number], and codes, uint8, of the heaviest candidates kept; NONE and 0 beyond them."""
    size = selection.weights.abs().float().masked_fill(selection.ids < 0, -1)
    short = max(number - size.shape[-1], 0)
    order = size.topk(min(number, size.shape[-1]), dim=-1).indices
    ids = selection.ids.gather(-1, order)
    weights = selection.weights.abs().gather(-1, order).where(ids >= 0, 0)
    weights = encode(weights)
    ids = torch.nn.functional.pad(ids.where(weights > 0, NONE), (0, short), value=NONE)
    return ids.to(torch.int32).to(torch.uint16), torch.nn.functional.pad(weights, (0, short))
