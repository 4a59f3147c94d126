"""`sentei prune`: the main job."""

import argparse
import importlib
import json
import sys
from pathlib import Path

from sentei.commands.verb import Progress, Say, Verb, draws, json_argument, number, table

QUALITY = 0.99


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei prune`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder of a Hugging Face model (safetensors), a "
                        ".gguf file, with --online a name on the hub, or 'default', the embedded SmolLM2-135M-Instruct "
                        "(default: that one; a folder of that name is ./default)")
    parser.add_argument("--text", metavar="FILE", help="plain text in UTF-8 to calibrate and to measure quality on "
                        "(default: Python's own language documentation)")
    parser.add_argument("--workload", default="prefill:4096", metavar="KIND:TOKENS",
                        help="what is to become faster: prefill:TOKENS, the reading of a prompt, or decode:TOKENS, the "
                        "tokens written when the text is that long (default: %(default)s)")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--quality", metavar="Q", help="find the fastest plan with at least this quality, above 0 and at "
                      f"most 1, on held-out text: dense perplexity / pruned perplexity, or of an encoder the cosine of "
                      f"its embeddings with the dense model's (default: {QUALITY})")
    goal.add_argument("--speed", metavar="S", help="find the best quality at this speed-up, 1 or more")
    parser.add_argument("--no-lookahead", dest="lookahead", action="store_false", help="also measure quality "
                        "with what a token keeps chosen from no later token, and hold that to --quality too; the plan "
                        "is the usual one, which chooses for a block of tokens with the whole block in sight")
    parser.add_argument("--plain", action="store_true", help="prune every layer alike, or leave it out whole, so "
                        "that the folder loads in transformers without sentei, as a smaller model (default: what is "
                        "best for each layer, which may need sentei to load)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="number format of dense and pruned model alike (default: %(default)s)")
    parser.add_argument("--heal", metavar="MINUTES", help="choose a bolder plan, train the pruned model for so long "
                        "to say what the dense one does, on text that nothing is judged on, and measure it then; kept "
                        "if that serves the bound better (default: 0, no training)")
    parser.add_argument("--out", metavar="DIR", help="folder for the pruned model and the report; the same folder goes "
                        "on with an interrupted run (default: chosen and printed)")
    parser.add_argument("--online", action="store_true", help="allow a download from the hub (default: no network)")
    json_argument(parser)


def work(options: argparse.Namespace, say: Say) -> bool:
    """Runs the main job, and says its public result and whether the bound is met."""
    quality = number("--quality", options.quality, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
    speed = number("--speed", options.speed, "a number that is 1 or more", lambda value: 1 <= value < float("inf"))
    heal = number("--heal", options.heal, "minutes, 0 or more", lambda value: 0 <= value < float("inf"))
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
        heal=heal or 0.0,
        plain=options.plain,
    )
    outcome = pipeline.run(request, Progress(sys.stderr, bars=draws(sys.stderr)))
    if not outcome.met:
        print(f"sentei: bound not met: {outcome.reason}", file=sys.stderr)
    say(outcome.result, summary(outcome.result, outcome.quality_interval, outcome.report))
    return outcome.met


def summary(result: dict, interval: tuple[float, float], report: Path) -> str:
    """The public result of `sentei prune`, a line for each of its parts."""
    dense, pruned, strict = result["dense"], result["pruned"], result.get("quality_without_lookahead")
    told = "cosine of embeddings with the dense model's" if dense["perplexity"] is None else \
        f"perplexity {dense['perplexity']:.4g} dense, {pruned['perplexity']:.4g} pruned"
    code = f"import sentei; model = sentei.load({json.dumps(str(result['out']), ensure_ascii=False)})"
    return table({
        "model": result["model"],
        "workload": f"{result['workload']}, {result['dtype']}, {result['threads']} threads",
        "speed-up": f"{result['speedup']:.2f} times ({dense['seconds']:.3g} s dense, {pruned['seconds']:.3g} s pruned; "
                    f"{dense['tokens_per_second']:.3g} and {pruned['tokens_per_second']:.3g} tokens a second)",
        "quality": f"{result['quality']:.4f}, between {interval[0]:.4f} and {interval[1]:.4f} ({told})",
        **({"without lookahead": f"quality {strict:.4f}"} if strict is not None else {}),
        **({"healed": healed_words(result["healed"])} if "healed" in result else {}),
        "plan": "; ".join(result["does"]),
        **({"beside it": beside} if (beside := beside_words(result["frontier"])) else {}),
        "report": str(report),
        "use it": code,
    })


def beside_words(frontier: list[dict]) -> str:
    """The plans that were proved and not taken, fastest first, in a line; empty where there are none."""
    proved = [point for point in frontier if point["speed"] == "measured" and not point["chosen"]]
    return "; ".join(f"{' and '.join(point['rooms']) or 'no room'} {point['speedup']:.2f} times at "
                     f"{point['quality']:.4f}, measured" for point in sorted(proved, key=lambda each: -each["speedup"]))


def healed_words(healed: dict) -> str:
    """What healing came to, in a line."""
    relaxed = healed["relaxed"]
    chosen = "" if relaxed is None else \
        f"; chosen under {relaxed['quality']:.4f}, as {relaxed['share']:.0%} of the nats came back in a probe"
    if not healed["kept"]:
        return f"not kept{chosen}: {healed['reason']}"
    without = healed["unhealed"]
    return (f"for {healed['minutes']:g} minutes{chosen}; quality {healed['quality_unhealed']:.4f} before; without "
            f"healing {without['speedup']:.2f} times at {without['quality']:.4f}")


VERB = Verb(
    summary="make a model faster inside a quality bound, measure it and write a report",
    examples=(
        "sentei prune",
        "sentei prune ./my-model --text notes.txt --quality 0.995 --out ./faster",
        "sentei prune --workload prefill:8000 --speed 1.5",
        "sentei prune --workload decode:8000",
        "sentei prune --no-lookahead",
        "sentei prune --workload decode:1024 --quality 0.95 --plain",
        "sentei prune --workload prefill:1024 --quality 0.95 --heal 10",
        "sentei prune --json > result.json",
    ),
    arguments=arguments,
    work=work,
)
