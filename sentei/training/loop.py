"""The training loop: AdamW, warm-up and cosine, gradient accumulation and clipping, checkpoints, resumed exactly.

A step depends on the weights (with the biases of balanced experts), the optimizer's moments, the seed and the step's
number, and on nothing else: random numbers begin anew with each step. So a run that is killed and started again writes
the same losses, bit for bit, on the same machine with as many threads; and with another number of processes the same up
to rounding, unless it draws noise.
References: Kingma and Ba 2014 (1412.6980), Loshchilov and Hutter 2017 (1711.05101: AdamW; 1608.03983: cosine).
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sentei.axes.experts import Experts
from sentei.core.errors import FileError, SenteiError, require
from sentei.core.storage import write_text
from sentei.training import checkpoints
from sentei.training.data import Windows, mixed
from sentei.training.losses import Balanced, Term, next_token, of_rooms
from sentei.training.parallel import World

METRICS = "metrics.jsonl"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its schedule.

    Args:
        rate: the highest learning rate.
        warmup: steps over which it rises, in a line.
        final: the share of `rate` that the cosine ends at.
        beta1, beta2, epsilon: of Adam.
        decay: of matrices; vectors have none.
        clip: the largest norm of a step's gradient.
    """

    rate: float = 3e-3
    warmup: int = 20
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        require("optimizer", self, {
            "a rate above 0": _between(self.rate, 0, 1e3) and self.rate > 0,
            "warmup in whole steps from 0": type(self.warmup) is int and self.warmup >= 0,
            "final from 0 to 1": _between(self.final, 0, 1),
            "beta1 and beta2 from 0, below 1": all(_between(b, 0, 1) and b < 1 for b in (self.beta1, self.beta2)),
            "epsilon above 0": _between(self.epsilon, 0, 1) and self.epsilon > 0,
            "decay from 0": _between(self.decay, 0, 1e3), "clip above 0": _between(self.clip, 0, 1e9) and self.clip > 0,
        })

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step 0 … steps - 1."""
        return self.rate_after(step, (step - self.warmup) / max(steps - self.warmup, 1))

    def rate_after(self, step: int, done: float) -> float:
        """The learning rate of a step when this share of the way down, 0 to 1, is done."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long and in what portions.

    Args:
        steps: of the optimizer.
        batch: sequences of one pass.
        accumulate: passes whose gradients make one step.
        precision: "float32", or "bfloat16" for autocast; weights and moments are float32 in both.
        seed: of the weights, the order of the text and whatever else is drawn.
        evaluate, save: after how many steps; both are also done at the end.
        optimizer: see there.
    """

    steps: int = 200
    batch: int = 16
    accumulate: int = 1
    precision: str = "float32"
    seed: int = 0
    evaluate: int = 50
    save: int = 100
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self):
        numbers = (self.steps, self.batch, self.accumulate, self.evaluate, self.save)
        require("training", self, {
            "steps, batch, accumulate, evaluate and save as whole numbers from 1": all(
                type(number) is int and 1 <= number < 1e8 for number in numbers),
            f"precision {' or '.join(PRECISIONS)}": isinstance(self.precision, str) and self.precision in PRECISIONS,
            "a seed from 0": type(self.seed) is int and 0 <= self.seed < 1 << 63,
            "an optimizer": isinstance(self.optimizer, Optimizer)})


def train(model: nn.Module, windows: Windows, config: Config, out: Path, *, job: dict,
          terms: Sequence[Term] = (of_rooms,), step: Callable[[str], object] = lambda note: None,
          world: World | None = None) -> dict:
    """Trains `model` in place, from the newest checkpoint in `out` on if there is one.

    Args:
        model: tokens [B, T] → logits [B, T, V], float32.
        out: gets the checkpoints and METRICS, one JSON object a step.
        job: everything the result depends on, a JSON object; a checkpoint of another job is refused.
        terms: added to the loss, see `losses.Term`.
        step: called after each step that is done here.
        world: the processes that train together, among which `model` is placed; by default this one alone.
    Returns:
        resumed_from (a step), loss_before and loss_after (held-out, nats a token), seconds (of the steps done here).
    Raises:
        FileError: a checkpoint that was changed or is of another job.
        SenteiError: a batch that the processes cannot share evenly; or a loss or a gradient that is
            not finite, where the checkpoints are those of before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        run = Run(model, windows, config, out, job, terms, world)
        first, start = run.resume(), time.perf_counter()
        for number in range(first, config.steps):
            step(f"loss {run.advance(number):.4f}")
        held = {row["step"]: row["held_out"] for row in run.rows if "held_out" in row}
        return {"resumed_from": first, "loss_before": held[0], "loss_after": held[config.steps],
                "seconds": time.perf_counter() - start}


class Run:
    """The state of one run; arguments as for `train`. What is trained are the parameters that want a gradient."""

    def __init__(self, model, windows, config, out, job, terms, world=None):
        self.model, self.windows, self.config, self.out = model, windows, config, out
        self.job, self.terms, self.rows, self.world = job, terms, [], World() if world is None else world
        require("training.batch", config.batch, {
            f"a multiple of the processes, {self.world.size}": config.batch % self.world.size == 0})
        self.balanced = [term for term in terms if isinstance(term, Balanced)]
        self.biased = [room for room in model.modules() if isinstance(room, Experts) and room.bias is not None]
        self.named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        matrices = [parameter for parameter in self.named.values() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.named.values() if parameter.dim() <= 1]
        given = config.optimizer
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": given.decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=given.rate, betas=(given.beta1, given.beta2), eps=given.epsilon)
        for parameter in self.named.values():  # also of those that never have a gradient
            self.adam.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                                          "exp_avg_sq": torch.zeros_like(parameter)}

    def resume(self) -> int:
        """Takes up the newest checkpoint, and returns how many steps are done."""
        found = checkpoints.newest(self.out)
        if found is None:
            self.tell({"step": 0, "held_out": self.evaluate()}, start=True)
            return 0
        self.check_job(found)
        self.load(found)
        self.rows = self.world.in_turn(lambda: read_metrics(self.out / METRICS, found.step))
        if self.world.first:
            write_text(self.out / METRICS, "".join(map(_line, self.rows)))
        return found.step

    def advance(self, number: int) -> float:
        """Does step `number`, evaluates and saves where it is time, and returns the loss."""
        row, done = self.step(number), number + 1
        last = done == self.config.steps
        if last or done % self.config.evaluate == 0:
            row["held_out"] = self.evaluate()
        self.tell(row)
        if last or done % self.config.save == 0:
            self.world.save(self.out, done, self.state(), {"job": self.job})
        return row["loss"]

    def step(self, number: int) -> dict:
        """Does step `number`, and returns its line of the metrics."""
        config, done, rate = self.config, number + 1, self.rate(number)
        for group in self.adam.param_groups:
            group["lr"] = rate
        loss, added = self.gradients(number)
        norm = self.world.clip(list(self.named.values()), config.optimizer.clip)
        if not (math.isfinite(loss + added) and math.isfinite(norm)):
            raise SenteiError(f"step {done}", expected="a finite loss and gradient",
                              got=f"loss {loss}, added {added}, norm {norm}",
                              do="choose a lower rate, a longer warmup or float32")
        self.adam.step()
        self.adam.zero_grad()
        for room in self.biased:
            self.world.sum(room.counts)
            self.world.sum(room.tokens)
            room.update_bias()
        row = {"step": done, "loss": loss, "added": added, "norm": norm, "rate": rate}
        for term in self.balanced:
            row |= term.numbers()
        return row

    def rate(self, number: int) -> float:
        """The learning rate of step `number`."""
        return self.config.optimizer.rate_at(number, self.config.steps)

    def gradients(self, number: int) -> tuple[float, float]:
        """Adds up the gradients of a step's passes; their mean loss, and the mean of what the terms added."""
        config, losses, extras = self.config, [], []
        self.model.train()
        torch.manual_seed(mixed(config.seed, number, self.world.rank))
        batches = self.windows.batch(number, config.batch * config.accumulate).split(config.batch)
        parts = [self.world.share(batch) for batch in batches]
        for term in self.balanced:
            term.begin(self.model, [partial(self.forward, part) for part in parts])
        for room in self.biased:
            room.forget()
        for part in parts:
            loss, added = self.loss(part)
            ((loss + added) / config.accumulate).backward()
            losses.append(loss.item())
            extras.append(added.item())
        means = torch.tensor([math.fsum(losses), math.fsum(extras)], dtype=torch.float64) / len(losses)
        return tuple((self.world.sum(means) / self.world.size).tolist())

    def loss(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one pass, and what the terms add."""
        with ExitStack() as stack:
            added = [stack.enter_context(term(self.model)) for term in self.terms]
            loss = self.forward(part)
            extras = [extra for extra in (term() for term in added) if extra is not None]
        return loss, sum(extras, torch.zeros((), device=loss.device))

    def forward(self, part: torch.Tensor) -> torch.Tensor:
        """The loss of one pass without what terms add."""
        device, kind = next(iter(self.named.values())).device, PRECISIONS[self.config.precision]
        with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
            return next_token(self.model, part.to(device))

    def evaluate(self) -> float:
        """The mean loss of the held-out windows.

        Gradients stay on, for the kernels that training runs: without them attention may take whichever measured
        faster, and two runs could differ in their last bits.
        """
        self.model.eval()
        held = self.windows.held_out()
        total = []
        for part in held.split(self.config.batch):
            own = self.world.share(part)
            rows = own if len(own) else part[:1]  # which count 0: no process may leave out a pass
            total.append(self.forward(rows).item() * len(own))
        return self.world.sum(torch.tensor(math.fsum(total), dtype=torch.float64)).item() / len(held)

    def tell(self, row: dict, start: bool = False) -> None:
        """Adds a line to the metrics; on the disk before the checkpoint that follows it."""
        self.rows.append(row)
        if not self.world.first:
            return
        with open(self.out / METRICS, "w" if start else "a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the next step depends on, by name."""
        return {**{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}, **self.moments()}

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's part of `state`."""
        return {f"optimizer.{name}.{key}": value for name, parameter in self.named.items()
                for key, value in self.adam.state[parameter].items()}

    def load(self, found: checkpoints.Checkpoint) -> None:
        """Puts a checkpoint's tensors in their places, if they are exactly those."""
        state, got = self.state(), found.shapes()
        expected = {name: tensor.shape for name, tensor in state.items()}
        if got != expected:
            wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise FileError(f"checkpoint-{found.step:08}", expected="exactly the tensors of this job",
                            got=f"{len(wrong)} others, first {wrong[0]}", do="name another folder with --out")
        with torch.no_grad():
            found.fill(state)

    def check_job(self, found: checkpoints.Checkpoint) -> None:
        """Raises FileError unless the checkpoint is of this job."""
        theirs = found.about.get("job")
        if theirs == self.job:
            return
        theirs = theirs if isinstance(theirs, dict) else {}
        differs = [key for key in self.job.keys() | theirs.keys() if self.job.get(key) != theirs.get(key)]
        raise FileError(str(self.out), expected="checkpoints of the same job",
                        got=f"another {' and '.join(sorted(differs))}", do="name another folder with --out")


def read_metrics(path: Path, step: int) -> list[dict]:
    """The lines up to `step`; what a killed run wrote after its checkpoint is left out.

    Raises:
        FileError: lines are missing.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break  # a line that was being written
        if not isinstance(row, dict) or row.get("step") != len(rows) or len(rows) > step:
            break
        rows.append(row)
    if len(rows) != step + 1:
        raise FileError(str(path), expected=f"a line for each of the steps 0 to {step}", got=f"{len(rows)} of them",
                        do="remove the folder, or name another one with --out")
    return rows


def _line(row: dict) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _between(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number in a range; NaN is in none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
