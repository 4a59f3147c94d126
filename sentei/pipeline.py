"""The main job: load → calibrate → slack → solve → convert, measure and verify → export → report.

Every stage leaves its result in OUT/stages; the same command again goes on from the last finished one.
"""

import fcntl
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from sentei.axes.connections import Config
from sentei.budget import slack as slack_of
from sentei.budget.goal import Goal, Workload
from sentei.budget.judge import Judge, Judgement
from sentei.budget.solver import Candidate, Solution, solve
from sentei.conversion import export
from sentei.conversion.checkpoints import DTYPES, load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.errors import ResourceError, SenteiError, UnsupportedError
from sentei.core.storage import Stages, read_json, write_json
from sentei.measurement.latency import Comparison
from sentei.measurement.outcome import environment, public, today
from sentei.measurement.report import write_report
from sentei.measurement.text import Text, cut, read_text

MARKER = "sentei-run.json"
# Windows of the workload's length for each use; no two uses share a token.
WINDOWS = {"calibrate": 1, "choose": 2, "verify": 2}
RUNS = 3


class Progress(Protocol):
    """Who is told how far the job is."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[str], object]]:
        """A context for one stage of `total` steps; it yields what to call after each."""


class Silent:
    """Progress nobody sees."""

    @contextmanager
    def stage(self, name: str, total: int):
        """Yields a step that does nothing."""
        yield lambda note="": None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `sentei prune` is asked; checked when it is made.

    Args:
        model: a folder, a .gguf file, with `online` a hub id, or None for the embedded default.
        text: plain text in UTF-8, or None for the interpreter's documentation.
        workload: e.g. "prefill:4096".
        quality, speed: the bound; exactly one of them.
        dtype: "float32" or "bfloat16".
        out: the folder to write, or None for one named after the job below ./sentei-out.
        online: whether the hub may be asked.
    """

    model: str | None = None
    text: Path | None = None
    workload: str = "prefill:4096"
    quality: float | None = None
    speed: float | None = None
    dtype: str = "float32"
    out: Path | None = None
    online: bool = False

    def __post_init__(self):
        Workload.parse(self.workload)
        Goal(quality=self.quality, speed=self.speed)
        if self.dtype not in DTYPES:
            raise SenteiError("--dtype", expected=f"one of {', '.join(DTYPES)}", got=repr(self.dtype), do="choose one")

    def command(self) -> str:
        """The command line that asks the same."""
        flags = {"--text": self.text, "--workload": self.workload, "--quality": self.quality, "--speed": self.speed,
                 "--dtype": self.dtype, "--out": self.out}
        words = ["sentei", "prune", *([self.model] if self.model else [])]
        words += [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
        return shlex.join(words + ["--online"] * self.online)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model a job is about.

    Args:
        model: dense, in eval mode.
        tokenizer: a transformers tokenizer.
        name, source: for reports.
        fingerprint: differs for different weights.
    """

    model: nn.Module
    tokenizer: object
    name: str
    source: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a job.

    Args:
        result: the public object, schema "sentei.prune/1".
        met: whether the bound is met.
        reason: why not; empty when it is.
        quality_interval: 95 % interval of the quality.
        report: the page, or None when nothing was written.
        model: converted with `plan`.
        plan: the plan chosen.
    """

    result: dict
    met: bool
    reason: str
    quality_interval: tuple[float, float]
    report: Path | None
    model: nn.Module
    plan: Plan


def run(request: Request, progress: Progress) -> Outcome:
    """Does the main job for files: loads the model, finds and proves a plan, and writes the result and its report.

    Raises:
        SenteiError: bad input, with its exit code; nothing is written before model, text and folder are accepted.
    """
    with progress.stage("load", 2) as step:
        checkpoint = locate(request.model, online=request.online)
        text = read_text(request.text)
        step("checked")
        tokenizer = load_tokenizer(checkpoint)
        subject = Subject(model=load_model(checkpoint, request.dtype), tokenizer=tokenizer, name=checkpoint.name,
                          source=checkpoint.source, fingerprint=checkpoint.fingerprint)
        windows = _windows(subject, text, Workload.parse(request.workload))
        step("loaded")
    out = request.out or Path("sentei-out") / f"{subject.name}-{request.workload.replace(':', '-')}-{request.dtype}"
    with _claimed(out):
        return _prune(subject, text, windows, request, out, progress)


def prune(model: nn.Module | str | None = None, tokenizer=None, *, text: Path | None = None,
          workload: str = "prefill:4096", quality: float | None = None, speed: float | None = None,
          out: Path | None = None, progress: Progress | None = None) -> Outcome:
    """Does the main job from Python; the pruned model is in the outcome.

        outcome = prune(model, tokenizer, workload="prefill:4096", quality=0.99)
        outcome.model.generate(...)

    Args:
        model: a transformers model, converted in place; or what `Request` takes.
        tokenizer: the model's; needed with a model.
        text, workload, quality, speed, out: as in `Request`; quality 0.99 when neither bound is named. A model given
            as an object is only written when `out` is.
        progress: who is told; nobody by default.
    Raises:
        SenteiError: bad input.
    """
    quality = 0.99 if quality is None and speed is None else quality
    request = Request(model=None if isinstance(model, nn.Module) else model, text=text and Path(text),
                      workload=workload, quality=quality, speed=speed, out=out and Path(out),
                      dtype=str(model.dtype).removeprefix("torch.") if isinstance(model, nn.Module) else "float32")
    progress = progress or Silent()
    if not isinstance(model, nn.Module):
        return run(request, progress)
    if tokenizer is None:
        raise SenteiError("prune", expected="the model's tokenizer", got="none", do="pass prune(model, tokenizer)")
    convert(model, Plan())
    name = Path(model.name_or_path or type(model).__name__).name
    subject = Subject(model=model.eval(), tokenizer=tokenizer, name=name, source=f"{name} (a model in memory)",
                      fingerprint=_fingerprint(model))
    windows = _windows(subject, read_text(request.text), Workload.parse(workload))
    if out is None:
        return _prune(subject, read_text(request.text), windows, request, None, progress)
    with _claimed(Path(out)):
        return _prune(subject, read_text(request.text), windows, request, Path(out), progress)


def verify(folder: Path) -> dict:
    """Loads a folder written by `run` in a fresh process and compares it with its receipt, see `export.check`."""
    export.read_policy(folder)
    return export.check_afresh(folder)


def _prune(subject: Subject, text: Text, windows: dict[str, torch.Tensor], request: Request, out: Path | None,
           progress: Progress) -> Outcome:
    """The job itself, once its input is accepted."""
    goal, workload = Goal(quality=request.quality, speed=request.speed), Workload.parse(request.workload)
    layers, config = prunable_layers(subject.model), Config()
    inputs = {"model": subject.fingerprint, "text": text.sha256, "workload": str(workload), "dtype": request.dtype,
              "threads": torch.get_num_threads(), "environment": environment(), "version": 1}
    stages = Stages(out and out / "stages")
    judge = Judge(subject.model, windows, stages, inputs)
    clock = Clock()

    with clock("calibrate"), progress.stage("calibrate", len(windows["choose"]) + len(windows["verify"]) + 1) as step:
        judge.prepare("choose", step)
        judge.prepare("verify", step)
        dense_seconds = judge.time_dense("calibrate", step)
    with clock("slack"), progress.stage("slack", len(layers) * len(windows["calibrate"])) as step:
        slack = slack_of.from_json(stages.run("slack", inputs, lambda: {"slack": slack_of.to_json(
            slack_of.measure(subject.model, windows["calibrate"], layers, config, rules=slack_of.options(), step=step)
        )})["slack"])
    with clock("solve"), progress.stage("solve", 8 * len(windows["choose"])) as step:
        solution = solve(goal, slack, config, lambda candidate: judge.judge(candidate.plan, "choose", step),
                         dense_seconds)
    with clock("measure"), progress.stage("measure", 2 * RUNS + 2 + len(windows["verify"])) as step:
        for candidate in solution.ladder:
            judgement, comparison = _prove(judge, goal, candidate, step)
            reason = goal.shortfall(judgement, comparison) if comparison else "unproven"
            if not reason:
                break
    convert(subject.model, candidate.plan)
