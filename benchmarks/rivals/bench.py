"""The default model, the text, and the models that recipes make of it: what all steps of `bench_rivals` share."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.rivals import ours
from benchmarks.rivals.points import Points
from benchmarks.rivals.recipe import build, shape_of, shared_copy
from benchmarks.rivals.table import OURS, RIVALS
from sentei.budget.calibration import Library
from sentei.budget.workload import Workload
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, complete, convert, place
from sentei.measurement.text import read_text, windows_of

CUTS, WISHED = {"calibrate": 1, "choose": 2, "verify": 8}, {"calibrate": 3}


@dataclass(frozen=True)
class Bench:
    """A workload with its model, its windows and what was found so far.

    Args:
        workload: what is to become faster.
        results: a folder for recipes, quality and times.
        scratch: a folder for what can be made again.
        pythons: the interpreter of the environment that has a rival's package, by the package.
    """

    workload: Workload
    results: Path
    scratch: Path
    pythons: dict[str, str]

    @cached_property
    def checkpoint(self):
        """The default model's files."""
        return locate(None)

    @cached_property
    def model(self) -> nn.Module:
        """Dense, float32; no step changes it for good."""
        return load_model(self.checkpoint)

    @cached_property
    def windows(self) -> dict[str, torch.Tensor]:
        """Those of `sentei prune`, with more to verify on."""
        return windows_of(load_tokenizer(self.checkpoint), read_text(None).text, length=self.workload.tokens,
                          needed=CUTS, wished=WISHED)

    @cached_property
    def library(self) -> Library:
        """The statistics of the calibration windows that plans want."""
        return Library(self.model, self.windows["calibrate"], self.workload.lever)

    def points(self, kind: str) -> Points:
        """What was found: "recipes", "quality" or "times"."""
        return Points(self.results / f"{kind}.jsonl")

    def file(self, use: str) -> Path:
        """The windows of a use, for scripts that know nothing of sentei."""
        path = self.scratch / f"{use}-{self.workload.tokens}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.judged if use == "judged" else self.windows[use]
        save_file({"tokens": rows.contiguous()}, str(path))
        return path

    @property
    def judged(self) -> torch.Tensor:
        """The windows that are judged: every other one of those to verify on."""
        return self.windows["verify"][::2]

    def recipes(self) -> list[dict]:
        """The newest recipe of every rival's settings, and of sentei's for this workload."""
        found = {(row["rival"], row["setting"]): row for row in self.points("recipes").rows
                 if row["workload"] in (None, str(self.workload)) and row["rival"] in (*RIVALS, OURS)}
        return list(found.values())

    def whole(self) -> dict:
        """The recipe that leaves all."""
        return {"layers": list(range(self.model.config.num_hidden_layers))}

    def made(self, recipe: dict, native: bool = True) -> nn.Module:
        """A recipe's model. What is left of it runs natively where that is faster, whoever has pruned it, or by torch.

        Raises:
            SenteiError: see `conversion.plan.convert`.
        """
        if "plan" not in recipe:
            model = build(self.model, recipe)
            return complete(model, ours.whole_plan(model, self.workload)) if native else model
        plan = Plan.from_json(recipe["plan"])
        statistics, model = self.library(plan), shared_copy(self.model)
        if native and not plan.standing("under").entries:  # of a rival: its attention is kept by our kernel, too
            plan = Plan((*plan.entries, *ours.whole_plan(model, self.workload).entries))
        return (convert if native else place)(model, plan, statistics)


def digest(value: object) -> str:
    """Sixteen hexadecimal digits that differ for different JSON-able values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def key_of(recipe: dict) -> str:
    """What tells a recipe's model from others."""
    return digest({name: value for name, value in recipe.items() if name != "package"})


def timed_as(recipe: dict) -> str:
    """What tells the time of a recipe's model from others': widths of one shape take as long, whatever is left."""
    return key_of(recipe) if "plan" in recipe else digest(shape_of(recipe))
