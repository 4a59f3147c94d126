"""How much memory there is, asked before it is taken."""

import os
from pathlib import Path

from sentei.core.errors import ResourceError


def available_memory() -> int:
    """Bytes that can be taken without swapping: the kernel's estimate, which counts the page cache as free."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(where: Path | str, needed: int, what: str = "the weights") -> None:
    """Raises ResourceError when fewer than `needed` bytes are available for what `where` is about."""
    available = available_memory()
    if needed > available:
        raise ResourceError(str(where), expected=f"{needed / 1e9:.1f} GB of memory for {what}",
                            got=f"{available / 1e9:.1f} GB available",
                            do="close other programs, use --dtype bfloat16, or choose a smaller model")
