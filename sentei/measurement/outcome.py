"""What a job found, as data: the public object of `sentei prune --json` and the details its report shows."""

import datetime
import importlib.metadata
import platform

import torch

from sentei.core.machine import processor

SCHEMA = "sentei.prune/1"
PACKAGES = ("torch", "transformers", "numpy")


def public(*, model: str, workload: str, dtype: str, tokens: int, perplexity: tuple[float, float],
           seconds: tuple[float, float], speedup: float) -> dict:
    """The part of the public object that is measured, dense before pruned in every pair.

    Args:
        tokens: of the workload, for tokens a second.
    """
    sides = [{"perplexity": perplexity[side], "seconds": seconds[side], "tokens_per_second": tokens / seconds[side]}
             for side in (0, 1)]
    return {"schema": SCHEMA, "model": model, "workload": workload, "dtype": dtype, "threads": torch.get_num_threads(),
            "dense": sides[0], "pruned": sides[1], "speedup": speedup, "quality": perplexity[0] / perplexity[1]}


def environment() -> dict[str, str]:
    """The machine and the versions a figure belongs to; no host or user names."""
    return {"processor": processor(), "threads": str(torch.get_num_threads()), "system": platform.system(),
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES}}


def today() -> str:
    """The date, for reports."""
    return datetime.date.today().isoformat()
