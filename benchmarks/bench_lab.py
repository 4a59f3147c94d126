"""The claims of the lecture, measured: `sentei lab all`.

    python -m benchmarks.bench_lab --out FOLDER

Every claim is one file of `sentei/lab/`, which says what is measured and how. A verdict is made of the checks alone: a
number, its 95 % interval, and the range that the claim says it lies in. Claims that were measured in FOLDER before, by
`sentei lab NAME --out FOLDER`, are not measured again: so those about time can be measured by themselves, with nothing
else running.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.publish import table, write_result
from sentei.core.progress import Silent
from sentei.lab.finding import Finding, number
from sentei.lab.folder import require_ready
from sentei.lab.records import keep, kept, measure
from sentei.lab.table import CLAIMS


def main() -> None:
    """Measures what is missing, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the findings")
    out = parser.parse_args().out
    sys.argv[1:] = ["--out", "FOLDER"]  # what a page tells of the command: no folders of a machine
    require_ready(out)
    missing = [name for name in CLAIMS if name not in kept(out)]
    for _, record, _ in measure(missing, Silent()):
        keep(record, out)
    found = kept(out)
    verdicts = table(["claim", "verdict", "number", "threads", "seconds"], [
        [f"`{name}`", finding.verdict, finding.sentence, record["environment"]["threads"], f"{record['seconds']:.0f}"]
        for name, (record, finding) in found.items()])
    print(write_result("lab", __doc__, [verdicts, *(part for name, (_, finding) in found.items()
                                                    for part in told(name, finding))]))


def told(name: str, finding: Finding) -> list[str]:
    """A claim's part of the page."""
    head = list(finding.rows[0])
    return [f"## {name}", finding.claim, f"**{finding.sentence}**",
            table(head, [[number(row[key]) for key in head] for row in finding.rows]),
            table(["check", "verdict"], [[check.words(), check.verdict] for check in finding.checks]),
            " ".join(finding.notes)]


if __name__ == "__main__":
    main()
