"""Memory that no cache holds: how much of it, and how fast it is read."""

import ctypes
import os

import torch

from sentei.core.errors import ResourceError
from sentei.kernels import native
from sentei.measurement.io_model import cache_sizes

TIMES, LEAST = 4, 256 << 20  # a cache that replaces at random still holds some of twice its size
LINE = 128  # floats that `sentei_read` adds up at once


def size() -> int:
    """Bytes to cycle through so that none is in a cache when its turn comes: 4 times the largest cache there is.

    A virtual machine may see its host's cache, hundreds of MiB; where the system names none it is 256 MiB.

    Raises:
        ResourceError: that is more than a quarter of the memory.
    """
    wanted = max(TIMES * max(cache_sizes().values(), default=0), LEAST)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory // 4:
        raise ResourceError("bench", expected=f"{wanted >> 18:,} MiB of memory, 16 times the largest cache",
                            got=f"{memory >> 20:,} MiB", do="use a machine with more memory")
    return wanted


def read(memory: torch.Tensor) -> None:
    """Reads contiguous memory with a native loop and torch's number of threads, but for less than 512 bytes at its end.

    Raises:
        ResourceError: memory ran out.
    """
    floats = memory.numel() * memory.element_size() // 4 // LINE * LINE
    if native.load().sentei_read(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(floats),
                                 ctypes.byref(ctypes.c_float()), ctypes.c_int64(torch.get_num_threads())):
        raise ResourceError("bench", expected="memory for a sum of every piece", got="none left",
                            do="use a machine with more memory")
