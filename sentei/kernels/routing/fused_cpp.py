"""Routing through a `Stack` on the CPU, in C++: each kept expert's weights are read as they lie, forward and backward.

fp32 and bfloat16. Experts of few rows are read once for all of them, those of many are products of blocks, and an
expert that is one neuron is three rows of numbers. Products are made in fp32, but for those of blocks of bfloat16 where
the processor is faster at pairs: then activations and their gradients are rounded to bfloat16 between two products, and
sums are in fp32. A call is an op of torch (`sentei::route`, with `sentei::route_backward`) where torch looks on, and a
plain call of the library elsewhere, as a token takes many.
"""

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.autograd import forward_ad

from sentei.core.errors import ImplError, ResourceError, ShapeError
from sentei.core.modes import is_watched
from sentei.kernels import native, ops
from sentei.kernels.routing.stack import Stack

_KINDS = ("silu", "gelu_tanh", "relu", "identity", "gelu")  # of native/products.h, in order
_LONGS = ("hidden_stride", "up_stride", "up_row", "gate_stride", "gate_row", "down_stride", "down_row", "tokens",
          "slots", "experts", "width", "inner", "outputs", "activation", "bfloat16", "threads", "machine")
MANY = 1 << 16  # numbers that are worth keeping for the next call
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_C = torch._C


class _Route(ctypes.Structure):
    """The struct of native/routing.cpp, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("hidden", "ids", "weights", "up", "gate", "down", "output",
                                                       "saved")),
                *((name, ctypes.c_int64) for name in _LONGS)]


class _Backward(ctypes.Structure):
    """The struct of native/routing.cpp, field by field."""

    _fields_ = [("call", _Route), *((name, ctypes.c_void_p) for name in ("gradient", "hidden", "first", "down",
                                                                         "weights"))]


def route(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """See `sentei.kernels.routing.route`. First gradients only, for which the products of gate and up are kept in fp32.

    Raises:
        ImplError: `refusal` has a reason.
        ShapeError: an id that is no expert's.
        ResourceError: memory ran out.
    """
    reason = refusal(hidden, ids, weights, experts)
    if reason:
        raise ImplError("fused_cpp", expected="a call it can take", got=reason, do="use impl='auto'")
    return run(hidden, ids, weights, experts)


def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Stack) -> torch.Tensor:
    """`route` for who has just asked `refusal`."""
    tensors = hidden, ids, weights, experts.up, experts.down, experts.gate
    kind, wants = _KINDS.index(experts.activation), _wants_gradients(hidden, weights, experts)
    if wants or _is_watched(tensors):
        return torch.ops.sentei.route(*tensors, kind, wants)[0]
    return _run(*tensors, kind)


def refusal(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: Sequence) -> str:
    """Why this implementation cannot take these arguments; empty when it can."""
    compiling = torch.compiler.is_compiling()
    if not compiling and native.missing():  # a graph finds out when it runs
        return native.missing()
    if not isinstance(experts, Stack):
        return "experts that are functions"
    dtype = hidden.dtype
    if dtype is not torch.float32 and dtype is not torch.bfloat16 or not hidden.is_cpu:
        return f"{dtype} on {hidden.device}"
    up = experts.up
    if up.dtype is not dtype or not up.is_cpu:
        return f"experts of {up.dtype} on {up.device} with {dtype} on {hidden.device}"
    for weight in experts.weights():
        if weight.stride(2) != 1 and weight.shape[2] > 1:
            return "weights whose rows are not contiguous"
    if not compiling and _C._functorch.peek_interpreter_stack() is not None:
        return "a function transform"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None
                                              for t in (hidden, weights, *experts.weights())):
        return "tensors that carry a forward gradient"
    return ""


def _wants_gradients(hidden: torch.Tensor, weights: torch.Tensor, experts: Stack) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weights, *experts.weights()))


def _is_watched(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether something other than these tensors' memory counts."""
    if is_watched():
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return True
    return False


def _run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
         gate: torch.Tensor | None, kind: int, saved: torch.Tensor | None = None) -> torch.Tensor:
    """The output [T, O]; `saved` gets what the backward needs."""
    output = hidden.new_empty(hidden.shape[0], down.shape[1])
    if _is_nothing(ids, up, down):
        return _checked_ids(ids, up, output.zero_())
    if weights.dtype is not torch.bfloat16:  # a conversion takes as long as some products do
        weights = weights.float()
    arguments, held = _arguments(hidden, ids, weights, up, down, gate, kind)
    _finish(_library()(*arguments[:6], output.data_ptr(), None if saved is None else saved.data_ptr(), *arguments[6:],
                       weights.dtype is torch.bfloat16), up)
    del held
    return output


def _arguments(hidden, ids, weights, up, down, gate, kind) -> tuple[tuple, tuple]:
    """The fields of the struct but for output and saved, and what must live as long."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    ids = ids if ids.is_contiguous() else ids.contiguous()
    weights = weights if weights.is_contiguous() else weights.contiguous()
    tokens, slots = ids.shape
    experts, inner, width = up.shape
    up_stride, down_stride, gate_stride = up.stride(), down.stride(), (0, 0, 0) if gate is None else gate.stride()
    return (hidden.data_ptr(), ids.data_ptr(), weights.data_ptr(), up.data_ptr(),
            None if gate is None else gate.data_ptr(), down.data_ptr(),
            hidden.stride(0), up_stride[0], up_stride[1], gate_stride[0], gate_stride[1], down_stride[0],
            down_stride[1], tokens, slots, experts, width, inner, down.shape[1], kind, hidden.dtype is torch.bfloat16,
            torch.get_num_threads(), native.MACHINE), (hidden, ids, weights)


def _is_nothing(ids: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether every answer is 0 because there is nobody to give or to get one."""
    return not (ids.numel() and up.numel() and down.shape[1])


def _checked_ids(ids: torch.Tensor, up: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The output, if the ids are experts' or -1."""
    wrong = ids.numel() and (ids.min() < -1 or ids.max() >= len(up))
    _finish(native.BAD_PLAN if wrong else 0, up)
    return output


def _numbers_saved(ids: torch.Tensor, up: torch.Tensor, gate: torch.Tensor | None) -> int:
    """How many numbers up's and gate's products are, each expert's rows rounded up to whole panels."""
    pairs, panel = ids.numel(), _panel(native.MACHINE)
    return (pairs + min(pairs, len(up)) * (panel - 1)) * up.shape[1] * (1 if gate is None else 2)


def _room(count: int) -> torch.Tensor:
    """So many float32 numbers of any value. Many are what earlier calls left, and go back when nobody holds them: the
    first touch of new memory costs as much as a product."""
    if count < MANY:
        return torch.empty(count, dtype=torch.float32)
    take, give = _shelf()
    given = ctypes.c_int64(count)
    pointer = take(ctypes.byref(given))
    if not pointer:
        raise _no_memory()
    numbers = (ctypes.c_float * count).from_address(pointer)
    weakref.finalize(numbers, give, pointer, given.value).atexit = False
    return torch.frombuffer(numbers, dtype=torch.float32)


def _finish(status: int, up: torch.Tensor) -> None:
    if status == native.BAD_PLAN:
        raise ShapeError("route", expected=f"ids in -1..{len(up) - 1}", got="others",
                         do="give one function an expert, and -1 where a slot is empty")
    if status:
        raise _no_memory()


def _no_memory() -> ResourceError:
    return ResourceError("route", expected="memory for the kept tokens' rows", got="none left",
                         do="route fewer tokens at once")


@cache
def _library():
    """The forward of the library; its arguments are pointers and 64-bit integers."""
    function = native.load().sentei_route
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * (len(_LONGS) + 1)
    return function


@cache
def _shelf() -> tuple[Callable, Callable]:
    """Takes room for so many numbers, says how many it is, and gives it back."""
    take, give = native.load().sentei_route_take, native.load().sentei_route_give
    take.argtypes, take.restype = [ctypes.POINTER(ctypes.c_int64)], ctypes.c_void_p
    give.argtypes, give.restype = [ctypes.c_void_p, ctypes.c_int64], None
    return take, give


@cache
def _backward_of_library():
    return native.load().sentei_route_backward


@cache
def _panel(machine: int) -> int:
    function = native.load().sentei_route_panel
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    return function(machine)


def _forward(hidden, ids, weights, up, down, gate, kind, save):
    """The op `sentei::route`."""
    _check(hidden, ids, weights, up, down, gate, kind)
    saved = _room(_numbers_saved(ids, up, gate) if save else 0)
    return _run(hidden, ids, weights, up, down, gate, kind, saved if save else None), saved


def _forward_shapes(hidden, ids, weights, up, down, gate, kind, save):
    _check(hidden, ids, weights, up, down, gate, kind)
    return (hidden.new_empty(len(hidden), down.shape[1]),
            hidden.new_empty(_numbers_saved(ids, up, gate) if save else 0, dtype=torch.float32))


def _backward(gradient: torch.Tensor, given: list[torch.Tensor], gate: torch.Tensor | None, saved: torch.Tensor,
              kind: int, wanted: list[bool]) -> list[torch.Tensor]:
    """The op `sentei::route_backward`: gradients of hidden, weights, gate-and-up [E, 2 F, D], and down; else empty.

    Args:
        gradient: [T, O]; of the output.
        given: hidden, ids, weights, up and down.
        wanted: which of the four.
    """
    _check(*given, gate, kind)
    hidden, ids, weights, up, down = given
    found = _backward_shapes(gradient, given, gate, saved, kind, wanted, _like)
    if _is_nothing(ids, up, down):
        _checked_ids(ids, up, gradient)
        return [tensor.zero_() for tensor in found]
    arguments, held = _arguments(hidden, ids, weights.float(), up, down, gate, kind)
    call = _Route(*arguments[:6], None, saved.data_ptr(), *arguments[6:])
    gradient = gradient.contiguous()
    of_weights = found[1].float()
    backward = _Backward(call, gradient.data_ptr(), *(found[i].data_ptr() if wanted[i] else None for i in (0, 2, 3)),
                         of_weights.data_ptr() if wanted[1] else None)
    _finish(_backward_of_library()(ctypes.byref(backward)), up)
    del held
    found[1] = of_weights.to(weights.dtype)
    return found


def _like(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any values and the dtype of another; of many numbers, in such room."""
    count = math.prod(shape)
    if count < MANY:
        return tensor.new_empty(shape)
    return _room(-(-count * tensor.itemsize // 4)).view(tensor.dtype)[:count].view(shape)


def _backward_shapes(gradient, given, gate, saved, kind, wanted, like=torch.Tensor.new_empty):
    hidden, ids, weights, up, down = given
    _check(*given, gate, kind)
    if (gradient.shape != (len(hidden), down.shape[1]) or gradient.dtype != hidden.dtype or not gradient.is_cpu
            or saved.shape != (_numbers_saved(ids, up, gate),) or saved.dtype != torch.float32 or not saved.is_cpu
            or not saved.is_contiguous() or len(wanted) != 4):
        raise ShapeError("route", expected="the output's gradient and what its forward saved, on the CPU",
                         got=f"{gradient.dtype} {list(gradient.shape)} and {saved.dtype} {list(saved.shape)}",
                         do="call it through route")
    shapes = hidden.shape, weights.shape, (len(up), up.shape[1] * (1 if gate is None else 2), up.shape[2]), down.shape
    return [like(tensor, shape if want else (0,))
            for tensor, shape, want in zip((hidden, weights, up, down), shapes, wanted, strict=True)]


def _check(hidden, ids, weights, up, down, gate, kind) -> None:
    """Anyone may call an op, so what it is given is checked."""
    floats = [hidden, up, down] + ([] if gate is None else [gate])
    good = (hidden.dim() == 2 and ids.dim() == 2 and up.dim() == 3 and down.dim() == 3
            and ids.dtype == torch.int64 and weights.is_floating_point() and weights.shape == ids.shape
            and len(ids) == len(hidden) and 0 <= kind < len(_KINDS)
            and up.shape[2] == hidden.shape[1] and down.shape[::2] == up.shape[:2]
            and (gate is None or gate.shape == up.shape) and hidden.dtype in (torch.float32, torch.bfloat16)
            and all(tensor.dtype == hidden.dtype for tensor in floats)
            and all(tensor.device.type == "cpu" for tensor in (*floats, ids, weights))
            and all(weight.stride(2) == 1 or weight.shape[2] <= 1 for weight in floats[1:]))
    if not good:
        raise ShapeError("route", expected="hidden [T, D], ids int64 [T, K], weights [T, K], up and gate [E, F, D] and "
                         "down [E, O, F] of contiguous rows, float32 or bfloat16, on the CPU",
                         got=", ".join(f"{t.dtype} {list(t.shape)}" for t in (*floats, ids, weights)),
                         do="call it through route")


def _save(ctx, inputs, output):
    hidden, ids, weights, up, down, gate, ctx.kind, ctx.save = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros, as many as were saved
    ctx.save_for_backward(hidden, ids, weights, up, down, gate, output[1])


def _differentiate(ctx, gradient, _):
    if not ctx.save:
        raise ImplError("fused_cpp", expected="a forward that saved for it", got="a backward",
                        do="call it through route")
    *given, gate, saved = ctx.saved_tensors
    needs, width = ctx.needs_input_grad, given[3].shape[1]
    wanted = [needs[0], needs[2], needs[3] or needs[5], needs[4]]
    found = torch.ops.sentei.route_backward(gradient, given, gate, saved, ctx.kind, wanted)
    of_hidden, of_weights, first, of_down = (
        tensor if want else None for tensor, want in zip(found, wanted, strict=True))
    of_gate = first[:, :width] if wanted[2] and gate is not None else None
    of_up = first[:, -width:] if wanted[2] else None
    return of_hidden, None, of_weights, of_up, of_down, of_gate, None, None


ops.define("route(Tensor hidden, Tensor ids, Tensor weights, Tensor up, Tensor down, Tensor? gate, int kind,"
           " bool save) -> (Tensor, Tensor)", _forward, _forward_shapes)
ops.define("route_backward(Tensor gradient, Tensor[] given, Tensor? gate, Tensor saved, int kind, bool[] wanted)"
           " -> Tensor[]", _backward, _backward_shapes)
ops.differentiate_once("route", _differentiate, _save, impl="fused_cpp", do="use impl='reference'")
