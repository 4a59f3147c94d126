"""Linear layers of a model by the faster way: few rows, as in decoding, and many, as in a prompt, natively, each
where that was measured faster.

Nothing is rewritten: a module of exactly `nn.Linear` gets another class with the same parameters and another `forward`,
so its path, state_dict, hooks and tied weights stay what they are.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from sentei.kernels.linear import fused_cpp

ROWS = (1, 4, 8)  # measured, in turn; a number that is not faster ends it
MANY_ROWS = (1024, 256)  # the same of many rows: so many and more
RUNS = 4
SAMPLE, MANY_SAMPLE = 12, 2  # modules of a shape that are measured, with few rows and with many
MARGIN = 1.02  # below this a gain is noise
# The attribute of a model that holds what was measured, by kind of module.
MEASURED = "rows_measured_by_sentei"
Known = dict[Hashable, tuple[int, str]]  # kind of module: the last number of rows at which ours was faster, and why
MOST_NUMBERS = 1 << 25  # a layer that would make more where it is measured takes no many rows: an output head
UNMEASURED = "many rows are not for it"
MANY = "many"  # before the kind, where the rows are many


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a module was given and why.

    Args:
        path: of the module.
        outputs, width, dtype: the numbers it makes of a row, those of the row, and their dtype.
        most_rows: the native kernel takes up to so many; 0 for none.
        reason: measured gains, or what the kernel cannot take.
        many_rows: it takes so many and more; 0 for never. With both 0 the module is as it was.
    """

    path: str
    outputs: int
    width: int
    dtype: torch.dtype
    most_rows: int
    reason: str
    many_rows: int = 0

    def takes(self, input: torch.Tensor) -> bool:
        """Whether the native kernel is for so many rows, of this dtype."""
        count = input.numel()
        return input.dtype is self.dtype and (count <= self.most_rows * self.width
                                              or 0 < self.many_rows * self.width <= count)


class Steps(NamedTuple):
    """Numbers of rows at which a kind of module is measured, in turn."""

    few: tuple[int, ...] = ROWS
    many: tuple[int, ...] = MANY_ROWS


class NativeLinear(nn.Linear):
    """An `nn.Linear` of which few rows, and many, are the native kernel's; `native_rows` is its Choice."""

    native_rows: Choice

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`; other rows and dtypes, gradients and what a kernel refuses take torch's own path."""
        takes, own = self.native_rows.takes(input), self._parameters
        if takes:
            output = fused_cpp.at_once(input, own.get("weight"), own.get("bias"))
            if output is not None:
                return output
        weight, bias = self.weight, self.bias
        if takes and input.shape[-1:] == weight.shape[1:] and not fused_cpp.refusal(input, weight, bias):
            return fused_cpp.run(input, weight, bias)
        return nn.functional.linear(input, weight, bias)


def install(model: nn.Module, *, most_rows: int | None = None, many_rows: int | None = None) -> list[Choice]:
    """Lets the model's linear layers take few rows, and many, by whichever way is faster on this machine.

    Args:
        model: any model; modules of exactly `nn.Linear` are considered, the output head among them.
        most_rows: the native kernel takes so many without measuring, 0 to 8.
        many_rows: it takes so many and more without measuring; 0 for never.
    Returns:
        a Choice for every `nn.Linear`, in the model's order.
    Cost: measuring takes about a hundred passes of few rows over a dozen layers of each shape, and ten of 1,024 and of
        256 rows over two, with the present number of threads; once a model and number of threads.

    The choice holds for the dtype the weights now have; in another one torch's own path runs.
    """
    remove(model)
    known = model.__dict__.setdefault(MEASURED, {})
    modules = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    refused = {path: _refusal(module) for path, module in modules.items()}
    taken = [module for path, module in modules.items() if not refused[path]]
    ways = (lambda module, x: nn.functional.linear(x, module.weight, module.bias),
            lambda module, x: fused_cpp.linear(x, module.weight, module.bias))
    few = None if most_rows is None else min(most_rows, fused_cpp.FEW_ROWS)
    found = rows_taken(taken, _kind, ways, known, Steps(), few, many_rows)
    choices = []
    for path, module in modules.items():
        few, many, reason = (0, 0, refused[path]) if refused[path] else found[_kind(module)]
        outputs, width = module.weight.shape
        choice = Choice(path=path, outputs=outputs, width=width, dtype=module.weight.dtype, most_rows=few,
                        many_rows=many, reason=reason)
        choices.append(choice)
        if few or many:
            module.native_rows = choice
            module.__class__ = NativeLinear
    return choices


def remove(model: nn.Module) -> None:
    """Makes the model's linear layers plain again."""
    for module in model.modules():
        if type(module) is NativeLinear:
            del module.native_rows
            module.__class__ = nn.Linear


@torch.no_grad()
def _refusal(module: nn.Linear) -> str:
    """What the kernel cannot take of this module, whatever the input."""
    weight = module.weight
    if weight.numel() == 0:
        return "a weight without numbers"
    return fused_cpp.refusal(torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device), weight,
                             module.bias)


def _kind(module: nn.Linear) -> tuple:
    """Modules of one kind are measured together."""
    return tuple(module.weight.shape), module.weight.dtype, module.bias is not None, torch.get_num_threads()


def rows_taken(modules: list[nn.Module], kind_of: Callable[[nn.Module], Hashable], ways: tuple[Callable, Callable],
               known: Known, steps: Steps, most_rows: int | None, many_rows: int | None
               ) -> dict[Hashable, tuple[int, int, str]]:
    """The most few rows and the fewest many at which the second way is taken, and why, for every kind of module.

    Args:
        most_rows, many_rows: asked for; None to measure. See `faster_rows` for the rest.
    """
    def found(asked: int | None, modules: list, kind_of: Callable, steps: tuple[int, ...], most: int) -> Known:
        if asked is None:
            return faster_rows(modules, kind_of, ways, known, steps, most)
        return {kind_of(module): (asked, "asked for") for module in modules}

    few = found(most_rows, modules, kind_of, steps.few, SAMPLE)
    most = max(steps.many, default=0)
    narrow = [module for module in modules if most and len(next(module.parameters())) * most <= MOST_NUMBERS]
    many = found(many_rows, narrow, lambda module: (MANY, kind_of(module)), steps.many, MANY_SAMPLE)
    taken = {}
    for kind in {kind_of(module): None for module in modules}:
        (most, why), (least, also) = few[kind], many.get((MANY, kind), (0, UNMEASURED))
        taken[kind] = most, least, why if why == also else f"{why}; {also}"
    return taken


@torch.no_grad()
def faster_rows(modules: list[nn.Module], kind_of: Callable[[nn.Module], Hashable], ways: tuple[Callable, Callable],
                known: Known, steps: tuple[int, ...], most: int) -> Known:
    """The last of `steps` at which the second way is faster than the first, and the gains, for every kind of module.

    Args:
        modules: of a model, in its order; the last dimension of a module's first parameter is its input's.
        kind_of: modules that give the same are measured together.
        ways: functions of a module and its input.
        known: what was measured before; it is used and added to.
        steps: numbers of rows, in turn; one that is not faster ends it.
        most: modules of a kind that are measured.

    A pass goes through the modules in the model's order, so that each weight has left the cache, as in decoding, when
    its turn comes again.
    """
    number, sample = defaultdict(int), []
    for module in (module for module in modules if kind_of(module) not in known):
        number[kind_of(module)] += 1
        sample += [module] if number[kind_of(module)] <= most else []
    if not sample:
        return known
    gains = {rows: _gains(sample, kind_of, ways, rows) for rows in steps}
    for kind in number:
        best = 0
        for rows in steps:
            if gains[rows][kind] < MARGIN:
                break
            best = rows
        known[kind] = best, ", ".join(f"{gains[rows][kind]:.2f} times as fast at {rows} rows" for rows in steps)
    return known


def input_of(module: nn.Module, rows: int) -> torch.Tensor:
    """Random rows, [1, rows, I], that the module takes."""
    weight = next(module.parameters())
    return torch.randn(1, rows, weight.shape[-1], generator=torch.Generator().manual_seed(rows)).to(weight.dtype)


def _gains(modules, kind_of, ways, rows) -> dict[Hashable, float]:
    """Seconds of the first way ÷ seconds of the second, the median over modules and runs, for every kind."""
    inputs = {kind_of(module): input_of(module, rows) for module in modules}
    seconds = defaultdict(lambda: ([], []))
    for run in range(RUNS + 1):
        for which in (0, 1) if run % 2 else (1, 0):
            for module in modules:
                kind = kind_of(module)
                start = time.perf_counter()
                ways[which](module, inputs[kind])
                if run:
                    seconds[kind][which].append(time.perf_counter() - start)
    return {kind: statistics.median(first / second for first, second in zip(*pair, strict=True))
            for kind, pair in seconds.items()}
