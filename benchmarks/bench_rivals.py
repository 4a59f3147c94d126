"""What other ways of making the default model faster cost it, at the same measured speed, beside sentei's own plans.

Run from the repository's root:

    python -m benchmarks.bench_rivals make judge --python optipfair=PYTHON torch-pruning=PYTHON …
    python -m benchmarks.bench_rivals time       (on a machine with nothing else to do; it ends within --minutes)
    python -m benchmarks.bench_rivals heal
    python -m benchmarks.bench_rivals page

`make` has every rival prune the model at a ladder of strengths and keeps which parts are left, no weights; `judge`
reads held-out text with each; `time` times each in turn with the dense model; `heal` trains what comes nearest to 1.5
times, all for the same minutes; `page` interpolates. All steps go on from what is in --results.

What a rival leaves runs natively wherever what sentei leaves does: the same layers, the same attention that keeps all.
So "dense" below is the model that prunes nothing with native layers, and speed is what pruning gives alone; what native
layers give to all is said apart. Models of one shape (as many layers, or neurons) are timed once. All have the same
calibration text and are judged on the same windows, which are those of `sentei prune`, with more to verify on; sentei's
plans are those that `sentei prune --speed` begins with, chosen on other windows. A decoding model has read its prompt
itself. CALM is not timed: it counts as fast as a model without the layers that it skips on the mean, as if choosing
cost nothing. Everything is float32. What runs in the environment of a package is in benchmarks/rivals/elsewhere.
"Ratio" is the perplexity over the dense one; between two strengths its logarithm is linear in the time.
"""

import argparse
import shutil
import time as clock
from pathlib import Path

import torch

from benchmarks.rivals import contest, healing, ours
from benchmarks.rivals.bench import Bench, key_of, timed_as
from benchmarks.rivals.page import write_page
from benchmarks.rivals.table import OURS, RIVALS, WHOLE
from sentei.budget.workload import Decode, workload_of
from sentei.conversion.plan import Plan
from sentei.core.machine import processor
from sentei.measurement.quality import compare, token_losses
from sentei.training.healing import Config

WORKLOADS = "prefill:1024", "decode:1024"
SPEEDS = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5)
RUNS, TOGETHER = 3, 5


def make(bench: Bench, asked: argparse.Namespace) -> None:
    """Finds the recipes that are not there yet: one for every setting of a rival, and sentei's for the workload."""
    points = bench.points("recipes")

    def found(name: str, setting: float, workload: str | None, recipe: dict) -> None:
        points.add({"rival": name, "setting": setting, "workload": workload, "recipe": recipe})
        print(workload or "any workload", name, setting, flush=True)

    for rival in (RIVALS[name] for name in asked.only if name in RIVALS):
        for setting in rival.ladder:
            if not points.where(rival=rival.name, setting=setting):
                found(rival.name, setting, None, rival.make(bench, setting))
    own = str(bench.workload)
    if OURS in asked.only and (asked.again or not points.where(rival=OURS, workload=own)):
        stages = bench.scratch / f"stages-{own.replace(':', '-')}"
        if asked.again:
            shutil.rmtree(stages, ignore_errors=True)
        for speed, plan in ours.plans(bench.model, bench.workload, bench.windows, SPEEDS, stages):
            found(OURS, speed, own, {"plan": plan.to_json()})


def judge(bench: Bench, asked: argparse.Namespace) -> None:
    """Reads the windows that are judged with the models that have not read them yet."""
    points, own = bench.points("quality"), None
    for row in bench.recipes():
        same = {"workload": str(bench.workload), "key": key_of(row["recipe"]), "healed": 0}
        if row["rival"] not in asked.only or points.where(**same):
            continue
        if "losses" in row["recipe"] and not isinstance(bench.workload, Decode):
            continue  # it decodes alone
        own = losses(bench, bench.whole()) if own is None else own
        quality = compare(own, losses(bench, row["recipe"]))
        points.add({**same, "rival": row["rival"], "setting": row["setting"], **figures(quality)})
        print(bench.workload, row["rival"], row["setting"], f"{1 / quality.value:.3f}", flush=True)


def losses(bench: Bench, recipe: dict) -> torch.Tensor:
    """Of the windows that are judged. What does not choose pages reads alike for all workloads, and is read once."""
    if "losses" in recipe:
        return torch.tensor(recipe["losses"], dtype=torch.float64)
    if Plan.from_json(recipe.get("plan", [])).standing("under").entries:
        return contest.losses(bench.workload, bench.judged, bench.made(recipe))
    path = bench.scratch / f"losses-{key_of(recipe)}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(token_losses(bench.made(recipe), bench.judged), path)
    return contest.of_workload(bench.workload, torch.load(path, weights_only=True))


def figures(quality) -> dict:
    """What a page says of a quality: the ratio of perplexities, its 95 % interval, and the dense perplexity."""
    return {"ratio": 1 / quality.value, "low": 1 / quality.high, "high": 1 / quality.low, "dense": quality.dense}


def time(bench: Bench, asked: argparse.Namespace) -> None:
    """Times the shapes that were not timed yet, some at once, in turn with both dense models, while there is time."""
    points, longest = bench.points("times"), 0.0
    way = "torch" if asked.torch else "native"
    kept = {"workload": str(bench.workload), "way": way}
    recipes = {timed_as(row["recipe"]): row["recipe"] for row in bench.recipes()
               if row["rival"] in asked.only and "losses" not in row["recipe"]}
    left = {key: recipe for key, recipe in recipes.items() if not points.where(key=key, **kept)}
    while left and clock.perf_counter() + longest < asked.until:
        start, batch = clock.perf_counter(), dict(list(left.items())[:TOGETHER])
        models = {"transformers": bench.model}
        models |= {name: bench.made(recipe, not asked.torch) for name, recipe in ((WHOLE, bench.whole()),
                                                                               *batch.items())}
        seconds = contest.times(bench.workload, bench.windows["verify"][0], models, RUNS)
        for key in batch:
            points.add({**kept, "key": key, "transformers": seconds["transformers"], "dense": seconds[WHOLE],
                        "pruned": seconds[key], "machine": processor(), "threads": torch.get_num_threads()})
            del left[key]
        longest = max(longest, clock.perf_counter() - start)
        print(bench.workload, f"{longest:.0f} s for {len(batch)}, {len(left)} left", flush=True)
    if left:
        print(f"{bench.workload}: no time for {len(left)}; the same command goes on", flush=True)


def heal(bench: Bench, asked: argparse.Namespace) -> None:
    """Heals what comes nearest to 1.5 times, and judges it."""
    points = bench.points("quality")
    for row in healing.nearest(bench, asked.settings):
        same = {"workload": str(bench.workload), "key": key_of(row["recipe"]), "healed": asked.minutes}
        if row["rival"] not in asked.only or points.where(**same):
            continue
        model = healing.healed(bench, row["recipe"], healing.texts_of(bench, row["recipe"]),
                               Config(minutes=asked.minutes))
        own = losses(bench, bench.whole())
        quality = compare(own, contest.losses(bench.workload, bench.judged, model))
        points.add({**same, "rival": row["rival"], "setting": row["setting"], **figures(quality)})
        print(bench.workload, row["rival"], row["setting"], f"healed {1 / quality.value:.3f}", flush=True)


def main() -> None:
    """Does the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"make": make, "judge": judge, "time": time, "heal": heal}
    parser.add_argument("steps", nargs="+", choices=[*steps, "page"])
    parser.add_argument("--workload", nargs="*", default=WORKLOADS)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/rivals"))
    parser.add_argument("--scratch", type=Path, default=Path("sentei-out/rivals"), help="for what can be made again")
    parser.add_argument("--only", nargs="*", default=[*RIVALS, OURS], help="rivals by name")
    parser.add_argument("--again", action="store_true", help="measure anew what sentei's plans are made of")
    parser.add_argument("--torch", action="store_true", help="time all without native layers")
    parser.add_argument("--settings", type=float, nargs="*", default=[], help="to heal, instead of the nearest")
    parser.add_argument("--minutes", type=float, default=10.0, help="time: of all; heal: of a model, processor time")
    parser.add_argument("--python", nargs="*", default=[], metavar="PACKAGE=PYTHON")
    asked = parser.parse_args()
    asked.until = clock.perf_counter() + 60 * asked.minutes
    for name in (step for step in asked.steps if step != "page"):
        for workload in asked.workload:
            bench = Bench(workload_of(workload), asked.results, asked.scratch,
                          dict(pair.split("=", 1) for pair in asked.python))
            with torch.set_grad_enabled(name == "heal"):
                steps[name](bench, asked)
    if "page" in asked.steps:
        write_page(__doc__, asked.results)


if __name__ == "__main__":
    main()
