"""A linear layer as the definition reads: one output at a time.

    y_ro = Σ_i x_ri w_oi + b_o

Any floating dtype, differentiable by autograd, for reading and for tests.
"""

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `sentei.kernels.linear.linear`. The sum is made in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide).reshape(x.shape[:-1].numel(), x.shape[-1])
    outputs = []
    for row in rows:
        for o in range(len(weight)):
            output = (row * weight[o].to(wide)).sum()
            outputs.append(output if bias is None else output + bias[o].to(wide))
    y = torch.stack(outputs) if outputs else rows.new_zeros(0)
    return y.view(*x.shape[:-1], len(weight)).to(x.dtype)
