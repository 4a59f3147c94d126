"""What a layer is made of besides attention, in native calls: linear layers, gated MLPs, RMS norms, attention's heads.

Found by what they are made of and proven by what they compute, whatever the family: a module of three linear layers and
an activation is taken for a gated MLP, one whose class ends in RMSNorm for a norm, one with the layers of heads for an
attention; and each only where the native result is that of the module's own forward on random rows. Few
rows, as in decoding, and many, as in a prompt, are measured apart. As in `conversion.linear` a module gets another
class, a subclass of its own, and keeps its parameters, path, state_dict and hooks.
"""

import inspect
from collections.abc import Iterator

import torch
from torch import nn

from sentei.conversion.altered import (
    NORM_STEPS,
    Kind,
    all_rows,
    attention_functions,
    in_float32,
    is_altered,
    native_class,
    near,
    plain_layers,
    restore,
    turns,
)
from sentei.conversion.interface import IMPLEMENTATION
from sentei.conversion.linear import Choice, NativeLinear, Steps, input_of
from sentei.core.modes import is_plain_call
from sentei.kernels import block, native
from sentei.kernels.linear import fused_cpp, rows

LAYERS = ("gate_proj", "up_proj", "down_proj")
HEADS, HEAD_NORMS = ("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm")
ATTENTION_INPUTS = ["self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"]
ATTENTIONS = ("sdpa", IMPLEMENTATION)  # the functions known to take what ours makes; others are told of windows, too
MORE_ROWS = fused_cpp.FEW_ROWS + 5  # rows that a module is tried on, which are many to the kernel
EPSILONS = ("variance_epsilon", "eps")
SCALES = (1.0, 1e-3, 30.0)  # of the rows a module is tried on: small ones tell the epsilon
ROUNDINGS = 8  # of the dtype, of a result's largest number: what the own forward may differ by


class NativeRows:
    """A module whose rows are a native call's; what that call does not take goes to the class it had before."""

    native_rows: Choice

    def forward(self, *inputs, **named):
        """As the module's own; see `NativeLinear.forward`."""
        if len(inputs) == 1 and not named:
            x = inputs[0]
            output = self._native(x) if type(x) is torch.Tensor and self.native_rows.takes(x) else None
            if output is not None:
                return output
        return super().forward(*inputs, **named)


class NativeGated(NativeRows):
    """down(act(gate(x)) · up(x)); `activation` is the module of it and the name of what it computes."""

    activation: tuple[nn.Module, str]

    def _native(self, x):
        layers = self.layers()
        return None if layers is None else rows.gated(x, *layers, self.activation[1])

    def layers(self) -> list[rows.Layer] | None:
        """Gate, up and down, unless somebody has altered one of them or the activation."""
        parts, act = self._modules, self.activation[0]
        return plain_layers(parts, LAYERS) if parts.get("act_fn") is act and not is_altered(act) else None


class NativeNorm(NativeRows):
    """x / √(mean(x²) + ε) · (shift + weight); `form` is the name of ε's attribute and the shift."""

    form: tuple[str, float]

    def _native(self, x):
        return rows.norm(x, *self.norm())

    def norm(self) -> block.Norm:
        """What is computed."""
        epsilon, shift = self.form
        return block.Norm(self._parameters.get("weight"), self.__dict__[epsilon], shift)


class NativeHeads:
    """An attention module whose queries, keys and values, turned, are made by one native call.

    What comes before and after them is the module's own: the cache, the attention function, the output layer.
    """

    native_rows: Choice
    turn: tuple[str, float, tuple[nn.Module, ...]]  # the name of ε's attribute in its norms, their shift, the norms

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **named):
        """As the module's own; see `NativeLinear.forward`."""
        heads = None
        if (not self.training and type(hidden_states) is torch.Tensor and self.native_rows.takes(hidden_states)
                and is_plain_call()):
            name = self.config._attn_implementation
            attend = attention_functions().get(name) if name in ATTENTIONS else None
            heads = None if attend is None else self._native(hidden_states, position_embeddings)
        if heads is None:
            return super().forward(hidden_states=hidden_states, position_embeddings=position_embeddings,
                                   attention_mask=attention_mask, past_key_values=past_key_values, **named)
        query, key, value = heads
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **named)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _native(self, x, position_embeddings):
        heads = self.heads(position_embeddings)
        return None if heads is None else rows.heads(x, *heads)

    def heads(self, position_embeddings) -> tuple[rows.Layer, rows.Layer, rows.Layer, rows.Turn] | None:
        """Queries', keys' and values' layers and what turns them, unless somebody has altered one of them."""
        parts = self._modules
        layers = plain_layers(parts, HEADS)
        norms = tuple(parts[name] for name in HEAD_NORMS if name in parts)
        name, shift, proven = self.turn
        if layers is None or not isinstance(position_embeddings, tuple) or len(norms) != len(proven):
            return None
        weights, epsilons = [], {0.0} if not norms else set()
        for norm, known in zip(norms, proven, strict=True):
            weights.append(norm._parameters.get("weight"))
            if norm is not known or weights[-1] is None or is_altered(norm):
                return None
            epsilons.add(norm.__dict__[name])
        if len(epsilons) > 1:
            return None
        return *layers, rows.Turn(*position_embeddings, *(weights or (None, None)), *epsilons, shift)


def _looks_gated(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} == {*LAYERS, "act_fn"} and all(
        type(getattr(module, name)) in (nn.Linear, NativeLinear) for name in LAYERS)


def _looks_like_a_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter)


def _looks_like_heads(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()} - {"connections"}
    return names - set(HEAD_NORMS) == {*HEADS, "o_proj"} and len(names) in (4, 6) and all(
        type(getattr(module, name)) in (nn.Linear, NativeLinear) for name in HEADS)


@torch.no_grad()
def _prove_heads(module: nn.Module, mixin: type) -> str:
    """Switches the module if in fp32 its own output is what it is with native heads; else says why not."""
    norms = [getattr(module, name) for name in HEAD_NORMS if hasattr(module, name)]
    names = [name for name in EPSILONS if all(isinstance(vars(norm).get(name), float) for norm in norms)]
    epsilons = {vars(norm)[names[0]] for norm in norms} if names else set()
    if list(inspect.signature(type(module).forward).parameters) != ATTENTION_INPUTS:
        return "another forward than transformers' attention has"
    if not names or len(epsilons) > 1 or module.head_dim % 2:
        return "norms without one epsilon, or an odd width"
    reason = native.missing() or _foreign(module.q_proj.weight)
    if reason:
        return reason
    trial = in_float32(module, module.config)
    tried = [input_of(trial, count) * scale for count in (4, MORE_ROWS) for scale in SCALES[:2]]
    expected = [trial(x, *turns(trial, x))[0] for x in tried]
    own = type(module)
    trial.__class__ = native_class(mixin, own)
    trial.native_rows = all_rows(trial)
    for shift in (0.0, 1.0) if norms else (0.0,):
        trial.turn = names[0], shift, tuple(getattr(trial, name) for name in HEAD_NORMS if hasattr(trial, name))
        proven = [trial._native(x, turns(trial, x)[0]) is not None and near(trial(x, *turns(trial, x))[0], y)
                  for x, y in zip(tried, expected, strict=True)]
        if all(proven[:2]):
            module.__class__, module.turn = native_class(mixin, own), (names[0], shift, tuple(norms))
            module.native_rows = all_rows(module, many=all(proven))
            return ""
    return "another result than with native heads, on random rows"


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
        module.__class__ = native_class(mixin, own)
        setattr(module, attribute, form)
        found = [module._native(x) for x in _tried(module)]
        if all(y is not None and _same(y, expected[i]) for i, y in enumerate(found)):
            x = input_of(module, MORE_ROWS)
            y = module._native(x)
            module.native_rows = all_rows(module, many=y is not None and _same(y, own.forward(module, x)))
            return ""
        restore(module)
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


KINDS = (
    Kind(NativeHeads, _looks_like_heads, _prove_heads, Steps(),
         lambda module: sum(len(getattr(module, name).weight) for name in HEADS),
         lambda module, x: (x, *turns(module, x))),
    Kind(NativeGated, _looks_gated, _prove_gated, Steps(), lambda module: len(module.down_proj.weight)),
    Kind(NativeNorm, _looks_like_a_norm, _prove_norm, NORM_STEPS, lambda module: len(module.weight)),
)
