"""`sentei slack`: where a model has slack, layer by layer and room by room, on this machine."""

import argparse
import importlib
import sys
from pathlib import Path

from sentei.commands.verb import Progress, Say, Verb, draws, json_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei slack`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for sentei prune (default: the embedded model)")
    parser.add_argument("--text", metavar="FILE", help="plain text in UTF-8 to measure on (default: Python's own "
                        "language documentation)")
    parser.add_argument("--workload", default="decode:1024", metavar="KIND:TOKENS",
                        help="what is to become faster: prefill:TOKENS or decode:TOKENS (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="number format of the model (default: %(default)s)")
    parser.add_argument("--online", action="store_true", help="allow a download from the hub (default: no network)")
    json_argument(parser)


def work(options: argparse.Namespace, say: Say) -> bool:
    """Measures every option of every room in every layer, and says what each costs and saves."""
    pipeline, prices = (importlib.import_module(name) for name in ("sentei.pipeline", "sentei.budget.prices"))
    request = pipeline.Request(model=options.model, text=None if options.text is None else Path(options.text),
                               workload=options.workload, quality=0.99, dtype=options.dtype, online=options.online)
    progress = Progress(sys.stderr, bars=draws(sys.stderr))
    subject, _, windows = pipeline.opened(request, progress)
    found = prices.measure(subject.model, subject.work, windows, progress)
    result = {"schema": "sentei.slack/1", "model": subject.name, "workload": options.workload, "dtype": options.dtype,
              **found}
    say(result, summary(result))
    return True


def summary(result: dict) -> str:
    """A line a layer: the cheapest option of every room, and its price."""
    rooms = list(dict.fromkeys(option["room"] for option in result["options"]))
    layers = sorted({option["layer"] for option in result["options"]})
    dense, measure = result["dense"], result.get("measure", "perplexity")
    price = f"{measure}_per_millisecond"
    level = "" if dense["perplexity"] is None else f", perplexity {dense['perplexity']:.4g}"
    lines = [f"{result['model']}, {result['workload']}, {result['dtype']}, {result['threads']} threads: dense "
             f"{dense['seconds'] * 1e3:.0f} ms{level}",
             f"the cheapest option of each room: {measure} a millisecond saved (the option, milliseconds saved)", "",
             "layer  " + "".join(f"{room:<34}" for room in rooms)]
    for layer in layers:
        cells = []
        for room in rooms:
            paying = [option for option in result["options"] if option["layer"] == layer and option["room"] == room
                      and option[price] is not None]
            best = min(paying, key=lambda option: option[price], default=None)
            cells.append("no gain here" if best is None else
                         f"{best[price]:.2g} ({best['option']}, {best['milliseconds']:.2g} ms)")
        lines.append(f"{layer:<7}" + "".join(f"{cell:<34}" for cell in cells).rstrip())
    for room in rooms:
        options = [option for option in result["options"] if option["room"] == room]
        none = sum(option[price] is None for option in options)
        if none:
            lines.append(f"{room}: {none} of {len(options)} options save no time on this machine")
    return "\n".join(lines)


VERB = Verb(
    summary="measure where a model has slack: what each option of each room costs in quality and saves in time",
    examples=("sentei slack", "sentei slack ./my-model --workload prefill:4096", "sentei slack --json > slack.json"),
    arguments=arguments,
    work=work,
)
