"""Attention over the best keys of each query on the CPU, in C++: tiles of scores, none of which outlives its own.

fp32; bfloat16 and float16 by conversion. Each call is an op of torch (`sentei::topk`, `sentei::topk_backward`), so that
`torch.compile` keeps it in its graph and tensors without memory never reach it.
"""

import ctypes

import torch
from torch.autograd.forward_ad import unpack_dual

from sentei.core.errors import ImplError, ResourceError, RuleError, ShapeError
from sentei.kernels import native, ops
from sentei.kernels.attention.tiles import Grid
from sentei.kernels.topk.choice import Choice

_LONGS = ("batch", "queries", "keys", "heads", "groups", "width", "value_width", "causal", "threads", "machine", "best",
          "window", "slots")


class _TopK(ctypes.Structure):
    """The struct of native/topk.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "lse", "ids", "lengths")),
        *((name, ctypes.c_int64 * 3) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_int64) for name in _LONGS),
        ("scale", ctypes.c_float),
    ]


class _Backward(ctypes.Structure):
    """The struct of native/topk.cpp, field by field."""

    _fields_ = [("call", _TopK),
                *((name, ctypes.c_void_p) for name in ("gradient", "lse_gradient", "query", "key", "value"))]


def attend_topk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k: int | Choice,
    *,
    causal: bool = True,
    lengths: torch.Tensor | None = None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `sentei.kernels.topk.attend_topk`.

    Raises:
        ImplError: `refusal` has a reason.
        ResourceError: memory ran out.
    """
    reason = refusal(query, key, value)
    if reason:
        raise ImplError("fused_cpp", expected="tensors it can take", got=reason, do="use impl='auto'")
    choice = k if isinstance(k, Choice) else Choice(k)
    window = -1 if choice.window is None else choice.window
    return torch.ops.sentei.topk(query, key, value, lengths, [choice.k, window, int(causal)], scale)


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Why this implementation cannot take these tensors; empty when it can."""
    if not torch.compiler.is_compiling() and native.missing():  # a graph finds out when it runs
        return native.missing()
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype} on {query.device}"
    if any(unpack_dual(tensor).tangent is not None for tensor in (query, key, value)):
        return "tensors that carry a forward gradient"
    return ""


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None,
             sizes: list[int], scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `sentei::topk`: output, lse and ids; `sizes` are k, the window or -1, and 1 for causal."""
    output, lse, ids = _results((query, key, value), lengths, sizes)
    if ids.numel():
        call, held = _call((query, key, value), ids, lengths, sizes, scale)
        call.output, call.lse = output.data_ptr(), lse.data_ptr()
        _finish(native.load().sentei_topk(ctypes.byref(call)))
        del held
    else:
        output.zero_(), lse.fill_(-torch.inf)
    return output.to(query.dtype), lse, ids


def _forward_shapes(query, key, value, lengths, sizes, scale):
    output, lse, ids = _results((query, key, value), lengths, sizes)
    return output.to(query.dtype), lse, ids


def _backward(given: list[torch.Tensor], ids: torch.Tensor, lengths: torch.Tensor | None, sizes: list[int],
              scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `sentei::topk_backward`: the gradients of query, key and value.

    Args:
        given: query, key, value, and the gradients of output and lse.
        ids, lengths, sizes, scale: as in `_forward`.
    """
    _check_backward(given, ids, lengths, sizes)
    query, key, value = given[:3]
    gradients = [torch.zeros(tensor.shape, dtype=torch.float32, device="cpu") for tensor in (query, key, value)]
    if ids.numel():
        backward = _Backward()
        ids, gradient, lse_gradient = (tensor.contiguous() for tensor in (ids, given[3].float(), given[4].float()))
        backward.call, held = _call((query, key, value), ids, lengths, sizes, scale)
        backward.gradient, backward.lse_gradient = gradient.data_ptr(), lse_gradient.data_ptr()
        backward.query, backward.key, backward.value = (tensor.data_ptr() for tensor in gradients)
        _finish(native.load().sentei_topk_backward(ctypes.byref(backward)))
        del held
    return tuple(found.to(query.dtype) for found in gradients)


def _backward_shapes(given, ids, lengths, sizes, scale):
    _check_backward(given, ids, lengths, sizes)
    return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in given[:3])


def _save(ctx, inputs, output):
    query, key, value, lengths, ctx.sizes, ctx.scale = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # zeros, as many as there are ids
    ctx.save_for_backward(query, key, value, output[2], lengths)


def _differentiate(ctx, gradient, lse_gradient, _):
    query, key, value, ids, lengths = ctx.saved_tensors
    rows = query.shape[:3]
    gradient = query.new_zeros(*rows, value.shape[3]) if gradient is None else gradient
    lse_gradient = query.new_zeros(rows) if lse_gradient is None else lse_gradient
    given = [query, key, value, gradient, lse_gradient]
    return *torch.ops.sentei.topk_backward(given, ids, lengths, ctx.sizes, ctx.scale), None, None, None


ops.define("topk(Tensor query, Tensor key, Tensor value, Tensor? lengths, int[] sizes, float scale)"
           " -> (Tensor, Tensor, Tensor)", _forward, _forward_shapes)
ops.define("topk_backward(Tensor[] given, Tensor ids, Tensor? lengths, int[] sizes, float scale)"
           " -> (Tensor, Tensor, Tensor)", _backward, _backward_shapes)
ops.differentiate_once("topk", _differentiate, _save, impl="fused_cpp", do="use impl='eager' or 'reference'")


def _choice(where: str, tensors: tuple[torch.Tensor, ...], lengths: torch.Tensor | None, sizes: list[int]) -> Choice:
    """The choice that an op was given in parts. Anyone may call an op, so what it is given is checked."""
    query, key, value = tensors
    if query.dim() != 4 or key.dim() != 4 or len(sizes) != 3 or sizes[1] < -1:
        raise ShapeError(where, expected="four dimensions, and as sizes k, a window or -1, and 1 for causal",
                         got=f"{list(query.shape)}, {list(key.shape)}, {sizes}", do="call it through attend_topk")
    grid = Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=1, key_block=1, lengths=lengths)
    grid.check(where, query, key, value)
    if lengths is not None and lengths.device != query.device:
        raise ShapeError(where, expected=f"lengths on {query.device}", got=str(lengths.device),
                         do="move them to the same device")
    if sizes[1] >= 0 and not sizes[2]:
        raise RuleError(where, expected="a window of causal attention", got=f"sizes {sizes}",
                        do="give -1 for the window")
    return Choice(sizes[0], None if sizes[1] < 0 else sizes[1])


def _check_backward(given: list[torch.Tensor], ids: torch.Tensor, lengths: torch.Tensor | None,
                    sizes: list[int]) -> None:
    """Raises ShapeError or RuleError unless all that `_backward` is given fits; the ids themselves are read later."""
    if len(given) != 5:
        raise ShapeError("topk_backward", expected="5 tensors", got=str(len(given)), do="call it through attend_topk")
    query, key, value, gradient, lse_gradient = given
    slots = _choice("topk_backward", (query, key, value), lengths, sizes).slots(key.shape[1])
    rows = query.shape[:3]
    if not (gradient.shape == (*rows, value.shape[3]) and lse_gradient.shape == rows and ids.shape == (*rows, slots)
            and gradient.is_floating_point() and lse_gradient.is_floating_point() and ids.dtype == torch.int32
            and gradient.device == lse_gradient.device == ids.device == query.device):
        raise ShapeError("topk_backward", expected=f"gradients [*{list(rows)}, {value.shape[3]}] and {list(rows)}, and "
                         f"ids int32 [*{list(rows)}, {slots}]", do="call it through attend_topk",
                         got=", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (*given[3:], ids)))


def _results(tensors: tuple[torch.Tensor, ...], lengths: torch.Tensor | None,
             sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 output and lse and int32 ids of `_forward`, to be filled."""
    choice = _choice("topk", tensors, lengths, sizes)
    query, key, value = tensors
    shape = query.shape[:3]
    return (query.new_empty(*shape, value.shape[3], dtype=torch.float32), query.new_empty(shape, dtype=torch.float32),
            query.new_empty(*shape, choice.slots(key.shape[1]), dtype=torch.int32))


def _call(tensors: tuple[torch.Tensor, ...], ids: torch.Tensor, lengths: torch.Tensor | None, sizes: list[int],
          scale: float) -> tuple[_TopK, tuple]:
    """What both calls share, and the tensors that must outlive the call."""
    query, key, value = tensors = tuple(_rows(tensor) for tensor in tensors)
    lengths = None if lengths is None else lengths.contiguous()
    strides = [(ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in tensors]
    call = _TopK(
        query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), ids=ids.data_ptr(),
        lengths=None if lengths is None else lengths.data_ptr(),
        query_stride=strides[0], key_stride=strides[1], value_stride=strides[2],
        batch=query.shape[0], queries=query.shape[1], keys=key.shape[1], heads=query.shape[2], groups=key.shape[2],
        width=query.shape[3], value_width=value.shape[3], best=min(sizes[0], key.shape[1]),
        window=min(sizes[1], key.shape[1]), causal=bool(sizes[2]), slots=ids.shape[3], threads=torch.get_num_threads(),
        machine=native.MACHINE, scale=scale)
    return call, (tensors, lengths, ids)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32 with contiguous rows, itself where it is that already."""
    return tensor.float() if tensor.stride(-1) == 1 else tensor.float().contiguous()


def _finish(status: int) -> None:
    """Raises what the native call could not."""
    if status == native.BAD_PLAN:
        raise ShapeError("topk_backward", expected="ascending ids of keys, and -1 after them", got="others",
                         do="give the ids of attend_topk")
    if status:
        raise ResourceError("attend_topk", expected="memory for a packed copy of the keys", got="none left",
                            do="use a shorter input, a smaller batch or a machine with more memory")
