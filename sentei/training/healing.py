"""Healing: low-rank changes of a pruned model that bring its next-token distributions back to those of the dense one.

    loss = mean over tokens of KL(dense ‖ pruned)

The clock is the bound. Steps are counted and times are not: the rate of a step depends on its number and on what the
checkpoint before it says of the clock, so the steps that a killed run does again have the same losses, bit for bit;
later rates depend on the clock.
References: Hinton et al. 2015, arXiv 1503.02531 (distillation, here at temperature 1); Hu et al. 2021, 2106.09685.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import kl_div

from sentei.axes.rank import Config as Rank
from sentei.conversion import adapters
from sentei.core.errors import FileError, SenteiError, require
from sentei.measurement.quality import logits_of, token_losses
from sentei.training import checkpoints
from sentei.training.data import order
from sentei.training.loop import Config as Loop
from sentei.training.loop import Optimizer, Run

# Rows of logits of both models that are held at once, with their gradient.
ROWS_AT_ONCE = 256
# A check and a checkpoint after so many seconds, or after each tenth of the time: checks of the longer of the two,
# checkpoints of the shorter.
SECONDS, PARTS = 60.0, 10


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a model is healed.

    Args:
        minutes: by the clock, of everything: steps, checks and checkpoints.
        part: of the minutes that may be used, where they are for more than one healing.
        batch: windows of a step.
        seed: of the adapters and of the order of the text.
        rank: of the adapters.
        optimizer: its cosine goes down with the time.
    """

    minutes: float
    part: float = 1.0
    batch: int = 1
    seed: int = 0
    rank: Rank = field(default_factory=lambda: Rank(rank=16, alpha=16.0))
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(rate=3e-3, warmup=10, final=0.02, decay=0.0))

    def __post_init__(self):
        require("--heal", self.minutes, {"minutes as a number above 0": isinstance(
            self.minutes, int | float) and 0 < self.minutes < math.inf})
        require("healing.part", self.part, {"a number above 0 and at most 1": 0 < self.part <= 1})

    def to_json(self) -> dict:
        """The configuration as a JSON object."""
        return {**asdict(self), "rank": self.rank.to_json()}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Tokens of a text, no one of them twice.

    Args:
        rows: int64 [N, T], to heal on.
        checks: int64 [M, C], to see what it bought.
        seed: of the order of the rows.
    """

    rows: torch.Tensor
    checks: torch.Tensor
    seed: int

    def batch(self, step: int, size: int) -> torch.Tensor:
        """The rows of a step, int64 [size, T]; each is read once an epoch."""
        number = len(self.rows)
        return self.rows[[int(order(number, self.seed, n // number)[n % number])
                          for n in range(step * size, (step + 1) * size)]]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What a checkpoint says of the time, in seconds.

    Args:
        spent: on all that led to it, in whatever processes.
        step, check: the longest of each so far; a checkpoint counts with the check.
        checked: `spent` when it was last checked.
    """

    spent: float = 0.0
    step: float = 0.0
    check: float = 0.0
    checked: float = 0.0

    @classmethod
    def from_json(cls, value: object) -> "Clock":
        """The clock that a checkpoint holds; anything else is refused with a FileError."""
        if not isinstance(value, dict) or set(value) != set(cls.__dataclass_fields__) or not all(
                isinstance(number, int | float) and 0 <= number < math.inf for number in value.values()):
            raise FileError("checkpoint", expected="the times of a healing", got=repr(value)[:200],
                            do="name another folder with --out")
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class Healing:
    """What came of it.

    Args:
        table: one row a check, the first before any step: minutes, step, tokens, perplexity and quality (dense
            perplexity ÷ this one's) on the check windows.
        losses: KL of every step, in nats a token.
        kept: whether the last row is better than the first.
    """

    table: list[dict]
    losses: list[float]

    @property
    def kept(self) -> bool:
        """Whether it is better than it was."""
        return self.table[-1]["quality"] > self.table[0]["quality"]


def heal(teacher: nn.Module, student: nn.Module, texts: Texts, config: Config, folder: Path, *, job: dict,
         step: Callable[[str], object] = lambda note: None, now: Callable[[], float] = time.perf_counter) -> Healing:
    """Trains the student's adapters in place, from the newest checkpoint in `folder` on if there is one.

    Args:
        teacher: the dense model, on the same text.
        student: with adapters (`conversion.student`); the rest of it stays as it is. In eval mode, as the teacher.
        folder: gets the checkpoints, and `metrics.jsonl` with every step's loss.
        job: everything the result depends on, a JSON object; a checkpoint of another job is refused.
        step: called after every check.
        now: the clock, in seconds.
    Raises:
        SenteiError: a step and the checks around it take longer than there is time; or no text.
        FileError: a checkpoint that was changed or is of another job.
    Cost: a step is a pass of the teacher, and one forward and backward of the student in which only the adapters have
        gradients of their own; ROWS_AT_ONCE rows of logits, and the student's activations for one batch.
    """
    if not len(texts.rows):
        raise SenteiError("--heal", expected="text that is not used to judge the plan", got="none",
                          do="give a longer text")
    run = _Healer(teacher, student, texts, config, folder, job | {"healing": config.to_json()}, now)
    number = run.resume()
    while not run.finished:
        number = run.go_on(number, step)
    return run.healing()


class _Healer(Run):
    """The state of a healing."""

    def __init__(self, teacher, student, texts, config, folder, job, now):
        folder.mkdir(parents=True, exist_ok=True)
        self.teacher, self.now, self.began = teacher, now, now()
        self.part, self.limit = config.part, 60.0 * config.minutes * config.part
        self.clock, self.finished = Clock(), False
        self.last = 0, 0.0  # the step of the last checkpoint, and the seconds that led to it
        super().__init__(student, texts, Loop(batch=config.batch, seed=config.seed, optimizer=config.optimizer), folder,
                         job, ())
        self.before = 0.0
        self.dense = token_losses(teacher, texts.checks).mean().item()

    def spent(self) -> float:
        """Seconds of all that led here, in this process and in those before it."""
        return self.before + self.now() - self.began

    def resume(self) -> int:
        """Takes up the newest checkpoint, and returns how many steps are done."""
        number, spent = super().resume(), self.spent()
        if not number:
            self.clock = Clock(spent=spent, check=spent, checked=spent)
            self.require_time(0)
        return number

    def go_on(self, number: int, told: Callable[[str], object]) -> int:
        """Does step `number`, and what it is time for; returns the number of the next."""
        start = self.spent()
        row = self.step(number)
        begun, clock = self.spent(), self.clock
        self.clock = clock = replace(clock, step=max(clock.step, begun - start))
        self.require_time(number + 1)
        self.finished = begun + clock.step + 2 * clock.check > self.limit
        checks = self.finished or begun - clock.checked >= max(SECONDS, self.limit / PARTS)
        if checks:
            row["held_out"] = self.evaluate()
            told(f"quality {self.quality(row):.4f}")
        self.tell(row)
        saves = checks or begun - self.last[1] >= min(SECONDS, self.limit / PARTS)
        if saves:
            self.save(number + 1, checks, begun)
        return number + 1

    def save(self, done: int, checked: bool, begun: float) -> None:
        """Writes a checkpoint; the rates that follow depend on what it says of the time."""
        spent = self.spent()
        self.clock = replace(self.clock, spent=spent, **({"checked": spent} if checked else {}))
        self.last = done, spent
        self.world.save(self.out, done, self.state(), {"job": self.job, "clock": asdict(self.clock),
                                                       "finished": self.finished})
        self.clock = replace(self.clock, check=max(self.clock.check, self.spent() - begun))

    def require_time(self, done: int) -> None:
        """Raises SenteiError where the first step and the check after it do not fit."""
        needed = self.spent() + self.clock.check + (0.0 if done else self.clock.step)
        if done <= 1 and needed > self.limit:
            share = "" if self.part == 1 else f" in {self.part:g} of the time"
            raise SenteiError("--heal", expected=f"more than {needed / 60 / self.part:.3g} minutes, so that a step and "
                              f"the checks before and after it fit{share}",
                              got=f"{self.limit / 60 / self.part:g}", do="give it more minutes")

    def rate(self, number: int) -> float:
        """The learning rate of a step: it goes down with the time, as foreseen at the last checkpoint."""
        done, spent = self.last
        foreseen = spent + (number - done) * spent / max(done, 1)
        return self.config.optimizer.rate_after(number, min(foreseen / self.limit, 1.0))

    def gradients(self, number: int) -> tuple[float, float]:
        """Adds up the gradients of a step; its loss, to which nothing is added."""
        rows = self.windows.batch(number, self.config.batch)
        with torch.no_grad():
            told = self.teacher.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)
        found = self.model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)
        leaf, losses = found.detach().requires_grad_(), []
        for said, heard in zip(told.split(ROWS_AT_ONCE), leaf.split(ROWS_AT_ONCE), strict=True):
            with torch.no_grad():
                wanted = logits_of(self.teacher, said).log_softmax(-1)
            part = kl_div(logits_of(self.model, heard).log_softmax(-1), wanted, reduction="sum", log_target=True)
            (part / len(told)).backward()
            losses.append(part.item())
        found.backward(leaf.grad)
        return math.fsum(losses) / len(told), 0.0

    def evaluate(self) -> float:
        """The mean loss of the check windows, of the model as it would be with its adapters folded in."""
        adapters.merge(self.model)
        try:
            return token_losses(self.model, self.windows.checks).mean().item()
        finally:
            adapters.unmerge(self.model)

    def quality(self, row: dict) -> float:
        """Dense perplexity ÷ that of a row."""
        return math.exp(self.dense - row["held_out"])

    def tell(self, row: dict, start: bool = False) -> None:
        """Adds a line to the metrics, with its time where it has a check."""
        super().tell(row | ({"seconds": self.spent()} if "held_out" in row else {}), start)

    def state(self) -> dict[str, torch.Tensor]:
        """The adapters and their moments."""
        return {**{f"model.{name}": parameter for name, parameter in self.named.items()}, **self.moments()}

    def load(self, found: checkpoints.Checkpoint) -> None:
        """Takes up a checkpoint, with its clock."""
        self.clock, self.finished = Clock.from_json(found.about.get("clock")), found.about.get("finished") is True
        self.before, self.last = self.clock.spent, (found.step, self.clock.spent)
        super().load(found)

    def healing(self) -> Healing:
        """What came of it."""
        size = self.config.batch * self.windows.rows.shape[1]
        table = [{"minutes": row["seconds"] / 60, "step": row["step"], "tokens": row["step"] * size,
                  "perplexity": math.exp(row["held_out"]), "quality": self.quality(row)}
                 for row in self.rows if "held_out" in row]
        return Healing(table=table, losses=[row["loss"] for row in self.rows[1:]])
