"""What a layer is made of besides attention, in one native call each: a gated MLP, an RMS norm, an attention's heads.

For rows on the CPU, few or many, as `fused_cpp`. In the plain case (`fused_cpp.is_plain`, while `fused_cpp.is_quiet`) a
plain call of the library, because a token takes hundreds of them; where torch looks on (a compiled graph, a dispatch
mode) an op of torch (`sentei::gated`, `sentei::norm`, `sentei::heads`). Every other case is answered None: for it the
module's own forward is there. fp32 and bfloat16; what is between the first number read and the last one written is
fp32, so that bfloat16 is rounded once where torch rounds at every step (twice between the layers of a gated MLP of many
rows where pairs are multiplied). No gradients.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch.autograd import forward_ad

from sentei.core.errors import ShapeError
from sentei.core.modes import is_watched
from sentei.kernels import native, ops
from sentei.kernels.linear import fused_cpp
from sentei.kernels.linear.layers import ACTIVATIONS, Layer, Turn

MOST_LAID_OUT = 1 << 26  # numbers of the weights of a call of many rows, which it copies: 256 MiB


def gated(x: torch.Tensor, gate: Layer, up: Layer, down: Layer, activation: str) -> torch.Tensor | None:
    """Returns down(act(gate(x)) · up(x)), or None where it is left to the module.

    Args:
        x: [..., I].
        gate, up, down: weight and bias, or None: [F, I] and [F], the same, [O, F] and [O]; of the input's dtype.
        activation: one of ACTIVATIONS.
    Raises:
        ResourceError: memory ran out.
    Cost: few rows read the weights once; many rows a copy of them (fp32, or pairs), MOST_LAID_OUT numbers at
    most, whose memory the process keeps for its next calls (256 MiB of all native calls, at most). A row
    depends on neither the other rows (but on whether they are few) nor the number of threads.
    """
    given = x, *gate, *up, *down
    run = _runner("gated", (x, gate[0], up[0], down[0]), (gate[1], up[1], down[1]))
    return run(*given, activation) if run is not None and gated_fits(*given) else None


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, shift: float) -> torch.Tensor | None:
    """Returns x / √(mean(x²) + ε) · (shift + weight), or None where it is left to the module.

    Args:
        x: [..., I].
        weight: [I], of the input's dtype.
        epsilon: ε.
        shift: 1 where the weights are kept less one, as Gemma's; else 0.
    """
    run = _runner("norm", (x, weight), ())
    return run(x, weight, epsilon, shift) if run is not None and _norm_fits(x, weight) else None


def heads(x: torch.Tensor, query: Layer, key: Layer, value: Layer, turn: Turn
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Returns query [B, H, T, D], key [B, G, T, D] and value [B, G, T, Dv], or None where it is left to the module.

        turn(norm(q_proj(x))), turn(norm(k_proj(x))), v_proj(x);   turn(u)_j = u_j cos_j ∓ u_(j ± D/2) sin_j

    Args:
        x: [B, T, I].
        query, key, value: weight and bias, or None: [H·D, I], [G·D, I] and [G·Dv, I].
        turn: of the input's dtype.
    Raises:
        ResourceError: memory ran out.
    Cost: as `gated`; the results are views of one tensor.
    """
    given = x, *query, *key, *value, *turn[:4]
    run = _runner("heads", (x, query[0], key[0], value[0], *turn[:2]), (query[1], key[1], value[1], *turn[2:4]))
    if run is None or not heads_fit(*given):
        return None
    output = run(*given, *turn[4:])
    return heads_of(output, [layer[0].shape[0] for layer in (query, key, value)], turn.cosine.shape[-1])


def heads_of(output: torch.Tensor, sizes: list[int], head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The views [B, H, T, D], [B, G, T, D] and [B, G, T, Dv] of queries, keys and values side by side.

    Args:
        output: [B, T, H·D + G·D + G·Dv], contiguous.
        sizes: of the three in its last dimension.
        head: D.
    """
    batch, tokens, total = output.shape
    before, made = 0, []
    for size, each in zip(sizes, (head, head, sizes[2] // (sizes[1] // head)), strict=True):
        made.append(output.as_strided((batch, size // each, tokens, each), (tokens * total, each, total, 1), before))
        before += size
    return tuple(made)


def _runner(name: str, needed: tuple[torch.Tensor, ...], others: tuple[torch.Tensor | None, ...]) -> Callable | None:
    """What computes these tensors, whatever their shapes: the library, or an op where torch looks on; None for neither.

    Args:
        name: of the op.
        needed, others: the input first; those that may be None apart.
    """
    given = *needed, *(part for part in others if part is not None)
    if fused_cpp.is_quiet():
        dtype = getattr(given[0], "dtype", None)
        plain = all(fused_cpp.is_plain(part) and part.dtype is dtype for part in given)
        return _CALLS[name] if plain else None
    return getattr(torch.ops.sentei, name) if is_watched() and _is_for_an_op(given) else None


def _is_for_an_op(given: tuple[torch.Tensor, ...]) -> bool:
    """Whether the library takes these tensors when the op runs."""
    if torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
        return False
    if not torch.compiler.is_compiling() and (  # a graph finds out when it runs
            native.missing() or torch._C._functorch.peek_interpreter_stack() is not None):
        return False
    return all(isinstance(part, torch.Tensor) for part in given) and _can_be_read(given) and not (
        torch.is_grad_enabled() and any(part.requires_grad for part in given))


def _can_be_read(given: tuple[torch.Tensor, ...]) -> bool:
    """Whether these are of one dtype of the library's, on the CPU."""
    dtype = given[0].dtype
    return (dtype is torch.float32 or dtype is torch.bfloat16) and all(
        part.is_cpu and part.layout is torch.strided and part.dtype is dtype for part in given)


def _layer_fits(weight: torch.Tensor, bias: torch.Tensor | None, outputs: int, width: int) -> bool:
    """Whether the layer makes so many outputs of a row of that width."""
    return weight.shape == (outputs, width) and (bias is None or bias.shape == (outputs,))


def _rows_fit(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether there are rows, few or of weights that may be copied."""
    count = x.numel()
    return 0 < count and (count <= fused_cpp.FEW_ROWS * x.shape[-1]
                          or sum(weight.numel() for weight in weights) <= MOST_LAID_OUT)


def gated_fits(x, gate, gate_bias, up, up_bias, down, down_bias) -> bool:
    """Whether these are rows and layers that follow one another."""
    if x.dim() == 0 or gate.dim() != 2 or down.dim() != 2:
        return False
    width, hidden = x.shape[-1], gate.shape[0]
    return _rows_fit(x, gate, up, down) and _layer_fits(gate, gate_bias, hidden, width) and (
        _layer_fits(up, up_bias, hidden, width) and _layer_fits(down, down_bias, down.shape[0], hidden))


def _norm_fits(x, weight) -> bool:
    """Whether these are rows and one weight for each number of them."""
    return x.dim() > 0 and weight.shape == x.shape[-1:] and x.numel() > 0


def heads_fit(*given: torch.Tensor | None) -> bool:
    """Whether these are rows, whole heads of an even width, and a turn of that width for every row or token.

    Args:
        given: x, three layers' weights and biases, cosine and sine, and the norms of query and key.
    """
    x, query, query_bias, key, key_bias, value, value_bias, cosine, sine, query_norm, key_norm = given
    if not (x.dim() == 3 and query.dim() == key.dim() == value.dim() == 2 and cosine.dim()):
        return False
    (batch, tokens, width), head = x.shape, cosine.shape[-1]
    sizes = query.shape[0], key.shape[0], value.shape[0]
    if not _rows_fit(x, query, key, value) or head < 2 or head % 2 or sizes[0] % head or (
            not sizes[1]) or sizes[1] % head or sizes[2] % (sizes[1] // head) or not sizes[2]:
        return False
    layers = (query, query_bias), (key, key_bias), (value, value_bias)
    return (sine.shape == cosine.shape and cosine.numel() // head in (batch * tokens, tokens)
            and all(_layer_fits(*layer, size, width) for layer, size in zip(layers, sizes, strict=True))
            and all(norm is None or norm.shape == (head,) for norm in (query_norm, key_norm)))


def _pointers(*given: torch.Tensor | None) -> list[int | None]:
    return [None if part is None else part.data_ptr() for part in given]


def _gated(x, gate, gate_bias, up, up_bias, down, down_bias, activation: str) -> torch.Tensor:
    """The call, of contiguous tensors that fit."""
    output, (hidden, width) = _gated_shape(x, down), gate.shape
    fused_cpp.checked(_gated_call()(
        *_pointers(x, gate, up, down, gate_bias, up_bias, down_bias, output), x.numel() // width, width, hidden,
        down.shape[0], activation == "gelu_tanh", x.dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE),
        "gated")
    return output


def _gated_shape(x, down) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], down.shape[0]))


def _norm(x, weight, epsilon: float, shift: float) -> torch.Tensor:
    """The call, of contiguous tensors that fit."""
    output, width = torch.empty_like(x), weight.shape[0]
    fused_cpp.checked(_norm_call()(
        *_pointers(x, weight, output), x.numel() // width, width, epsilon, shift, x.dtype is torch.bfloat16,
        torch.get_num_threads(), native.MACHINE), "norm")
    return output


def _heads(*given) -> torch.Tensor:
    """The call, of contiguous tensors that fit: queries, keys and values of a row side by side.

    Args:
        given: as of `heads_fit`, then epsilon and shift.
    """
    (x, query, query_bias, key, key_bias, value, value_bias, cosine, sine, query_norm, key_norm, epsilon,
     shift) = given
    output = _heads_shape(x, query, key, value)
    head, count = cosine.shape[-1], x.shape[0] * x.shape[1]
    fused_cpp.checked(_heads_call()(
        *_pointers(x, query, key, value, query_bias, key_bias, value_bias, query_norm, key_norm, cosine, sine, output),
        count, x.shape[2], query.shape[0], key.shape[0], value.shape[0], head, cosine.numel() // head, epsilon, shift,
        x.dtype is torch.bfloat16, torch.get_num_threads(), native.MACHINE), "heads")
    return output


def _heads_shape(x, query, key, value) -> torch.Tensor:
    return x.new_empty((*x.shape[:2], query.shape[0] + key.shape[0] + value.shape[0]))


def _checked(name: str, fits: Callable, given: tuple[torch.Tensor | None, ...], expected: str) -> list:
    """The tensors, contiguous. Anyone may call an op, so what it is given is checked.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    parts = [part for part in given if part is not None]
    if not (_can_be_read(parts) and fits(*given)):
        raise ShapeError(name, expected=f"{expected}, of one dtype, float32 or bfloat16, on the CPU",
                         got=", ".join(f"{part.dtype} {list(part.shape)} on {part.device}" for part in parts),
                         do="call it through sentei.kernels.linear.rows")
    return [None if part is None else part.contiguous() for part in given]


def _checked_gated(given, activation: str) -> list:
    if activation not in ACTIVATIONS:
        raise ShapeError("gated", expected=f"an activation of {', '.join(ACTIVATIONS)}", got=activation[:50],
                         do="call it through sentei.kernels.linear.rows")
    return _checked("gated", gated_fits, given, "x [..., I], gate and up [F, I] and down [O, F], with biases that "
                    f"fit; with more than {fused_cpp.FEW_ROWS} rows weights of {MOST_LAID_OUT} numbers at most")


def _checked_norm(given) -> list:
    return _checked("norm", _norm_fits, given, "x [..., I] and weight [I]")


def _checked_heads(given) -> list:
    return _checked("heads", heads_fit, given, "x [B, T, I], query [H·D, I], key [G·D, I], value [G·Dv, I], "
                    "biases that fit, cosine and sine [N, D] of an even D, N rows or tokens, and norms [D]; with more "
                    f"than {fused_cpp.FEW_ROWS} rows weights of {MOST_LAID_OUT} numbers at most")


_CALLS = {"gated": _gated, "norm": _norm, "heads": _heads}
_LAYERS = "Tensor {0}, Tensor? {0}_bias"
ops.define(f"gated(Tensor x, {', '.join(_LAYERS.format(name) for name in ('gate', 'up', 'down'))}, str activation)"
           " -> Tensor",
           lambda *given: _gated(*_checked_gated(given[:7], given[7]), given[7]),
           lambda *given: _gated_shape(given[0], _checked_gated(given[:7], given[7])[5]))
ops.define("norm(Tensor x, Tensor weight, float epsilon, float shift) -> Tensor",
           lambda *given: _norm(*_checked_norm(given[:2]), *given[2:]),
           lambda *given: torch.empty_like(_checked_norm(given[:2])[0]))
ops.define(f"heads(Tensor x, {', '.join(_LAYERS.format(name) for name in ('query', 'key', 'value'))}, Tensor cosine, "
           "Tensor sine, Tensor? query_norm, Tensor? key_norm, float epsilon, float shift) -> Tensor",
           lambda *given: _heads(*_checked_heads(given[:11]), *given[11:]),
           lambda *given: _heads_shape(given[0], *_checked_heads(given[:11])[1:6:2]))
for _name in _CALLS:
    ops.differentiate_never(_name, impl="fused_cpp", do="use the module's own forward")


@cache
def _gated_call():
    """The function of the library; its arguments are pointers and 64-bit integers."""
    function = native.load().sentei_gated
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 8
    return function


@cache
def _norm_call():
    function = native.load().sentei_norm
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_double] * 2 + [ctypes.c_int64] * 3
    return function


@cache
def _heads_call():
    function = native.load().sentei_heads
    function.argtypes = [ctypes.c_void_p] * 12 + [ctypes.c_int64] * 7 + [ctypes.c_double] * 2 + [ctypes.c_int64] * 3
    return function
