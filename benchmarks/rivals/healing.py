"""Heals the models of recipes as `sentei prune --heal` heals plans: low-rank changes of all linear layers, by KL from
the dense model on the same text, in processor time, so that what else runs on the machine takes no minutes away.
"""

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.rivals import ours
from benchmarks.rivals.bench import Bench
from benchmarks.rivals.page import rows_of
from benchmarks.rivals.recipe import build
from sentei.budget.distilled import checks_of, context_of, text_for
from sentei.conversion import adapters
from sentei.conversion.checkpoints import load_tokenizer
from sentei.conversion.plan import Plan, complete, convert
from sentei.conversion.student import adapted, student_of
from sentei.measurement.text import read_text
from sentei.training.healing import Config, Texts, heal

TARGET = 1.5


def nearest(bench: Bench, settings: list[float]) -> list[dict]:
    """The recipes of these settings, or for every rival the one whose measured speed is nearest to TARGET."""
    recipes = bench.recipes()
    if settings:
        return [row for row in recipes if row["setting"] in settings]
    timed = [row for row in rows_of(bench.results, str(bench.workload)) if row.setting is not None]
    best = {row.name: min((other for other in timed if other.name == row.name),
                          key=lambda other: abs(1 / other.speed - 1 / TARGET)).setting for row in timed}
    return [row for row in recipes if best.get(row["rival"]) == row["setting"]]


def texts_of(bench: Bench, recipe: dict) -> Texts:
    """What a recipe's model is healed on: all of the text that nothing is chosen or judged on."""
    context = context_of(Plan.from_json(recipe.get("plan", [])), bench.workload.tokens)
    rows = text_for(load_tokenizer(bench.checkpoint), read_text(None).text, bench.windows, context)
    return Texts(rows=rows, checks=checks_of(bench.windows["choose"], context), seed=Config.seed)


def healed(bench: Bench, recipe: dict, texts: Texts, config: Config) -> nn.Module:
    """A recipe's model after so many minutes of healing, with native layers."""
    plan = Plan.from_json(recipe.get("plan", []))
    student = student_of(bench.model, plan, bench.library(plan))[0] if plan.entries else build(bench.model, recipe)
    student.requires_grad_(False)
    torch.manual_seed(config.seed)
    adapted(student, config.rank)
    convert(student, plan.standing("under"))
    with tempfile.TemporaryDirectory() as folder:
        heal(bench.model, student, texts, config, Path(folder), job={}, step=lambda note: print(note, flush=True),
             now=time.process_time)
    adapters.remove(convert(student, Plan()), fold=True)
    standing = plan.standing("under")
    return complete(student, standing if standing.entries else ours.whole_plan(student, bench.workload))
