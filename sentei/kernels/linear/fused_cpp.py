"""A linear layer on the CPU, in C++: up to FEW_ROWS rows read every weight once, for all of them; more are multiplied
block by block, in fp32 or pairs of bfloat16, by weights that are laid out once a call.

fp32 and bfloat16, summed in fp32; no gradients. A call is an op of torch (`sentei::linear`) where torch looks on (a
compiled graph, a dispatch mode, a tensor that is more than its memory), and a plain call of the library elsewhere,
because a token takes hundreds of them.
"""

import ctypes
from functools import cache

import torch
from torch.autograd import forward_ad

from sentei.core.errors import ImplError, ResourceError, ShapeError
from sentei.core.modes import is_plain_call, is_watched
from sentei.kernels import native, ops

FEW_ROWS = 8  # of native/rows.h
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_C = torch._C


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `sentei.kernels.linear.linear`.

    Raises:
        ImplError: `refusal` has a reason.
        ResourceError: memory ran out.
    """
    reason = refusal(x, weight, bias)
    if reason:
        raise ImplError("fused_cpp", expected="a product it can take", got=reason, do="use impl='auto'")
    return run(x, weight, bias)


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` for who has just asked `refusal`."""
    if _is_watched(x, weight) or bias is not None and bias.is_neg():
        return torch.ops.sentei.linear(x, weight, bias)
    return _linear(x, weight, bias)


def at_once(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`linear` in the plain case, told from the others in a microsecond; None in the others.

    A decoded token takes hundreds of these calls, and some kernels are no longer than the questions of `refusal`.
    """
    if not (is_quiet() and is_plain(x) and is_plain(weight) and (bias is None or is_plain(bias))):
        return None
    shape, (outputs, width), dtype = x.shape, weight.shape, x.dtype
    rows = x.numel() // (width or 1)
    if (shape[-1] if shape else 0) != width or weight.dtype is not dtype or rows < 1 or (
            bias is not None and (bias.dtype is not dtype or bias.shape != weight.shape[:1])):
        return None
    output = x.new_empty((*shape[:-1], outputs))
    checked(_call()(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), output.data_ptr(), rows,
                    width, outputs, width, width, dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE))
    return output


def is_quiet() -> bool:
    """Whether a call made now is about nothing but memory."""
    return is_plain_call() and not torch.is_grad_enabled() and not native.missing()


def is_plain(x: object) -> bool:
    """Whether it is a contiguous tensor of fp32 or bfloat16 on the CPU, and nothing but its memory."""
    return (type(x) in _PLAIN and x.is_cpu and x.layout is torch.strided and x.is_contiguous()
            and (x.dtype is torch.float32 or x.dtype is torch.bfloat16) and not x.is_neg())


def checked(status: int, name: str = "linear") -> None:
    """Raises ResourceError where a call of the library ran out of memory."""
    if status:
        raise ResourceError(name, expected="memory for a copy of the input, or of the weights", got="none left",
                            do="use a machine with more memory")


def refusal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    """Why this implementation cannot take these tensors; empty when it can."""
    compiling = torch.compiler.is_compiling()
    if not compiling and native.missing():  # a graph finds out when it runs
        return native.missing()
    dtype, others = x.dtype, (weight,) if bias is None else (weight, bias)
    if dtype is not torch.float32 and dtype is not torch.bfloat16 or not x.is_cpu:
        return f"{dtype} on {x.device}"
    for other in others:
        if other.dtype is not dtype or not other.is_cpu:
            return f"{other.dtype} on {other.device} with {dtype} on {x.device}"
    if not x.layout is weight.layout is torch.strided:
        return f"an input of {x.layout} and weights of {weight.layout}"
    if x.numel() == 0:
        return "an input that is empty"
    if weight.stride(1) != 1:
        return "weights whose rows are not contiguous"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"a bias of {list(bias.shape)} for {len(weight)} outputs"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if torch.is_grad_enabled() and (x.requires_grad or any(other.requires_grad for other in others)):
        return "tensors that want gradients"
    if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
        return "a function transform"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in (x, *others)):
        return "tensors that carry a forward gradient"
    return ""


def _is_watched(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether something other than these tensors' memory counts."""
    return (is_watched() or type(x) is not torch.Tensor or type(weight) not in _PLAIN
            or x.is_neg() or weight.is_neg())


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product, of tensors that `refusal` takes."""
    output = _empty(x, weight)
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    outputs, width = weight.shape
    checked(_call()(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), output.data_ptr(),
                    x.numel() // width, width, outputs, width, weight.stride(0), x.dtype is torch.bfloat16,
                    torch.get_num_threads(), native.MACHINE))
    return output


@cache
def _call():
    """The function of the library; its arguments are pointers and 64-bit integers."""
    function = native.load().sentei_linear
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 8
    return function


def _empty(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The output, to be filled."""
    shape = list(x.shape)
    shape[-1] = weight.shape[0]
    return x.new_empty(shape)


def _op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The op `sentei::linear`."""
    _check(x, weight, bias)
    return _linear(x, weight, bias)


def _shape(x, weight, bias):
    _check(x, weight, bias)
    return _empty(x, weight)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Anyone may call an op, so what it is given is checked."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if (x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.stride(1) != 1
            or bias is not None and bias.shape != weight.shape[:1]
            or x.numel() == 0 or x.dtype not in (torch.float32, torch.bfloat16)
            or any(tensor.dtype != x.dtype or tensor.device.type != "cpu" for tensor in given)):
        raise ShapeError("linear", expected="x [..., I] of a row or more, weight [O, I] of contiguous rows and "
                         "bias [O], float32 or bfloat16, on the CPU", do="call it through linear",
                         got=", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in given))


ops.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _op, _shape)
ops.differentiate_never("linear", impl="fused_cpp", do="use impl='auto'")
