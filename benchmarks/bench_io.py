"""Do the bytes that attention moves explain its seconds? The model of FlashAttention beside the clock.

Run from the repository's root: python -m benchmarks.bench_io

Causal forward, fp32. Predicted are the bytes past each cache of one core, by sentei/measurement/io_model.py, and from
those past the last one the time at the speed of a copy measured here; next to it the median time of standard attention
(softmax(QKᵀ)V in plain torch, every matrix whole), of torch's sdpa and of our kernel, timed in turn. A predicted time
far below the measured one says that arithmetic, not memory, is the limit.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.publish import table, write_result
from sentei.benches.attention import BLOCK, Case, agree, sdpa
from sentei.measurement.io_model import Attention, cache_sizes

TOKENS = (512, 1024, 2048, 4096, 8192)
SHAPES = ((1, 1), (9, 3))
WIDTH = 64


def standard(case: Case) -> torch.Tensor:
    """softmax(QKᵀ)V, one whole matrix after another."""
    query, key, value = (tensor.transpose(1, 2) for tensor in case.tensors)
    key, value = (tensor.repeat_interleave(case.heads // case.groups, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * case.width**-0.5
    future = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)
    return (scores.masked_fill_(future, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def seconds(calls: list[Callable[[], object]], runs: int) -> list[float]:
    """The median of each, timed in turn after one untimed round."""
    found = [[] for _ in calls]
    for number in range(runs + 1):
        for call, times in zip(calls, found, strict=True):
            start = time.perf_counter()
            call()
            times.extend([time.perf_counter() - start] if number else [])
    return [statistics.median(times) for times in found]


def copy_speed() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)], 5)[0]


@torch.no_grad()
def main() -> None:
    """Predicts and measures every length and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each")
    arguments = parser.parse_args()
    caches, speed = cache_sizes(), copy_speed()
    lines = []
    for heads, groups in SHAPES:
        for tokens in TOKENS:
            case, model = Case(heads, groups, WIDTH, tokens), Attention(tokens=tokens, width=WIDTH, query_block=BLOCK)
            agree(case.ours(), standard(case), case.dtype)
            clock = seconds([lambda case=case: standard(case), lambda case=case: sdpa(case), case.ours], arguments.runs)
            moved = [(heads * model.standard(size), heads * model.tiled(size)) for size in caches.values()]
            last = moved[-1] if moved else (heads * model.standard(0), heads * model.tiled(0))
            lines.append([f"{heads}/{groups} x {WIDTH}, {tokens:,}", *(f"{a / 2**20:,.1f} / {b / 2**20:,.1f}"
                          for a, b in moved), *(f"{1000 * bytes / speed:,.2f}" for bytes in last),
                          *(f"{1000 * found:,.1f}" for found in clock)])
            print(" | ".join(lines[-1]), flush=True)
    head = ["heads, tokens", *(f"MiB past {name} ({size >> 10:,} KiB), standard / tiled"
                               for name, size in caches.items()),
            "predicted ms, standard", "tiled", "measured ms, standard", "torch sdpa", "ours"]
    write_result("io", __doc__, [f"Copy speed {speed / 1e9:.1f} GB/s. Caches: {caches or 'unknown'}.",
                                 table(head, lines)])


if __name__ == "__main__":
    main()
