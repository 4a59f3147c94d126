"""What modules whose rows are taken natively have in common, and how one is told from a module that was altered.

Modules get another class, a subclass of their own, and keep their parameters, path, state_dict and hooks.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sentei.axes.axis import Axis
from sentei.conversion.linear import Choice, NativeLinear, Steps, input_of
from sentei.core.tracing import Tap
from sentei.kernels.block import place_of
from sentei.kernels.linear.layers import Layer

NORM_STEPS = Steps(few=(1, 8, 64))  # a norm of each head has many to a token
SWITCHED = ("native_rows", "activation", "form", "turn", "parts")  # what a module that was switched has of its own
NOTED = ("known", "following")  # and what it notes as it runs
# Of a result's largest number, in fp32, where a softmax of scores is between; every other rotation differs by far more.
DIFFER = 1e-3


def plain_layers(parts: dict[str, nn.Module], names: tuple[str, ...]) -> list[Layer] | None:
    """Weight and bias of linear layers that nobody has altered; else None."""
    if _has_any_global_hook():
        return None
    layers = []
    for name in names:
        layer = parts[name]
        if type(layer) is not NativeLinear and type(layer) is not nn.Linear or is_altered(layer):
            return None
        layers.append((layer._parameters.get("weight"), layer._parameters.get("bias")))
    return layers


def is_altered(module: nn.Module) -> bool:
    """Whether someone put a hook on it that does something, or a forward of their own, as accelerate does."""
    hooks = module._forward_hooks
    return bool(hooks and not all(map(_is_idle, hooks.values())) or module._forward_pre_hooks
                or "forward" in module.__dict__)


def _is_idle(hook: Callable) -> bool:
    """Whether it is one of those by which transformers keeps layers' outputs, and none are wanted.

    It puts them on every attention of a model that was once asked for some, and never takes them back.
    """
    if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return False
    wanted = _wanted_outputs()
    return wanted is not None and not wanted.get()


@cache
def _wanted_outputs():
    """Where those hooks look for what is wanted of this call; None in a version that keeps it elsewhere."""
    from transformers.utils import output_capturing

    return getattr(output_capturing, "_active_collector", None)


class Answer(NamedTuple):
    """What was found out of a module's parts, and what that rests on, which is asked again in microseconds.

    Args:
        value: what was found.
        parts: of whom, by what name, which module, of which class.
        weights: of whom, by what name, and where its numbers lie.
        numbers: of whom, by what name, and the number.
    """

    value: object
    parts: list[tuple[nn.Module, str, nn.Module, type]]
    weights: list[tuple[nn.Module, str, tuple | None]]
    numbers: list[tuple[nn.Module, str, float]]

    @classmethod
    def of(cls, module: nn.Module, value: object) -> "Answer":
        """One that rests on the modules in a module and in these, all their weights and all their numbers."""
        holders = module, *module.children()
        parts = [(holder, name, part, type(part)) for holder in holders for name, part in holder.named_children()]
        return cls(value, parts,
                   [(part, name, place_of(weight)) for _, _, part, _ in parts
                    for name, weight in part._parameters.items()],
                   [(part, name, number) for _, _, part, _ in parts for name, number in vars(part).items()
                    if type(number) is float])

    def holds(self) -> bool:
        """Whether all of that is as it was, and nobody looks on."""
        if _has_any_global_hook():
            return False
        for holder, name, part, kind in self.parts:
            if holder._modules.get(name) is not part or type(part) is not kind or is_altered(part):
                return False
        for part, name, place in self.weights:
            if place_of(part._parameters.get(name)) != place:
                return False
        return all([part.__dict__.get(name) == number for part, name, number in self.numbers])


@cache
def attention_functions():
    """transformers' table of attention functions, in which ours is."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def restore(module: nn.Module) -> None:
    """Gives the module the class it had."""
    module.__class__ = type(module).__bases__[1]
    for name in (*SWITCHED, *NOTED):
        module.__dict__.pop(name, None)


@cache
def native_class(mixin: type, own: type) -> type:
    """The class a module of class `own` gets; its name stays, which some code asks for."""
    return type(own.__name__, (mixin, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


class Kind(NamedTuple):
    """One kind of module whose rows are taken natively.

    Args:
        mixin: what its class becomes a subclass of.
        looks_like: whether a module is worth a try.
        prove: switches the module, with a Choice of all the rows it is proven on, or says why not.
        steps: numbers of rows that are measured.
        outputs: the numbers it makes of a row.
        given: what it is called with, of rows [1, T, D].
        alike: what tells modules of one class and shape apart where they are measured.
        settle: what follows from a module's Choice.
    """

    mixin: type
    looks_like: Callable[[nn.Module], bool]
    prove: Callable[[nn.Module, type], str]
    steps: Steps
    outputs: Callable[[nn.Module], int]
    given: Callable[[nn.Module, torch.Tensor], tuple] = lambda module, x: (x,)
    alike: Callable[[nn.Module], tuple] = lambda module: ()
    settle: Callable[[nn.Module], None] = lambda module: None


class Proofs:
    """What was proven of modules, for as long as they are not altered; forgotten where a model is copied or pickled.

    A plan that is installed again, to be judged and timed, would otherwise be proven again, a second or two each time.
    """

    def __init__(self):
        self.found: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()

    def __reduce__(self):
        return Proofs, ()

    def prove(self, module: nn.Module, kind: Kind) -> str:
        """As `kind.prove`; what came out before is taken where nothing it depends on has changed since."""
        seen, known = (kind.mixin, kind.alike(module), _state_of(module)), self.found.get(module)
        if known is None or known[0] != seen:
            reason = kind.prove(module, kind.mixin)
            switched = {name: vars(module)[name] for name in SWITCHED if name in vars(module)}
            self.found[module] = seen, reason, type(module), switched
            return reason
        _, reason, module.__class__, switched = known
        vars(module).update(switched)
        return reason


def _state_of(module: nn.Module) -> list[tuple]:
    """What tells whether a module, or a part of it, is what it was: classes, parts, settings, and weights as they lie.

    A room in it is left out: what of it counts is for its kind to say.
    """
    return [(ref(part), type(part), {name: value for name, value in vars(part).items()
                                if type(value) in (bool, int, float, str)},
             *map(_form_of, part.parameters(recurse=False)))
            for part in module.modules() if not isinstance(part, Axis | Tap)]


def _form_of(weight: torch.Tensor) -> tuple:
    """Where a weight's numbers lie, how, and how often they were changed; of a sparse one, which weight it is."""
    if weight.layout is not torch.strided:
        return (ref(weight),)
    return (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype, weight.device,
            weight.shape, weight.stride())


def near(y: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a result in fp32 is the module's own."""
    return y.shape == own.shape and bool((y - own).abs().max() <= DIFFER * own.abs().max())


def all_rows(module: nn.Module, *, many: bool = True) -> Choice:
    """Few rows of any number, and many if they were proven, too."""
    x = input_of(module, 1)
    return Choice(path="", outputs=0, width=x.shape[-1], dtype=x.dtype, most_rows=NORM_STEPS.few[-1], reason="",
                  many_rows=int(many))


def in_float32(module: nn.Module, config) -> nn.Module:
    """A copy in fp32 to be tried, in evaluation, which attends through torch's sdpa.

    Args:
        config: the module's, or its attention's; the model's own stays as it is.
    """
    other = copy.copy(config)
    other._attn_implementation = "sdpa"
    return copy.deepcopy(module, {id(config): other}).float().eval()


def turns(module: nn.Module, x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], None]:
    """The position embeddings of rows of unlike positions, and no mask."""
    return _turns_of(x.shape[1], module.head_dim, x.dtype), None


@cache
def _turns_of(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.linspace(0.1, 9, rows * (width // 2)).view(1, rows, width // 2).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
