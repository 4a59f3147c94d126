"""The router: a token's logit for every expert. With the metrics it is a search for the nearest rows."""

import torch
from torch import nn
from torch.nn import functional as F

from sentei.axes.experts.balance import Noise
from sentei.axes.experts.gates import Gate, Noisy, Soft, Task
from sentei.core.errors import ShapeError
from sentei.core.precision import in_full, widened

METRICS = ("dot", "cosine", "l2")
# The size of the noise never falls below this, as in the code of Shazeer et al.
LEAST_NOISE = 1e-2


class Router(nn.Module):
    """The logits of each token for each candidate, in fp32 or wider: x [..., T, width] → [..., T, C].

    Args:
        gate: decides how many rows there are; a Task gate has a row of logits a task and reads no token.
        metric: "dot" x·w; "cosine", the cosine times a learned scale (X-MoE, arXiv 2204.09179); "l2", x·w - |w|² / 2,
            whose order is that of the nearest w.
        width: D.
        num_experts: E.
    """

    def __init__(self, gate: Gate, metric: str, width: int, num_experts: int):
        super().__init__()
        self.metric = metric
        self.gate = gate
        rows = (self.gate.tasks, num_experts) if isinstance(self.gate, Task) else (num_experts * self.gate.slots, width)
        noisy = isinstance(self.gate, Noisy)
        # Equal logits and equal noise at first, as Shazeer et al. begin; else small ones.
        self.weight = nn.Parameter(torch.zeros(rows) if noisy else torch.empty(rows).normal_(std=0.02))
        self.noise_weight = nn.Parameter(torch.zeros(rows)) if noisy else None
        cosine = self.metric == "cosine" and not isinstance(self.gate, Task)
        # One number as a row, because FSDP2 takes no parameter without dimensions.
        self.scale = nn.Parameter(torch.tensor([1.0 if isinstance(self.gate, Soft) else 10.0])) if cosine else None

    def forward(self, x: torch.Tensor, tasks: torch.Tensor | None = None) -> tuple[torch.Tensor, Noise | None]:
        """The logits and, where noise was added, what they were without it.

        Args:
            tasks: int64 [...], the task of each sequence; for a Task gate.
        """
        with in_full(x):
            weight = widened(self.weight)
            if isinstance(self.gate, Task):
                return self.of_task(weight, tasks).unsqueeze(-2).expand(*x.shape[:-1], -1), None
            x = widened(x)
            if self.metric == "cosine":
                logits = F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)) * widened(self.scale)
            else:
                logits = F.linear(x, weight)
            if self.metric == "l2":
                logits = logits - weight.square().sum(-1) / 2
            if self.noise_weight is None or not self.training:
                return logits, None
            spread = F.softplus(F.linear(x, widened(self.noise_weight))) + LEAST_NOISE
            return logits + torch.randn_like(logits) * spread, Noise(logits, spread)

    def of_task(self, weight: torch.Tensor, tasks: torch.Tensor | None) -> torch.Tensor:
        """The rows [..., E] of `tasks`."""
        known = tasks is not None and tasks.dtype == torch.int64
        if not known or (tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < len(weight)):
            raise ShapeError("experts", expected=f"tasks int64 from 0 to {len(weight) - 1}",
                             got=repr(tasks), do="name the task of each sequence")
        return weight[tasks]
