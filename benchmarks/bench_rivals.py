"""What other ways of making the default model faster cost it, at the same measured speed, beside sentei's own plans.

Run from the repository's root, for each workload; the steps keep what they find in --work:

    python -m benchmarks.bench_rivals front find time judge --workload prefill:1024
    python -m benchmarks.bench_rivals page

`front` makes sentei's plans, from dense to the leanest; `find` times a few settings of each, `time` those that come
nearest to 1.2, 1.5 and 2 times dense, and `judge` reads text with these.

`--python optipfair=PYTHON` names the interpreter of an environment that has a rival's package; what runs there is in
benchmarks/rivals/elsewhere and knows nothing of sentei. Everything is float32 and unhealed. All have the same
calibration text and are judged on the same windows, which are those of `sentei prune`, with more to verify on. Dense is
transformers' sdpa path, timed in turn with each. Ours run what is beside attention natively, as `convert` leaves them,
the rivals through torch, as published: a part of our speed is that. "Ratio" is the perplexity over the dense one with
its 95 % interval.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.rivals import contest, ours
from benchmarks.rivals.contest import Contender
from benchmarks.rivals.page import write_page
from benchmarks.rivals.rebuilt import rebuild
from benchmarks.rivals.table import OURS, RIVALS, Rival
from sentei.budget.calibration import calibrate
from sentei.budget.workload import Workload, workload_of
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, place, wanted
from sentei.core.storage import write_json
from sentei.measurement.quality import compare
from sentei.measurement.text import read_text, windows_of

TARGETS = (1.2, 1.5, 2.0)
VERIFY, RUNS, PLACES = 4, 2, 6


class Bench:
    """The model, the windows and what was found of a workload so far.

    `judged` is how many of the windows to verify on are read, `clock` what is timed by, `settings` what to time.
    """

    def __init__(self, workload: Workload, work: Path, pythons: dict[str, str], judged: int, clock: Callable):
        self.checkpoint, self.workload, self.work, self.pythons = locate(None), workload, work, pythons
        self.judged, self.clock, self.settings = judged, clock, []
        self.windows = windows_of(load_tokenizer(self.checkpoint), read_text(None).text, length=workload.tokens,
                                  needed={**workload.windows, "choose": 2, "verify": VERIFY}, wished={"calibrate": 3})
        self.model = load_model(self.checkpoint)
        work.mkdir(parents=True, exist_ok=True)
        self.calibration = work / f"calibration-{workload.tokens}.safetensors"
        save_file({"tokens": self.windows["calibrate"]}, str(self.calibration))
        self.path = work / f"{str(workload).replace(':', '-')}.json"
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.seen = self.read = None

    def keep(self, *names: str) -> None:
        """Writes what was found under these names; other processes may write other names."""
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        write_json(self.path, before | {name: self.found[name] for name in names})

    def rows(self, rival: str, kind: str) -> dict:
        """What was found of a rival, by setting."""
        return self.found.setdefault(rival, {}).setdefault(kind, {})

    def contender(self, rival: Rival, setting: float) -> Contender:
        """A rival with a setting; its file is written the first time."""
        if rival.plan is not None:
            plan = rival.plan(self.model, self.found.get("plans", []), setting)
            ours = rival.name == OURS
            return Contender(ready=lambda: self.converted(plan, convert if ours else place), few=ours)
        path = self.work / f"{rival.name}-{setting:g}-{self.workload.tokens}.safetensors".replace(" ", "-")
        if not path.exists():
            convert(self.model, Plan())
            rival.write(self, setting, path)
        convert(self.model, Plan())
        model = rebuild(self.model, path)
        return Contender(ready=lambda: model)

    def converted(self, plan: Plan, put: Callable) -> nn.Module:
        """The one model that all plans share, by a plan; what another's leaves runs as transformers runs it."""
        if wanted(plan) and self.seen is None:
            names: dict[int, set[str]] = {}
            for every in map(Plan.from_json, self.found.get("plans", [])):
                for layer, wants in wanted(every).items():
                    names.setdefault(layer, set()).update(wants)
            self.seen = calibrate(self.model, self.windows["calibrate"], names)
        return put(self.model, plan, self.seen)

    def reading(self) -> tuple[list, torch.Tensor]:
        """What the dense model has of the windows: the beginnings of their reading, and the losses."""
        if self.read is None:
            windows, dense = self.windows["verify"][:self.judged], self.dense()
            prefixes = [self.workload.prefix(dense.ready(), row) for row in windows]
            self.read = prefixes, contest.losses(self.workload, windows, [], dense)["itself"]
        return self.read

    def dense(self) -> Contender:
        """transformers' own."""
        return Contender(ready=lambda: convert(self.model, Plan()))


def front(bench: Bench, rival: Rival) -> None:
    """Finds sentei's plans."""
    if rival.name != OURS:
        return
    pairs = ours.front(bench.model, bench.workload, bench.windows)
    bench.found["plans"] = [candidate.plan.to_json() for _, candidate in pairs]
    bench.found["foreseen"] = [speed for speed, _ in pairs]
    bench.keep("plans", "foreseen")
    print([f"{speed:.2f}" for speed, _ in pairs])


def find(bench: Bench, rival: Rival) -> None:
    """Times the settings of a ladder once."""
    if bench.rows(rival.name, "about"):
        return
    ladder = rival.ladder if rival.name != OURS else places(bench.found["foreseen"])
    if len(ladder) > 1 or rival.whole is not None:
        for setting, pair in timed(bench, rival, ladder, 1).items():
            bench.rows(rival.name, "about")[f"{setting:g}"] = ratio(pair)
            print(bench.workload, rival.name, setting, f"about {ratio(pair):.2f}", flush=True)
        bench.keep(rival.name)


def places(foreseen: list[float]) -> list[int]:
    """The places of a few plans, from the one that is foreseen to be slowest but for dense to the fastest."""
    last = len(foreseen) - 1
    return sorted({max(1, round(part * last / PLACES)) for part in range(PLACES + 1)})


def time(bench: Bench, rival: Rival) -> None:
    """Times the settings that come nearest to the targets, in turn with dense."""
    before = bench.rows(rival.name, "times")
    settings = [setting for setting in chosen(bench, rival) if f"{setting:g}" not in before]
    pairs = timed(bench, rival, settings, RUNS) if settings else {}
    found = {f"{setting:g}": pair for setting, pair in pairs.items()}
    for setting, pair in found.items():
        print(bench.workload, rival.name, setting, f"{ratio(pair):.3f}", flush=True)
    before |= found
    bench.keep(rival.name)


def chosen(bench: Bench, rival: Rival) -> list[float]:
    """The settings that were asked for, or those for the targets, each once."""
    if bench.settings:
        return bench.settings
    about = {float(setting): speed for setting, speed in bench.rows(rival.name, "about").items()}
    return sorted({rival.nearest(about, target) for target in TARGETS})


def timed(bench: Bench, rival: Rival, settings: list[float], runs: int) -> dict[float, dict[str, list[float]]]:
    """Seconds of dense and of a rival's settings, in turn."""
    contenders = {setting: bench.contender(rival, setting) for setting in settings}
    seconds = contest.times(bench.workload, bench.windows["verify"][0], {"dense": bench.dense(), **contenders}, runs,
                            bench.clock)
    return {setting: {"dense": seconds["dense"], "pruned": seconds[setting]} for setting in settings}


def ratio(seconds: dict[str, list[float]]) -> float:
    """The median of dense ÷ pruned, pair by pair."""
    pairs = sorted(dense / pruned for dense, pruned in zip(seconds["dense"], seconds["pruned"], strict=True))
    return (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2


def judge(bench: Bench, rival: Rival) -> None:
    """Reads the windows to verify on with every setting that was timed."""
    windows, (prefixes, own) = bench.windows["verify"][:bench.judged], bench.reading()
    for setting in bench.rows(rival.name, "times"):
        if setting in bench.rows(rival.name, "quality"):
            continue
        found = contest.losses(bench.workload, windows, prefixes, bench.contender(rival, float(setting)))
        quality = {who: compare(own, losses) for who, losses in found.items()}
        bench.rows(rival.name, "quality")[setting] = {who: [1 / one.value, 1 / one.high, 1 / one.low, one.dense]
                                                      for who, one in quality.items()}
        bench.keep(rival.name)
        print(bench.workload, rival.name, setting, bench.rows(rival.name, "quality")[setting], flush=True)


def main() -> None:
    """Does one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"front": front, "find": find, "time": time, "judge": judge}
    parser.add_argument("steps", nargs="+", choices=[*steps, "page"])
    parser.add_argument("--workload", type=workload_of, default="prefill:1024")
    parser.add_argument("--work", type=Path, default=Path("sentei-out/rivals"), help="a folder for what is found")
    parser.add_argument("--only", nargs="*", default=[*RIVALS, OURS], help="rivals by name")
    parser.add_argument("--windows", type=int, default=VERIFY, help="how many are judged")
    parser.add_argument("--settings", type=float, nargs="*", default=[], help="instead of those near the targets")
    parser.add_argument("--processor", action="store_true", help="time the processor, on one thread, not the clock")
    parser.add_argument("--python", nargs="*", default=[], metavar="PACKAGE=PYTHON")
    asked = parser.parse_args()
    if asked.steps == ["page"]:
        write_page(__doc__, asked.work, TARGETS)
        return
    workload = asked.workload if isinstance(asked.workload, Workload) else workload_of(asked.workload)
    if asked.processor:
        torch.set_num_threads(1)
    bench = Bench(workload, asked.work, dict(pair.split("=", 1) for pair in asked.python), asked.windows,
                  process_time if asked.processor else perf_counter)
    bench.settings = asked.settings
    named = {**RIVALS, OURS: Rival.ours()}
    for name in asked.only:
        for step in asked.steps:
            steps[step](bench, named[name])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
