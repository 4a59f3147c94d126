"""The rivals: one row each, with the settings that are tried."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rivals import formulas
from benchmarks.rivals.recipe import lettered, masked
from sentei.axes.heads import Config as Heads
from sentei.conversion.plan import Plan

ELSEWHERE = Path(__file__).parent / "elsewhere"
OURS, WHOLE, CALM, DEPTH = "sentei", "nothing pruned", "CALM (economize)", "ShortGPT"
LAYERS, PERCENT = (3, 6, 10, 15), (12.5, 25, 50, 75, 87.5)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One row.

    Args:
        name: of the rival.
        setting: what the number of a setting is.
        ladder: the settings.
        make: the recipe of a setting, see `recipe`, with "package" where one made it, or {"plan": a plan as JSON}, or
            where a package reads text itself {"losses": of the windows that are judged, "ran": layers, the mean};
            called with a bench and the setting.
    """

    name: str
    setting: str
    ladder: tuple[float, ...]
    make: Callable[[object, float], dict]


def _formula(formula: Callable) -> Callable:
    return lambda bench, setting: formula(bench.model, bench.windows["calibrate"], setting)


def _elsewhere(package: str, script: str, *words: str, reads: str = "calibrate") -> Callable:
    """A script that runs in the environment of a package, on the windows of a use."""
    def make(bench, setting: float) -> dict:
        path = bench.scratch / f"{'-'.join((script, *words))}.json"
        subprocess.run([bench.pythons[package], str(ELSEWHERE / script), str(bench.checkpoint.folder),
                        str(bench.file(reads)), *words, f"{setting:g}", str(path)], check=True)
        return packed(bench.model.config, json.loads(path.read_text(encoding="utf-8")), setting)

    return make


def packed(config: object, found: dict, setting: float) -> dict:
    """The recipe of what a script has found, of lists of numbers.

    Args:
        config: of the dense model.
        found: "gone", layers in the order in which they go, or what `recipe` names, as numbers.
    """
    gone = found.get("gone", [])[:int(setting)]
    recipe = {"layers": [layer for layer in range(config.num_hidden_layers) if layer not in gone]}
    for name in ("package", "active", "losses", "ran"):
        recipe |= {name: found[name]} if name in found else {}
    if "neurons" in found:
        recipe["neurons"] = [masked(kept, config.intermediate_size) for kept in found["neurons"]]
    if "stream" in found:
        recipe["stream"] = masked(found["stream"], config.hidden_size)
    if "experts" in found:
        recipe["experts"] = [{"groups": lettered(layer["shared"], layer["experts"]), "routers": layer["routers"]}
                             for layer in found["experts"]]
    return recipe


def _mean_heads(bench, kept: float) -> dict:
    layers = range(bench.model.config.num_hidden_layers)
    return {"plan": Plan.everywhere(layers, "heads", Heads(num_kv_heads=int(kept))).to_json()}


RIVALS = {rival.name: rival for rival in (
    Rival(name=DEPTH, setting="layers left out", ladder=LAYERS,
          make=lambda bench, number: formulas.short_gpt(bench.model, bench.windows["calibrate"], int(number))),
    Rival(name="SLEB (economize)", setting="layers left out", ladder=LAYERS, make=_elsewhere(
        "economize", "run_sleb.py")),
    Rival(name="Wanda width", setting="% of the neurons left out", ladder=PERCENT, make=_formula(formulas.wanda_width)),
    Rival(name="optipfair width", setting="% of the neurons left out", ladder=PERCENT,
          make=_elsewhere("optipfair", "run_optipfair.py")),
    Rival(name="torch-pruning network (magnitude)", setting="% of the neurons left out", ladder=PERCENT,
          make=_elsewhere("torch-pruning", "run_torch_pruning.py", "network")),
    Rival(name="torch-pruning widths", setting="% of stream and neurons left out", ladder=(10, 20, 35, 50),
          make=_elsewhere("torch-pruning", "run_torch_pruning.py", "widths")),
    Rival(name="mean-pooled heads", setting="key/value heads", ladder=(1,), make=_mean_heads),
    Rival(name="CMoE", setting="experts of 16 for all, and as many chosen", ladder=(2, 4, 6),
          make=_elsewhere("cmoe", "run_cmoe.py")),
    Rival(name=CALM, setting="confidence at which a token leaves", ladder=(0.9, 0.7, 0.5),
          make=_elsewhere("economize", "run_calm.py", reads="judged")),
)}
