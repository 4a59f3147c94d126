"""Random directions: unit vectors, and the inner products of all pairs of them."""

import torch

from sentei.core.shapes import check_shape


def unit_vectors(number: int, dimensions: int, generator: torch.Generator) -> torch.Tensor:
    """Directions drawn evenly from the unit sphere of R^d, float32 [number, dimensions]."""
    drawn = torch.randn(number, dimensions, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def inner_products(vectors: torch.Tensor) -> torch.Tensor:
    """The inner products [N (N - 1) / 2] of all pairs of rows of vectors [N, d], in fp64.

    For directions drawn evenly they are independent pair by pair: u·v and u·w too, as w sees no u by itself.
    """
    sizes = check_shape("inner_products", "vectors", vectors, "N D")
    rows, columns = torch.triu_indices(sizes["N"], sizes["N"], 1)
    return (vectors @ vectors.T)[rows, columns].double()
