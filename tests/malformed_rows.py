"""The malformed calls of a gated MLP, an RMS norm and an attention's heads; `malformed` makes them.

What these cannot take they leave to the module's own forward, by the answer None: that is their refusal.
"""

from collections.abc import Callable
from random import Random

import torch
from malformed_choices import Arguments, Found, many_rows, no_memory, no_tensor, other_dtype, other_rank, resized

from sentei.kernels.linear import rows


def valid(draw: Random) -> Arguments:
    """Everything an entry here can be given, by name; `tokens` are what heads are made of."""
    width, hidden, outputs = draw.randint(1, 40), draw.randint(0, 20), draw.randint(0, 20)
    batch, count, head, groups = draw.randint(1, 2), draw.choice([1, 4, 99]), 2 * draw.randint(1, 4), draw.randint(1, 2)
    shapes = {
        "x": draw.choice([(width,), (draw.randint(1, 8), width), (2, draw.randint(1, 4), width)]),
        "gate": (hidden, width), "up": (hidden, width), "down": (outputs, hidden), "gain": (width,), "bias": (hidden,),
        "tokens": (batch, count, width), "query": (groups * draw.randint(1, 3) * head, width),
        "key": (groups * head, width), "value": (groups * draw.randint(1, 9), width),
        "cosine": (count, head), "sine": (count, head), "key_norm": (head,)}
    dtype = draw.choice([torch.float32, torch.bfloat16])
    given = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    for name in ("bias", "key_norm"):
        given[name] = draw.choice([None, given[name]])
    return given


def taken(call: Callable, *arguments: object):
    """What the call gives.

    Raises:
        ValueError: it answered None.
    """
    with torch.no_grad():
        found = call(*arguments)
    if found is None:
        raise ValueError("left to the module")
    return found


def gated(given: Arguments) -> Found:
    x, down = given["x"], given["down"]
    found = taken(rows.gated, x, (given["gate"], None), (given["up"], given["bias"]), (down, None), "silu")
    return [found], [[*x.shape[:-1], len(down)]]


def norm(given: Arguments) -> Found:
    return [taken(rows.norm, given["x"], given["gain"], 1e-6, 0.0)], [[*given["x"].shape]]


def heads(given: Arguments) -> Found:
    layers = [given[name] for name in ("query", "key", "value")]
    turn = rows.Turn(given["cosine"], given["sine"], key_norm=given["key_norm"], epsilon=1e-6)
    found = taken(rows.heads, given["tokens"], *((weight, None) for weight in layers), turn)
    (batch, count, _), (query, key, value), head = given["tokens"].shape, map(len, layers), given["cosine"].shape[-1]
    return list(found), [[batch, query // head, count, head], [batch, key // head, count, head],
                         [batch, key // head, count, value // (key // head)]]


ENTRIES: dict[Callable, tuple[str, ...]] = {  # what each reads
    gated: ("x", "gate", "up", "down", "bias"), norm: ("x", "gain"),
    heads: ("tokens", "query", "key", "value", "cosine", "sine", "key_norm"),
}
# The dimensions no other size of which is right; -1 is the last.
FIXED = {"x": (-1,), "gate": (0, 1), "up": (0, 1), "down": (1,), "gain": (0,), "bias": (0,), "tokens": (-1,),
         "query": (1,), "key": (1,), "value": (1,), "cosine": (0, 1), "sine": (0, 1), "key_norm": (0,)}


# Each damage changes one argument and says whether the call must now be refused.


def other_size(draw: Random, given: Arguments, name: str) -> bool:
    dims = given[name].dim()
    given[name], place = resized(draw, given[name])
    return place in FIXED[name] or place - dims in FIXED[name]


def other_order(draw: Random, given: Arguments, name: str) -> bool:
    """Numbers that do not lie together."""
    if given[name].layout is not torch.strided:
        raise TypeError("torch 2.13 itself divides by zero when it turns an empty mkldnn tensor")
    given[name] = given[name].t().contiguous().t()
    return not given[name].is_contiguous()


def other_layout(draw: Random, given: Arguments, name: str) -> bool:
    given[name] = draw.choice([torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])(given[name])
    return True


_WEIGHTS = ("gate", "up", "down", "query", "key", "value")
_TENSORS = (*_WEIGHTS, "x", "gain", "bias", "tokens", "cosine", "sine", "key_norm")
DAMAGES: dict[Callable, tuple[str, ...]] = {  # and to what each can be done
    other_rank: _TENSORS, other_size: _TENSORS, other_dtype: _TENSORS, no_memory: _TENSORS,
    no_tensor: tuple(name for name in _TENSORS if name not in ("bias", "key_norm")), other_order: _WEIGHTS,
    other_layout: _WEIGHTS, many_rows: ("x",),
}
