"""What of a model runs natively besides attention: found, proven, measured, switched; and all of it taken back."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from sentei.conversion import block, linear, rows, stacks
from sentei.conversion.altered import Kind, Proofs, restore
from sentei.conversion.linear import Choice, input_of, rows_taken
from sentei.kernels.linear import fused_cpp

KINDS = (*rows.KINDS, stacks.KIND, block.KIND)
# The attribute of a model that holds what was proven of its modules.
PROVEN = "proofs_of_sentei"


def install(model: nn.Module, *, most_rows: int | None = None, many_rows: int | None = None) -> list[Choice]:
    """Lets the model take few rows, and many, in native calls where these are faster on this machine.

    Args:
        model: any model; see `conversion.linear.install`.
        most_rows: take so many without measuring, 0 to 8.
        many_rows: take so many and more without measuring; 0 for never.
    Returns:
        a Choice for every `nn.Linear`, then one for every module that looks like one of KINDS, each kind in the model's
        order.
    Cost: as `conversion.linear.install`, about twice, and a few calls of every module to prove it; both once.
        Measured one after the other, each on top of what is before it.
    """
    remove(model)
    choices = linear.install(model, most_rows=most_rows, many_rows=many_rows)
    for kind in KINDS:
        modules = {path: module for path, module in model.named_modules() if kind.looks_like(module)}
        choices += _install(model, modules, kind, most_rows, many_rows)
    return choices


def is_installed(model: nn.Module) -> bool:
    """Whether anything of the model runs natively besides attention."""
    return any(isinstance(module, (linear.NativeLinear, *(kind.mixin for kind in KINDS))) for module in model.modules())


def remove(model: nn.Module) -> None:
    """Makes the model plain again."""
    linear.remove(model)
    for module in model.modules():
        if isinstance(module, tuple(kind.mixin for kind in KINDS)):
            restore(module)


@contextmanager
def removed(model: nn.Module) -> Iterator[nn.Module]:
    """The model plain for as long as this lasts, so that its numbers do not depend on what was measured faster."""
    was_native = is_installed(model)
    remove(model)
    try:
        yield model
    finally:
        if was_native:
            install(model)


def _install(model: nn.Module, modules: dict[str, nn.Module], kind: Kind, most_rows: int | None,
             many_rows: int | None) -> list[Choice]:
    """Switches modules that are proven and, unless numbers of rows are asked for, measured faster."""
    known, proofs = model.__dict__[linear.MEASURED], model.__dict__.setdefault(PROVEN, Proofs())
    refused = {path: "a forward of its own" if "forward" in vars(module) else proofs.prove(module, kind)
               for path, module in modules.items()}
    proven = [module for path, module in modules.items() if not refused[path]]
    ways = (lambda module, x: type(module).__bases__[1].forward(module, *kind.given(module, x)),
            lambda module, x: module(*kind.given(module, x)))
    if most_rows:  # of a token, of which a norm may have many
        most_rows = min(most_rows, fused_cpp.FEW_ROWS) * kind.steps.few[-1] // linear.ROWS[-1]
    alike = partial(_alike, kind)
    found = rows_taken(proven, alike, ways, known, kind.steps, most_rows, many_rows)
    choices = []
    for path, module in modules.items():
        few, many, reason = (0, 0, refused[path]) if refused[path] else found[alike(module)]
        if not refused[path] and not module.native_rows.many_rows:
            many = 0
        x = input_of(module, 1)
        choice = Choice(path=path, outputs=kind.outputs(module), width=x.shape[-1], dtype=x.dtype, most_rows=few,
                        many_rows=many, reason=reason)
        choices.append(choice)
        if few or many:
            module.native_rows = choice
            kind.settle(module)
        elif not refused[path]:
            restore(module)
    return choices


def _alike(kind: Kind, module: nn.Module) -> tuple:
    """Modules that give the same are measured together. Of names: the answers stay with a model that may be pickled."""
    mixin, own = type(module).__bases__[:2]
    return mixin.__name__, own.__module__, own.__qualname__, torch.get_num_threads(), *kind.alike(module), *(
        (tuple(weight.shape), weight.dtype) for weight in module.parameters())
