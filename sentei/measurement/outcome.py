"""What a job found, as data: the public object of `sentei prune --json` and the details its report shows."""

import datetime
import importlib.metadata
import platform

import torch

from sentei.core.machine import processor
from sentei.measurement.quality import PERPLEXITY, Quality

SCHEMA = "sentei.prune/1"
PACKAGES = ("torch", "transformers", "numpy")


def public(*, model: str, workload: str, dtype: str, tokens: int, measure: str, quality: Quality,
           seconds: tuple[float, float], speedup: float) -> dict:
    """The part of the public object that is measured, dense before pruned.

    Args:
        tokens: of the workload, for tokens a second.
        measure: the name of the quality's; told where it is not perplexity, and the perplexities are then None.
    """
    dense, pruned = ({"perplexity": perplexity, "seconds": taken, "tokens_per_second": tokens / taken}
                     for perplexity, taken in zip((quality.dense, quality.pruned), seconds, strict=True))
    return {"schema": SCHEMA, "model": model, "workload": workload, "dtype": dtype, "threads": torch.get_num_threads(),
            "dense": dense, "pruned": pruned, "speedup": speedup, "quality": quality.value,
            **measure_of(measure)}


def measure_of(name: str) -> dict[str, str]:
    """What a public object says of its measure: nothing where that is perplexity."""
    return {} if name == PERPLEXITY.name else {"measure": name}


def environment() -> dict[str, str]:
    """The machine and the versions a figure belongs to; no host or user names."""
    return {"processor": processor(), "threads": str(torch.get_num_threads()), "system": platform.system(),
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES}}


def today() -> str:
    """The date, for reports."""
    return datetime.date.today().isoformat()
