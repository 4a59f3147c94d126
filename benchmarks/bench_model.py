"""Is a whole model faster than in transformers: prefill and decode, exact and pruned?

Run from the repository's root: python -m benchmarks.bench_model --tokens 8000

Dense is transformers' sdpa path with its own cache, in the same threads; of the same dtype, or of the one --against
names, where another dtype is the faster one to run dense. "Exact" keeps every key and only the kernels, the cache and
the layers beside attention are ours. "Pruned" is the plan of a folder that `sentei prune` wrote (--plan). Both sides
run in turn in one process; a ratio is the median over neighbouring pairs, dense ÷ ours. A decoded token's time is the
mean over the steps of a run, at the end of the text. Quality is the dense side's perplexity ÷ ours on that text, a
window that no plan was made on, so that it holds what a change of dtype costs as well; in brackets its 95 % interval.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.connections import Config
from sentei.budget.workload import Decode, Prefill, Workload
from sentei.conversion import export
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import All, Threshold
from sentei.measurement.latency import interleave, measured
from sentei.measurement.quality import compare
from sentei.measurement.text import read_text, windows_of

DTYPES = ("float32", "bfloat16")
KINDS = {"prefill": Prefill, "decode": Decode}
EXACT = {"prefill": Config(rule=All()), "decode": Config(decode=Threshold(0.0))}


def plans(model: nn.Module, workload: Workload, folders: list[Path]) -> dict[str, Plan]:
    """The exact plan, and those of the folders that are for this workload, by what the table calls them."""
    found = {"exact": Plan.everywhere(prunable_layers(model), "connections", EXACT[workload.kind])}
    for folder in folders:
        policy = export.read_policy(folder)
        facts = policy["facts"]
        if facts["workload"] == str(workload):
            found[f"pruned to density {facts['density']:.2f}"] = Plan.from_json(policy["plan"])
    return found


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model and what its work starts from, e.g. the cache of a prompt.

    Args:
        dtype: of the model's weights.
        row: the tokens of one window.
        prefix: what `Workload.prefix` made of them with this model, dense.
    """

    model: nn.Module
    dtype: str
    workload: Workload
    row: torch.Tensor
    prefix: object

    @classmethod
    def of(cls, model: nn.Module, dtype: str, workload: Workload, row: torch.Tensor) -> "Side":
        """The side before its first run."""
        convert(model, Plan())
        return cls(model=model, dtype=dtype, workload=workload, row=row, prefix=workload.prefix(model, row))

    def losses(self, plan: Plan) -> torch.Tensor:
        """Of the tokens of the row that the workload reads."""
        convert(self.model, plan)
        return self.workload.answer(self.model, self.row, self.prefix)

    def begin(self, plan: Plan) -> Callable[[], object]:
        """The work, ready to be timed."""
        convert(self.model, plan)
        return self.workload.begin(self.model, self.row, self.prefix)


def rows(asked: argparse.Namespace) -> Iterator[dict]:
    """One row for every workload, dtype and plan."""
    checkpoint = locate(None)
    length = asked.tokens
    windows = windows_of(load_tokenizer(checkpoint), read_text(None).text, length=length,
                         needed=Prefill(length).windows)
    row = windows["verify"][0]
    for kind, dtype in product(asked.kinds, asked.dtype or DTYPES):
        ours = Side.of(load_model(checkpoint, dtype), dtype, KINDS[kind](length), row)
        other = asked.against or dtype
        dense = ours if other == dtype else Side.of(load_model(checkpoint, other), other, ours.workload, row)
        expected = dense.losses(Plan())
        for name, plan in plans(ours.model, ours.workload, asked.plan).items():
            yield _row(dense, ours, plan, f"{checkpoint.name}, {ours.workload}, {dtype}, {name}", expected, asked.runs)


def _row(dense: Side, ours: Side, plan: Plan, case: str, expected: torch.Tensor, runs: int) -> dict:
    """One measurement; `expected` are the dense side's losses."""
    quality = compare(expected[None], ours.losses(plan)[None])
    ready = {}

    def begin(which: str, side: Side, chosen: Plan) -> None:
        ready[which] = side.begin(chosen)

    timed = interleave(lambda: ready["dense"](), lambda: ready["ours"](), runs=runs,
                       before=(partial(begin, "dense", dense, Plan()), partial(begin, "ours", ours, plan)))
    made = measured("model", case, f"transformers sdpa {dense.dtype}", timed)
    each = ours.workload.timed_runs
    return {**made, "ours_s": made["ours_s"] / each, "peer_s": made["peer_s"] / each, "quality": quality.value,
            "quality_low": quality.low, "quality_high": quality.high}


def main() -> None:
    """Measures what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"which of {', '.join(KINDS)}; all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="both when none is named")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--plan", action="append", type=Path, default=[], help="a folder written by sentei prune")
    parser.add_argument("--runs", type=int, default=3, help="timed pairs a row")
    parser.add_argument("--against", choices=DTYPES, help="the dtype of the dense side; the same when it is not given")
    asked = parser.parse_args()
    lines = []
    for row in rows(asked):
        print(json.dumps(row), flush=True)
        lines.append([row["case"], row["peer"], f"{1000 * row['ours_s']:,.1f}", f"{1000 * row['peer_s']:,.1f}",
                      f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})",
                      f"{row['quality']:.4f} ({row['quality_low']:.4f} to {row['quality_high']:.4f})"])
    head = ["case", "dense side", "ours ms", "dense ms", "dense ÷ ours", "quality"]
    against = ["against", asked.against] if asked.against else []
    name = "-".join(["model", *asked.kinds, str(asked.tokens), *(asked.dtype or []), *against])
    write_result(name, __doc__, [table(head, lines)])


if __name__ == "__main__":
    main()
