"""Rivals that choose a token's depth as they decode, in the loop of their own package, each in its own environment."""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.rivals.table import ELSEWHERE


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """One row.

    Args:
        name: of the rival.
        package: whose environment it runs in.
        script: in `elsewhere`.
        settings: in words, as the script takes them.
        windows: how many windows are judged: some take a second a token.
    """

    name: str
    package: str
    script: str
    settings: tuple[str, ...]
    windows: int


DYNAMIC = {rival.name: rival for rival in (
    Dynamic(name="economize CALM", package="economize", script="run_economize.py", windows=1,
            settings=("state 0.99", "state 0.98", "state 0.95")),
    Dynamic(name="tide-inference", package="tide", script="run_tide.py", windows=4, settings=("defaults",)),
)}


def ran(bench, rival: Dynamic, setting: str, mode: str) -> dict:
    """What the script found in "losses" or "seconds", see `elsewhere/run_economize.py`."""
    with tempfile.TemporaryDirectory() as folder:
        windows, out = Path(folder) / "windows.safetensors", Path(folder) / "out.json"
        save_file({"tokens": bench.windows["verify"][:rival.windows].contiguous()}, str(windows))
        given = setting if rival.package == "economize" else str(bench.calibration)
        subprocess.run([bench.pythons[rival.package], str(ELSEWHERE / rival.script), str(bench.checkpoint.folder),
                        str(windows), mode, given, str(out)], check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def judged(bench, rival: Dynamic, setting: str) -> torch.Tensor:
    """Float64 [windows, T']: the losses of the tokens that are decoded."""
    found = ran(bench, rival, setting, "losses")
    print(rival.name, setting, found.get("exits", ""), flush=True)
    return torch.tensor(found["losses"], dtype=torch.float64)
