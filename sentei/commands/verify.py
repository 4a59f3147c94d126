"""`sentei verify`: a written folder, checked once more."""

import argparse
import importlib
from pathlib import Path

from sentei.commands.verb import Say, Verb, json_argument, table


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei verify`."""
    parser.add_argument("folder", metavar="DIR", help="a folder written by sentei prune")
    json_argument(parser)


def work(options: argparse.Namespace, say: Say) -> bool:
    """Checks a folder written by `sentei prune` once more; a result with `"met": false` is a bound not met."""
    result = importlib.import_module("sentei.pipeline").verify(Path(options.folder))
    say(result, table({key: str(value) for key, value in result.items() if not isinstance(value, dict | list)}))
    return result.get("met", True)


VERB = Verb(
    summary="load a folder written by sentei prune in a fresh process and check its promises",
    examples=("sentei verify ./faster", "sentei verify ./faster --json"),
    arguments=arguments,
    work=work,
)
