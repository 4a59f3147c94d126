"""This machine: its processor, and where its user keeps what can be made again."""

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def processor() -> str:
    """The processor's name and its widest vector instructions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def cache_folder() -> Path:
    """~/.cache/sentei, which may not exist.

    Raises:
        RuntimeError: this user has no home.
    """
    return Path.home() / ".cache" / "sentei"
