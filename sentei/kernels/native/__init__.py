"""The C++ behind the fused kernels: built with the package, loaded by path, fed with plain pointers.

There are no torch headers, so one build serves every torch; where no compiler was present the library is absent and
`missing` says so.
"""

import ctypes
from functools import cache
from pathlib import Path

from sentei.core.errors import ImplError
from sentei.core.storage import sha256

LIBRARY = "_native*.so"
ABI = 19  # of attention.cpp's sentei_abi()
BAD_PLAN = 2  # the status of a call whose plan is none; of call.h
MACHINE = -1  # the instruction set to run: the best this processor has; the tests run each, see `machines`


def _path() -> Path | None:
    """Where the library is, if it was built."""
    return min(Path(__file__).parent.glob(LIBRARY), default=None)


@cache
def missing() -> str:
    """Why there is no native library to call; empty when there is one. Looked up once: every attention asks."""
    path = _path()
    if path is None:
        return "a package without its native library"
    try:
        version = ctypes.CDLL(str(path)).sentei_abi()
    except (OSError, AttributeError) as error:
        return f"a native library that cannot be loaded ({error})"
    return "" if version == ABI else f"a native library of version {version}, not {ABI}"


@cache
def load() -> ctypes.CDLL:
    """The native library.

    Raises:
        ImplError: there is none that fits.
    """
    if missing():
        raise ImplError("native", expected="the native library beside the package", got=missing(),
                        do="install a C++17 compiler and install sentei again, or use impl='eager'")
    return ctypes.CDLL(str(_path()))


def machines() -> int:
    """How many instruction sets this processor can run, numbered from the plainest, 0."""
    return load().sentei_machines()


def takes_pairs() -> bool:
    """Whether it multiplies pairs of bfloat16 numbers as such: where the processor has that and it is the faster."""
    return bool(load().sentei_takes_pairs(MACHINE))


def identity() -> str:
    """What tells this library from another: its digest, or why there is none."""
    return missing() or sha256(_path())
