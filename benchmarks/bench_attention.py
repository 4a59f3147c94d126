"""Is the native attention faster than what a user could pick instead? Exact, block-sparse, and with the backward.

Run from the repository's root: python -m benchmarks.bench_attention

The cases, the peers and how a ratio is taken are those of `sentei bench attention`, which measures the same on any
machine: sentei/measurement/attention_bench.py.
"""

import argparse
import json
import sys
from functools import partial

from benchmarks.publish import table, write_result
from sentei.measurement import attention_bench
from sentei.measurement.benches import rows


def main() -> None:
    """Measures the cases asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"which of {', '.join(attention_bench.CASES)}; all")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs a row")
    arguments = parser.parse_args()
    lines = []
    for row in rows("attention", arguments.cases, arguments.runs, partial(print, file=sys.stderr)):
        print(json.dumps(row), flush=True)
        lines.append([row["case"], row["peer"], f"{1000 * row['ours_s']:,.1f}", f"{1000 * row['peer_s']:,.1f}",
                      f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f})", f"{row['gflops']:.0f}"])
    head = ["case", "peer", "ours ms", "peer ms", "peer ÷ ours", "our forward GFLOP/s"]
    rest = attention_bench.__doc__.partition("\n\n")[2]
    write_result("attention", f"{__doc__}\n{rest}", [table(head, lines)])


if __name__ == "__main__":
    main()
