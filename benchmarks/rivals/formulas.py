"""Rivals that are a formula, on the weights and the calibration text that all are given. Each writes a file, see
`rebuilt`.

| rival | what goes | source |
|---|---|---|
| ShortGPT | the n layers that turn the stream least: block influence, the mean of 1 − cos(x_in, x_out) | 2403.03853 |
| magnitude | half of each linear layer's weights, the smallest | – |
| Wanda | half of each output's weights, by size · norm of the input they read | 2306.11695 |
"""

from pathlib import Path

import torch
from torch import nn

from benchmarks.rivals.rebuilt import save
from benchmarks.subject import read
from sentei.conversion.statistics import Influence


def short_gpt(model: nn.Module, calibration: torch.Tensor, number: int, path: Path) -> None:
    """Leaves `number` layers out."""
    order = block_influence(model, calibration).argsort(stable=True).tolist()
    save(path, {}, sorted(order[number:]))


@torch.no_grad()
def block_influence(model: nn.Module, calibration: torch.Tensor) -> torch.Tensor:
    """Float64 [layers], over windows int64 [N, T]."""
    states = [Influence() for _ in model.model.layers]

    def listen(state: Influence):
        return lambda _, given, named, after: state.see(given[0] if given else named["hidden_states"],
                                                        after[0] if isinstance(after, tuple) else after)

    handles = [layer.register_forward_hook(listen(state), with_kwargs=True)
               for layer, state in zip(model.model.layers, states, strict=True)]
    read(model, calibration, handles)
    return torch.tensor([state.influence for state in states], dtype=torch.float64)


def magnitude(model: nn.Module, calibration: torch.Tensor, sparsity: float, path: Path) -> None:
    """A share of the weights of every linear layer but the head is zero."""
    save(path, {f"{name}.weight": _zeroed(linear.weight, linear.weight.abs().flatten()[None], sparsity)
                for name, linear in linears(model).items()}, list(range(len(model.model.layers))))


def wanda(model: nn.Module, calibration: torch.Tensor, sparsity: float, path: Path) -> None:
    """A share of the weights of every output of every linear layer but the head is zero."""
    norms = input_norms(model, calibration)
    save(path, {f"{name}.weight": _zeroed(linear.weight, linear.weight.abs() * norms[name], sparsity)
                for name, linear in linears(model).items()}, list(range(len(model.model.layers))))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, by name."""
    return {f"model.{name}": module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def input_norms(model: nn.Module, calibration: torch.Tensor) -> dict[str, torch.Tensor]:
    """The norm over all tokens of each number that a linear layer reads, float32 [I] by name."""
    squares = {name: torch.zeros(linear.in_features, dtype=torch.float64) for name, linear in linears(model).items()}

    def listen(name: str):
        def hook(_, given: tuple) -> None:
            squares[name] += given[0].flatten(0, -2).double().square().sum(0)

        return hook

    read(model, calibration, [linear.register_forward_pre_hook(listen(name))
                               for name, linear in linears(model).items()])
    return {name: total.sqrt().float() for name, total in squares.items()}


def _zeroed(weight: torch.Tensor, scores: torch.Tensor, share: float) -> torch.Tensor:
    """The weights without the share of each row of scores that is smallest; scores have as many numbers."""
    drop = scores.detach().argsort(dim=1, stable=True)[:, :round(share * scores.shape[1])]
    return weight.detach().clone().view_as(scores).scatter_(1, drop, 0.0).view_as(weight)
