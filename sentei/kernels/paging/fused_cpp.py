"""Attention to chosen pages on the CPU, in C++: bounds, choice and attention in one call that reads only what is kept.

The query may be of another dtype than the keys and values, which are float32 or bfloat16 (float16 is converted first).
There are no gradients. The call goes straight to the library, because a torch op costs as much as a layer's attention;
a graph of `torch.compile` gets the op `sentei::pages`.
"""

import math
import struct

import torch
from torch.autograd.forward_ad import unpack_dual

from sentei.core.errors import ResourceError, RuleError, ShapeError
from sentei.core.rules import Rule, TopK
from sentei.kernels import native, ops
from sentei.kernels.paging.pages import PAGE, RULES, Pages

# The struct of native/pages.h: pointers, strides and sizes, then parameter and scale.
_PAGED = struct.Struct("=8Q 13q 16q 2d")
_SCORE, _GIVEN, _CHOOSE = 0, 1, 2
_REFUSED = 2  # the status of a call that met NaN or plus infinity; of native/pages.h
_READ = torch.float32, torch.bfloat16  # what the library reads
_DTYPES = *_READ, torch.float16  # and what is converted first
_KINDS = {rule: (number, name) for number, (rule, name) in enumerate(RULES.items())}


def score(query: torch.Tensor, key: torch.Tensor, pages: Pages, *, scale: float) -> torch.Tensor:
    """See `sentei.kernels.paging.score`."""
    return _run(query, key, key, pages, scale, _SCORE, None)[1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    *,
    scale: float,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sentei.kernels.paging.attend`.

    It takes tensors that fit and that `refusal` lets pass; `sentei.kernels.paging` has asked.

    Raises:
        ResourceError: memory ran out.
    """
    output, chosen = _run(query, key, value, pages, scale, _CHOOSE if kept is None else _GIVEN, kept)
    return output if output.dtype == query.dtype else output.to(query.dtype), chosen if kept is None else kept


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Why this implementation cannot take these tensors; empty when it can."""
    if not torch.compiler.is_compiling() and native.missing():  # a graph finds out when it runs
        return native.missing()
    if not query.is_cpu or query.dtype not in _DTYPES or key.dtype not in _DTYPES:
        return f"{query.dtype} and {key.dtype} on {query.device}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "tensors that want gradients"
    # One after the other: this runs for every layer of every token, and a generator costs as much as all three.
    if not (unpack_dual(query).tangent is unpack_dual(key).tangent is unpack_dual(value).tangent is None):
        return "tensors that carry a forward gradient"
    return ""


def numbers_of(rule: Rule) -> tuple[int, float]:
    """A rule that `can_choose` takes, as the library knows it: its kind and its parameter."""
    kind, name = _KINDS[type(rule)]
    return kind, float(getattr(rule, name)) if name else 0.0


def checked(status: int, name: str = "paging") -> None:
    """Raises what a call of the library ended with: RuleError or ResourceError, or nothing."""
    if status == _REFUSED:
        raise RuleError(name, expected="finite scores", got="NaN or infinity",
                        do="look for overflow in the queries and keys")
    if status:
        raise ResourceError(name, expected="memory for what is between the rows and the result", got="none left",
                            do="use a shorter input, a smaller batch or a machine with more memory")


def _run(query, key, value, pages, scale, task, kept):
    """What `_pages` gives, of which a task leaves something empty."""
    kind, number = numbers_of(pages.rule)
    sizes, numbers = [task, kind, pages.window, int(pages.causal)], [scale, number]
    call = _pages if type(query) is torch.Tensor and not torch.compiler.is_compiling() else torch.ops.sentei.pages
    return call(query, key, value, pages.bounds, pages.lengths, kept, sizes, numbers)


def _pages(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor | None,
           lengths: torch.Tensor | None, kept: torch.Tensor | None, sizes: list[int],
           numbers: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the checks of the op `sentei::pages`: output [B, R, H, Dv] and bool choice [B, G, R, KB].

    The output is of the query's dtype where that can be read, else float32.

    For the task _SCORE nothing and float32 scores instead, for _GIVEN output and nothing.

    Args:
        bounds, lengths: those of the pages.
        kept: given for the task _GIVEN.
        sizes: task, kind of rule, window, and 1 for causal.
        numbers: scale, and the rule's number.
    Raises:
        RuleError: a score is NaN or infinite.
    """
    output, made = _empty(query, key, value, sizes[0])
    if not (query.numel() and key.numel() and value.numel()):
        return output.zero_(), made.fill_(-torch.inf if made.is_floating_point() else False)
    task, rule, window, causal = sizes
    batch, num_keys, groups, width = key.shape
    rows = _rows(query.to(output.dtype))
    if key.dtype == torch.float16:
        key, value, bounds = key.float(), value.float(), None if bounds is None else bounds.float()
    key, value, bounds = _rows(key), _rows(value), None if bounds is None else _rows(bounds)
    lengths = None if lengths is None else lengths.contiguous()
    choice = made if kept is None else kept.expand(batch, groups, query.shape[1], -1).contiguous()
    checked(native.load().sentei_pages(_PAGED.pack(
        rows.data_ptr(), key.data_ptr(), value.data_ptr(), 0 if bounds is None else bounds.data_ptr(),
        0 if lengths is None else lengths.data_ptr(), output.data_ptr(), made.data_ptr(), choice.data_ptr(),
        *rows.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *((0, 0, 0, 0) if bounds is None else bounds.stride()[:4]),
        batch, query.shape[1], num_keys, query.shape[2], groups, width, value.shape[3], PAGE,
        min(window, num_keys), bool(causal), key.dtype == torch.bfloat16, rows.dtype == torch.bfloat16, task, rule,
        torch.get_num_threads(), native.MACHINE, numbers[1], numbers[0])))
    return output, made


def _op(query, key, value, bounds, lengths, kept, sizes, numbers):
    """The op: anyone may call it, so what it is given is checked."""
    _check(query, key, value, bounds, lengths, kept, sizes, numbers)
    return _pages(query, key, value, bounds, lengths, kept, sizes, numbers)


def _shapes(query, key, value, bounds, lengths, kept, sizes, numbers):
    _check(query, key, value, bounds, lengths, kept, sizes, numbers)
    return _empty(query, key, value, sizes[0])


def _check(query, key, value, bounds, lengths, kept, sizes, numbers) -> None:
    """Raises ShapeError or RuleError unless the parts of a call fit one another."""
    if not (query.dim() == key.dim() == 4 and len(sizes) == 4 and len(numbers) == 2
            and sizes[0] in (_SCORE, _GIVEN, _CHOOSE) and (sizes[0] == _GIVEN) == (kept is not None)
            and 0 <= sizes[1] < len(RULES)):
        raise ShapeError("paging", expected="four dimensions, a task and kept where it is given, a rule, window and "
                         "causal, and two numbers", got=f"{list(query.shape)}, {list(key.shape)}, {sizes}, {numbers}",
                         do="call it through attend")
    (kind, name), number = list(RULES.items())[sizes[1]], numbers[1]
    rule = kind(**{name: int(number) if kind is TopK and math.isfinite(number) else number} if name else {})
    Pages(num_queries=query.shape[1], num_keys=key.shape[1], rule=rule, window=sizes[2], causal=bool(sizes[3]),
          lengths=lengths, bounds=bounds).check(query, key, value, kept)


def _empty(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           task: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tensors to be filled."""
    (batch, rows, heads, _), (_, num_keys, groups, _) = query.shape, key.shape
    output = (0,) if task == _SCORE else (batch, rows, heads, value.shape[3])
    made = (0,) if task == _GIVEN else (batch, groups, rows, -(-num_keys // PAGE))
    return (query.new_empty(output, dtype=query.dtype if query.dtype in _READ else torch.float32),
            query.new_empty(made, dtype=torch.float32 if task == _SCORE else torch.bool))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous rows and no pending sign, itself where it is that already."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


ops.define("pages(Tensor query, Tensor key, Tensor value, Tensor? bounds, Tensor? lengths, Tensor? kept, int[] sizes,"
           " float[] numbers) -> (Tensor, Tensor)", _op, _shapes)
