"""`sentei lab`: the claims of the lecture, measured here."""

import argparse
import importlib
import sys
from pathlib import Path

from sentei.commands.verb import Progress, Say, Verb, draws, json_argument
from sentei.lab.table import CLAIMS, EVERY, chosen

OUT = "sentei-lab"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei lab`."""
    parser.add_argument("names", metavar="NAME", nargs="+", help=f"{EVERY}, or some of {', '.join(CLAIMS)}")
    parser.add_argument("--out", metavar="DIR", default=OUT, help="folder for the page, its pictures as SVG, and the "
                        "numbers as JSON; claims measured there before stay on the page (default: %(default)s)")
    json_argument(parser, "a row, and one for each verdict,")


def work(options: argparse.Namespace, say: Say) -> bool:
    """Measures claims, says each one's rows and verdict at once, and writes the page into a folder found to be fit."""
    names, out = chosen(options.names), Path(options.out)
    progress = Progress(sys.stderr, bars=draws(sys.stderr))
    page, records = importlib.import_module("sentei.lab.page"), importlib.import_module("sentei.lab.records")
    importlib.import_module("sentei.lab.folder").require_ready(out)
    for name, record, finding in records.measure(names, progress):
        records.keep(record, out)
        page.write(out)
        head, *told = records.lines(finding)
        head = f"{name}: {finding.claim}\n\n{head}\n"
        for row, line in zip(finding.rows, told, strict=True):
            say({"claim": name, **row}, head + line)
            head = ""
        verdict = {key: record["finding"][key] for key in ("verdict", "sentence", "checks", "notes")}
        say({"claim": name, **verdict, "page": str(page.path(out))},
            "\n" + "\n".join([*finding.notes, finding.sentence]) + "\n")
    return True


VERB = Verb(
    summary="measure the claims of the lecture, each a table, a picture and a verdict",
    examples=("sentei lab orthogonality", "sentei lab attention-mass contexts --out mine --json", "sentei lab all"),
    arguments=arguments,
    work=work,
)
