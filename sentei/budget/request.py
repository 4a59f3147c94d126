"""What `sentei prune` is asked."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sentei.budget.goal import Goal
from sentei.budget.workload import Workload, on_model, workload_of
from sentei.conversion.checkpoints import DTYPES
from sentei.core.errors import SenteiError, UnsupportedError
from sentei.training.healing import Config as Healing


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `sentei prune` is asked; checked when it is made.

    Args:
        model: a folder, a .gguf file, with `online` a hub id, or None for the embedded default.
        text: plain text in UTF-8, or None for the interpreter's documentation.
        workload: e.g. "prefill:4096" or "decode:8000".
        quality, speed: the bound; exactly one of them.
        dtype: "float32" or "bfloat16".
        out: the folder to write, or None for one named after the job below ./sentei-out.
        online: whether the hub may be asked.
        lookahead: see `Goal`.
        heal: minutes to heal the chosen plan for; 0 for none.
        plain: whether the folder must load in transformers alone: layers are pruned all alike, or left out whole.
    """

    model: str | None = None
    text: Path | None = None
    workload: str = "prefill:4096"
    quality: float | None = None
    speed: float | None = None
    dtype: str = "float32"
    out: Path | None = None
    online: bool = False
    lookahead: bool = True
    heal: float = 0.0
    plain: bool = False

    def __post_init__(self):
        if self.work().lever == "decode" and not self.lookahead:
            raise SenteiError("--no-lookahead", expected="a prefill workload", got=repr(self.workload),
                              do="leave it out: what a decoded token keeps is never chosen from a later one")
        self.goal()
        self.healing()
        if self.dtype not in DTYPES:
            raise SenteiError("--dtype", expected=f"one of {', '.join(DTYPES)}", got=repr(self.dtype),
                              do="choose one, or convert the model with model.float()")

    def goal(self) -> Goal:
        """The bound that is asked."""
        return Goal(quality=self.quality, speed=self.speed, lookahead=self.lookahead)

    def healing(self) -> Healing | None:
        """How it is healed, or None."""
        return None if self.heal == 0 else Healing(minutes=self.heal)

    def work(self) -> Workload:
        """What is to become faster."""
        return workload_of(self.workload)

    def work_of(self, model: nn.Module) -> Workload:
        """The same as this model does it.

        Raises:
            UnsupportedError: a model of no known family, or what only language models can be asked: of an encoder
                neither decoding, nor healing, which learns next tokens, nor choices without lookahead.
        """
        work = on_model(self.work(), model)
        for flag, asked in (("--heal", self.heal), ("--no-lookahead", not self.lookahead)):
            if asked and work.measure is not self.work().measure:
                raise UnsupportedError(flag, expected="a language model", got="an encoder", do=f"leave {flag} out")
        return work

    def command(self) -> str:
        """The command line that asks the same."""
        flags = {"--text": self.text, "--workload": self.workload, "--quality": self.quality, "--speed": self.speed,
                 "--dtype": self.dtype, "--heal": self.heal or None, "--out": self.out}
        words = ["sentei", "prune", *([self.model] if self.model else [])]
        words += [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
        return shlex.join(words + ["--no-lookahead"] * (not self.lookahead) + ["--plain"] * self.plain
                          + ["--online"] * self.online)

    def call(self) -> str:
        """The Python that asks the same of a model in memory."""
        settings = {"text": self.text and str(self.text), "workload": self.workload, "quality": self.quality,
                    "speed": self.speed, "out": self.out and str(self.out)}
        given = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
        given += ["lookahead=False"] * (not self.lookahead)
        return f"sentei.prune({', '.join(['model', 'tokenizer', *given])})"
