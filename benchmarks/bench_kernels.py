"""Writes the table of a bench of `sentei bench` as a page of results.

Run from the repository's root: python -m benchmarks.bench_kernels attention sparse --runs 9
"""

import argparse
import importlib
import json
import sys
from functools import partial

from benchmarks.publish import table, write_result
from sentei.benches import table as benches


def main() -> None:
    """Measures the cases asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=benches.BENCHES)
    parser.add_argument("cases", nargs="*", help="of the bench; all when none is named")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs a row")
    asked = parser.parse_args()
    lines = []
    for row in benches.rows(asked.bench, asked.cases, asked.runs, partial(print, file=sys.stderr)):
        print(json.dumps(row), flush=True)
        *first, ratio, extent = benches.cells(row)
        lines.append([*first, f"**{ratio}** ({extent})", benches.more(row)])
    about = importlib.import_module(f"sentei.benches.{asked.bench}").__doc__
    write_result("-".join([asked.bench, *asked.cases]), about,
                 [table(["case", "peer", "ours ms", "peer ms", "peer ÷ ours", "besides"], lines)])


if __name__ == "__main__":
    main()
