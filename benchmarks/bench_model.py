"""Is a whole model faster than in transformers: prefill and decode, exact and pruned?

Run from the repository's root: python -m benchmarks.bench_model --tokens 8000

Dense is transformers' sdpa path with its own cache, in the same dtype and threads. "Exact" keeps every key and only the
kernels, the cache and the few-row layers are ours. "Pruned" is the plan of a folder that `sentei prune` wrote (--plan),
whose quality its receipt tells. Both sides run in turn in one process; a ratio is the median over neighbouring pairs,
dense ÷ ours. A decoded token's time is the mean over the steps of a run, at the end of the text.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.publish import table, write_result
from sentei.axes.connections import Config
from sentei.budget.workload import Decode, Prefill, Workload
from sentei.conversion import export
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate
from sentei.conversion.plan import Plan, convert, prunable_layers
from sentei.core.rules import All, Threshold
from sentei.measurement.latency import interleave
from sentei.measurement.outcome import environment
from sentei.measurement.text import read_text, windows_of

KINDS = {"prefill": Prefill, "decode": Decode}
EXACT = {"prefill": Config(rule=All()), "decode": Config(decode=Threshold(0.0))}


def plans(model: nn.Module, workload: Workload, folders: list[Path]) -> dict[str, Plan]:
    """The exact plan, and those of the folders that are for this workload, by what the table calls them."""
    found = {"exact": Plan.everywhere(prunable_layers(model), "connections", EXACT[workload.kind])}
    for folder in folders:
        policy = export.read_policy(folder)
        facts = policy["facts"]
        if facts["workload"] == str(workload):
            name = f"pruned, quality {facts['quality']:.4f}, density {facts['density']:.2f}"
            found[name] = Plan.from_json(policy["plan"])
    return found


def rows(kinds: list[str], dtypes: list[str], tokens: int, folders: list[Path], runs: int) -> Iterator[dict]:
    """One row for every workload, dtype and plan."""
    checkpoint, machine = locate(None), environment()["processor"]
    tokenizer = load_tokenizer(checkpoint)
    row = windows_of(tokenizer, read_text(None).text, length=tokens, needed={"row": 1})["row"][0]
    for dtype in dtypes:
        model = load_model(checkpoint, dtype)
        for workload in (KINDS[kind](tokens) for kind in kinds):
            prefix = workload.prefix(model, row)
            for name, plan in plans(model, workload, folders).items():
                work = {}

                def begin(which: Plan, work=work, workload=workload, prefix=prefix, model=model) -> None:
                    convert(model, which)
                    work["run"] = workload.begin(model, row, prefix)

                timed = interleave(lambda work=work: work["run"](), lambda work=work: work["run"](), runs=runs,
                                   before=(partial(begin, Plan()), partial(begin, plan)))
                dense, ours = (seconds / workload.timed_runs for seconds in timed.seconds())
                ratios = timed.ratios()
                convert(model, Plan())
                yield {"bench": "model", "case": f"{checkpoint.name}, {workload}, {dtype}, {name}",
                       "peer": "transformers sdpa", "ours_s": ours, "peer_s": dense,
                       "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "machine": machine}


def main() -> None:
    """Measures what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"which of {', '.join(KINDS)}; all")
    parser.add_argument("--dtype", action="append", help="float32 or bfloat16; both when none is named")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--plan", action="append", type=Path, default=[], help="a folder written by sentei prune")
    parser.add_argument("--runs", type=int, default=3, help="timed pairs a row")
    asked = parser.parse_args()
    lines = []
    for row in rows(asked.kinds, asked.dtype or ["float32", "bfloat16"], asked.tokens, asked.plan, asked.runs):
        print(json.dumps(row), flush=True)
        lines.append([row["case"], f"{1000 * row['ours_s']:,.1f}", f"{1000 * row['peer_s']:,.1f}",
                      f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})"])
    write_result(f"model-{asked.tokens}", __doc__, [table(["case", "ours ms", "transformers ms", "transformers ÷ ours"],
                                                          lines)])


if __name__ == "__main__":
    main()
