"""The judge: what a whole plan does to the real model, on text kept for that use, by the clock and by its answers."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import nn

from sentei.budget.workload import Workload
from sentei.conversion import wrapper
from sentei.conversion.plan import Entry, Plan, attention_path, convert
from sentei.conversion.rooms import WAYS
from sentei.conversion.sparing import choice_path
from sentei.conversion.statistics import Statistics
from sentei.core.rules import All, Fixed
from sentei.core.storage import Stages
from sentei.core.tracing import Record, Trace, trace
from sentei.measurement.latency import Comparison, interleave
from sentei.measurement.quality import Quality

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a plan did.

    Args:
        quality: against the dense model, on the same tokens.
        density: kept ÷ permitted a head, by layer, of the layers whose attention the plan names.
        experts: the share that tokens kept of the experts their router chose, by layer, of those that skip some.
    """

    quality: Quality
    density: dict[int, list[float]]
    experts: dict[int, float] = field(default_factory=dict)

    def mean_density(self, layers: tuple[int, ...]) -> float:
        """The mean over `layers`; those the plan does not name count 1."""
        means = [sum(heads) / len(heads) for heads in (self.density.get(layer, [1.0]) for layer in layers)]
        return sum(means) / len(means)


class Judge:
    """Judges plans on windows of text, each plan once; the judgements of an earlier run are remembered.

    Args:
        model: a transformers model; on its sdpa path from now on, and dense again after every judgement.
        workload: what is judged and timed.
        windows: int64 [N, T] tokens a use, e.g. {"choose": …, "verify": …}.
        stages: where judgements are kept.
        inputs: what every judgement depends on beside the plan, JSON-able.
        statistics: gives those a plan wants; of none by default.
    """

    named = ""  # before the names of the stages

    def __init__(self, model: nn.Module, workload: Workload, windows: dict[str, torch.Tensor], stages: Stages,
                 inputs: dict, statistics: Callable[[Plan], Statistics | None] = lambda plan: None):
        self.model, self.workload, self.windows, self.stages = model, workload, windows, stages
        self.statistics = statistics
        self.inputs = {**inputs, "workload": str(workload), "measure": workload.measure.name}
        self.dense: dict[str, torch.Tensor] = {}
        self._read: tuple[str, list] = ("", [])  # the use that was read last, and its prefixes
        self._opened: tuple[str, object] = ("", None)  # the use that was timed last, and what its runs begin with
        wrapper.use(model, "sdpa")

    def prepare(self, use: str, step: Step) -> None:
        """Reads the windows of one use with the dense model; a step a window."""
        def work() -> dict:
            prefixes = self._prefixes(use)
            convert(self.model, Plan())
            return {"answers": self._answers(self.model, use, prefixes, step)}

        result = self.stages.run(f"dense-{use}", {**self.inputs, "use": use}, work)
        self.dense[use] = torch.tensor(result["answers"], dtype=torch.float64)

    def judge(self, plan: Plan, use: str, step: Step) -> Judgement:
        """The plan on the windows of one use; a step a window."""
        def work() -> dict:
            try:
                prefixes, model = self._beginnings(plan, use), self.standing(plan)
                with trace(model, _Counts()) as counts:
                    answers = self._answers(model, use, prefixes, step)
                density = {entry.layer: [0.0] for entry in plan.entries if takes_attention(entry)}
                density |= {entry.layer: counts.density_at(f"{attention_path(model, entry.layer)}.connections")
                            for entry in plan.entries if entry.room == "connections"}
                skipping = {entry.layer: choice_path(model, entry.layer) for entry in plan.entries}
                experts = {layer: counts.density_at(path)[0] for layer, path in skipping.items() if path in counts.kept}
            finally:
                convert(self.model, Plan())
            quality = self.workload.measure.compare(self.dense[use], torch.tensor(answers, dtype=torch.float64))
            return {"quality": asdict(quality), "density": density, "experts": experts}

        inputs = {**self.inputs, "use": use, "plan": plan.to_json(), "prompt": self._reads_itself(plan)}
        result = self.stages.run(f"{self.named}{use}-{short_key(plan)}", inputs, work)
        return Judgement(quality=Quality(**result["quality"]),
                         density={int(layer): heads for layer, heads in result["density"].items()},
                         experts={int(layer): share for layer, share in result.get("experts", {}).items()})

    def time(self, plan: Plan, use: str, runs: int, step: Step) -> Comparison:
        """Seconds of the workload on the first window of `use`, dense (transformers' sdpa) and pruned, in turn.

        A plan that prunes nothing is the dense model, so its seconds are the dense ones and its speed-up is 1,
        whatever the clock says.
        """
        def work() -> dict:
            run = self.run(use)
            try:
                found = interleave(run, run if plan.entries else lambda: None, runs=runs, step=step, before=(
                    partial(run.begin, Plan()), partial(run.begin, plan) if plan.entries else lambda: None))
            finally:
                convert(self.model, Plan())
            return asdict(found if plan.entries else replace(found, pruned=found.dense))

        inputs = {**self.inputs, "use": use, "plan": plan.to_json(), "runs": runs}
        return Comparison(**self.stages.run(f"{self.named}time-{short_key(plan)}", inputs, work))

    def seconds(self, plan: Plan, use: str, step: Step) -> float:
        """Seconds of one run of the workload with a plan, for forecasts; what is reported comes from `time`."""
        def work() -> dict:
            try:
                seconds = self.run(use).least(plan)
            finally:
                convert(self.model, Plan())
            step()
            return {"seconds": seconds}

        inputs = {**self.inputs, "use": use, "plan": plan.to_json()}
        return self.stages.run(f"seconds-{short_key(plan)}", inputs, work)["seconds"]

    def standing(self, plan: Plan) -> nn.Module:
        """The model with the plan; `convert(self.model, Plan())` ends it."""
        return convert(self.model, plan, self.statistics(plan))

    def opening(self, plan: Plan, use: str) -> object:
        """What a run with the plan on the first window of a use begins with."""
        if self._opened[0] != use:
            self._opened = "", None  # first that of another use is let go: at 8,000 tokens it is some 400 MB
            self._opened = use, self.workload.opening(self._reader(), self.windows[use][0])
        return self._opened[1]

    def _reader(self) -> nn.Module:
        """The model that reads prompts for plans that do not do so themselves."""
        return convert(self.model, Plan())

    def run(self, use: str) -> "Run":
        """The workload on the first window of a use, to be timed."""
        return Run(self, use)

    def _prefixes(self, use: str) -> list:
        """What every reading of a use's windows begins with; the model is dense afterwards if they had to be made."""
        if self._read[0] != use:
            self._read = "", []  # first those of another use are let go
            model = self._reader()
            self._read = use, [self.workload.prefix(model, row) for row in self.windows[use]]
        return self._read[1]

    def _reads_itself(self, plan: Plan) -> bool:
        """Whether the prompt before decoded tokens is read otherwise than by the dense model."""
        return self.workload.lever == "decode" and bool(reading(plan).entries)

    def _beginnings(self, plan: Plan, use: str) -> list:
        """What the plan's readings begin with: prompts as it reads them itself, which is what a user gets.

        Only where that is what the dense model does are its own taken, which are there already.
        """
        if not self._reads_itself(plan):
            return self._prefixes(use)
        model = self.standing(reading(plan))
        return [self.workload.prefix(model, row) for row in self.windows[use]]

    def _answers(self, model: nn.Module, use: str, prefixes: list, step: Step) -> list[list[float]]:
        answers = []
        for row, prefix in zip(self.windows[use], prefixes, strict=True):
            answers.append(self.workload.answer(model, row, prefix).tolist())
            step()
        return answers


class Run:
    """One run of a judge's workload on the first window of a use: `begin`, which is not timed, and the call itself."""

    def __init__(self, judge: Judge, use: str):
        self.judge, self.workload = judge, judge.workload
        self.row, self.use = judge.windows[use][0], use
        self.work: Callable[[], list[float]] = list

    def begin(self, plan: Plan) -> None:
        """Converts the model and does what comes before the work."""
        self.work = list  # what the last run holds is let go first
        opening = self.judge.opening(plan, self.use)
        self.work = self.workload.begin(self.judge.standing(plan), self.row, opening)

    def __call__(self) -> None:
        self.work()

    def least(self, plan: Plan) -> float:
        """Seconds of a run in which every pass through the model takes what the quickest does, of two at least.

        The first pays for what later ones find ready, and what else runs here only ever adds.
        """
        passes: list[float] = []
        while len(passes) < 2:
            self.begin(plan)
            passes += self.work()
        return min(passes) * self.workload.timed_runs


def reading(plan: Plan) -> Plan:
    """What of a plan stands while a prompt is read: what only decoding prunes does not."""
    entries = [replace(entry, config=replace(entry.config, decode=All())) if entry.room == "connections" else entry
               for entry in plan.entries]
    return Plan(tuple(entry for entry in entries if entry.room != "connections" or entry.config.rule != All()))


def takes_attention(entry: Entry) -> bool:
    """Whether the entry leaves the attention of its layer out."""
    return entry.room == "depth" and "attention" in WAYS["depth"].parts(entry.config) and entry.config.rule == Fixed(())


def short_key(plan: Plan) -> str:
    """Sixteen hexadecimal digits that differ for different plans."""
    return hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()[:16]


class _Counts(Trace):
    """A trace that keeps two numbers a head and not the selections, which grow with the square of the length."""

    def __init__(self):
        super().__init__()
        self.kept: dict[str, torch.Tensor] = {}
        self.permitted: dict[str, torch.Tensor] = {}

    def append(self, record: Record) -> None:
        """Adds the candidates of connections, or of a mixture's choice, kept and permitted, to those of their room."""
        along = {"connections": (0, 2), "sparing": (0,)}.get(record.room)
        if along is None:
            return
        selection = record.selection
        for counts, number in ((self.kept, selection.count()), (self.permitted, selection.permitted)):
            counts[record.path] = counts.get(record.path, 0) + number.sum(along).double()

    def density_at(self, path: str) -> list[float]:
        """Kept ÷ permitted for every head (or KV group) of one room; of a mixture's choice there is one number."""
        return (self.kept[path] / self.permitted[path]).reshape(-1).tolist()
