"""Which of two ways to compute the same is faster here: measured once for a case, then remembered in a file.

There is one file for each native library, torch and processor, choices/….json in the user's cache folder, with one
ratio a case. It is small, checked when it is read, and replaced whole. What it says chooses between two right answers
and nothing else. A file that is not what was written there, or cannot be, costs a measurement, and the reason says so.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path

import torch

from sentei.core import turns
from sentei.core.errors import FileError, ResourceError
from sentei.core.machine import cache_folder, processor
from sentei.core.storage import read_json, write_json
from sentei.core.turns import Action
from sentei.kernels import native

RUNS, LEAST = 4, 0.1  # pairs, and seconds they take together, at least: the first few of short calls mislead
SCHEMA = "sentei.choices/1"
MAX_BYTES, MAX_CASES, MAX_GAIN = 1 << 20, 4096, 1e4

Ways = tuple[Action, Action]
_known: dict[Hashable, tuple[float, str]] = {}


def gain(case: tuple[Hashable, ...], ways: Callable[[], Ways]) -> tuple[float, str]:
    """How many times as fast the second way is as the first, and where the number is from: "measured here", ….

    Args:
        case: what the ways are for: everything that the ratio depends on besides this machine.
        ways: makes the two calls; asked for only where the case is new.
    Cost: a look-up in a process that knows the case; reading a file of some kilobytes where another process measured
        it; else ten calls, or more until they took LEAST.
    """
    found = _known.get(case)
    if found is None:
        found = _known[case] = _remembered(", ".join(map(str, case)), ways)
    return found


def forget() -> None:
    """Lets this process read the file again."""
    _known.clear()


def _remembered(case: str, ways: Callable[[], Ways]) -> tuple[float, str]:
    """The gain of a case that is new to this process."""
    told = ""
    try:
        path = _path()
        told, gains = "", _read(path)
    except RuntimeError as error:
        path, told, gains = None, f", for this process alone: {error}", {}
    except FileError as error:
        told, gains = f" again: the file of earlier measurements had {error.got}", {}
    if case in gains:
        return gains[case], "measured here before"
    found = in_turn(*ways())
    if path is not None:
        try:
            write_json(path, {"schema": SCHEMA, "machine": _machine(), "gains": gains | {case: found}})
        except ResourceError as error:
            told = f", for this process alone: the file cannot be written ({error.got})"
    return found, f"measured here{told}"


def in_turn(first: Action, second: Action) -> float:
    """Seconds of the first ÷ seconds of the second: the median over neighbouring pairs."""
    pairs = turns.in_turn(first, second, runs=RUNS, least=LEAST)
    return statistics.median(one / other for one, other in zip(*pairs, strict=True))


@cache
def _machine() -> dict[str, str]:
    """What a gain belongs to."""
    return {"kernel": native.identity(), "torch": str(torch.__version__), "processor": processor()}


def _path() -> Path:
    digest = hashlib.sha256(json.dumps(_machine(), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "choices" / f"{digest[:32]}.json"


def _read(path: Path) -> dict[str, float]:
    """The gains in the file, none where there is no file.

    Raises:
        FileError: it is not what `_remembered` writes.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _not_ours(path, str(error.strerror)) from error
    found = read_json(path, MAX_BYTES)
    gains = found.get("gains")
    if found.get("schema") != SCHEMA or found.get("machine") != _machine() or type(gains) is not dict:
        raise _not_ours(path, "another schema or machine")
    if len(gains) >= MAX_CASES:
        raise _not_ours(path, f"{len(gains)} cases")
    if not all(type(number) is float and math.isfinite(number) and 1 / MAX_GAIN <= number <= MAX_GAIN
               for number in gains.values()):
        raise _not_ours(path, "gains that are no ratios")
    return gains


def _not_ours(path: Path, got: str) -> FileError:
    return FileError(str(path), expected=f"gains of {SCHEMA}", got=got, do="remove it: it is made again")
