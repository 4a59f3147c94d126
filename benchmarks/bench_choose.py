"""What does choosing cost, beside the attention it saves? The estimates and the choice, natively and in plain torch.

Run from the repository's root: python -m benchmarks.bench_choose

One layer's queries and keys, unit normals with a part that a block of keys shares, so that blocks differ. A share is
the median over neighbouring pairs of the time ÷ that of exact attention by our own kernel (every tile kept); both run
in turn. "In torch" is the definition that every native estimate is compared with in the tests; "choice" is the rule,
what it may not drop, and the list of tiles for the kernel.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.publish import table, write_result
from sentei.axes.connections import Config, Connections
from sentei.core.rules import Mass, Rule, Threshold, TopK
from sentei.kernels.attention import Grid, Tiles, attend, select
from sentei.kernels.attention.select import Antidiagonal, PageBounds, Pooled, Sampled, Trailing
from sentei.measurement.latency import interleave

HEADS, GROUPS, WIDTH = 9, 3, 64
ESTIMATORS = (Sampled(8), Sampled(12), Sampled(16), Antidiagonal(8), Antidiagonal(16), Pooled(), PageBounds(),
              Trailing(15))
RULES = (Threshold(tuple(0.1 + 0.02 * head for head in range(HEADS))), Mass(0.9), TopK(16))


def tensors(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [1, T, H, D], key and value [1, T, G, D]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, shared = (torch.randn(1, length, heads, WIDTH, generator=generator) for length, heads in (
        (tokens, HEADS), (tokens, GROUPS), (tokens, GROUPS), (-(-tokens // 64), GROUPS)))
    return tuple(part.to(dtype) for part in (1.5 * query, key + shared.repeat_interleave(64, 1)[:, :tokens], value))


def steps(query: torch.Tensor, key: torch.Tensor, grid: Grid) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """What is timed: the step, how it is done, and the call."""
    scale = WIDTH ** -0.5
    for estimator in ESTIMATORS:
        name, arguments = f"estimate, {estimator}", (estimator, query, key, grid, scale)
        yield name, "natively", partial(select.estimate, *arguments, pool="rms")
        if not estimator.history:
            yield name, "in torch", partial(select._estimate, *arguments, "rms")
    scores = select.estimate(Sampled(8), query, key, grid, scale, pool="rms")

    def forced() -> torch.Tensor:
        return select.always_kept(grid, query.device, window=128)

    def natively(rule: Rule) -> Tiles:
        return select.choose(rule, scores, forced(), grid)

    def in_torch(rule: Rule) -> Tiles:
        return Tiles.from_selection(rule(scores, forced=forced()), grid)

    for rule in RULES:
        yield f"choice, {type(rule).__name__}", "natively", partial(natively, rule)
        yield f"choice, {type(rule).__name__}", "in torch", partial(in_torch, rule)


@torch.no_grad()
def rows(tokens: int, runs: int, dtype: torch.dtype = torch.float32) -> Iterator[list[str]]:
    """One line a step and a way."""
    query, key, value = tensors(tokens, dtype)
    grid = Connections(Config()).grid(query, key, None)

    def dense() -> torch.Tensor:
        return attend(query, key, value, Tiles(grid=grid), impl="fused_cpp")

    for step, way, call in steps(query, key, grid):
        timed = interleave(dense, call, runs=runs)
        dense_s, step_s = timed.seconds()
        shares = [100 / ratio for ratio in timed.ratios()]
        print(json.dumps({"dtype": str(dtype), "step": step, "way": way, "ms": 1000 * step_s,
                          "dense_ms": 1000 * dense_s, "percent": statistics.median(shares)}), flush=True)
        yield [step, way, f"{1000 * step_s:,.1f}", f"{1000 * dense_s:,.0f}",
               f"**{statistics.median(shares):.1f} %** ({min(shares):.1f} to {max(shares):.1f})"]


def main() -> None:
    """Measures one length and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000, help="of the prompt")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs a row")
    arguments = parser.parse_args()
    head = ["step", "how", "ms", "exact attention, ms", "share of it"]
    parts = [f"{HEADS}/{GROUPS} heads × {WIDTH}, {arguments.tokens:,} tokens, tiles of 64 × 64."]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        parts += [f"## {name}", table(head, list(rows(arguments.tokens, arguments.runs, dtype)))]
    write_result("choose", __doc__, parts)


if __name__ == "__main__":
    main()
