"""The command line: one table of verbs, and one place that turns every end of a run into an exit code.

Only the result goes to stdout; progress, warnings and errors go to stderr. Nothing heavy is imported before a verb's
work starts, so that every `--help` answers at once.
"""

import argparse
import difflib
import json
import os
import shlex
import signal
import sys
import textwrap
import traceback
from pathlib import Path
from typing import TextIO

from sentei.commands import bench, inspect, lab, prune, slack, trace, train, verify
from sentei.commands.verb import table
from sentei.core.errors import ResourceError, SenteiError
from sentei.core.storage import disk_is_full

BOUND_NOT_MET = 1
INTERNAL = 70
INTERRUPTED = 130
EXIT_CODES = {
    0: "done",
    BOUND_NOT_MET: "the bound is not met (the best plan found is kept)",
    2: "usage: a wrong or missing argument",
    3: "a file that is missing, malformed or not to be trusted",
    4: "not enough memory or disk",
    5: "a model or layer that is not supported",
    INTERNAL: "an internal error: please report it",
    INTERRUPTED: "interrupted: the same command goes on from the last finished stage",
}


WRITTEN = ("out", "save")  # the flags of any verb that name what it writes: an empty one is a mistake, as of a script
VERBS = {"prune": prune.VERB, "slack": slack.VERB, "verify": verify.VERB, "bench": bench.VERB, "train": train.VERB,
         "trace": trace.VERB, "inspect": inspect.VERB, "lab": lab.VERB}


class Parser(argparse.ArgumentParser):
    """argparse with errors in four parts and no abbreviated flags."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        """Raises the complaint as a SenteiError (exit code 2)."""
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        raise SenteiError(self.prog, expected=usage, got=message, do=f"run {self.prog} --help")


def parser() -> Parser:
    """The parser of the whole command line, built from `VERBS`."""
    everything = Parser(
        prog="sentei",
        description="Decides, for each input, what a transformer need not compute.",
        epilog=epilog(*(verb.examples[0] for verb in VERBS.values())),
    )
    # The package root is loaded before any of its modules, and no module imports it.
    version = sys.modules[__package__].__version__
    everything.add_argument("--version", action="version", version=f"sentei {version}")
    verbs = everything.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        verb.arguments(verbs.add_parser(
            name, help=verb.summary, description=verb.summary.capitalize() + ".", epilog=epilog(*verb.examples)))
    return everything


def epilog(*examples: str) -> str:
    """The end of every help: examples and the exit codes."""
    codes = table({str(code): meaning for code, meaning in EXIT_CODES.items()})
    return f"examples:\n{textwrap.indent(chr(10).join(examples), '  ')}\n\nexit codes:\n{textwrap.indent(codes, '  ')}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The parsed arguments.

    Raises:
        SenteiError: (exit code 2) wrong arguments, an empty path to write to among them; for an unknown verb with the
            nearest known one.
    """
    if not arguments:
        raise SenteiError("sentei", expected=f"a verb: {', '.join(VERBS)}", got="none", do="run sentei --help")
    first = arguments[0]
    if not first.startswith("-") and first not in VERBS:
        near = difflib.get_close_matches(first, VERBS, n=1)
        raise SenteiError("sentei", expected=f"a verb: {', '.join(VERBS)}", got=repr(first),
                          do=f"did you mean sentei {near[0]}?" if near else "run sentei --help")
    options = parser().parse_args(arguments)
    for name in WRITTEN:
        if getattr(options, name, None) == "":
            raise SenteiError(f"--{name}", expected="a path to write to", got="''",
                              do=f"name one, or leave --{name} away")
    return options


def take_stdout() -> TextIO:
    """The process's standard output, taken away from everybody else for good.

    Whatever a library prints there from now on, native code included, goes to stderr. It is not given back, because
    text that native code holds until the process exits would then follow the result.
    """
    sys.stdout.flush()
    result = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return result


class Ending:
    """Turns every way a run can end into a message on stderr and an exit code, in `code` after the `with` block."""

    code = 0

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if error is None or isinstance(error, SystemExit):  # argparse leaves --help and --version with SystemExit
            return False
        if isinstance(error, KeyboardInterrupt):
            print("\nsentei: interrupted: run the same command again to go on from the last finished stage:\n  "
                  + command(), file=sys.stderr)
            self.code = INTERRUPTED
            return True
        known = error if isinstance(error, SenteiError) else scarcity(error)
        if known is not None:
            print(known.lines(), file=sys.stderr)
            self.code = known.exit_code
            return True
        traceback.print_exception(error)
        print("sentei: internal error; please report it with the lines above and this command:\n  " + command(),
              file=sys.stderr)
        self.code = INTERNAL
        return True


def scarcity(error: BaseException) -> ResourceError | None:
    """The error to show when `error` means that memory or disk ran out; None when it means something else.

    torch reports an allocation that failed as a RuntimeError.
    """
    text = str(error)
    if disk_is_full(error):
        where = getattr(error, "filename", None) or "the disk"
        return ResourceError(str(where), expected="room for the files of this run", got="a full disk",
                             do="free some space and run the same command again")
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return ResourceError("memory", expected="enough memory for this model and workload", got=text or "none left",
                             do="close other programs, or choose a shorter --workload or a smaller model")
    return None


def command() -> str:
    """The command that was given, ready to be pasted into a shell."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    return shlex.join(sys.orig_argv if as_module else sys.argv)


def interrupt(signum: int, frame: object) -> None:
    """Lets SIGTERM end a run the way Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs the command line in `sys.argv` and returns the exit code; for use as the process's entry, once."""
    with Ending() as ending:
        signal.signal(signal.SIGTERM, interrupt)
        options = parse(sys.argv[1:])
        with take_stdout() as stdout:
            def say(result: dict, text: str) -> None:
                print(json.dumps(result, allow_nan=False) if options.json else text, file=stdout, flush=True)

            met = VERBS[options.verb].work(options, say)
        return 0 if met else BOUND_NOT_MET
    return ending.code
