"""A pruned model of its own: what stands in a converted model, for good, beside the dense one it came from.

Nothing is copied that need not be: where the numbers are float32 both models share every weight, until the student's
are replaced. So a dense teacher and its student take little more memory than the one of them.
"""

import copy

import torch
from torch import nn

from sentei.axes.rank import Config as Rank
from sentei.conversion import adapters
from sentei.conversion.layers import ORIGINALS, family_of, originals
from sentei.conversion.plan import Plan, convert, place
from sentei.conversion.rooms.experts import ChoosingNetwork
from sentei.conversion.rooms.heads import FOLD
from sentei.conversion.statistics import Statistics


def student_of(model: nn.Module, plan: Plan, statistics: Statistics | None = None
               ) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """A model in float32 of the shapes that the plan's rooms of changed weights give; the others are not installed.

    Args:
        model: a transformers model; it is dense afterwards, and untouched.
        plan, statistics: as for `plan.convert`.
    Returns:
        the model, and for `settled` the dtype that each of its tensors has in `model`.
    Cost: what the rooms cost to build; where the model is of half precision also its weights in float32.
    """
    place(model, plan.standing("in"), statistics)
    try:
        dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        modules = [model, *originals(model).values()]
        memo = {id(tensor): _own(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
        if ORIGINALS in vars(model):  # what stood there is no part of the student
            memo[id(originals(model))] = {}
        made = copy.deepcopy(model, memo)
    finally:
        convert(model, Plan())
    made.__dict__.pop(ORIGINALS, None)
    for module in made.modules():  # a cache of the dense model cannot be folded by weights that are about to change
        module.__dict__.pop(FOLD, None)
    return made, dtypes


def _own(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def adapted(student: nn.Module, config: Rank) -> list[str]:
    """Gives every linear layer inside the student's layers an adapter; their paths. Only adapters are trainable then.

    Left out are weights that a network of chosen neurons reads without calling their layer.
    """
    read = {id(module.up_proj) for module in student.modules() if isinstance(module, ChoosingNetwork)}
    root = family_of(student).layers
    targets = [f"{root}.{path}" for path, module in student.get_submodule(root).named_modules()
               if type(module) is nn.Linear and id(module) not in read]
    return adapters.add(student, targets, config)


def settled(student: nn.Module, dtypes: dict[str, torch.dtype]) -> nn.Module:
    """The student with what its adapters have learned in its weights, its tensors in their own dtypes again."""
    adapters.remove(student, fold=True)
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        tensor.data = tensor.data.to(dtypes[name])
    return student
