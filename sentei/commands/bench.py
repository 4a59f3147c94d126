"""`sentei bench`: what the kernels are worth on this machine."""

import argparse
import sys

from sentei.benches import table as benches
from sentei.commands.verb import Say, Verb, json_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei bench`."""
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(benches.BENCHES)}")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="some of its cases; an unknown one is answered with "
                        "their names (default: all; for attention those of topk, linear, decode and memory too)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed pairs a row (default: %(default)s)")
    json_argument(parser, "a row")


def work(options: argparse.Namespace, say: Say) -> bool:
    """Measures this machine, and says each row at once."""
    def absent(reason: str) -> None:
        print(f"sentei: {reason}", file=sys.stderr)

    head = benches.head() + "\n"
    for row in benches.rows(options.name, options.cases, options.runs, absent):
        say(row, head + benches.line(row))
        head = ""
    return True


VERB = Verb(
    summary="measure on this machine what the kernels are worth beside what else could be called",
    examples=("sentei bench attention", "sentei bench attention sparse --runs 9 --json"),
    arguments=arguments,
    work=work,
)
