"""sentei (剪定, pruning): decides, for each input, what a transformer need not compute."""

import importlib

__version__ = "0.1.0"

# Each public name and the module it lives in; loaded on first use, so that the command line answers at once.
_HOMES = {
    "AXES": "sentei.axes",
    "Connections": "sentei.axes.connections",
    "Entry": "sentei.conversion.plan",
    "Experts": "sentei.axes.experts",
    "Grid": "sentei.kernels.attention",
    "MixtureOfExperts": "sentei.axes.experts",
    "Plan": "sentei.conversion.plan",
    "SelfAttention": "sentei.axes.connections",
    "Selection": "sentei.core.selection",
    "SenteiError": "sentei.core.errors",
    "Tiles": "sentei.kernels.attention",
    "attend": "sentei.kernels.attention",
    "balancing": "sentei.axes.experts.balance",
    "convert": "sentei.conversion.plan",
    "load": "sentei.conversion.export",
    "prune": "sentei.pipeline",
    "trace": "sentei.circuit.tracing",
    "verify": "sentei.pipeline",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """The public name, from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sentei' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not, beside what the module holds."""
    return sorted({*globals(), *__all__})
