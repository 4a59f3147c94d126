"""Routing to experts that lie in several processes: rows go to the process that has their expert, answers come back.

A stack whose weights are DTensors, sharded over their first dimension, is asked this way. Every kept (token, expert)
is one row: both ways are one `all_to_all_single`, which the gradients take back. The weighed sum is made at home.
All processes of the group must call it together, those without a row too.
Reference: GShard, Lepikhin et al. 2020, arXiv 2006.16668.
"""

from collections.abc import Callable

import torch

from sentei.kernels.routing.stack import Stack

NAME, REASON = "all_to_all", "the experts lie in several processes"


def is_sharded(experts: object) -> bool:
    """Whether `experts` is a stack whose weights are DTensors."""
    return isinstance(experts, Stack) and hasattr(experts.up, "device_mesh")


def route(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Stack,
          at_home: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Stack], torch.Tensor]) -> torch.Tensor:
    """See `sentei.kernels.routing.route`.

    Args:
        experts: a sharded stack; each process has as many.
        at_home: `route` over the experts that this process has.
    Cost: K rows of hidden and of answers a token through the network, and one number of the host, the counts.
    """
    from torch.distributed import all_to_all_single

    group, own = _group(experts.up), _local(experts)
    parts, size = len(experts) // len(own), len(own)
    flat = ids.flatten()
    leave = torch.bincount(flat + 1, minlength=len(experts) + 1)[1:]
    arrive = torch.empty_like(leave)
    all_to_all_single(arrive, leave, group=group)
    order = flat.argsort(stable=True)[len(flat) - int(leave.sum()):]
    sent, received = (counts.view(parts, size).sum(1).tolist() for counts in (leave, arrive))
    rows = _exchange(hidden[order // max(ids.shape[1], 1)], received, sent, group)
    local = torch.arange(size, device=ids.device).repeat(parts).repeat_interleave(arrive)[:, None]
    answers = at_home(rows, local, torch.ones_like(local, dtype=weights.dtype), own)
    if not len(rows):  # a graph that leads back through both exchanges, as that of the other processes
        answers = answers + rows.sum()
    back = _exchange(answers, sent, received, group)
    wide = torch.promote_types(back.dtype, torch.float32)
    placed = back.new_zeros(len(flat), back.shape[1]).index_copy(0, order, back)
    kept = weights.masked_fill(ids < 0, 0).to(wide)
    placed = placed.view(*ids.shape, back.shape[1]).to(wide)
    return torch.bmm(kept.unsqueeze(1), placed).squeeze(1).to(back.dtype)


def _exchange(rows: torch.Tensor, received: list[int], sent: list[int], group: object) -> torch.Tensor:
    """Rows [N, D], `sent[p]` of them for process p in order, to those that came, `received[p]` of process p."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

    return wait_tensor(all_to_all_single_autograd(rows.contiguous(), received, sent, group))


def _group(weight: torch.Tensor) -> object:
    """The processes among which the experts are sharded."""
    dimension = next(index for index, place in enumerate(weight.placements) if place.is_shard(0))
    return weight.device_mesh.get_group(dimension)


def _local(experts: Stack) -> Stack:
    """The experts of this process. Over other dimensions of the mesh their gradients are still to be added up."""
    from torch.distributed.tensor import Partial

    places = [place if place.is_shard() else Partial() for place in experts.up.placements]
    up, down, gate = (None if weight is None else weight.to_local(grad_placements=places)
                      for weight in (experts.up, experts.down, experts.gate))
    return Stack(up=up, down=down, gate=gate, activation=experts.activation)
