"""Malformed calls of every native entry, one for each number; a process of its own, because a crash ends it.

python tests/malformed.py FIRST COUNT prints each number before its call and what came of it after: the kind of
error, or "fits" for a call that was not damaged after all, or whose damage means nothing, with a right-shaped result.
The exit code is 1 when a damaged call was accepted or a result had another shape; what a crash leaves is its last line.
"""

import faulthandler
import sys
from collections.abc import Callable
from random import Random

import malformed_block
import malformed_choices
import malformed_rows
import torch
from malformed_choices import (
    LARGE,
    Arguments,
    no_memory,
    no_tensor,
    other_dtype,
    other_lengths,
    other_rank,
    other_scale,
    other_strides,
    resized,
)

from sentei.kernels.attention import Grid, Tiles, attend, fused_cpp

PLAN = ("full_count", "full_ids", "partial_count", "partial_ids")


def valid(draw: Random) -> Arguments:
    """Small tensors, a grid and a plan that fit: everything an entry can be given, by name."""
    batch, groups, width, value_width = draw.randint(1, 3), draw.randint(1, 3), draw.randint(0, 9), draw.randint(0, 9)
    queries, keys = (draw.choice([0, 1, 5, 12, 40]) for _ in range(2))
    heads = groups * draw.randint(1, 3)
    lengths = None if draw.random() < 0.6 else torch.tensor([sorted(draw.choices(range(keys + 1), k=2))
                                                             for _ in range(batch)])
    grid = Grid(num_queries=queries, num_keys=keys, query_block=draw.choice([1, 3, 8, 16]), lengths=lengths,
                key_block=draw.choice([1, 3, 16]),
                **draw.choice([{"causal": False}, {}, {"window": draw.randint(1, 50)}]))
    keep = torch.rand(batch, draw.choice([heads, groups]), grid.num_query_blocks, grid.num_key_blocks) < 0.7
    tiles = Tiles.from_mask(keep, grid)
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    query, key, value, softmax, gradient, delta = (torch.randn(shape, dtype=kind) for shape, kind in (
        ((batch, queries, heads, width), dtype), ((batch, keys, groups, width), dtype),
        ((batch, keys, groups, value_width), dtype), ((2, batch, queries, heads), torch.float32),
        ((batch, queries, heads, value_width), dtype), ((batch, queries, heads), torch.float32)))
    return {"query": query, "key": key, "value": value, "softmax": softmax, "gradient": gradient, "delta": delta,
            "lengths": lengths, "sizes": [grid.query_block, grid.key_block, int(grid.causal), grid.window or 0],
            "rows": [0, draw.randrange(grid.query_block), draw.randint(1, 4)], "scale": 0.3,
            "softcap": draw.choice([0.0, 0.0, 2.0]), "cut": draw.choice([0.5, 8.0]),
            **{name: getattr(tiles, name) for name in PLAN}}


def grid_of(given: Arguments) -> Grid:
    """The grid a careful caller would build; raises where there is none."""
    query_block, key_block, causal, window = given["sizes"]
    return Grid(num_queries=given["query"].shape[1], num_keys=given["key"].shape[1], query_block=query_block,
                key_block=key_block, causal=bool(causal), window=window or None, lengths=given["lengths"])


def public(given: Arguments) -> tuple[list[torch.Tensor], list[list[int]]]:
    tiles = Tiles(grid=grid_of(given), **{name: given[name] for name in PLAN})
    query, key, value = given["query"], given["key"], given["value"]
    found = attend(query, key, value, tiles, scale=given["scale"], softcap=given["softcap"],
                   impl="fused_cpp", return_lse=True)
    return list(found), [[*query.shape[:3], value.shape[3]], [*query.shape[:3]]]


def public_estimate(given: Arguments) -> tuple[list[torch.Tensor], list[list[int]]]:
    rows = "exact", *given["rows"][1:]
    found = fused_cpp.estimate(given["query"], given["key"], grid_of(given), scale=given["scale"], rows=rows,
                               square=True)
    return [found], [estimate_shape(given)]


def estimate_shape(given: Arguments) -> list[int]:
    grid = grid_of(given)
    return [len(given["query"]), given["query"].shape[2], grid.num_query_blocks, grid.num_key_blocks]


def raw(given: Arguments) -> tuple[list[torch.Tensor], list[list[int]]]:
    query, value = given["query"], given["value"]
    found = torch.ops.sentei.attend(query, given["key"], value, [given[name] for name in PLAN], given["lengths"],
                                    given["sizes"], given["scale"], given["softcap"])
    rows = [*query.shape[:3]]
    return list(found), [[*rows, value.shape[3]], rows, [2, *rows]]


def raw_rows(given: Arguments) -> tuple[list[torch.Tensor], list[list[int]]]:
    query, value = given["query"], given["value"]
    found = torch.ops.sentei.attend_rows(query, given["key"], value, given["lengths"], [16, 16, 1, 0], given["scale"])
    return [found], [[*query.shape[:3], value.shape[3]]]


def raw_certify(given: Arguments) -> tuple[list[torch.Tensor], list[list[int]]]:
    query, value = given["query"], given["value"]
    found = torch.ops.sentei.certify(query, given["key"], value, given["lengths"], given["sizes"], given["scale"],
                                     given["cut"])
    return list(found), [[*query.shape[:3], value.shape[3]], estimate_shape(given)]


def raw_backward(given: Arguments) -> tuple[list[torch.Tensor], list[list[int]]]:
    tensors = [given[name] for name in ("query", "key", "value", "softmax", "gradient", "delta")]
    found = torch.ops.sentei.attend_backward(tensors, [given[name] for name in PLAN], given["lengths"], given["sizes"],
                                             given["scale"], given["softcap"])
    return list(found), [[*tensor.shape] for tensor in tensors[:3]]


def raw_estimate(given: Arguments) -> tuple[list[torch.Tensor], list[list[int]]]:
    found = torch.ops.sentei.estimate(given["query"], given["key"], given["lengths"], given["sizes"], given["rows"],
                                      False, given["scale"])
    return [found], [estimate_shape(given)]


SHARED, OWN = ("query", "key", "lengths", "sizes", "scale"), ("softmax", "gradient", "delta")
ENTRIES: dict[Callable, tuple[str, ...]] = {  # what each reads
    public: (*SHARED, "value", "softcap", *PLAN), public_estimate: (*SHARED, "rows"),
    raw: (*SHARED, "value", "softcap", *PLAN), raw_backward: (*SHARED, "value", "softcap", *PLAN, *OWN),
    raw_estimate: (*SHARED, "rows"), raw_certify: (*SHARED, "value", "cut"),
    raw_rows: ("query", "key", "lengths", "scale", "value"),
}

# Each damage changes one argument and says whether the call must now be refused.


def other_size(draw: Random, given: Arguments, name: str) -> bool:
    """Not always wrong: any value width will do."""
    given[name], place = resized(draw, given[name])
    return name == "key" and place == 3 or name in OWN


def plan_dtype(draw: Random, given: Arguments, name: str) -> bool:
    given[name] = given[name].to(draw.choice([torch.int64, torch.float32, torch.int16, torch.bool]))
    return True


def other_ids(draw: Random, given: Arguments, name: str) -> bool:
    """An id that is out of range, named twice, out of order, or a hole before the last one."""
    ids, count = given[name].clone(), given[name.replace("ids", "count")]
    used = torch.nonzero(torch.arange(ids.shape[-1]) < count[..., None]).tolist()
    if not used:
        return False
    place = tuple(draw.choice(used))
    blocks = -(-given["key"].shape[1] // given["sizes"][1])
    before = ids[place[:-1]][place[-1] - 1].item() if place[-1] else blocks
    ids[place] = draw.choice([-1, -2, -2**31, blocks, blocks + 1, 2**31 - 1, before])
    given[name] = ids
    return is_read(given)


def other_counts(draw: Random, given: Arguments, name: str) -> bool:
    counts = given[name].clone()
    if not counts.numel():
        return False
    place = tuple(draw.randrange(size) for size in counts.shape)
    right = counts[place].item()
    counts[place] = draw.choice([right + 1, right + 1000, 2**31 - 1, -1, -2**31] + [right - 1] * (right > 0))
    given[name] = counts
    return is_read(given)


def is_read(given: Arguments) -> bool:
    """Whether there is anything to compute; else nobody looks into the lists."""
    return all(given[name].numel() for name in ("query", "key", "value"))


def swapped_plan(draw: Random, given: Arguments, name: str) -> bool:
    """Full tiles are said to be partial and partial ones full; which they are is worked out, so that is no error."""
    for one in ("count", "ids"):
        given[f"full_{one}"], given[f"partial_{one}"] = given[f"partial_{one}"], given[f"full_{one}"]
    return False


def plan_of_another_grid(draw: Random, given: Arguments, name: str) -> bool:
    query_block, key_block, causal, window = given["sizes"]
    given["sizes"] = draw.choice([[query_block + 1, key_block, causal, window],
                                  [query_block, key_block + 5, causal, window],
                                  [query_block, key_block, 1 - causal, 0]])
    return False


def other_sizes(draw: Random, given: Arguments, name: str) -> bool:
    sizes, place = [*given["sizes"]], draw.choice([0, 1, 3])
    sizes[place] = draw.choice([-1, -2**63, *LARGE[1:]] + [0, 4097, LARGE[0]] * (place != 3))
    given["sizes"] = draw.choice([sizes, sizes, sizes[:2], [], [*given["sizes"], 1]])
    return True


def other_rows(draw: Random, given: Arguments, name: str) -> bool:
    kind, first, stride = given["rows"]
    given["rows"] = draw.choice([[kind, -1, stride], [kind, given["sizes"][0], stride], [kind, first, 0],
                                 [kind, first, -3], [kind, draw.choice(LARGE), stride], [kind, -2**63, stride],
                                 [kind, first, draw.choice(LARGE)], [3, first, 4097]])
    return True


def other_cap(draw: Random, given: Arguments, name: str) -> bool:
    given[name] = draw.choice([float("nan"), float("inf"), -1.0, -float("inf"), "2"])
    return True


TENSORS = ("query", "key", "value", *OWN)
DAMAGES: dict[Callable, tuple[str, ...]] = {  # and to what each can be done
    other_rank: TENSORS + PLAN, other_size: TENSORS + PLAN, other_dtype: TENSORS, no_memory: TENSORS + PLAN,
    plan_dtype: PLAN, other_ids: ("full_ids", "partial_ids"), other_counts: ("full_count", "partial_count"),
    swapped_plan: ("full_ids",), plan_of_another_grid: ("sizes",), other_sizes: ("sizes",), other_rows: ("rows",),
    other_lengths: ("lengths",), other_scale: ("scale",), other_strides: ("query", "key", "value", "gradient"),
    no_tensor: TENSORS + PLAN, other_cap: ("softcap", "cut"),
}
FAMILIES = ((valid, ENTRIES, DAMAGES), (malformed_choices.valid, malformed_choices.ENTRIES, malformed_choices.DAMAGES),
            (malformed_rows.valid, malformed_rows.ENTRIES, malformed_rows.DAMAGES),
            (malformed_block.valid, malformed_block.ENTRIES, malformed_block.DAMAGES))


def drawn(number: int) -> tuple[Callable, Arguments, list[str], bool]:
    """The call of this number: its entry and arguments, what was done to them, and whether it must be refused."""
    draw = Random(number)
    torch.manual_seed(number)
    valid_for, entries, damages = FAMILIES[number % len(FAMILIES)]
    entry = draw.choice(list(entries))
    given, done, wrong = valid_for(draw), [], False
    choices = {damage: [name for name in names if name in entries[entry]] for damage, names in damages.items()}
    for damage in draw.sample([damage for damage in choices if choices[damage]], k=draw.choice([1, 1, 1, 2, 3])):
        name = draw.choice(choices[damage])
        try:
            wrong |= damage(draw, given, name)
        except (AttributeError, RuntimeError, IndexError, TypeError, ValueError, ArithmeticError):
            continue  # an argument that was damaged before cannot always be damaged again
        done.append(f"{damage.__name__} {name}")
    return entry, given, done, wrong and len(done) == 1


def outcome(number: int) -> tuple[str, bool]:
    """What came of the call, and whether that is right."""
    entry, given, done, wrong = drawn(number)
    told = f"{entry.__name__}: {', '.join(done)}"
    try:
        found, shapes = entry(given)
    except Exception as error:  # any will do but a crash; those of the interpreter pass through
        return f"{type(error).__name__} for {told}", True
    if wrong:
        return f"accepted {told}", False
    good = [[*tensor.shape] for tensor in found] == shapes
    return f"{'fits' if good else f'shapes {[[*tensor.shape] for tensor in found]}'} for {told}", good


def main(first: int, count: int) -> int:
    """Makes the calls and returns the exit code."""
    faulthandler.enable()
    torch.set_num_threads(2)
    wrong = 0
    for number in range(first, first + count):
        print(number, end=" ", flush=True)
        told, right = outcome(number)
        wrong += not right
        print(told if right else f"WRONG {told}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
