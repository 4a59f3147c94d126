"""The malformed calls of a decoder layer; `malformed` makes them.

A call it cannot take is left to the layer, by the answer None: that is its refusal. One that it takes must give what
the smaller calls give, to the bit, and leave the cache as they do; what it refuses by RuleError they must refuse too.
"""

from collections.abc import Callable
from random import Random

import torch
from layer_steps import decoder_layer, in_steps
from malformed_choices import (
    LARGE,
    Arguments,
    Found,
    no_memory,
    no_tensor,
    other_dtype,
    other_rank,
    other_scale,
    other_strides,
    resized,
)
from malformed_rows import other_layout, other_order, taken

from sentei.core.errors import RuleError
from sentei.core.rules import MAX_K, All, Capacity, Certified, Mass, Threshold, TopK
from sentei.kernels.block import After, Before, Buffers, Norm, PageChoice
from sentei.kernels.linear.layers import Turn
from sentei.kernels.paging import PAGE, bounds_of


def valid(draw: Random) -> Arguments:
    """A layer, its rows and its cache that fit, by name; NaN stands in the cache behind its tokens."""
    batch, tokens = draw.choice([(1, 1), (1, 5), (1, 8), (2, 1), (2, 3), (8, 1)])
    width, hidden, groups = draw.choice([draw.randint(1, 40), 130]), draw.randint(1, 20), draw.randint(1, 3)
    heads, head, value_head = groups * draw.randint(1, 5), 2 * draw.randint(1, 9), draw.randint(1, 18)
    turns, length = draw.choice([tokens, batch * tokens]), draw.choice([0, 15, 60, 130, 1100])
    room = (-(-(length + tokens) // PAGE) + draw.randint(0, 2)) * PAGE
    shapes = {
        "x": (batch, tokens, width), "norm": (width,), "query": (heads * head, width), "key": (groups * head, width),
        "value": (groups * value_head, width), "cosine": (turns, head), "sine": (turns, head), "query_norm": (head,),
        "key_norm": (head,), "joint": (width, heads * value_head), "second": (width,), "gate": (hidden, width),
        "up": (hidden, width), "down": (width, hidden)}
    dtype, kept = (draw.choice([torch.float32, torch.bfloat16]) for _ in range(2))
    given = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    given |= {f"{name}_bias": torch.randn(len(given[name]), dtype=dtype) for name in LAYERS}
    given |= {name: None for name in OPTIONAL if draw.random() < 0.5}
    keys, values = (torch.full((batch, groups, room, size), torch.nan, dtype=kept) for size in (head, value_head))
    for states in (keys, values):
        states[:, :, :length] = torch.randn(batch, groups, length, states.shape[3])
    bounds = torch.full((batch, groups, room // PAGE, 2, head), torch.nan, dtype=kept)
    bounds[:, :, :length // PAGE] = bounds_of(keys[:, :, :length])
    return given | {
        "keys": keys, "values": values, "bounds": bounds, "length": length, "scale": 0.3,
        "rule": draw.choice([All(), TopK(draw.randint(0, 9)), Mass(0.6), Threshold(0.1)]),
        "window": draw.choice([0, 1, 40]), "activation": draw.choice(["silu", "gelu_tanh"]),
        "lengths": None if draw.random() < 0.6 else torch.tensor([[draw.randint(0, 20), length + tokens]] * batch),
        "numbers": [1e-6, 0.0, 1e-5, 1.0, 1e-6, 0.5]}


def arguments(given: Arguments) -> tuple:
    """Those of `decoder_layer`."""
    query, key, value, joint, gate, up, down = ((given[name], given[f"{name}_bias"]) for name in LAYERS)
    turn = Turn(*(given[name] for name in ("cosine", "sine", "query_norm", "key_norm")), *given["numbers"][2:4])
    return (given["x"], Before(Norm(given["norm"], *given["numbers"][:2]), query, key, value, turn),
            Buffers(*(given[name] for name in CACHE), given["length"]),
            PageChoice(*(given[name] for name in ("rule", "window", "scale", "lengths"))),
            After(joint, Norm(given["second"], *given["numbers"][4:]), gate, up, down, given["activation"]))


@torch.no_grad()
def layer(given: Arguments) -> Found:
    """The output, and a number for whatever differs from the smaller calls; there may be none."""
    x, before, buffers, choice, after = arguments(given)
    copy = Buffers(*(part.clone() if isinstance(part, torch.Tensor) else part for part in buffers))
    try:
        output = taken(decoder_layer, x, before, buffers, choice, after)
    except RuleError:
        if isinstance(steps(x, before, copy, choice, after), RuleError):
            raise
        return [torch.ones(1)], [[0]]
    answer = steps(x, before, copy, choice, after)
    if isinstance(answer, Exception):
        return [output, torch.ones(1)], [[*x.shape], [0]]
    pairs = (output, answer[0]), *zip(buffers[:3], answer[1][:3], strict=True)
    differing = torch.cat([one[(one != other) & ~(one.isnan() & other.isnan())].float() for one, other in pairs])
    return [output, differing], [[*x.shape], [0]]


def steps(*given: object) -> tuple[torch.Tensor, Buffers] | Exception:
    """What the smaller calls give, or what they raise."""
    try:
        return in_steps(*given)
    except Exception as error:  # any differs from an answer
        return error


LAYERS = ("query", "key", "value", "joint", "gate", "up", "down")
CACHE = ("keys", "values", "bounds")
OPTIONAL = (*(f"{name}_bias" for name in LAYERS), "query_norm", "key_norm")
NEEDED = ("x", "norm", "second", "cosine", "sine", *LAYERS, *CACHE)
ENTRIES: dict[Callable, tuple[str, ...]] = {  # what it reads
    layer: (*NEEDED, *OPTIONAL, "length", "scale", "rule", "window", "activation", "lengths", "numbers")}

# Each damage changes one argument and says whether the call must now be refused.


def other_size(draw: Random, given: Arguments, name: str) -> bool:
    """Wrong but for the tokens of x, whose turns may then be those of all rows."""
    given[name], place = resized(draw, given[name])
    return (name, place) != ("x", 1)


def other_precision(draw: Random, given: Arguments, name: str) -> bool:
    """The other dtype, alone among its neighbours."""
    given[name] = given[name].to(torch.bfloat16 if given[name].dtype is torch.float32 else torch.float32)
    return True


def more_than_memory(draw: Random, given: Arguments, name: str) -> bool:
    """A tensor of a class of its own."""
    given[name] = given[name].as_subclass(type("Watched", (torch.Tensor,), {}))
    return True


def swapped(draw: Random, given: Arguments, name: str) -> bool:
    """Two tensors in each other's place; they may fit there."""
    other = draw.choice([*NEEDED, *OPTIONAL])
    given[name], given[other] = given[other], given[name]
    return False


def poisoned(draw: Random, given: Arguments, name: str) -> bool:
    """A number that is none, or too large, anywhere."""
    given[name] = given[name].clone()
    given[name].view(-1)[draw.randrange(given[name].numel())] = draw.choice(
        [torch.nan, torch.inf, -torch.inf, 1e30, -3e38])
    return False


def no_heads(draw: Random, given: Arguments, name: str) -> bool:
    """Queries of no head at all, and what fits them."""
    given["query"], given["joint"], given["query_bias"] = given["query"][:0], given["joint"][:, :0], None
    return True


def other_length(draw: Random, given: Arguments, name: str) -> bool:
    """More tokens than there is room for; fewer than stand there are no error."""
    room, length, tokens = given["keys"].shape[2], given["length"], given["x"].shape[1]
    given["length"] = draw.choice([-1, -2**63, room - tokens + 1, room, *LARGE, 2**64, 0.5, length // 2, length // 3])
    return type(given["length"]) is float or not 0 <= given["length"] <= length


def other_window(draw: Random, given: Arguments, name: str) -> bool:
    """A window wider than the cache is no error."""
    given["window"] = draw.choice([-1, -2**63, *LARGE, 2**64])
    return given["window"] < 0


def other_rule(draw: Random, given: Arguments, name: str) -> bool:
    given["rule"] = draw.choice([None, "topk", TopK, Threshold((0.1, 0.2)), Mass((0.5,)), Certified(0.1), Capacity(1)])
    return True


def edge_of_a_rule(draw: Random, given: Arguments, name: str) -> bool:
    given["rule"] = draw.choice([TopK(0), TopK(MAX_K), Mass(0.0), Mass(1.0), Threshold(0.0), Threshold(1.0)])
    return False


def other_lengths(draw: Random, given: Arguments, name: str) -> bool:
    """Lengths out of range are clipped, which is no error; those of another shape or dtype are."""
    batch = len(given["x"])
    good = torch.tensor([[draw.choice([-5, 0, 3, -2**63, 2**63 - 1]) for _ in range(2)] for _ in range(batch)])
    wrong = [good[:, :1], good.float(), good[0], good.new_zeros(batch + 1, 2), good.to("meta"), good.int(),
             good.repeat(1, 2)[:, ::2] if batch > 1 else good.new_zeros(0), "all"]
    given["lengths"] = draw.choice([good, draw.choice(wrong)])
    return given["lengths"] is not good


def other_numbers(draw: Random, given: Arguments, name: str) -> bool:
    """ε and shifts are any; they must be numbers."""
    numbers, place = [*given["numbers"]], draw.randrange(6)
    numbers[place] = draw.choice([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1e300, "1", None])
    given["numbers"] = numbers
    return not isinstance(numbers[place], float)


def other_activation(draw: Random, given: Arguments, name: str) -> bool:
    given["activation"] = draw.choice(["relu", "", None, 3, ["silu"]])
    return True


_TENSORS = (*NEEDED, *OPTIONAL)
DAMAGES: dict[Callable, tuple[str, ...]] = {  # and to what each can be done
    other_rank: _TENSORS, other_size: _TENSORS, other_dtype: _TENSORS, other_precision: _TENSORS, no_memory: _TENSORS,
    more_than_memory: _TENSORS, no_tensor: NEEDED, swapped: _TENSORS, poisoned: _TENSORS, other_order: LAYERS,
    other_layout: ("x", *LAYERS), other_strides: ("keys", "values"), no_heads: ("query",), other_length: ("length",),
    other_window: ("window",), other_rule: ("rule",), edge_of_a_rule: ("rule",), other_lengths: ("lengths",),
    other_scale: ("scale",), other_numbers: ("numbers",), other_activation: ("activation",),
}
