"""A linear layer of half-precision numbers multiplied in float32: faster where a processor has no fast arithmetic
for them, if the rows are many."""

import torch

NUMBERS = 1 << 23  # of copied inputs and outputs at once: 32 MiB


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `sentei.kernels.linear.linear`: summed in float32 and rounded once; float64 stays what it is.

    Cost: a float32 copy of the weights, and of some rows at a time.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    parameters = weight.to(wide), None if bias is None else bias.to(wide)
    rows, (outputs, width) = x.reshape(-1, x.shape[-1]), weight.shape
    parts = rows.split(max(1, NUMBERS // max(1, outputs + width)))
    products = [torch.nn.functional.linear(part.to(wide), *parameters).to(x.dtype) for part in parts]
    return torch.cat(products).view(*x.shape[:-1], outputs)
