"""The rivals that are a smaller model: one row each, with the settings that are tried first."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import nn

from benchmarks.rivals import formulas
from sentei.axes.heads import Config as Heads
from sentei.conversion.plan import Plan

ELSEWHERE = Path(__file__).parent / "elsewhere"
OURS = "sentei"


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One row.

    Args:
        name: of the rival, also that of its files.
        setting: what the number of a setting is.
        ladder: settings that are tried first.
        step: settings are multiples of it.
        whole: the setting that leaves everything as it is, or None.
        write: writes the file of a setting, see `rebuilt`; called with a bench, the setting and a path.
        plan: instead of a file: the plan of a setting; called with the model, sentei's plans as JSON and the setting.
    """

    name: str
    setting: str
    ladder: tuple[float, ...]
    step: float = 1
    whole: float | None = None
    write: Callable[[object, float, Path], None] | None = None
    plan: Callable[[nn.Module, list, float], Plan] | None = None

    @classmethod
    def ours(cls) -> "Rival":
        """sentei's own plans."""
        return cls(name=OURS, setting="plan", ladder=(), plan=lambda model, plans, place: Plan.from_json(
            plans[int(place)]))

    def nearest(self, about: dict[float, float], target: float) -> float:
        """The setting that is about as fast as the target, or the fastest or slowest there is.

        Args:
            about: speed-ups by setting, of the ladder, with those of `whole`; between two of them the time is taken to
                be linear.
        """
        if not about:
            return self.ladder[0]
        about = about | {} if self.whole is None else about | {self.whole: 1.0}
        settings = sorted(about)
        for low, high in pairwise(settings):
            first, last = 1 / about[low], 1 / about[high]
            if first != last and min(first, last) <= 1 / target <= max(first, last):
                share = (first - 1 / target) / (first - last)
                return self.step * round((low + share * (high - low)) / self.step)
        return min(about, key=lambda setting: abs(1 / about[setting] - 1 / target))


def _formula(formula: Callable) -> Callable:
    return lambda bench, setting, path: formula(bench.model, bench.windows["calibrate"], setting, path)


def _elsewhere(package: str, script: str, *words: str) -> Callable:
    """A script that runs in the environment of a package."""
    def write(bench, setting: float, path: Path) -> None:
        own = words or (f"{setting:g}",)
        subprocess.run([bench.pythons[package], str(ELSEWHERE / script), str(bench.checkpoint.folder),
                        str(bench.calibration), *own, f"{setting:g}", str(path)], check=True)

    return write


def _mean_heads(model: nn.Module, plans: list, kept: float) -> Plan:
    return Plan.everywhere(range(model.config.num_hidden_layers), "heads", Heads(num_kv_heads=int(kept)))


RIVALS = {rival.name: rival for rival in (
    Rival(name="ShortGPT", setting="layers left out", ladder=(16,), whole=0,
          write=lambda bench, setting, path: _formula(formulas.short_gpt)(bench, int(setting), path)),
    Rival(name="optipfair width", setting="% of the neurons pruned", ladder=(80,), step=10, whole=0,
          write=_elsewhere("optipfair", "run_optipfair.py", "width")),
    Rival(name="torch-pruning widths", setting="ratio of stream and neurons", ladder=(0.15, 0.35), step=0.05, whole=0,
          write=_elsewhere("torch-pruning", "run_torch_pruning.py", "widths")),
    Rival(name="torch-pruning network", setting="ratio of neurons", ladder=(0.8,), step=0.1, whole=0,
          write=_elsewhere("torch-pruning", "run_torch_pruning.py", "network")),
    Rival(name="mean-pooled heads", setting="key/value heads", ladder=(1,), plan=_mean_heads),
    Rival(name="CMoE", setting="shared and as many chosen experts of 16", ladder=(1, 4),
          write=_elsewhere("cmoe", "run_cmoe.py")),
    Rival(name="magnitude", setting="share of zeros", ladder=(0.5,), write=_formula(formulas.magnitude)),
    Rival(name="Wanda", setting="share of zeros", ladder=(0.5,), write=_formula(formulas.wanda)),
)}
