"""The command line: one table of verbs, and one place that turns every end of a run into an exit code.

Only the result goes to stdout; progress, warnings and errors go to stderr. Nothing heavy is imported before a verb's
work starts, so that every `--help` answers at once.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import os
import shlex
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from sentei.benches import table as benches
from sentei.core.errors import ResourceError, SenteiError
from sentei.core.storage import disk_is_full

# Takes a result as data and as text, and prints the one or the other.
Say = Callable[[dict, str], None]

QUALITY = 0.99
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


class Progress:
    """Shows the stages of a run on `stream`: a bar each on a terminal, elsewhere one plain line as each stage starts.

    No colours are ever used, so NO_COLOR has nothing to switch off; a terminal that says it is dumb gets plain lines.
    """

    def __init__(self, stream: TextIO, *, bars: bool):
        self.stream, self.bars, self.start = stream, bars, time.monotonic()

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Yields `step(note="")`, to be called once after each of the stage's `total` steps."""
        if not self.bars:
            steps = f" ({total} steps)" if total > 1 else ""
            print(f"[{time.monotonic() - self.start:5.0f} s] {name}{steps}", file=self.stream, flush=True)
            yield lambda note="": None
            return
        from tqdm import tqdm

        with tqdm(total=total, desc=f"{name:<10}", file=self.stream, dynamic_ncols=True) as bar:

            def step(note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update()

            yield step


def draws(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can redraw a line: not a dumb one, nor one that says it has no columns."""
    capable = stream.isatty() and os.environ.get("TERM") != "dumb"
    return capable and os.get_terminal_size(stream.fileno()).columns > 0


def prune_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei prune`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder of a Hugging Face model (safetensors), a "
                        ".gguf file, or with --online a name on the hub (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--text", metavar="FILE", help="plain text in UTF-8 to calibrate and to measure quality on "
                        "(default: Python's own language documentation)")
    parser.add_argument("--workload", default="prefill:4096", metavar="KIND:TOKENS",
                        help="what is to become faster: prefill:TOKENS, the reading of a prompt, or decode:TOKENS, the "
                        "tokens written when the text is that long (default: %(default)s)")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--quality", metavar="Q", help="find the fastest plan with at least this quality, above 0 and at "
                      f"most 1: dense perplexity / pruned perplexity on held-out text (default: {QUALITY})")
    goal.add_argument("--speed", metavar="S", help="find the best quality at this speed-up, 1 or more")
    parser.add_argument("--no-lookahead", dest="lookahead", action="store_false", help="also measure quality "
                        "with what a token keeps chosen from no later token, and hold that to --quality too; the plan "
                        "is the usual one, which chooses for a block of tokens with the whole block in sight")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="number format of dense and pruned model alike (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="folder for the pruned model and the report; the same folder goes "
                        "on with an interrupted run (default: chosen and printed)")
    parser.add_argument("--online", action="store_true", help="allow a download from the hub (default: no network)")
    json_argument(parser)


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei verify`."""
    parser.add_argument("folder", metavar="DIR", help="a folder written by sentei prune")
    json_argument(parser)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei bench`."""
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(benches.BENCHES)}")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="some of its cases; an unknown one is answered with "
                        "their names (default: all)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed pairs a row (default: %(default)s)")
    json_argument(parser, "a row")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei train`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as examples/train.yaml")
    parser.add_argument("--out", metavar="DIR", help="folder for the model and its checkpoints (default: chosen)")
    json_argument(parser)


def json_argument(parser: argparse.ArgumentParser, each: str = "") -> None:
    """`--json`, the same for every verb."""
    parser.add_argument("--json", action="store_true",
                        help=f"print one JSON object {each} on stdout and nothing else there".replace("  ", " "))


def prune(options: argparse.Namespace, say: Say) -> bool:
    """Runs the main job, and says its public result and whether the bound is met."""
    quality = number("--quality", options.quality, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
    speed = number("--speed", options.speed, "a number that is 1 or more", lambda value: 1 <= value < float("inf"))
    pipeline = importlib.import_module("sentei.pipeline")
    request = pipeline.Request(
        model=options.model,
        text=None if options.text is None else Path(options.text),
        workload=options.workload,
        quality=QUALITY if quality is None and speed is None else quality,
        speed=speed,
        dtype=options.dtype,
        out=None if options.out is None else Path(options.out),
        online=options.online,
        lookahead=options.lookahead,
    )
    outcome = pipeline.run(request, Progress(sys.stderr, bars=draws(sys.stderr)))
    if not outcome.met:
        print(f"sentei: bound not met: {outcome.reason}", file=sys.stderr)
    say(outcome.result, prune_summary(outcome.result, outcome.quality_interval, outcome.report))
    return outcome.met


def prune_summary(result: dict, interval: tuple[float, float], report: Path) -> str:
    """The public result of `sentei prune`, a line for each of its parts."""
    dense, pruned, strict = result["dense"], result["pruned"], result.get("quality_without_lookahead")
    code = f"import sentei; model = sentei.load({json.dumps(str(result['out']), ensure_ascii=False)})"
    return table({
        "model": result["model"],
        "workload": f"{result['workload']}, {result['dtype']}, {result['threads']} threads",
        "speed-up": f"{result['speedup']:.2f} times ({dense['seconds']:.3g} s dense, {pruned['seconds']:.3g} s pruned; "
                    f"{dense['tokens_per_second']:.3g} and {pruned['tokens_per_second']:.3g} tokens a second)",
        "quality": f"{result['quality']:.4f}, between {interval[0]:.4f} and {interval[1]:.4f} "
                   f"(perplexity {dense['perplexity']:.4g} dense, {pruned['perplexity']:.4g} pruned)",
        **({"without lookahead": f"quality {strict:.4f}"} if strict is not None else {}),
        "density": f"{result['density']:.3f} of the connections are computed",
        "report": str(report),
        "use it": code,
    })


def verify(options: argparse.Namespace, say: Say) -> bool:
    """Checks a folder written by `sentei prune` once more; a result with `"met": false` is a bound not met."""
    result = importlib.import_module("sentei.pipeline").verify(Path(options.folder))
    say(result, table({key: str(value) for key, value in result.items() if not isinstance(value, dict | list)}))
    return result.get("met", True)


def bench(options: argparse.Namespace, say: Say) -> bool:
    """Measures this machine, and says each row at once."""
    def absent(reason: str) -> None:
        print(f"sentei: {reason}", file=sys.stderr)

    head = benches.head() + "\n"
    for row in benches.rows(options.name, options.cases, options.runs, absent):
        say(row, head + benches.line(row))
        head = ""
    return True


def train(options: argparse.Namespace, say: Say) -> bool:
    """Trains a model, and says the result."""
    job = importlib.import_module("sentei.training.job")
    out, progress = options.out and Path(options.out), Progress(sys.stderr, bars=draws(sys.stderr))
    if result := job.run(Path(options.config), out, progress):  # else another process says it
        say(result, table(job.summary(result)))
    return True


def table(rows: dict[str, str]) -> str:
    """Names and values in two columns, one row a line."""
    width = max(map(len, rows), default=0) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def number(flag: str, text: str | None, expected: str, fits: Callable[[float], bool]) -> float | None:
    """`text` as a number, None where the flag was not given.

    Raises:
        SenteiError: (exit code 2) not a number, or one that does not fit; NaN never fits.
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise SenteiError(flag, expected=expected, got=repr(text), do="correct the number and run the command again")
    return value


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb: what it says of itself, its arguments, and its work, which says results and returns: is all well?"""

    summary: str
    examples: tuple[str, ...]
    arguments: Callable[[argparse.ArgumentParser], None]
    work: Callable[[argparse.Namespace, Say], bool]


VERBS = {
    "prune": Verb(
        summary="make a model faster inside a quality bound, measure it and write a report",
        examples=(
            "sentei prune",
            "sentei prune ./my-model --text notes.txt --quality 0.995 --out ./faster",
            "sentei prune --workload prefill:8000 --speed 1.5",
            "sentei prune --workload decode:8000",
            "sentei prune --no-lookahead",
            "sentei prune --json > result.json",
        ),
        arguments=prune_arguments,
        work=prune,
    ),
    "verify": Verb(
        summary="load a folder written by sentei prune in a fresh process and check its promises",
        examples=("sentei verify ./faster", "sentei verify ./faster --json"),
        arguments=verify_arguments,
        work=verify,
    ),
    "bench": Verb(
        summary="measure on this machine what the kernels are worth beside what else could be called",
        examples=("sentei bench attention", "sentei bench attention sparse --runs 9 --json"),
        arguments=bench_arguments,
        work=bench,
    ),
    "train": Verb(
        summary="train a small model from text, going on from its newest checkpoint",
        examples=("sentei train examples/train.yaml", "torchrun --nproc-per-node 4 -m sentei train my.yaml --json"),
        arguments=train_arguments,
        work=train,
    ),
}


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
        SenteiError: (exit code 2) wrong arguments; for an unknown verb with the nearest known one.
    """
    if not arguments:
        raise SenteiError("sentei", expected=f"a verb: {', '.join(VERBS)}", got="none", do="run sentei --help")
    first = arguments[0]
    if not first.startswith("-") and first not in VERBS:
        near = difflib.get_close_matches(first, VERBS, n=1)
        raise SenteiError("sentei", expected=f"a verb: {', '.join(VERBS)}", got=repr(first),
                          do=f"did you mean sentei {near[0]}?" if near else "run sentei --help")
    return parser().parse_args(arguments)


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
