"""Linear layers of a model by the faster way: few rows, as in decoding, with the native kernel, and many rows of half
precision in float32, each where that was measured faster.

Nothing is rewritten: a module of exactly `nn.Linear` gets another class with the same parameters and another `forward`,
so its path, state_dict, hooks and tied weights stay what they are.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import nn

from sentei.kernels.linear import fused_cpp, widened

ROWS = (1, 4, 8)  # measured, in turn; a number that is not faster ends it
MANY_ROWS = (1024, 256)  # measured in float32 where numbers are halves, in turn as above
RUNS = 4
SAMPLE, MANY_SAMPLE = 12, 2  # modules of a shape that are measured, with few rows and with many
MARGIN = 1.02  # below this a gain is noise
# The attribute of a model that holds what was measured, by kind of module.
MEASURED = "few_rows_of_sentei"
Known = dict[Hashable, tuple[int, str]]  # kind of module: the most rows, and why


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a module was given and why.

    Args:
        path: of the module.
        outputs, width, dtype: the numbers it makes of a row, those of the row, and their dtype.
        most_rows: the native kernel takes up to so many; 0 for none.
        reason: measured gains, or what the kernel cannot take.
        many_rows: so many and more are multiplied in float32; 0 for never. With both 0 the module is as it was.
    """

    path: str
    outputs: int
    width: int
    dtype: torch.dtype
    most_rows: int
    reason: str
    many_rows: int = 0


class FewRowLinear(nn.Linear):
    """An `nn.Linear` whose products of few rows, and of many, are ours; `few_rows` is its Choice."""

    few_rows: Choice

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`; other rows and dtypes, gradients and what a kernel refuses take torch's own path."""
        choice, own = self.few_rows, self._parameters
        few = input.dtype is choice.dtype and input.numel() <= choice.most_rows * choice.width
        if few:
            output = fused_cpp.at_once(input, own.get("weight"), own.get("bias"))
            if output is not None:
                return output
        weight, bias = self.weight, self.bias
        if few and input.shape[-1:] == weight.shape[1:] and not fused_cpp.refusal(input, weight, bias):
            return fused_cpp.run(input, weight, bias)
        many = choice.many_rows and input.numel() >= choice.many_rows * choice.width
        if many and input.dtype is weight.dtype is choice.dtype and not torch.is_grad_enabled():
            return widened.linear(input, weight, bias)
        return nn.functional.linear(input, weight, bias)


def install(model: nn.Module, *, most_rows: int | None = None, many_rows: int | None = None) -> list[Choice]:
    """Lets the model's linear layers take few rows, and many, by whichever way is faster on this machine.

    Args:
        model: any model; modules of exactly `nn.Linear` are considered, the output head among them.
        most_rows: the native kernel takes so many without measuring, 0 to 8.
        many_rows: so many and more are multiplied in float32 without measuring, if they are of half precision.
    Returns:
        a Choice for every `nn.Linear`, in the model's order.
    Cost: measuring takes about a hundred passes over a dozen layers of each shape, with the present number of threads;
        once a model and number of threads.

    The choice holds for the dtype the weights now have; in another one torch's own path runs.
    """
    remove(model)
    known = model.__dict__.setdefault(MEASURED, {})
    modules = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    refused = {path: _refusal(module) for path, module in modules.items()}
    taken = [module for path, module in modules.items() if not refused[path]]
    found = _measured(taken, known) if most_rows is None else {
        _kind(module): (min(most_rows, fused_cpp.MOST_ROWS), "asked for") for module in taken}
    halves = [module for module in modules.values() if _is_half(module)]
    wide = _measured_wide(halves, known) if many_rows is None else {
        ("many", *_kind(module)): (many_rows, "asked for") for module in halves}
    choices = []
    for path, module in modules.items():
        rows, reason = (0, refused[path]) if refused[path] else found[_kind(module)]
        many, why = wide.get(("many", *_kind(module)), (0, ""))
        outputs, width = module.weight.shape
        choice = Choice(path=path, outputs=outputs, width=width, dtype=module.weight.dtype, most_rows=rows,
                        many_rows=many, reason=f"{reason}; in float32 {why}" if why else reason)
        choices.append(choice)
        if rows or many:
            module.few_rows = choice
            module.__class__ = FewRowLinear
    return choices


def remove(model: nn.Module) -> None:
    """Makes the model's linear layers plain again."""
    for module in model.modules():
        if type(module) is FewRowLinear:
            del module.few_rows
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


def _measured(modules: list[nn.Linear], known: Known) -> Known:
    return faster_rows(modules, _kind, (lambda module, x: nn.functional.linear(x, module.weight, module.bias),
                                        lambda module, x: fused_cpp.linear(x, module.weight, module.bias)), known)


def _is_half(module: nn.Linear) -> bool:
    weight = module.weight
    return weight.dtype in (torch.bfloat16, torch.float16) and weight.numel() > 0 and weight.device.type == "cpu"


def _measured_wide(modules: list[nn.Linear], known: Known) -> Known:
    return faster_rows(modules, lambda module: ("many", *_kind(module)),
                       (lambda module, x: nn.functional.linear(x, module.weight, module.bias),
                        lambda module, x: widened.linear(x, module.weight, module.bias)), known, MANY_ROWS, MANY_SAMPLE)


@torch.no_grad()
def faster_rows(modules: list[nn.Module], kind_of: Callable[[nn.Module], Hashable], ways: tuple[Callable, Callable],
                known: Known, steps: tuple[int, ...] = ROWS, most: int = SAMPLE) -> Known:
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
