"""Rotary positions (Su et al. 2021, arXiv 2104.09864)."""

import torch


def rotate(heads: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions: heads [B, N, H, D], whose halves are pairs, turned by positions [B, N]; in their own dtype."""
    half = heads.shape[-1] // 2
    speeds = base ** (-torch.arange(half, dtype=torch.float64, device=heads.device) / half)
    angles = (positions[..., None] * speeds)[:, :, None]
    dtype = torch.promote_types(heads.dtype, torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(heads.dtype)
