"""`sentei train`: a small model, from text."""

import argparse
import importlib
import sys
from pathlib import Path

from sentei.commands.verb import Progress, Say, Verb, draws, json_argument, table


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei train`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as examples/train.yaml")
    parser.add_argument("--out", metavar="DIR", help="folder for the model and its checkpoints (default: chosen)")
    json_argument(parser)


def work(options: argparse.Namespace, say: Say) -> bool:
    """Trains a model, and says the result."""
    job = importlib.import_module("sentei.training.job")
    out, progress = options.out and Path(options.out), Progress(sys.stderr, bars=draws(sys.stderr))
    if result := job.run(Path(options.config), out, progress):  # else another process says it
        say(result, table(job.summary(result)))
    return True


VERB = Verb(
    summary="train a small model from text, going on from its newest checkpoint",
    examples=("sentei train examples/train.yaml", "torchrun --nproc-per-node 4 -m sentei train my.yaml --json"),
    arguments=arguments,
    work=work,
)
