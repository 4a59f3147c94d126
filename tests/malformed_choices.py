"""The malformed calls of what chooses keys, pages and tiles, of the linear layer and experts; `malformed` makes them.

The damages that fit every entry are here too.
"""

from collections.abc import Callable
from random import Random

import torch

from sentei.core.rules import MAX_K
from sentei.kernels.attention import Grid, fused_cpp
from sentei.kernels.linear import linear
from sentei.kernels.paging import PAGE, Pages, attend, bounds_of, score
from sentei.kernels.paging.pages import RULES
from sentei.kernels.routing import Stack, route
from sentei.kernels.topk import Choice, attend_topk

LARGE = (2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)
Arguments = dict[str, object]
Found = tuple[list[torch.Tensor], list[list[int]]]  # what an entry gives, and the shapes that are right

# Each damage changes one argument and says whether the call must now be refused.


def other_rank(draw: Random, given: Arguments, name: str) -> bool:
    tensor = given[name]
    given[name] = draw.choice([lambda: tensor[None], lambda: tensor.flatten(), lambda: tensor.sum(0),
                               lambda: torch.zeros((), dtype=tensor.dtype), lambda: tensor[..., None]])()
    # A row may be one or many for a linear layer, and what was flat already stays so.
    return name != "x" and given[name].dim() != tensor.dim()


def resized(draw: Random, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """One dimension, which is told too, longer or shorter: seen without memory."""
    place = draw.randrange(tensor.dim())
    shape = [*tensor.shape]
    shape[place] = draw.choice([size for size in (0, 1, 2, 7, 1000) if size != shape[place]])
    if not tensor.numel():
        return tensor.new_zeros(shape), place
    return tensor.index_select(place, torch.arange(shape[place]).clamp(max=tensor.shape[place] - 1)), place


def other_dtype(draw: Random, given: Arguments, name: str) -> bool:
    kinds = [kind for kind in (torch.int64, torch.complex64, torch.bool, torch.int8) if kind != given[name].dtype]
    given[name] = given[name].to(draw.choice(kinds))
    return True


def no_memory(draw: Random, given: Arguments, name: str) -> bool:
    given[name] = given[name].to("meta")
    return True


def other_lengths(draw: Random, given: Arguments, name: str) -> bool:
    """Lengths out of range are clipped, which is no error; those of another shape or dtype are."""
    batch = len(given["query"])
    good = torch.tensor([[draw.choice([-5, 0, 3, -2**63, 2**63 - 1]) for _ in range(2)] for _ in range(batch)])
    wrong = [good[:, :1], good.float(), good[0], good.new_zeros(batch + 1, 2), good.to("meta"), good.int()]
    given["lengths"] = draw.choice([good, draw.choice(wrong)])
    return given["lengths"] is not good


def other_scale(draw: Random, given: Arguments, name: str) -> bool:
    given["scale"] = draw.choice([float("nan"), float("inf"), -float("inf"), 1e300, 0.0, -1e-320, "0.3", [0.3]])
    # Where there is nothing to compute nobody may look at it.
    return not isinstance(given["scale"], float) and bool(given["key"].numel() and given["value"].numel())


def other_strides(draw: Random, given: Arguments, name: str) -> bool:
    """The same numbers seen through other strides, or one row seen many times; no error at all."""
    tensor = given[name]
    if tensor.dim() != 4:
        return False
    given[name] = draw.choice([
        lambda: tensor.transpose(1, 3).contiguous().transpose(1, 3),
        lambda: torch.stack([tensor, tensor], -1)[..., 0],
        lambda: tensor[:, :1].expand(tensor.shape) if tensor.shape[1] else tensor,
        lambda: tensor[:1].as_strided(tensor[:1].shape, (2**40, *tensor.stride()[1:])).expand(tensor.shape)
        if tensor.numel() else tensor,
        lambda: torch.complex(tensor.float(), -tensor.float()).conj().imag.to(tensor.dtype),
    ])()
    return False


def no_tensor(draw: Random, given: Arguments, name: str) -> bool:
    given[name] = draw.choice([None, 3, "query", [given[name]]])
    return True


def valid(draw: Random) -> Arguments:
    """Everything an entry here can be given, by name; `rows` are the queries of `key` that attend to pages."""
    batch, groups, width, value_width = draw.randint(1, 3), draw.randint(1, 3), draw.randint(0, 9), draw.randint(0, 9)
    queries, keys, heads = draw.choice([0, 1, 5, 50]), draw.choice([0, 1, 5, 40, 200]), groups * draw.randint(1, 3)
    few = draw.randint(1, 3)
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    query, key, value, gradient, rows = (torch.randn(shape, dtype=kind) for shape, kind in (
        ((batch, queries, heads, width), dtype), ((batch, keys, groups, width), dtype),
        ((batch, keys, groups, value_width), dtype), ((batch, queries, heads, value_width), dtype),
        ((batch, few, heads, width), draw.choice([dtype, torch.float32]))))
    lengths = None if draw.random() < 0.6 else torch.tensor([sorted(draw.choices(range(keys + 1), k=2))
                                                             for _ in range(batch)])
    causal, k = draw.random() < 0.7, draw.choice([0, 1, 4, 30, 300])
    choice = [k, draw.choice([-1, 0, 3, 400]) if causal else -1, int(causal)]
    ids = torch.ops.sentei.topk(query, key, value, lengths, choice, 0.3)[2]
    kept = torch.rand(batch, groups, few, -(-keys // PAGE)) < 0.7 if draw.random() < 0.4 else None
    bounds = bounds_of(key.transpose(1, 2)) if draw.random() < 0.5 else None
    kind, grid = draw.randrange(len(RULES)), Grid(num_queries=queries, num_keys=keys, query_block=3, key_block=16)
    scores = torch.randn(batch, heads, grid.num_query_blocks, grid.num_key_blocks)
    masks = torch.rand(2, draw.choice([1, batch]), 1, *scores.shape[2:]) < 0.3
    return {
        "query": query, "key": key, "value": value, "gradient": gradient, "lse_gradient": torch.randn(query.shape[:3]),
        "lengths": lengths, "scale": 0.3, "choice": choice, "ids": ids, "rows": rows, "kept": kept, "bounds": bounds,
        "task": [1 if kept is not None else draw.choice([0, 2])], "kind": kind, "window": draw.randint(0, 40),
        "number": k if kind == 1 else 0.6, "scores": scores, "forced": masks[0], "full": masks[1],
        "rule": fused_cpp.NATIVE_RULES[kind], "parameters": [float(k if kind == 1 else 0.6)] * heads,
        **layer(draw), **mixture(draw)}


def layer(draw: Random) -> Arguments:
    """A linear layer that fits."""
    inputs, outputs = draw.randint(1, 40), draw.randint(0, 20)
    dtype = draw.choice([torch.float32, torch.bfloat16])
    leading = draw.choice([(), (draw.randint(1, 8),), (2, draw.randint(1, 4))])
    return {"x": torch.randn(*leading, inputs, dtype=dtype), "weight": torch.randn(outputs, inputs, dtype=dtype),
            "bias": draw.choice([None, torch.randn(outputs, dtype=dtype)])}


def mixture(draw: Random) -> Arguments:
    """Tokens and experts that fit, and what their forward saved."""
    tokens, slots, experts = draw.choice([0, 1, 5, 70]), draw.randint(0, 3), draw.randint(1, 4)
    width, inner, outputs = draw.randint(1, 20), draw.choice([1, 1, 3, 60]), draw.randint(1, 20)
    dtype, gated = draw.choice([torch.float32, torch.bfloat16]), draw.random() < 0.7
    tokens_in, up, gate, down, gradient = (torch.randn(shape, dtype=dtype) for shape in (
        (tokens, width), (experts, inner, width), (experts, inner, width), (experts, outputs, inner),
        (tokens, outputs)))
    ids, shares, gate = torch.randint(-1, experts, (tokens, slots)), torch.rand(tokens, slots), gate if gated else None
    saved = torch.ops.sentei.route(tokens_in, ids, shares, up, down, gate, 0, True)[1]
    return {"hidden": tokens_in, "experts": ids, "shares": shares, "up": up, "down": down, "gate": gate,
            "answer": gradient, "saved": saved}


def topk_shapes(given: Arguments) -> list[list[int]]:
    k, window, _ = given["choice"]
    slots, rows = Choice(k, None if window == -1 else window).slots(given["key"].shape[1]), [*given["query"].shape[:3]]
    return [[*rows, given["value"].shape[3]], rows, [*rows, slots]]


def topk(given: Arguments) -> Found:
    k, window, causal = given["choice"]
    found = attend_topk(given["query"], given["key"], given["value"], Choice(k, None if window == -1 else window),
                        causal=bool(causal), lengths=given["lengths"], scale=given["scale"], impl="fused_cpp")
    return list(found), topk_shapes(given)


def raw_topk(given: Arguments) -> Found:
    found = torch.ops.sentei.topk(given["query"], given["key"], given["value"], given["lengths"], given["choice"],
                                  given["scale"])
    return list(found), topk_shapes(given)


def raw_topk_backward(given: Arguments) -> Found:
    tensors = [given[name] for name in ("query", "key", "value", "gradient", "lse_gradient")]
    found = torch.ops.sentei.topk_backward(tensors, given["ids"], given["lengths"], given["choice"], given["scale"])
    return list(found), [[*tensor.shape] for tensor in tensors[:3]]


def pages_of(given: Arguments) -> Pages:
    """The pages a careful caller would build; raises where there are none."""
    rule, name = dict(enumerate(RULES.items()))[given["kind"]]
    return Pages(num_queries=given["rows"].shape[1], num_keys=given["key"].shape[1],
                 rule=rule(**{name: given["number"]} if name else {}), window=given["window"],
                 causal=bool(given["choice"][2]), lengths=given["lengths"], bounds=given["bounds"])


def choice_shape(given: Arguments) -> list[int]:
    key, rows = given["key"], given["rows"]
    return [key.shape[0], key.shape[2], rows.shape[1], -(-key.shape[1] // PAGE)]


def paged(given: Arguments) -> Found:
    rows, value, kept = given["rows"], given["value"], given["kept"]
    output, chosen = attend(rows, given["key"], value, pages_of(given), scale=given["scale"], impl="fused_cpp",
                            kept=kept)
    return [output, chosen], [[*rows.shape[:3], value.shape[3]], choice_shape(given) if kept is None else [*kept.shape]]


def page_scores(given: Arguments) -> Found:
    return [score(given["rows"], given["key"], pages_of(given), scale=given["scale"], impl="fused_cpp")], [
        choice_shape(given)]


def raw_pages(given: Arguments) -> Found:
    rows, value, task = given["rows"], given["value"], given["task"]
    found = torch.ops.sentei.pages(
        rows, given["key"], value, given["bounds"], given["lengths"], given["kept"],
        [*task, given["kind"], given["window"], given["choice"][2]], [given["scale"], given["number"]])
    return list(found), [[0] if task == [0] else [*rows.shape[:3], value.shape[3]],
                         [0] if task == [1] else choice_shape(given)]


def plan_shapes(given: Arguments) -> list[list[int]]:
    shape = [*given["scores"].shape]
    return [shape[:3], shape, shape[:3], shape]


def keep(given: Arguments) -> Found:
    grid = Grid(num_queries=given["query"].shape[1], num_keys=given["key"].shape[1], query_block=3, key_block=16)
    tiles = fused_cpp.keep(given["scores"], given["forced"], grid, rule=given["rule"], parameters=given["parameters"])
    return [tiles.full_count, tiles.full_ids, tiles.partial_count, tiles.partial_ids], plan_shapes(given)


def raw_keep(given: Arguments) -> Found:
    found = torch.ops.sentei.keep(*(given[name] for name in ("scores", "forced", "full", "rule", "parameters")))
    return list(found), plan_shapes(given)


def layer_call(given: Arguments) -> Found:
    x, weight = given["x"], given["weight"]
    return [linear(x, weight, given["bias"], impl="fused_cpp")], [[*x.shape[:-1], len(weight)]]


def raw_linear(given: Arguments) -> Found:
    x, weight = given["x"], given["weight"]
    return [torch.ops.sentei.linear(x, weight, given["bias"])], [[*x.shape[:-1], len(weight)]]


def mixed(given: Arguments) -> Found:
    hidden, down = given["hidden"], given["down"]
    stack = Stack(up=given["up"], down=down, gate=given["gate"])
    return [route(hidden, given["experts"], given["shares"], stack, impl="fused_cpp")], [[len(hidden), down.shape[1]]]


def raw_route(given: Arguments) -> Found:
    found = torch.ops.sentei.route(*(given[name] for name in _MIXTURE), 0, False)
    return list(found), [[len(given["hidden"]), given["down"].shape[1]], [0]]


def raw_route_backward(given: Arguments) -> Found:
    *tensors, gate = (given[name] for name in _MIXTURE)
    found = torch.ops.sentei.route_backward(given["answer"], tensors, gate, given["saved"], 0, [True] * 4)
    experts, inner, width = given["up"].shape
    first = [experts, inner if gate is None else 2 * inner, width]
    return found, [[*tensors[0].shape], [*tensors[2].shape], first, [*tensors[4].shape]]


_MIXTURE = ("hidden", "experts", "shares", "up", "down", "gate")
_TOPK, _PAGES = ("query", "key", "value", "lengths", "scale", "choice"), ("rows", "key", "kind", "window", "number",
                                                                          "lengths", "scale", "bounds")
_LINEAR = ("x", "weight", "bias")
ENTRIES: dict[Callable, tuple[str, ...]] = {  # what each reads
    topk: _TOPK, raw_topk: _TOPK, raw_topk_backward: (*_TOPK, "gradient", "lse_gradient", "ids"),
    paged: (*_PAGES, "value", "kept"), page_scores: _PAGES, raw_pages: (*_PAGES, "value", "kept", "task"),
    keep: ("scores", "forced", "rule", "parameters"), raw_keep: ("scores", "forced", "full", "rule", "parameters"),
    layer_call: _LINEAR, raw_linear: _LINEAR, mixed: _MIXTURE, raw_route: _MIXTURE,
    raw_route_backward: (*_MIXTURE, "answer", "saved"),
}
# The dimensions no other size of which is right; of forced masks the first may be 1 or the batch.
FIXED = {"key": (3,), "gradient": range(4), "lse_gradient": range(3), "ids": range(4), "bounds": (0, 1, 3, 4),
         "kept": (3,), "scores": (1, 2, 3), "forced": (1, 2, 3), "full": (1, 2, 3), "weight": (1,), "bias": (0,),
         "hidden": (0, 1), "experts": (0, 1), "shares": (0, 1), "up": (0, 1, 2), "gate": (0, 1, 2), "down": (0, 2),
         "answer": (0, 1), "saved": (0,)}


def other_size(draw: Random, given: Arguments, name: str) -> bool:
    dims = given[name].dim()
    given[name], place = resized(draw, given[name])
    return place in FIXED.get(name, ()) or name == "x" and place == dims - 1


def other_choice(draw: Random, given: Arguments, name: str) -> bool:
    k, window, causal = given["choice"]
    given["choice"] = draw.choice([
        [-1, window, causal], [-2**63, window, causal], [draw.choice(LARGE[1:]), window, causal], [k, -2, causal],
        [k, -2**63, causal], [k, draw.choice(LARGE[1:]), 1], [k, 3, 0], [k, window], [], [k, window, causal, 1]])
    return True


def most_keys(draw: Random, given: Arguments, name: str) -> bool:
    """More keys, or a wider window, than there are; no error."""
    given["choice"] = draw.choice([[MAX_K, -1, 0], [MAX_K, MAX_K, 1], [0, MAX_K, -7]])
    return False


def other_ids(draw: Random, given: Arguments, name: str) -> bool:
    """An id that is out of range, named twice, out of order, or behind the last."""
    ids, keys = given["ids"].clone(), given["key"].shape[1]
    if not ids.numel():
        return False
    place = tuple(draw.randrange(size) for size in ids.shape)
    before = ids[place[:-1]][place[-1] - 1].item() if place[-1] else keys
    ids[place] = draw.choice([-2, -2**31, keys, 2**31 - 1, before if before != -1 else -3])
    given["ids"] = ids
    return True


def other_window(draw: Random, given: Arguments, name: str) -> bool:
    given["window"] = draw.choice([-1, -2**63, *LARGE])
    return given["window"] < 0


def other_task(draw: Random, given: Arguments, name: str) -> bool:
    """Another task, which wants a choice made before or has no use for it; or too few or many."""
    given["task"] = draw.choice([[3], [-1], [2**63 - 1], [], [2, 2], [0 if given["kept"] is not None else 1]])
    return True


def other_kind(draw: Random, given: Arguments, name: str) -> bool:
    given["kind"] = draw.choice([-1, 4, -2**63, 2**63 - 1])
    return True


def other_number(draw: Random, given: Arguments, name: str) -> bool:
    given["number"] = draw.choice([float("nan"), float("inf"), -float("inf"), -1, 2**62, 1e300])
    return given["kind"] != 0  # All has none


def other_rule(draw: Random, given: Arguments, name: str) -> bool:
    given["rule"] = draw.choice(["", "topk", "Capacity", None, 3])
    return True


def other_parameters(draw: Random, given: Arguments, name: str) -> bool:
    first, *rest = given["parameters"]
    given["parameters"] = draw.choice([
        [draw.choice([float("nan"), float("inf"), -float("inf"), -1.0, 2.0**40, 1e300]), *rest], rest, [],
        [first, *rest, first]])
    return True


def bad_scores(draw: Random, given: Arguments, name: str) -> bool:
    scores = given["scores"].flatten()
    if not len(scores):
        return False
    scores[draw.randrange(len(scores))] = draw.choice([float("nan"), float("inf")])
    given["scores"] = scores.view(given["scores"].shape)
    return True


def many_rows(draw: Random, given: Arguments, name: str) -> bool:
    given["x"] = given["x"].flatten()[:given["x"].shape[-1]].repeat(draw.choice([9, 97, 1000]), 1)
    return False


def other_expert(draw: Random, given: Arguments, name: str) -> bool:
    """An id of nobody."""
    ids = given["experts"].flatten()
    if not len(ids):
        return False
    ids[draw.randrange(len(ids))] = draw.choice([-2, -2**63, len(given["up"]), 2**31, 2**63 - 1])
    given["experts"] = ids.view(given["experts"].shape)
    return True


def other_order(draw: Random, given: Arguments, name: str) -> bool:
    """Weights whose rows do not lie together."""
    given[name] = given[name].mT.contiguous().mT
    return given[name].stride(-1) != 1 and given[name].shape[-1] > 1


_TENSORS = ("query", "key", "value", "gradient", "lse_gradient", "ids", "rows", "kept", "bounds", "scores", "forced",
            "full", *_LINEAR, *_MIXTURE, "answer", "saved")
DAMAGES: dict[Callable, tuple[str, ...]] = {  # and to what each can be done
    other_rank: _TENSORS, other_size: _TENSORS, other_dtype: _TENSORS, no_memory: _TENSORS,
    no_tensor: tuple(name for name in _TENSORS if name not in ("kept", "bounds", "bias", "gate")),
    other_lengths: ("lengths",), other_scale: ("scale",),
    other_strides: ("query", "key", "value", "gradient", "rows", "kept", "scores", "forced"),
    other_choice: ("choice",), most_keys: ("choice",), other_ids: ("ids",), other_window: ("window",),
    other_task: ("task",), other_kind: ("kind",), other_number: ("number",), other_rule: ("rule",),
    other_parameters: ("parameters",), bad_scores: ("scores",), many_rows: ("x",),
    other_order: ("weight", "up", "down"),
    other_expert: ("experts",),
}
