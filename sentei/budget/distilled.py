"""A plan's model that has learned to say what the dense model says, and the judge of it.

Text for learning is what no plan was chosen or proved on. What each minute bought is read on the windows on which plans
are chosen.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from sentei.budget.judge import Judge, reading
from sentei.conversion.plan import Plan, complete, convert
from sentei.conversion.student import adapted, settled, student_of
from sentei.measurement.text import spare_of
from sentei.training import healing as training

# Tokens of a window to heal on; longer where attention is pruned, which short windows do not feel.
CONTEXT, LONG_CONTEXT = 256, 2048
# A check is on so many windows at most, and about so many tokens.
CHECKS, CHECKED = 2, 2048


class HealedJudge(Judge):
    """A judge of the healed model, a model of its own beside the dense one, on the same windows.

    Args:
        judge: of the dense model; what it has read is used.
        student: healed, without rooms.
        key: differs for different healed models.
    """

    named = "healed-"

    def __init__(self, judge: Judge, student: nn.Module, key: str):
        vars(self).update(vars(judge))
        self.plain = judge
        self.student, self.inputs = student, {**judge.inputs, "healed": key}
        self._read, self._opened = ("", []), ("", None)

    def standing(self, plan: Plan) -> nn.Module:
        """The dense model for the empty plan, else the healed one with what the plan still installs."""
        return complete(self.student, plan) if plan.entries else convert(self.model, plan)

    def opening(self, plan: Plan, use: str) -> object:
        """The dense model's for the empty plan: it does not go on from another model's cache."""
        return (super() if plan.entries else self.plain).opening(plan, use)

    def _beginnings(self, plan: Plan, use: str) -> list:
        """Read once for all plans."""
        return self._prefixes(use)

    def _reader(self) -> nn.Module:
        """The healed model itself: it is the one that will read prompts."""
        return convert(self.student, Plan())


def context_of(plan: Plan, tokens: int) -> int:
    """Tokens of a window to heal on, for a workload of so many tokens."""
    return min(tokens, LONG_CONTEXT if reading(plan.standing("under")).entries else CONTEXT)


def text_for(tokenizer, text: str, windows: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """int64 [N, size]: all of the text that is not in other windows than those for calibration.

    Args:
        windows: those that were cut of the text, by use.
    """
    length, counts = windows["calibrate"].shape[1], {use: len(rows) for use, rows in windows.items()}
    between = spare_of(tokenizer, text, length=length, needed=counts, size=size)
    within = [part for row in windows["calibrate"] for part in row.split(size) if len(part) == size]
    return torch.cat([torch.stack(within), between]) if within else between


def checks_of(windows: torch.Tensor, context: int) -> torch.Tensor:
    """The beginnings of windows [N, T], int64 [M, C], no shorter than those to heal on."""
    rows = windows[:CHECKS]
    return rows[:, :max(context, CHECKED // len(rows))]


def distil(judge: Judge, plan: Plan, rows: torch.Tensor, config: training.Config,
           step: Callable[[str], object] = lambda note="": None) -> tuple[HealedJudge, training.Healing]:
    """A plan's model after some minutes, and its judge; checkpoints go where the judge keeps its stages.

    Args:
        judge: its model is dense afterwards.
        plan: it prunes something that the reading of a text feels.
        rows: int64 [N, T], to learn on.
        step: called after every check.
    Raises:
        SenteiError, FileError: see `training.healing.heal`.
    """
    checks = checks_of(judge.windows["choose"], rows.shape[1])
    job = {**judge.inputs, "plan": plan.to_json(), "rows": digest(rows), "checks": digest(checks)}
    key = hashlib.sha256(json.dumps({**job, "healing": config.to_json()}, sort_keys=True).encode()).hexdigest()[:16]
    convert(judge.model, Plan())
    student, dtypes = student_of(judge.model, plan, judge.statistics(plan))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapted(student, config.rank)
    convert(student, plan.standing("under"))
    with _work(judge.stages.folder, key) as place:
        found = training.heal(judge.model, student, training.Texts(rows=rows, checks=checks, seed=config.seed), config,
                              place, job=job, step=step)
    settled(convert(student, Plan()), dtypes)
    # What came out depends on the clock too: another healing of the same job is another model.
    key += "-" + hashlib.sha256(json.dumps(found.losses).encode()).hexdigest()[:16]
    return HealedJudge(judge, student, key), found


def digest(tokens: torch.Tensor) -> str:
    """64 hexadecimal digits that differ for different tokens."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


@contextmanager
def _work(folder: Path | None, key: str) -> Iterator[Path]:
    """Where checkpoints go: a folder for each job, of which the last one is kept; or one for now."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)
        return
    for other in folder.glob("heal-*"):
        if other.name != f"heal-{key}":
            shutil.rmtree(other)
    yield folder / f"heal-{key}"
