"""A linear layer as the definition reads: one output at a time; and what else a layer is made of.

    y_ro = Σ_i x_ri w_oi + b_o

Any floating dtype, differentiable by autograd, for reading and for tests. Gated MLPs, norms and heads are computed in
the dtype they are given: what rounds at every step is no definition for bfloat16, float64 is.
"""

import torch

from sentei.kernels.linear.layers import ACTIVATIONS, Layer, Turn


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


def gated(x: torch.Tensor, gate: Layer, up: Layer, down: Layer, activation: str) -> torch.Tensor:
    """A gated MLP: down(act(gate(x)) · up(x)). See `sentei.kernels.linear.rows.gated`."""
    hidden = ACTIVATIONS[activation](linear(x, *gate)) * linear(x, *up)
    return linear(hidden, *down)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, shift: float) -> torch.Tensor:
    """An RMS norm, row by row: x / √(mean(x²) + ε) · (shift + weight). See `sentei.kernels.linear.rows.norm`."""
    normed = [row / (row.square().mean() + epsilon).sqrt() * (shift + weight) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(normed).view(x.shape) if normed else x.clone()


def heads(x: torch.Tensor, query: Layer, key: Layer, value: Layer,
          turn: Turn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of an attention, normed and turned, token by token and head by head.

        turn(u)_j = u_j cos_j − u_(j + D/2) sin_j      for j < D/2
        turn(u)_j = u_j cos_j + u_(j − D/2) sin_j      for the others

    See `sentei.kernels.linear.rows.heads`.
    """
    batch, tokens, _ = x.shape
    width, groups = turn.cosine.shape[-1], len(key[0]) // turn.cosine.shape[-1]
    cosines, sines = turn.cosine.reshape(-1, width), turn.sine.reshape(-1, width)

    def turned(u: torch.Tensor, row: int, weight: torch.Tensor | None) -> torch.Tensor:
        u = u if weight is None else norm(u, weight, turn.epsilon, turn.shift)
        partner = torch.cat([-u[width // 2:], u[:width // 2]])
        return u * cosines[row % len(cosines)] + partner * sines[row % len(sines)]

    found = []
    for layer, weight in ((query, turn.query_norm), (key, turn.key_norm)):
        made = linear(x, *layer).reshape(batch * tokens, -1, width)
        rows = [turned(u, row, weight) for row in range(batch * tokens) for u in made[row]]
        found.append(torch.stack(rows).view(batch, tokens, -1, width).transpose(1, 2))
    return *found, linear(x, *value).view(batch, tokens, groups, -1).transpose(1, 2)
