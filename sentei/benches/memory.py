"""How much memory does a forward take beside its inputs and its output?

Each call runs once, in a process of its own: the peak of its resident memory is set back when the inputs and the plan
are there, and read after the call (Linux's /proc). What the process holds by then, and the output, are taken off.
Seconds are of that one call, so they are only roughly comparable.
"""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sentei.benches.attention import Case, sdpa
from sentei.core.errors import UnsupportedError
from sentei.kernels.attention import Tiles, attend
from sentei.measurement.latency import Comparison, measured
from sentei.measurement.outcome import today

CASES = {"exact": Case(9, 3, 64, 65_536), "sparse": Case(9, 3, 64, 65_536, kept=0.125)}
MIB = 1 << 20


def rows(names: list[str], runs: int, absent: Callable[[str], None]) -> Iterator[dict]:
    """One row for every case: those of `sentei.benches.table`, and ours_mib and peer_mib.

    Args:
        names: of CASES.
        runs: not used: memory does not vary as seconds do, and a call takes most of a minute.
        absent: not used: torch is always there.
    Raises:
        UnsupportedError: no Linux.
    """
    for name in names:
        own, peer = (in_fresh_process(name, kernel) for kernel in KERNELS)
        pair = Comparison(dense=[peer["seconds"]], pruned=[own["seconds"]], date=today())
        yield {**measured("memory", str(CASES[name]), "torch sdpa, exact", pair),
               "ours_mib": own["bytes"] / MIB, "peer_mib": peer["bytes"] / MIB}


def in_fresh_process(name: str, kernel: str) -> dict:
    """The extra bytes and the seconds of one call, measured by `report` in a new Python."""
    code = f"from sentei.benches.memory import report; report({name!r}, {kernel!r})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    return json.loads(done.stdout)


def ours(case: Case) -> torch.Tensor:
    """sentei's kernel: the dense plan where all is kept."""
    return attend(*case.tensors, Tiles(grid=case.grid) if case.kept == 1 else case.tiles, impl="fused_cpp")


KERNELS = {"ours": ours, "sdpa": sdpa}


@torch.no_grad()
def report(name: str, kernel: str) -> None:
    """Makes one call in this process and prints its extra bytes and seconds as JSON.

    Raises:
        UnsupportedError: no Linux.
    """
    case = CASES[name]
    KERNELS[kernel](replace(case, tokens=256))  # threads, libraries and torch's own tables are there before
    _ = case.tensors, case.tiles
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    except OSError as error:
        raise UnsupportedError("bench memory", expected="Linux's /proc/self/clear_refs", got=str(error),
                               do="measure memory on Linux") from error
    # Memory that was freed and is still the process's would be taken again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    before, start = resident("VmRSS"), time.perf_counter()
    output = KERNELS[kernel](case)
    seconds = time.perf_counter() - start
    own = output.numel() * output.element_size()
    print(json.dumps({"bytes": resident("VmHWM") - before - own, "seconds": seconds}))


def resident(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith(name + ":")).split()[1])
