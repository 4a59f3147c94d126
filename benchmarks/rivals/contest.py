"""Times and judges contenders on a workload, each as sentei's judge does it."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.rivals.rebuilt import cache_of
from sentei.budget.workload import Decode, Workload
from sentei.measurement.quality import losses_after, token_losses


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model to be timed and judged.

    Args:
        ready: makes it ready and gives it.
        few: whether it chooses for itself in few rows, so that decoded tokens must be read few at a time.
    """

    ready: Callable[[], nn.Module]
    few: bool = False


class Steps(Decode):
    """Decoding to be timed: the cache is the dense model's up to a few tokens before the last steps."""

    READ = Decode.STEPS + 8


def times(workload: Workload, row: torch.Tensor, contenders: dict[str, Contender], runs: int,
          clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of the workload on a row, by name, all in turn; by the clock, after one untimed run of each.

    Args:
        contenders: the first one is dense.
        runs: timed runs of each; every other turn goes backwards.
        clock: time.process_time, on one thread, where others are at work on the machine.
    """
    workload = Steps(workload.tokens) if isinstance(workload, Decode) else workload
    prefix = workload.prefix(next(iter(contenders.values())).ready(), row)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(runs + 1):
        for name in contenders if number % 2 else reversed(contenders):
            model = contenders[name].ready()
            work = workload.begin(model, row, cache_of(model, prefix))
            start = clock()
            work()
            seconds[name] += [clock() - start] if number else []
            del work
    return seconds


@torch.no_grad()
def losses(workload: Workload, windows: torch.Tensor, prefixes: list, contender: Contender) -> dict[str, torch.Tensor]:
    """Token losses, float64 [N, T'], of the tokens a workload is about, by who has read the prompt before them.

    "itself": the contender. "dense": the dense model, as for sentei's judge; only where something is decoded, and not
    where the contender cannot go on with that cache.
    """
    model = contender.ready()
    if not isinstance(workload, Decode):
        return {"itself": token_losses(model, windows)}
    rows = workload.AT_ONCE if contender.few else workload.tokens
    found = {"itself": torch.stack([losses_after(model, row, workload.prefix(model, row), rows=rows)
                                    for row in windows])}
    if contender.few:
        found["dense"] = torch.stack([workload.answer(model, row, prefix)
                                      for row, prefix in zip(windows, prefixes, strict=True)])
    elif prefixes and goes_on(model, prefixes[0]):
        found["dense"] = torch.stack([losses_after(model, row, copy.deepcopy(cache_of(model, prefix)), rows=rows)
                                      for row, prefix in zip(windows, prefixes, strict=True)])
    return found


def goes_on(model: nn.Module, prefix: object) -> bool:
    """Whether a rebuilt model's key/value heads are those of a dense cache."""
    layers = zip(model.get_decoder().layers, cache_of(model, prefix).layers, strict=True)
    return all(layer.self_attn.k_proj.out_features == held.keys.shape[1] * held.keys.shape[3]
               for layer, held in layers)
