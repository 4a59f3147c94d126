"""The C++ behind the fused kernels: built with the package, loaded by path, fed with plain pointers.

There are no torch headers, so one build serves every torch; where no compiler was present the library is absent and
`load` says so.
"""

import ctypes
from functools import cache
from pathlib import Path

from sentei.core.errors import ImplError

LIBRARY = "_native*.so"


@cache
def present() -> bool:
    """Whether the native library was built; looked up once, because every call of attention asks."""
    return any(Path(__file__).parent.glob(LIBRARY))


@cache
def load() -> ctypes.CDLL:
    """The native library.

    Raises:
        ImplError: it was not built.
    """
    found = sorted(Path(__file__).parent.glob(LIBRARY))
    if not found:
        raise ImplError("native", expected="the native library beside the package", got="none",
                        do="install a C++17 compiler and install sentei again, or use impl='eager'")
    library = ctypes.CDLL(str(found[0]))
    for name in ("sentei_attend", "sentei_shares"):
        getattr(library, name).restype = None
    return library
