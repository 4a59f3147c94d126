"""Times and judges models on a workload, each as sentei's judge does it."""

import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.rivals.recipe import cache_of
from sentei.budget.workload import Decode, Workload
from sentei.conversion.cache import pruned_layers
from sentei.measurement.quality import losses_after, token_losses


class Steps(Decode):
    """Decoding to be timed: the cache is the dense model's up to a few tokens before the last steps."""

    READ = Decode.STEPS + 8


def times(workload: Workload, row: torch.Tensor, models: dict[str, nn.Module], runs: int,
          clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of the workload on a row, by name, all in turn, after one untimed run of each.

    Args:
        models: the first one is dense: its cache is what decoding begins with.
        runs: timed runs of each; every other turn goes backwards.
    """
    workload = Steps(workload.tokens) if isinstance(workload, Decode) else workload
    prefix = workload.prefix(next(iter(models.values())), row)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(runs + 1):
        for name in models if number % 2 else reversed(models):
            work = workload.begin(models[name], row, cache_of(models[name], prefix))
            start = clock()
            work()
            seconds[name] += [clock() - start] if number else []
            del work
    return seconds


@torch.no_grad()
def losses(workload: Workload, windows: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Token losses, float64 [N, T'], of the tokens a workload is about; the model has read the prompt before them."""
    if not isinstance(workload, Decode) or not pruned_layers(model):
        return of_workload(workload, token_losses(model, windows))
    rows = workload.AT_ONCE
    return torch.stack([losses_after(model, row, workload.prefix(model, row), rows=rows) for row in windows])


def of_workload(workload: Workload, losses: torch.Tensor) -> torch.Tensor:
    """Of the losses of all tokens [N, T - 1] those a workload is about."""
    return losses[:, 1 - min(workload.READ, workload.tokens // 2):] if isinstance(workload, Decode) else losses
