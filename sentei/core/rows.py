"""Rows: some of every slot of a batch, taken and added back; and their products with one vector."""

import torch

from sentei.core.modes import is_transformed

AT_ONCE = 1024  # rows: their products stay near, and few parts have to be started


def places_of(kept: torch.Tensor, rows: int, *, last: bool = False) -> torch.Tensor:
    """Int64 [B, N]: the places of what is kept, bool [B, T], in order, for N = `rows`; a slot that keeps fewer has
    others behind them, or, with `last`, before them."""
    if last:
        return torch.sort(kept, dim=1, stable=True).indices[:, kept.shape[1] - rows:]
    return torch.sort(~kept, dim=1, stable=True).indices[:, :rows]


def take(x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows [B, N, D] of x [B, T, D] at `places` [B, N], and x for whoever reads all of it.

    What both of them get is one gradient, made in one pass: a gradient of the rows alone would be zeros for the most
    part, made and added at the cost of three.
    """
    flat, every = _flat(x, places), x.flatten(0, 1)
    if _learns(x):
        rows, every = _Take.apply(every, flat)
    else:
        rows = every.index_select(0, flat)
    return rows.view(*places.shape, x.shape[-1]), every.view(x.shape)


def add(x: torch.Tensor, places: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """x [B, T, D] and, at `places` [B, N], the update [B, N, D]; in the dtype of x."""
    return x.flatten(0, 1).index_add(0, _flat(x, places), update.flatten(0, 1).to(x.dtype)).view(x.shape)


def dots(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The products [...] of the rows of x [..., D] with `weight` [D]: row by row, and not as a product of matrices, so
    that the same row gives the same bits whatever stands beside it."""
    if _learns(x, weight):
        return _Dots.apply(x, weight)
    return torch.cat([(part * weight).sum(-1) for part in x.flatten(0, -2).split(AT_ONCE)]).view(x.shape[:-1])


def _flat(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Int64 [B · N]: the places among the rows of all slots."""
    return (places + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]).flatten()


def _learns(*tensors: torch.Tensor) -> bool:
    """Whether autograd alone looks on, for one of these."""
    return (torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])
            and not torch.compiler.is_compiling() and not is_transformed())


class _Take(torch.autograd.Function):
    """Rows of x [M, D] at places [N], and x."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.save_for_backward(places)
        return x.index_select(0, places), x.view_as(x)

    @staticmethod
    def backward(ctx, of_rows, of_all):
        return of_all.index_add(0, ctx.saved_tensors[0], of_rows), None


class _Dots(torch.autograd.Function):
    """`dots`, that keeps x and not all the numbers which are summed."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return dots(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), (wants_x, wants_weight) = ctx.saved_tensors, ctx.needs_input_grad
        return (gradient.unsqueeze(-1) * weight if wants_x else None,
                gradient.flatten() @ x.flatten(0, -2) if wants_weight else None)
