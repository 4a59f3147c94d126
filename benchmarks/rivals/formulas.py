"""Rivals that are a formula, on the weights and the calibration text that all are given; each makes a recipe.

| rival | what goes | source |
|---|---|---|
| ShortGPT | the n layers that turn the stream least: block influence, the mean of 1 − cos(x_in, x_out) | 2403.03853 |
| Wanda width | a share of every network's neurons, the least Σ over outputs of size · norm of what is read: Wanda \
(2306.11695) by columns of the last projection, as FLAP compares itself with | 2312.11983 |
"""

import torch
from torch import nn

from benchmarks.rivals.recipe import masked
from benchmarks.subject import read
from sentei.conversion.statistics import Influence


def short_gpt(model: nn.Module, calibration: torch.Tensor, number: int) -> dict:
    """Leaves `number` layers out."""
    order = block_influence(model, calibration).argsort(stable=True).tolist()
    return {"layers": sorted(order[number:])}


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


def wanda_width(model: nn.Module, calibration: torch.Tensor, percent: float) -> dict:
    """So many per cent of the neurons of every network go."""
    masks = []
    for layer, norms in zip(model.model.layers, neuron_norms(model, calibration), strict=True):
        scores = layer.mlp.down_proj.weight.detach().abs().double().sum(0) * norms
        gone = round(percent / 100 * len(scores))
        masks.append(masked(scores.argsort(stable=True)[gone:].tolist(), len(scores)))
    return {"layers": list(range(len(masks))), "neurons": masks}


@torch.no_grad()
def neuron_norms(model: nn.Module, calibration: torch.Tensor) -> list[torch.Tensor]:
    """The norm over all tokens of what each neuron gives to the last projection, float64 [F] a layer."""
    squares = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64) for layer in model.model.layers]

    def listen(total: torch.Tensor):
        def hook(_, given: tuple) -> None:
            total.add_(given[0].flatten(0, -2).double().square().sum(0))

        return hook

    read(model, calibration, [layer.mlp.down_proj.register_forward_pre_hook(listen(total))
                              for layer, total in zip(model.model.layers, squares, strict=True)])
    return [total.sqrt() for total in squares]
