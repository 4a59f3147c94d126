"""Experts in several processes against the same in one: answers and gradients, also where some have nothing to do."""

import pytest
import torch
from processes import run
from torch import distributed

from sentei.kernels.routing import Stack, choose_impl, route

CASES = ["spread", "all to one", "one process has no token", "nothing is kept", "no slots"]


def inputs(case: str, rank: int) -> tuple:
    """Tokens, ids and weights of a process, and the same four experts in both."""
    torch.manual_seed(0)
    up, gate, down = (torch.randn(4, *shape, dtype=torch.float64) for shape in ((3, 5), (3, 5), (6, 3)))
    torch.manual_seed(1 + rank)
    tokens = 0 if case == "one process has no token" and rank else 7
    slots = 0 if case == "no slots" else 2
    ids = torch.stack([torch.randperm(4)[:slots] for _ in range(tokens)]) if tokens else torch.empty(0, slots)
    ids = ids.long()
    if case == "all to one":
        ids = ids % 2
        ids[:, 1] = -1
    if case == "nothing is kept":
        ids = torch.full_like(ids, -1)
    if case == "spread":
        ids[0, 1] = -1
    hidden, weights = torch.randn(tokens, 5, dtype=torch.float64), torch.randn(tokens, slots, dtype=torch.float64)
    return hidden.requires_grad_(), ids, weights.requires_grad_(), up, gate, down


def exchanged() -> list:
    """The largest difference of each case, of answers and gradients; NaN where a gradient is missing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, mesh, worst = distributed.get_rank(), init_device_mesh("cpu", (2,)), []
    for case in CASES:
        hidden, ids, weights, *stack = inputs(case, rank)
        leaves = [weight.requires_grad_() for weight in stack]
        cut = [distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_() for weight in stack]
        here, there = (Stack(up=up, gate=gate, down=down) for up, gate, down in (leaves, cut))
        assert choose_impl("auto", hidden, ids, weights, there)[0] == "all_to_all"
        answers, expected = (route(hidden, ids, weights, experts) for experts in (there, here))
        slope = torch.randn_like(expected)
        got = torch.autograd.grad((answers * slope).sum(), [hidden, weights, *cut])
        wanted = torch.autograd.grad((expected * slope).sum() + 0 * sum(leaf.sum() for leaf in [weights, *leaves]),
                                     [hidden, weights, *leaves])
        for gradient in wanted[2:]:
            distributed.all_reduce(gradient)
        pairs = [(answers, expected), *zip(got[:2], wanted[:2], strict=True),
                 *((gradient.full_tensor(), other) for gradient, other in zip(got[2:], wanted[2:], strict=True))]
        pairs = [(a.detach(), b.detach()) for a, b in pairs]
        worst.append(max(((a - b).abs().max().item() if a.numel() else 0.0) for a, b in pairs))
    return worst


def test_answers_and_gradients_are_those_of_one_process():
    for worst in run(exchanged, 2):
        assert dict(zip(CASES, worst, strict=True)) == pytest.approx(dict.fromkeys(CASES, 0), abs=1e-13)
