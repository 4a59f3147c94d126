"""What other ways of making the default model faster cost it, at the same measured speed, beside sentei's own plans.

Run from the repository's root, for each workload and in this order (the steps keep what they find in --work):

    python -m benchmarks.bench_rivals front --workload prefill:1024      sentei's plans, from dense to the leanest
    python -m benchmarks.bench_rivals files --workload prefill:1024      a rival each, as its packages make it
    python -m benchmarks.bench_rivals find --workload prefill:1024       about how fast a setting is; then files again
    python -m benchmarks.bench_rivals time --workload prefill:1024       the settings nearest to 1.2, 1.5 and 2 times
    python -m benchmarks.bench_rivals judge --workload prefill:1024      their perplexity
    python -m benchmarks.bench_rivals page                               the table

Those that choose a token's depth (`--only "economize CALM" tide-inference`) only decode: `time` and `judge` are theirs.
`--python optipfair=PYTHON` names the interpreter of an environment that has a rival's package; what runs there is in
benchmarks/rivals/elsewhere and knows nothing of sentei. Everything is float32 and unhealed. All have the same
calibration text and are judged on the same windows, which are those of `sentei prune`, with more to verify on. Dense is
transformers' sdpa path, timed in turn with each. "Ratio" is the perplexity over the dense one with its 95 % interval.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.rivals import contest, ours
from benchmarks.rivals.contest import Contender
from benchmarks.rivals.dynamic import DYNAMIC, Dynamic, judged, ran
from benchmarks.rivals.page import write_page
from benchmarks.rivals.rebuilt import rebuild
from benchmarks.rivals.table import OURS, RIVALS, Rival
from sentei.budget.calibration import calibrate
from sentei.budget.workload import Workload, workload_of
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, wanted
from sentei.core.storage import write_json
from sentei.measurement.quality import compare
from sentei.measurement.text import read_text, windows_of
from sentei.pipeline import WINDOWS

TARGETS = (1.2, 1.5, 2.0)
VERIFY, RUNS = 4, 3


class Bench:
    """The model, the windows and what was found of a workload so far."""

    def __init__(self, workload: Workload, work: Path, pythons: dict[str, str]):
        self.checkpoint, self.workload, self.work, self.pythons = locate(None), workload, work, pythons
        self.windows = windows_of(load_tokenizer(self.checkpoint), read_text(None).text, length=workload.tokens,
                                  needed={**WINDOWS, "verify": VERIFY}, wished={"calibrate": 3})
        self.model = load_model(self.checkpoint)
        work.mkdir(parents=True, exist_ok=True)
        self.calibration = work / f"calibration-{workload.tokens}.safetensors"
        save_file({"tokens": self.windows["calibrate"]}, str(self.calibration))
        self.path = work / f"{str(workload).replace(':', '-')}.json"
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.seen = None

    def keep(self) -> None:
        """Writes what was found."""
        write_json(self.path, self.found)

    def rows(self, rival: str, kind: str) -> dict:
        """What was found of a rival, by setting."""
        return self.found.setdefault(rival, {}).setdefault(kind, {})

    def contender(self, rival: Rival, setting: float) -> Contender:
        """A rival with a setting; its file is written the first time."""
        if rival.plan is not None:
            plan = rival.plan(self.model, self.found.get("plans", []), setting)
            return Contender(ready=lambda: self.converted(plan), few=True)
        path = self.work / f"{rival.name}-{setting:g}-{self.workload.tokens}.safetensors".replace(" ", "-")
        if not path.exists():
            convert(self.model, Plan())
            rival.write(self, setting, path)
        convert(self.model, Plan())
        model = rebuild(self.model, path)
        return Contender(ready=lambda: model)

    def converted(self, plan: Plan) -> nn.Module:
        """The one model that all plans share, by a plan."""
        if wanted(plan) and self.seen is None:
            names: dict[int, set[str]] = {}
            for every in map(Plan.from_json, self.found.get("plans", [])):
                for layer, wants in wanted(every).items():
                    names.setdefault(layer, set()).update(wants)
            self.seen = calibrate(self.model, self.windows["calibrate"], names)
        return convert(self.model, plan, self.seen)

    def dense(self) -> Contender:
        """transformers' own."""
        return Contender(ready=lambda: convert(self.model, Plan()))


def front(bench: Bench, rivals: list[Rival]) -> None:
    """Finds sentei's plans."""
    pairs = ours.front(bench.model, bench.workload, bench.windows)
    bench.found["plans"] = [candidate.plan.to_json() for _, candidate in pairs]
    bench.found["foreseen"] = [speed for speed, _ in pairs]
    bench.keep()
    print([f"{speed:.2f}" for speed, _ in pairs])


def files(bench: Bench, rivals: list[Rival]) -> None:
    """Writes the files of the settings that `find`, or after it `time`, wants."""
    for rival in rivals:
        for setting in chosen(bench, rival) if bench.rows(rival.name, "about") else rival.ladder:
            bench.contender(rival, setting)


def find(bench: Bench, rivals: list[Rival]) -> None:
    """Times the settings of all ladders once, in one turn."""
    settings = [(rival, setting) for rival in rivals if len(rival.ladder) > 1 for setting in rival.ladder]
    seconds = timed(bench, settings, 1)
    for (rival, setting), pair in seconds.items():
        bench.rows(rival.name, "about")[f"{setting:g}"] = ratio(pair)
        print(rival.name, setting, f"{ratio(pair):.2f}", flush=True)
    bench.keep()


def time(bench: Bench, rivals: list[Rival]) -> None:
    """Times the settings that come nearest to the targets, those of a rival in turn with dense."""
    for rival in rivals:
        if isinstance(rival, Dynamic):
            for setting in rival.settings:
                bench.rows(rival.name, "times")[setting] = seconds = ran(bench, rival, setting, "seconds")
                bench.keep()
                print(rival.name, setting, f"{ratio(seconds):.3f}", flush=True)
            continue
        settings = [(rival, setting) for setting in chosen(bench, rival)
                    if f"{setting:g}" not in bench.rows(rival.name, "times")]
        if settings:
            for (_, setting), seconds in timed(bench, settings, RUNS).items():
                bench.rows(rival.name, "times")[f"{setting:g}"] = seconds
                print(rival.name, setting, f"{ratio(seconds):.3f}", flush=True)
            bench.keep()


def chosen(bench: Bench, rival: Rival) -> list[float]:
    """The settings for the targets, each once; sentei's plans as the solver foresees their speed-ups."""
    about = {float(setting): speed for setting, speed in bench.rows(rival.name, "about").items()}
    if rival.name == OURS:
        about = dict(enumerate(bench.found["foreseen"]))
    return sorted({rival.nearest(about, target) for target in TARGETS})


Setting = tuple[Rival, float]


def timed(bench: Bench, settings: list[Setting], runs: int) -> dict[Setting, dict[str, list[float]]]:
    """Seconds of dense and of rivals with a setting, in turn."""
    contenders = {(rival, setting): bench.contender(rival, setting) for rival, setting in settings}
    row = bench.windows["verify"][0]
    prefix = bench.workload.prefix(bench.dense().ready(), row)
    seconds = contest.times(bench.workload, row, prefix, {"dense": bench.dense(), **contenders}, runs)
    return {one: {"dense": seconds["dense"], "pruned": seconds[one]} for one in settings}


def ratio(seconds: dict[str, list[float]]) -> float:
    """The median of dense ÷ pruned, pair by pair."""
    pairs = sorted(dense / pruned for dense, pruned in zip(seconds["dense"], seconds["pruned"], strict=True))
    return (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2


def judge(bench: Bench, rivals: list[Rival]) -> None:
    """Reads the windows to verify on with every setting that was timed."""
    windows, dense = bench.windows["verify"], bench.dense().ready()
    prefixes = [bench.workload.prefix(dense, row) for row in windows]
    own = contest.losses(bench.workload, windows, prefixes, bench.dense())["itself"]
    for rival in rivals:
        for setting in bench.rows(rival.name, "times"):
            if setting in bench.rows(rival.name, "quality"):
                continue
            if isinstance(rival, Dynamic):
                found = {"itself": judged(bench, rival, setting)}
            else:
                found = contest.losses(bench.workload, windows, prefixes, bench.contender(rival, float(setting)))
            quality = {who: compare(own[:len(losses)], losses) for who, losses in found.items()}
            bench.rows(rival.name, "quality")[setting] = {who: [1 / one.value, 1 / one.high, 1 / one.low, one.dense]
                                                          for who, one in quality.items()}
            bench.keep()
            print(rival.name, setting, bench.rows(rival.name, "quality")[setting], flush=True)


def main() -> None:
    """Does one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"front": front, "files": files, "find": find, "time": time, "judge": judge}
    parser.add_argument("step", choices=[*steps, "page"])
    parser.add_argument("--workload", type=workload_of, default="prefill:1024")
    parser.add_argument("--work", type=Path, default=Path("sentei-out/rivals"), help="a folder for what is found")
    parser.add_argument("--only", nargs="*", default=[*RIVALS, OURS], help="rivals by name")
    parser.add_argument("--python", nargs="*", default=[], metavar="PACKAGE=PYTHON")
    asked = parser.parse_args()
    if asked.step == "page":
        write_page(__doc__, asked.work, TARGETS)
        return
    workload = asked.workload if isinstance(asked.workload, Workload) else workload_of(asked.workload)
    bench = Bench(workload, asked.work, dict(pair.split("=", 1) for pair in asked.python))
    named = {**RIVALS, **DYNAMIC, OURS: Rival.ours()}
    steps[asked.step](bench, [named[name] for name in asked.only])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
