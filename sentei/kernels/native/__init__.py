"""The C++ behind the fused kernels: built with the package, loaded by path, fed with plain pointers.

There are no torch headers, so one build serves every torch; where no compiler was present the library is absent and
`missing` says so.
"""

import ctypes
import hashlib
from functools import cache
from pathlib import Path

from sentei.core.errors import ImplError

LIBRARY = "_native*.so"
ABI = 2  # of attention.cpp's sentei_abi()


@cache
def missing() -> str:
    """Why there is no native library to call; empty when there is one. Looked up once: every attention asks."""
    found = sorted(Path(__file__).parent.glob(LIBRARY))
    if not found:
        return "a package without its native library"
    try:
        library = ctypes.CDLL(str(found[0]))
        version = library.sentei_abi()
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
    return ctypes.CDLL(str(sorted(Path(__file__).parent.glob(LIBRARY))[0]))


def identity() -> str:
    """What tells this library from another: its digest, or why there is none."""
    return missing() or hashlib.sha256(sorted(Path(__file__).parent.glob(LIBRARY))[0].read_bytes()).hexdigest()
