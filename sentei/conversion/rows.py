"""The modules of a decoding step, for few rows in native calls: linear layers, gated MLPs and RMS norms.

Found by what they are made of and proven by what they compute, whatever the family: a module of three linear layers and
an activation is taken for a gated MLP, one whose class ends in RMSNorm for a norm, and either only where the native
result is that of the module's own forward on random rows. As in `conversion.linear` a module gets another class, a
subclass of its own, and keeps its parameters, path, state_dict and hooks.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from sentei.conversion import linear
from sentei.conversion.linear import Choice, FewRowLinear, faster_rows, input_of
from sentei.kernels import native
from sentei.kernels.linear import fused_cpp, rows

LAYERS = ("gate_proj", "up_proj", "down_proj")
NORM_ROWS = (1, 8, 64)  # measured; a norm of each head has many to a token
EPSILONS = ("variance_epsilon", "eps")
SCALES = (1.0, 1e-3, 30.0)  # of the rows a module is tried on: small ones tell the epsilon
ROUNDINGS = 8  # of the dtype, of a result's largest number: what the own forward may differ by


class FewRows:
    """A module whose few rows are a native call's; what that call does not take goes to the class it had before."""

    few_rows: Choice

    def forward(self, *inputs, **named):
        """As the module's own; see `FewRowLinear.forward`."""
        choice = self.few_rows
        if len(inputs) == 1 and not named:
            x = inputs[0]
            if type(x) is torch.Tensor and x.dtype is choice.dtype and x.numel() <= choice.most_rows * choice.width:
                output = self._native(x)
                if output is not None:
                    return output
        return super().forward(*inputs, **named)


class FewRowGated(FewRows):
    """down(act(gate(x)) · up(x)); `activation` is the module of it and the name of what it computes."""

    activation: tuple[nn.Module, str]

    def _native(self, x):
        parts = self._modules
        act, name = self.activation
        if parts.get("act_fn") is not act or act._forward_hooks or act._forward_pre_hooks or _has_any_global_hook():
            return None
        layers = []
        for path in LAYERS:
            layer = parts[path]
            if (type(layer) is not FewRowLinear and type(layer) is not nn.Linear or layer._forward_hooks
                    or layer._forward_pre_hooks):
                return None
            layers.append((layer._parameters.get("weight"), layer._parameters.get("bias")))
        return rows.gated(x, *layers, name)


class FewRowNorm(FewRows):
    """x / √(mean(x²) + ε) · (shift + weight); `form` is the name of ε's attribute and the shift."""

    form: tuple[str, float]

    def _native(self, x):
        epsilon, shift = self.form
        return rows.norm(x, self._parameters.get("weight"), self.__dict__[epsilon], shift)


def install(model: nn.Module, *, most_rows: int | None = None) -> list[Choice]:
    """Lets the model take few rows in native calls where they are faster on this machine.

    Args:
        model: any model; see `conversion.linear.install`.
        most_rows: take so many without measuring, 0 to 8.
    Returns:
        a Choice for every `nn.Linear`, then one for every module that looks like a gated MLP or an RMS norm, each kind
        in the model's order.
    Cost: as `conversion.linear.install`, about twice. Measured one after the other, each on top of what is before it.
    """
    remove(model)
    choices = linear.install(model, most_rows=most_rows)
    gated = {path: module for path, module in model.named_modules() if _looks_gated(module)}
    norms = {path: module for path, module in model.named_modules() if _looks_like_a_norm(module)}
    known = model.__dict__[linear.MEASURED]
    choices += _install(gated, FewRowGated, most_rows, known)
    return choices + _install(norms, FewRowNorm, most_rows, known)


def remove(model: nn.Module) -> None:
    """Makes the model plain again."""
    linear.remove(model)
    for module in model.modules():
        if isinstance(module, FewRows):
            _restore(module)


def _restore(module: nn.Module) -> None:
    module.__class__ = type(module).__bases__[1]
    for name in ("few_rows", "activation", "form"):
        module.__dict__.pop(name, None)


@cache
def _few_rows_class(mixin: type, own: type) -> type:
    """The class a module of class `own` gets; its name stays, which some code asks for."""
    return type(own.__name__, (mixin, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def _install(modules: dict[str, nn.Module], mixin: type, most_rows: int | None, known: linear.Known) -> list[Choice]:
    """Switches modules that are proven and, unless a number of rows is asked for, measured faster."""
    prove, steps = (_prove_gated, linear.ROWS) if mixin is FewRowGated else (_prove_norm, NORM_ROWS)
    refused = {path: prove(module, mixin) for path, module in modules.items()}
    proven = [module for path, module in modules.items() if not refused[path]]
    found = {_kind(module): (min(most_rows, fused_cpp.MOST_ROWS) * steps[-1] // linear.ROWS[-1], "asked for")
             for module in proven} if most_rows is not None else faster_rows(
        proven, _kind, (lambda module, x: super(FewRows, module).forward(x), lambda module, x: module(x)), known, steps)
    choices = []
    for path, module in modules.items():
        few, reason = (0, refused[path]) if refused[path] else found[_kind(module)]
        shape = input_of(module, 1).shape
        outputs = len(module.down_proj.weight) if mixin is FewRowGated else shape[-1]
        choice = Choice(path=path, outputs=outputs, width=shape[-1], dtype=input_of(module, 1).dtype, most_rows=few,
                        reason=reason)
        choices.append(choice)
        if few:
            module.few_rows = choice
        elif not refused[path]:
            _restore(module)
    return choices


def _kind(module: nn.Module) -> tuple:
    """Modules of one kind are measured together."""
    return type(module), torch.get_num_threads(), *(
        (tuple(weight.shape), weight.dtype) for weight in module.parameters())


def _looks_gated(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} == {*LAYERS, "act_fn"} and all(
        type(getattr(module, name)) in (nn.Linear, FewRowLinear) for name in LAYERS)


def _looks_like_a_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter)


def _prove_gated(module: nn.Module, mixin: type) -> str:
    """Switches the module if its activation is known and the native result its own; else says why not."""
    weight = module.gate_proj.weight
    if any(True for _ in module.parameters(recurse=False)) or weight.numel() == 0:
        return "parameters beside its layers, or none in them"
    reason = native.missing() or _foreign(weight)
    if reason:
        return reason
    x = torch.linspace(-12, 12, 4001)
    with torch.no_grad():
        own = module.act_fn(x)
        names = [name for name, function in rows.ACTIVATIONS.items()
                 if own.dtype is x.dtype and own.shape == x.shape and (own - function(x)).abs().max() <= 1e-5]
    if not names:
        return f"an activation that is neither {' nor '.join(rows.ACTIVATIONS)}"
    return _try(module, mixin, "activation", [(module.act_fn, names[0])])


def _prove_norm(module: nn.Module, mixin: type) -> str:
    """Switches the module if the native result is its own, of weights as they are or plus one; else says why not."""
    weight = module.weight
    names = [name for name in EPSILONS if isinstance(vars(module).get(name), float)]
    if weight.dim() != 1 or weight.numel() == 0 or not names:
        return "a norm without an epsilon or with weights of another shape"
    return native.missing() or _foreign(weight) or _try(
        module, mixin, "form", [(name, shift) for name in names for shift in (0.0, 1.0)])


def _foreign(weight: torch.Tensor) -> str:
    return "" if fused_cpp.is_plain(weight) else f"{weight.dtype} on {weight.device}, or not contiguous"


@torch.no_grad()
def _try(module: nn.Module, mixin: type, attribute: str, forms: list[tuple]) -> str:
    """Switches the module to the first form whose native results are its own on random rows of several sizes."""
    expected = list(_results(module))
    own = type(module)
    for form in forms:
        module.__class__ = _few_rows_class(mixin, own)
        setattr(module, attribute, form)
        width, dtype = input_of(module, 1).shape[-1], input_of(module, 1).dtype
        module.few_rows = Choice(path="", outputs=0, width=width, dtype=dtype, most_rows=NORM_ROWS[-1],
                                 reason="")
        found = [module._native(x) for x in _tried(module)]
        if all(y is not None and _same(y, expected[i]) for i, y in enumerate(found)):
            return ""
        _restore(module)
    return "another result than the native one, on random rows"


def _tried(module: nn.Module) -> Iterator[torch.Tensor]:
    """Rows of every size, one and two at a time."""
    for scale in SCALES:
        for count in (1, 2):
            yield input_of(module, count) * scale


def _results(module: nn.Module) -> Iterator[torch.Tensor]:
    for x in _tried(module):
        yield module(x)


def _same(y: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether they are equal up to rounding. A NaN or an infinity is not: such weights prove nothing."""
    if not isinstance(own, torch.Tensor) or y.shape != own.shape or y.dtype is not own.dtype:
        return False
    unit = max(torch.finfo(y.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    return bool((y - own).abs().max() <= ROUNDINGS * unit * own.abs().max())
