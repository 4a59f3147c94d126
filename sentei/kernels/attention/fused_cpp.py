"""Attention over chosen tiles on the CPU, in C++: every kept tile once, online softmax, nothing gathered.

fp32 and bfloat16, float16 by conversion; sums are always fp32. The gradients make the scores again, tile by tile, so
that memory stays linear in the tokens. The estimates that choose tiles are here too, and the choice. Each call is an
op of torch (`sentei::attend`, `sentei::attend_backward`, `sentei::estimate`, `sentei::keep`), so that `torch.compile`
keeps it in its graph and tensors without memory never reach it. The instruction set is picked when the library is
loaded.
"""

import ctypes
import math

import torch
from torch.autograd.forward_ad import unpack_dual

from sentei.core.errors import ImplError, ResourceError, RuleError, ShapeError
from sentei.core.rules import MAX_K, bad_scores
from sentei.kernels import native, ops
from sentei.kernels.attention.tiles import MAX_BLOCK, Grid, Tiles

_LONGS = ("batch", "queries", "keys", "heads", "groups", "width", "value_width", "query_block", "key_block", "causal",
          "window", "threads", "first", "stride", "machine", "bfloat16")
ESTIMATES = ("exact", "pooled", "bounds", "folded")  # EstimateKind of native/select.cpp, by number
NATIVE_RULES = ("All", "TopK", "Mass", "Threshold")  # RuleKind of native/rules.h, by number
LOG2_E = 1.4426950408889634
FEW_ROWS = 4  # that read every key where it lies: more are faster over packed ones
BAD_SCORES = 2  # what sentei_keep returns for them
_PLAN = ("full_count", "full_ids", "partial_count", "partial_ids")


class _Plan(ctypes.Structure):
    """The struct of native/call.h, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in _PLAN),
                *((name, ctypes.c_int64) for name in ("heads", "full_slots", "partial_slots"))]


class _Problem(ctypes.Structure):
    """The struct of native/call.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "lse", "softmax")),
        *((name, ctypes.c_int64 * 3) for name in ("query_stride", "key_stride", "value_stride")),
        ("plan", _Plan), ("lengths", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _LONGS),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("shares", ctypes.c_void_p),
        ("cut", ctypes.c_float), ("kept", ctypes.c_void_p),
    ]


class _Backward(ctypes.Structure):
    """The struct of native/backward.cpp, field by field."""

    _fields_ = [
        ("problem", _Problem),
        *((name, ctypes.c_void_p) for name in ("gradient", "delta", "query", "key", "value")),
    ]


class _Estimate(ctypes.Structure):
    """The struct of native/select.cpp, field by field."""

    _fields_ = [("problem", _Problem), ("kind", ctypes.c_int64), ("square", ctypes.c_int64)]


class _Choice(ctypes.Structure):
    """The struct of native/select.cpp, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("scores", "forced", "full", "parameters", *_PLAN)),
                *((name, ctypes.c_int64) for name in ("batch", "heads", "query_blocks", "key_blocks", "mask_batch",
                                                      "kind", "threads"))]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: Tiles,
    *,
    scale: float,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `sentei.kernels.attention.attend`.

    Raises:
        ImplError: `refusal` has a reason.
        ShapeError: a plan that names tiles the grid does not have.
        ResourceError: memory ran out.
    """
    reason = refusal(query, key, value)
    if reason:
        raise ImplError("fused_cpp", expected="tensors it can take", got=reason, do="use impl='auto'")
    if _are_few(query, key, value, tiles) and not softcap and not return_lse:
        return torch.ops.sentei.attend_rows(query, key, value, tiles.grid.lengths, _sizes(tiles.grid), scale)
    plan = [] if tiles.is_everything else [getattr(tiles, name) for name in _PLAN]
    output, lse, _ = torch.ops.sentei.attend(query, key, value, plan, tiles.grid.lengths, _sizes(tiles.grid), scale,
                                             softcap)
    return (output, lse) if return_lse else output


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: list[torch.Tensor],
             lengths: torch.Tensor | None, sizes: list[int], scale: float,
             softcap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `sentei::attend`: output, lse, and what the gradients need of the softmax.

    That is float32 [2, B, Tq, H]: the base that scores are weighed from, in powers of two, and 1 ÷ the sum.

    Args:
        plan: full counts and ids, partial counts and ids, as `Tiles` has them; empty for everything.
        lengths: the grid's.
        sizes: query block, key block, 1 for causal, and the window or 0.
    """
    grid = _grid("attend", [query, key, value], plan, lengths, sizes, softcap)
    rows = [_rows(tensor) for tensor in (query, key, value)]
    problem = _problem(*rows[:2], grid, scale, softcap)
    _set_plan(problem, plan)
    return _computed(problem, rows, grid, query.dtype)


def _computed(problem: _Problem, rows: list[torch.Tensor], grid: Grid,
              dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output in a dtype, lse and softmax of a problem, to which only the value and the results are missing.

    Args:
        rows: query, key and value as `_rows` gives them.
    """
    output, lse, softmax = _results(rows[0], rows[2])
    if lse.numel():
        _set_value(problem, rows[2])
        problem.output, problem.lse, problem.softmax = (tensor.data_ptr() for tensor in (output, lse, softmax))
        _finish(native.load().sentei_attend(ctypes.byref(problem)), grid)
    return output.to(dtype), lse, softmax


def _are_few(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: Tiles) -> bool:
    """Whether rows are so few that they read every key where it lies. Those that are trained do not: their gradients
    make the scores again, and must sum them in the order that the softmax was made in.
    """
    return (tiles.is_everything and tiles.grid.num_queries <= FEW_ROWS and tiles.grid.window is None
            and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))))


def _rows_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None,
                  sizes: list[int], scale: float) -> torch.Tensor:
    """The op `sentei::attend_rows`: `_forward`'s output for the plan that is everything, for a few rows."""
    grid = _rows_grid(query, key, value, lengths, sizes)
    rows = [_rows(tensor) for tensor in (query, key, value)]
    output = rows[0].new_zeros(*query.shape[:3], value.shape[3])
    if output.numel() and grid.num_keys:
        problem = _problem(*rows[:2], grid, scale, 0.0)
        _set_value(problem, rows[2])
        problem.output = output.data_ptr()
        _finish(native.load().sentei_attend_rows(ctypes.byref(problem)), grid)
    return output.to(query.dtype)


def _rows_shape(query, key, value, lengths, sizes, scale):
    _rows_grid(query, key, value, lengths, sizes)
    return query.new_empty(*query.shape[:3], value.shape[3])


def _rows_grid(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None,
               sizes: list[int]) -> Grid:
    """The grid of `_rows_forward`."""
    grid = _grid("attend_rows", [query, key, value], [], lengths, sizes)
    if grid.window is not None:
        raise ShapeError("attend_rows", expected="no window", got=str(grid.window), do="call it through attend")
    return grid


def _forward_shapes(query, key, value, plan, lengths, sizes, scale, softcap):
    _grid("attend", [query, key, value], plan, lengths, sizes, softcap)
    return _results(query, value)


def _certify(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None,
             sizes: list[int], scale: float, cut: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `sentei::certify`: output and kept of `certify`; the cut is in powers of two."""
    grid = _grid("certify", [query, key, value], [], lengths, sizes)
    _, kept = _certify_shapes(query, key, value, lengths, sizes, scale, cut)
    rows = [_rows(tensor) for tensor in (query, key, value)]
    problem = _problem(*rows[:2], grid, scale, 0.0)
    problem.cut, problem.kept = cut, kept.data_ptr()
    return _computed(problem, rows, grid, query.dtype)[0], kept


def _certify_shapes(query, key, value, lengths, sizes, scale, cut):
    grid = _grid("certify", [query, key, value], [], lengths, sizes)
    if not 0 < cut < float("inf"):
        raise ShapeError("certify", expected="a cut above 0", got=str(cut), do="call it through attend_certified")
    shape = query.shape[0], query.shape[2], grid.num_query_blocks, grid.num_key_blocks
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_zeros(shape, dtype=torch.bool)


def _backward(given: list[torch.Tensor], plan: list[torch.Tensor], lengths: torch.Tensor | None, sizes: list[int],
              scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `sentei::attend_backward`: the gradients of query, key and value.

    Args:
        given: query, key, value, the softmax of `_forward`, the output's gradient, and delta [B, Tq, H]: its product
            with the output, less the gradient of the lse.
        plan, lengths, sizes, scale, softcap: as in `_forward`.
    """
    grid = _backward_grid(given, plan, lengths, sizes, softcap)
    query, key, value, softmax, gradient, delta = (_rows(tensor) for tensor in given)
    gradients = [torch.zeros(tensor.shape, dtype=torch.float32, device="cpu") for tensor in (query, key, value)]
    if query.numel() and key.numel() and gradient.numel():
        problem = _problem(query, key, grid, scale, softcap)
        _set_plan(problem, plan)
        _set_value(problem, value)
        softmax, gradient, delta = (tensor.float().contiguous() for tensor in (softmax, gradient, delta))
        problem.softmax = softmax.data_ptr()
        backward = _Backward(problem, *(tensor.data_ptr() for tensor in (gradient, delta, *gradients)))
        _finish(native.load().sentei_backward(ctypes.byref(backward)), grid)
    return tuple(found.to(tensor.dtype) for found, tensor in zip(gradients, given, strict=False))


def _backward_shapes(given, plan, lengths, sizes, scale, softcap):
    _backward_grid(given, plan, lengths, sizes, softcap)
    return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in given[:3])


def _save(ctx, inputs, output):
    query, key, value, plan, lengths, ctx.sizes, ctx.scale, ctx.softcap = inputs
    ctx.set_materialize_grads(False)  # zeros, two for each of the softmax
    ctx.save_for_backward(query, key, value, *output, lengths, *plan)


def _differentiate(ctx, gradient, lse_gradient, _):
    query, key, value, output, _, softmax, lengths, *plan = ctx.saved_tensors
    gradient = torch.zeros_like(output) if gradient is None else gradient
    delta = (gradient.float() * output.float()).sum(-1)
    delta = delta if lse_gradient is None else delta - lse_gradient
    given = [query, key, value, softmax, gradient, delta]
    gradients = torch.ops.sentei.attend_backward(given, plan, lengths, ctx.sizes, ctx.scale, ctx.softcap)
    return *gradients, [None] * len(plan), None, None, None, None


def _estimate(query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor | None, sizes: list[int],
              rows: list[int], square: bool, scale: float) -> torch.Tensor:
    """The op `sentei::estimate`; `rows` are kind, first and stride of `estimate`."""
    grid = _grid("estimate", [query, key, key], [], lengths, sizes)
    found = _estimate_shape(query, key, lengths, sizes, rows, square, scale)
    if found.numel():
        kind, *which = rows
        problem = _problem(*_scored(query, key, kind), grid, scale, 0.0)
        problem.first, problem.stride = which
        problem.shares = found.data_ptr()
        _finish(native.load().sentei_estimate(ctypes.byref(_Estimate(problem, kind, square))), grid)
    return found


def _scored(query: torch.Tensor, key: torch.Tensor, kind: int) -> list[torch.Tensor]:
    """What the library scores: float32, or exact rows of bfloat16 where it multiplies these as pairs."""
    halves = query.dtype is key.dtype is torch.bfloat16 and query.shape[3] % 2 == 0
    if halves and ESTIMATES[kind] == "exact" and native.takes_pairs():
        rows = [_rows(query), _rows(key)]
        if rows[1].data_ptr() % 4 == 0 and not any(stride % 2 for stride in rows[1].stride()[:3]):
            return rows
    return [_rows(tensor.float()) for tensor in (query, key)]


def _estimate_shape(query, key, lengths, sizes, rows, square, scale):
    grid = _grid("estimate", [query, key, key], [], lengths, sizes)
    kind, first, stride = rows if len(rows) == 3 else (-1, 0, 0)
    fits = 0 <= kind < len(ESTIMATES) and 0 <= first < grid.query_block and 1 <= stride <= MAX_BLOCK
    if not fits or (ESTIMATES[kind] == "folded" and (grid.query_block % stride or grid.key_block % stride)):
        raise ShapeError("estimate", expected=f"a first row below {grid.query_block} and a stride that fits",
                         got=str(rows), do="choose rows that a query block has")
    return query.new_empty(query.shape[0], query.shape[2], grid.num_query_blocks, grid.num_key_blocks,
                           dtype=torch.float32)


def _keep(scores: torch.Tensor, forced: torch.Tensor, full: torch.Tensor, rule: str,
          parameters: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `sentei::keep`: counts and ids of full tiles and of partial ones, every id there is room for.

    Args:
        scores: float32 [B, P, QB, KB].
        forced, full: bool [B or 1, 1, QB, KB].
        rule, parameters: one of NATIVE_RULES, and its parameter for every head.
    """
    plan = _keep_shapes(scores, forced, full, rule, parameters)
    scores, forced, full = (tensor.contiguous() for tensor in (scores, forced, full))
    batch, heads, query_blocks, key_blocks = scores.shape
    numbers = torch.tensor(parameters, dtype=torch.float64)
    choice = _Choice(
        *(tensor.data_ptr() for tensor in (scores, forced, full, numbers, *plan)), batch, heads, query_blocks,
        key_blocks, forced.shape[0], NATIVE_RULES.index(rule), torch.get_num_threads())
    status = native.load().sentei_keep(ctypes.byref(choice))
    if status == BAD_SCORES:
        raise bad_scores(rule)
    _finish(status, None)
    return plan


def _keep_shapes(scores, forced, full, rule, parameters):
    _check_keep(scores, forced, full, rule, parameters)
    count, ids = (scores.new_empty(shape, dtype=torch.int32) for shape in (scores.shape[:3], scores.shape))
    return count, ids, torch.empty_like(count), torch.empty_like(ids)


def _check_keep(scores: torch.Tensor, forced: torch.Tensor, full: torch.Tensor, rule: str,
                parameters: list[float]) -> None:
    """Anyone may call an op, so what it is given is checked."""
    if not (scores.dim() == forced.dim() == 4 and scores.dtype == torch.float32 and forced.shape == full.shape
            and forced.shape[0] in (1, scores.shape[0]) and forced.shape[1:] == (1, *scores.shape[2:])
            and forced.dtype == full.dtype == torch.bool and scores.device == forced.device == full.device):
        raise ShapeError("keep", expected="scores float32 [B, P, QB, KB], forced and full bool [B or 1, 1, QB, KB]",
                         got=", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (scores, forced, full)),
                         do="give masks of these scores")
    most = MAX_K if rule == "TopK" else 1
    if rule not in NATIVE_RULES or len(parameters) != scores.shape[1] or not all(0 <= n <= most for n in parameters):
        raise RuleError("keep", expected=f"one of {', '.join(NATIVE_RULES)}, and a number from 0 to {most} for each of "
                        f"{scores.shape[1]} heads", got=f"{rule}, {parameters}"[:200], do="choose others")


ops.define("attend(Tensor query, Tensor key, Tensor value, Tensor[] plan, Tensor? lengths, int[] sizes, float scale,"
           " float softcap) -> (Tensor, Tensor, Tensor)", _forward, _forward_shapes)
ops.define("attend_backward(Tensor[] given, Tensor[] plan, Tensor? lengths, int[] sizes, float scale, float softcap)"
           " -> (Tensor, Tensor, Tensor)", _backward, _backward_shapes)
ops.differentiate_once("attend", _differentiate, _save, impl="fused_cpp", do="use impl='eager' or 'reference'")
ops.define("attend_rows(Tensor query, Tensor key, Tensor value, Tensor? lengths, int[] sizes, float scale) -> Tensor",
           _rows_forward, _rows_shape)
ops.differentiate_never("attend_rows", impl="fused_cpp", do="call it through attend")
ops.define("certify(Tensor query, Tensor key, Tensor value, Tensor? lengths, int[] sizes, float scale, float cut)"
           " -> (Tensor, Tensor)", _certify, _certify_shapes)
ops.define("estimate(Tensor query, Tensor key, Tensor? lengths, int[] sizes, int[] rows, bool square, float scale)"
           " -> Tensor", _estimate, _estimate_shape)
ops.define("keep(Tensor scores, Tensor forced, Tensor full, str rule, float[] parameters)"
           " -> (Tensor, Tensor, Tensor, Tensor)", _keep, _keep_shapes)


def certify(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, *, scale: float, cut: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without the tiles whose every score lies more than `cut` below its row's largest before it.

    Args:
        query, key, value: as in `attend`, without gradients.
        cut: above 0, in nats.
    Returns:
        output, and bool [B, H, QB, KB], the tiles that were computed.
    """
    return torch.ops.sentei.certify(query, key, value, grid.lengths, _sizes(grid), scale, cut * LOG2_E)


def estimate(
    query: torch.Tensor, key: torch.Tensor, grid: Grid, *, scale: float, rows: tuple[str, int, int], square: bool
) -> torch.Tensor:
    """The log share of every tile, as `select.estimate` defines it: float32 [B, H, QB, KB].

    Args:
        query, key: as in `attend`.
        rows: one of ESTIMATES, and of each query block the first row and the stride of those it scores; for "folded"
            the rows that are folded. Others score every row.
        square: pool the rows by their root mean square, and not by their mean.
    Raises:
        ShapeError: a first row that no block has, a stride below 1, or a fold that does not divide the blocks.
        ResourceError: memory ran out.
    Cost: 1 / stride of the dense scores and the exponentials of as many, or what the estimator says.
    """
    grid.check("estimate", query, key, key)
    rows = [ESTIMATES.index(rows[0]), *rows[1:]]
    return torch.ops.sentei.estimate(query, key, grid.lengths, _sizes(grid), rows, square, scale)


def keep(scores: torch.Tensor, forced: torch.Tensor, grid: Grid, *, rule: str, parameters: list[float]) -> Tiles:
    """The plan of the tiles that a rule keeps, as `core/rules.py` and `Tiles.from_mask` define it.

    Args:
        scores: float32 [B, H, QB, KB]; -inf where not permitted.
        forced: bool [B or 1, 1, QB, KB].
        rule, parameters: one of NATIVE_RULES, and its parameter for every head.
    Raises:
        RuleError: NaN or +inf among the scores.
        ResourceError: memory ran out.
    """
    plan = torch.ops.sentei.keep(scores, forced, grid.full(scores.device).expand_as(forced), rule, parameters)
    return Tiles(grid=grid, **dict(zip(_PLAN, plan, strict=True)))


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Why this implementation cannot take these tensors; empty when it can."""
    if not torch.compiler.is_compiling() and native.missing():  # a graph finds out when it runs
        return native.missing()
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype} on {query.device}"
    if any(unpack_dual(tensor).tangent is not None for tensor in (query, key, value)):
        return "tensors that carry a forward gradient"
    return ""


def _problem(query: torch.Tensor, key: torch.Tensor, grid: Grid, scale: float, softcap: float) -> _Problem:
    """What all calls share. It holds the tensors whose memory it names."""
    lengths = None if grid.lengths is None else grid.lengths.contiguous()
    problem = _Problem(
        query=query.data_ptr(), key=key.data_ptr(), lengths=None if lengths is None else lengths.data_ptr(),
        query_stride=(ctypes.c_int64 * 3)(*query.stride()[:3]), key_stride=(ctypes.c_int64 * 3)(*key.stride()[:3]),
        batch=query.shape[0], queries=grid.num_queries, keys=grid.num_keys, heads=query.shape[2], groups=key.shape[2],
        width=query.shape[3], query_block=grid.query_block, key_block=grid.key_block, causal=int(grid.causal),
        window=grid.window or 0, threads=torch.get_num_threads(), machine=native.MACHINE,
        bfloat16=int(query.dtype == torch.bfloat16), scale=scale, softcap=softcap)
    problem.held = [query, key, lengths]
    return problem


def _set_value(problem: _Problem, value: torch.Tensor) -> None:
    """Enters the value [B, Tk, G, Dv]."""
    problem.value, problem.value_width = value.data_ptr(), value.shape[3]
    problem.value_stride = (ctypes.c_int64 * 3)(*value.stride()[:3])
    problem.held.append(value)


def _set_plan(problem: _Problem, plan: list[torch.Tensor]) -> None:
    """Enters the lists of a plan; without any it is everything that is permitted."""
    if not plan:
        return
    listed = [part.contiguous() for part in plan]
    problem.plan = _Plan(*(tensor.data_ptr() for tensor in listed), listed[0].shape[1], listed[1].shape[-1],
                         listed[3].shape[-1])
    problem.held.append(listed)


def _grid(where: str, tensors: list[torch.Tensor], plan: list[torch.Tensor], lengths: torch.Tensor | None,
          sizes: list[int], softcap: float = 0.0) -> Grid:
    """The grid that an op was given in parts. Anyone may call an op, so what it is given is checked.

    Args:
        tensors: query, key, value.
    Raises:
        ShapeError: shapes, dtypes or devices that do not fit. One tensor without memory sends the whole call to the
            shapes alone, whose result is not to be read.
    """
    query, key, _ = tensors
    if len(sizes) != 4 or query.dim() != 4 or key.dim() != 4 or len(plan) not in (0, len(_PLAN)):
        raise ShapeError(where, expected="four dimensions, four sizes and a plan of four parts or none",
                         got=f"{list(query.shape)}, {list(key.shape)}, {sizes}, {len(plan)} parts",
                         do="call it through attend")
    grid = Grid(num_queries=query.shape[1], num_keys=key.shape[1], query_block=sizes[0], key_block=sizes[1],
                causal=bool(sizes[2]), window=sizes[3] or None, lengths=lengths)
    grid.check(where, *tensors)
    if not 0 <= softcap < math.inf:
        raise ShapeError(where, expected="a softcap from 0", got=str(softcap), do="give 0 for none")
    heads = query.shape[2], key.shape[2]
    if plan and Tiles(grid=grid, **dict(zip(_PLAN, plan, strict=True))).full_count.shape[:2] not in (
            (query.shape[0], heads[0]), (query.shape[0], heads[1])):
        raise ShapeError(where, expected=f"tiles of {query.shape[0]} rows, {heads[0]} or {heads[1]} heads",
                         got=str(list(plan[0].shape)), do="build the tiles for these tensors")
    others = {str(tensor.device) for tensor in (*plan, lengths) if tensor is not None} - {str(query.device)}
    if others:
        raise ShapeError(where, expected=f"plan and lengths on {query.device}", got=", ".join(sorted(others)),
                         do="move them to the same device")
    return grid


def _backward_grid(given: list[torch.Tensor], plan: list[torch.Tensor], lengths: torch.Tensor | None,
                   sizes: list[int], softcap: float) -> Grid:
    """The grid of `_backward`, whose further tensors are checked too."""
    if len(given) != 6:
        raise ShapeError("attend_backward", expected="6 tensors", got=str(len(given)), do="call it through attend")
    query, _, value, *more = given
    grid = _grid("attend_backward", given[:3], plan, lengths, sizes, softcap)
    rows = query.shape[:3]
    expected = (2, *rows), (*rows, value.shape[3]), rows
    if any(tensor.shape != shape or tensor.device != query.device or not tensor.is_floating_point()
           for tensor, shape in zip(more, expected, strict=True)):
        raise ShapeError("attend_backward", expected=f"softmax, gradient and delta {', '.join(map(str, expected))}",
                         got=", ".join(f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}" for tensor in more),
                         do="call it through attend")
    return grid


def _sizes(grid: Grid) -> list[int]:
    """The part of a grid that tensors do not tell."""
    return [grid.query_block, grid.key_block, int(grid.causal), grid.window or 0]


def _results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, lse and softmax of `_forward`, to be filled; float32 but the output."""
    shape = query.shape[:3]
    return (query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=torch.float32),
            query.new_empty(2, *shape, dtype=torch.float32))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with contiguous rows, float32 unless it is bfloat16; itself where it is that already."""
    tensor = tensor if tensor.dtype == torch.bfloat16 else tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _finish(status: int, grid: Grid) -> None:
    """Raises what the native call could not."""
    if status == native.BAD_PLAN:
        raise ShapeError("attend", expected=f"ascending ids of {grid.num_key_blocks} blocks, -1 beyond the count",
                         got="a plan that names others", do="build plans with Tiles.from_mask")
    if status:
        raise ResourceError("attend", expected="memory for a packed copy of keys and values", got="none left",
                            do="use a shorter input, a smaller batch or a machine with more memory")
