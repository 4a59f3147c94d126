"""The main job: load → calibrate → slack → solve → convert, measure and verify → export → report.

Every stage leaves its result in OUT/stages; the same command again goes on from the last finished one.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sentei.axes.connections import Config
from sentei.budget import distilled, frontier, healing
from sentei.budget import offers as offers_of
from sentei.budget import slack as slack_of
from sentei.budget.calibration import TOKENS, Library
from sentei.budget.chooser import Chooser
from sentei.budget.healing import Healed
from sentei.budget.judge import Judge
from sentei.budget.proof import RUNS, Proof, best_proven
from sentei.budget.request import Request
from sentei.budget.share import Foreseen, kept_of, rooms_of
from sentei.budget.solver import Forecast, Solution
from sentei.budget.workload import Workload
from sentei.conversion import card, export
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.deeds import deeds
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.conversion.rooms import WAYS
from sentei.conversion.rungs import rung_of
from sentei.conversion.tokenizers import require_known
from sentei.core.errors import FileError, SenteiError, UnsupportedError
from sentei.core.progress import Progress, Silent
from sentei.core.storage import Stages, claimed, write_json
from sentei.kernels import native
from sentei.measurement.outcome import environment, public
from sentei.measurement.report import write_report
from sentei.measurement.text import Text, read_text, windows_of

MARKER = "sentei-run.json"
# About how many plans the solver judges; only the length of a progress bar.
JUDGEMENTS = 18
# The receipt compares logits after this many tokens: enough that blocks are dropped.
RECEIPT_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model a job is about.

    Args:
        model: dense, in eval mode.
        tokenizer: a transformers tokenizer.
        name, source: for reports.
        fingerprint: differs for different weights.
        work: what is to become faster, as this model does it.
        command: what to type to do the job again.
        licence: of the weights, a word, or None where it is not known.
    """

    model: nn.Module
    tokenizer: object
    name: str
    source: str
    fingerprint: str
    work: Workload
    command: str
    licence: str | None = None


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


def opened(request: Request, progress: Progress) -> tuple[Subject, Text, dict[str, torch.Tensor]]:
    """The model, the text and its windows that a request names, checked.

    Raises:
        SenteiError: bad input, with its exit code.
    """
    with progress.stage("load", 2) as step:
        checkpoint = locate(request.model, online=request.online)
        text = read_text(request.text)
        step("checked")
        tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint, request.dtype)
        subject = Subject(model=model, tokenizer=tokenizer, name=checkpoint.name, source=checkpoint.source,
                          fingerprint=checkpoint.fingerprint, work=request.work_of(model), command=request.command(),
                          licence=checkpoint.licence)
        windows = _windows(subject, text)
        step("loaded")
    return subject, text, windows


def run(request: Request, progress: Progress) -> Outcome:
    """Does the main job for files: loads the model, finds and proves a plan, and writes the result and its report.

    Raises:
        SenteiError: bad input, with its exit code; nothing is written before model, text and folder are accepted.
    """
    subject, text, windows = opened(request, progress)
    job = f"{subject.name}-{request.workload.replace(':', '-')}-{request.dtype}-{subject.fingerprint[:6]}"
    out = request.out or Path("sentei-out") / job
    with claimed(out, MARKER, "sentei prune"):
        return _prune(subject, text, windows, request, out, progress)


def prune(model: nn.Module | str | None = None, tokenizer=None, *, text: Path | None = None,
          workload: str = "prefill:4096", quality: float | None = None, speed: float | None = None,
          out: Path | None = None, lookahead: bool = True) -> Outcome:
    """Does the main job from Python; the pruned model is in the outcome.

        outcome = prune(model, tokenizer, workload="prefill:4096", quality=0.99)
        outcome.model.generate(...)

    Args:
        model: a transformers model, converted in place (in eval mode, and "dense" is its sdpa path from then on); or
            what `Request` takes.
        tokenizer: the model's; needed with a model.
        text, workload, quality, speed, out, lookahead: as in `Request`; quality 0.99 when neither bound is named. A
            model given as an object is only written when `out` is.
    Raises:
        SenteiError: bad input; a model in memory is then as it was.
    """
    quality = 0.99 if quality is None and speed is None else quality
    given = isinstance(model, nn.Module)
    request = Request(model=None if given or model is None else str(model), text=text and Path(text),
                      workload=workload, quality=quality, speed=speed, out=out and Path(out), lookahead=lookahead,
                      dtype=str(model.dtype).removeprefix("torch.") if given else "float32")
    progress = Silent()
    if not given:
        return run(request, progress)
    if tokenizer is None:
        raise SenteiError("prune", expected="the model's tokenizer", got="none", do="pass prune(model, tokenizer)")
    name = Path(model.name_or_path or type(model).__name__).name
    subject = Subject(model=model, tokenizer=tokenizer, name=name, source=f"{name} (a model in memory)",
                      fingerprint=_fingerprint(model), work=request.work_of(model), command=request.call())
    content = read_text(request.text)
    windows = _windows(subject, content)
    with nullcontext() if request.out is None else claimed(request.out, MARKER, "sentei prune"):
        convert(model.eval(), Plan())
        return _prune(subject, content, windows, request, request.out, progress)


def verify(folder: Path) -> dict:
    """Loads a folder written by `run` in a fresh process and compares it with its receipt, see `export.check`."""
    export.read_policy(folder)
    export.read_receipt(folder)
    return export.check_afresh(folder)


class Clock(dict):
    """Seconds by stage."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time of the block to the stage."""
        start = time.perf_counter()
        yield
        self[stage] = self.get(stage, 0.0) + time.perf_counter() - start


def _prune(subject: Subject, text: Text, windows: dict[str, torch.Tensor], request: Request, out: Path | None,
           progress: Progress) -> Outcome:
    """The job itself, once its input is accepted."""
    goal, layers, config = request.goal(), prunable_layers(subject.model), Config()
    workload = subject.work
    rules = slack_of.options(workload)
    inputs = {"model": subject.fingerprint, "text": text.sha256, "workload": request.workload, "dtype": request.dtype,
              "environment": environment(), "kernel": native.identity(), "config": config.to_json(),
              "rules": [rule.to_json() for rule in rules],
              "windows": {use: len(rows) for use, rows in windows.items()}}
    stages, clock, cuts = Stages(out and out / "stages"), Clock(), windows
    library = Library(subject.model, windows["calibrate"], workload.lever)
    windows = {**windows, "calibrate": windows["calibrate"][:workload.windows["calibrate"]]}
    judge = Judge(subject.model, workload, windows, stages, inputs, library)
    whole = slack_of.whole_plan(workload, layers, config)
    with clock("calibrate"), progress.stage("calibrate", 2 + len(windows["choose"]) + len(windows["verify"])) as step:
        dense_seconds, whole_seconds = (judge.seconds(plan, "calibrate", step) for plan in (Plan(), whole))
        judge.prepare("verify", step)
        judge.prepare("choose", step)
    options = offers_of.candidates(subject.model, workload.lever)
    with clock("slack"), progress.stage("slack", len(layers) * len(windows["calibrate"]) + len(options)) as step:
        slack = slack_of.from_json(stages.run("slack", inputs, lambda: {"layers": slack_of.to_json(slack_of.measure(
            subject.model, workload, windows["calibrate"], layers, config, rules=rules,
            step=step))})["layers"])
        asked = {**inputs, "options": [entry.to_json() for entry, _ in options], "priced on": "choose"}
        offers = offers_of.from_json(stages.run("offers", asked, lambda: {"offers": offers_of.to_json(
            offers_of.measure(judge, windows["choose"], whole, step=step))})["offers"])
    forecast = Forecast.made(slack, workload, dense=dense_seconds, whole=whole_seconds)
    chooser = Chooser(judge=judge, slack=slack, offers=offers, config=config, forecast=forecast, plain=request.plain)
    with clock("solve"), progress.stage("solve", JUDGEMENTS * len(windows["choose"])) as step:
        solution = chooser.solution(goal, step)
    readings = 1 if goal.lookahead else 2
    with clock("measure"), progress.stage("measure", 2 * RUNS + 2 + readings * len(windows["verify"])) as step:
        proof = best_proven(goal, solution, judge, step)
    with clock("heal") if request.heal else nullcontext():
        healed = _healed(subject, text, request, chooser, proof, cuts, progress)
    proof, report = (healed.proof if healed else proof), None
    convert(subject.model, proof.candidate.plan, judge.statistics(proof.candidate.plan))
    foreseen = Foreseen(dense=dense_seconds, whole=whole_seconds, plan=dense_seconds / forecast(proof.candidate))
    result = _result(request, subject, proof, layers, out, foreseen)
    result |= {"healed": healed.to_json()} if healed else {}
    result["frontier"] = _frontier(solution, healed, proof, layers, forecast)
    subject = replace(subject, model=healed.model) if healed and healed.model else subject
    if out is not None:
        with clock("export"), progress.stage("export", 2) as step:
            receipt = _export(subject, proof, windows["verify"][0], out, result, step)
        with progress.stage("report", 1) as step:
            details = _details(subject, text, request, proof, layers)
            details |= {"slack": slack_of.to_json(slack), "seconds": dict(clock)}
            report = write_report(out, result, details)
            card.write(out, result, details, receipt)
            step()
    quality = proof.judgement.quality
    return Outcome(result=result, met=not proof.reason, reason=proof.reason, report=report, model=subject.model,
                   quality_interval=(quality.low, quality.high), plan=proof.candidate.plan)


def _frontier(solution: Solution, healed: Healed | None, proof: Proof, layers: tuple[int, ...], forecast: Forecast
              ) -> list[dict]:
    """Every plan that was looked at, unhealed and healed."""
    kept, plan = healed is not None and healed.model is not None, proof.candidate.plan
    proofs = (proof, *proof.beside, *((healed.before, *healed.before.beside) if kept else ()))
    return [*frontier.foreseen(solution.judged, None if kept else plan, layers, forecast),
            *frontier.foreseen(healed.judged if healed else [], plan if kept else None, layers, forecast),
            *frontier.measured(proofs, proof, layers)]


def _healed(subject: Subject, text: Text, request: Request, chooser: Chooser, proof: Proof,
            cuts: dict[str, torch.Tensor], progress: Progress) -> Healed | None:
    """What healing came to, where it is asked for."""
    config = request.healing()
    if config is None:
        return None
    texts = partial(distilled.text_for, subject.tokenizer, text.text, cuts)
    with progress.stage("heal", healing.STEPS) as step:
        return healing.heal(chooser, request.goal(), proof, texts, config, step=step)


def _windows(subject: Subject, text: Text) -> dict[str, torch.Tensor]:
    """The text as tokens, cut for each use; checks that model and workload fit."""
    work, config = subject.work, subject.model.config
    if not prunable_layers(subject.model):
        raise UnsupportedError(subject.name, expected="at least one layer of full attention",
                               got="sliding windows in every layer", do="choose another model")
    context = config.max_position_embeddings
    if work.tokens > context:
        raise SenteiError("--workload", expected=f"at most the model's context of {context:,} tokens",
                          got=f"{work.tokens:,}", do="choose a shorter workload")
    windows = windows_of(subject.tokenizer, text.text, length=work.tokens, needed=work.windows,
                         wished={"calibrate": -(-TOKENS // work.tokens) - work.windows["calibrate"]})
    require_known(max(int(part.max()) for part in windows.values()), config.vocab_size, subject.name)
    return windows


def _fingerprint(model: nn.Module) -> str:
    """64 hexadecimal digits that differ for different weights. Cost: one SHA-256 pass."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _result(request: Request, subject: Subject, proof: Proof, layers: tuple[int, ...], out: Path | None,
            foreseen: Foreseen) -> dict:
    """The public object."""
    quality, work = proof.judgement.quality, subject.work
    result = public(model=subject.name, workload=request.workload, dtype=request.dtype, tokens=work.timed_tokens,
                    measure=work.measure.name, quality=quality, seconds=proof.comparison.seconds(),
                    speedup=proof.comparison.speedup())
    kept = [(entry, kept_of(subject.model, entry, proof.judgement)) for entry in proof.candidate.plan.entries]
    plan = [{"layer": entry.layer, "room": entry.room, "option": WAYS[entry.room].words(entry.config),
             "rule": getattr(entry.config, work.lever if entry.room == "connections" else "rule").to_json(),
             "density": share} for entry, share in kept]
    strict = {} if proof.strict is None else {"quality_without_lookahead": proof.strict.quality.value}
    return {**result, **strict, "density": proof.judgement.mean_density(layers), "plan": plan,
            "does": deeds(kept, subject.model.config.num_hidden_layers, work.lever),
            "rooms": rooms_of(proof, foreseen), "out": out and str(out)}


def _export(subject: Subject, proof: Proof, tokens: torch.Tensor, out: Path, result: dict, step: Callable) -> dict:
    """Writes the model and proves in a fresh process that it gives the same outputs; the receipt."""
    names = "workload", "speedup", "measure", "quality", "quality_without_lookahead", "density", "threads", "healed"
    measured = {key: result[key] for key in names if key in result}
    measured |= {"verify_attempts": proof.attempts, "date": proof.comparison.date}
    export.export(subject.model, subject.tokenizer, proof.candidate.plan, out, tokens=tokens[:RECEIPT_TOKENS],
                  facts={"source": subject.source, **measured})
    step("written")
    receipt = verify(out)
    if not receipt["met"]:
        raise FileError(str(out), expected=f"the same outputs in a fresh process, within {receipt['tolerance']}",
                        got=f"a difference of {receipt['difference']}", do="report this: it is a bug in sentei")
    write_json(out / "sentei-receipt.json", receipt)
    step("verified")
    return receipt


def _details(subject: Subject, text: Text, request: Request, proof: Proof, layers: tuple[int, ...]) -> dict:
    """What stands behind the result, for the report."""
    quality, comparison = proof.judgement.quality, proof.comparison
    timings = {"dense": comparison.dense}
    if proof.candidate.plan.entries:
        timings["pruned"] = comparison.pruned
    ratios = comparison.ratios()
    heads = subject.model.config.num_attention_heads
    density = [[1.0] * heads if layer in layers else None for layer in range(subject.model.config.num_hidden_layers)]
    for layer, kept in proof.judgement.density.items():
        # A KV group that chooses as one, as in decoding, stands for its heads.
        density[layer] = [share for share in kept for _ in range(heads // len(kept))]
    work = subject.work
    return {"meaning": work.measure.meaning,
            "goal": {"quality": request.quality} if request.speed is None else {"speed": request.speed},
            "met": not proof.reason, "reason": proof.reason, "quality_interval": [quality.low, quality.high],
            "speedup_interval": [min(ratios), max(ratios)], "source": subject.source, "density": density,
            "text": {"name": text.name, "sha256": text.sha256,
                     "tokens": {use: count * work.tokens for use, count in work.windows.items()}},
            "timings": timings, "timed_tokens": work.timed_tokens, "environment": environment(),
            "verify_attempts": proof.attempts, "licence": subject.licence,
            "rung": rung_of(subject.model, proof.candidate.plan),
            "strict": proof.strict and {"quality_interval": [proof.strict.quality.low, proof.strict.quality.high],
                                        "density": proof.strict.mean_density(layers)},
            "command": subject.command, "date": comparison.date}
