"""`sentei inspect`: a look at a checkpoint that nobody trusts yet."""

import argparse
import importlib
import re

from sentei.commands.verb import Say, Verb, json_argument, table

LINES = 40  # kinds of tensors, settings and values that people are shown


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei inspect`."""
    parser.add_argument("path", metavar="FILE", help="a folder of a model, one written by sentei prune or sentei "
                        "train, an adapter, a .gguf or .safetensors file, a trace, or 'default' for the embedded model")
    json_argument(parser)


def work(options: argparse.Namespace, say: Say) -> bool:
    """Says what a checkpoint holds; ends as a verb would that opened it, with the first reason to refuse it."""
    path = importlib.import_module("sentei.conversion.embedded").path(options.path)
    facts, refused = importlib.import_module("sentei.conversion.inspection").inspect(path)
    told = refused and {"where": refused.where, "expected": refused.expected, "got": refused.got}
    result = {"schema": "sentei.inspect/1", **facts, "accepted": refused is None, "refused": told}
    say(result, summary(facts, refused is None))
    if refused is not None:
        raise refused
    return True


def summary(facts: dict, accepted: bool) -> str:
    """The facts for people."""
    plain = {"kind": facts["kind"]}
    plain |= {key: str(facts[key]) for key in ("architecture", "base", "layers") if key in facts}
    if "parameters" in facts:
        plain["parameters"] = f"{facts['parameters']:,} in {len(facts['tensors']):,} tensors, {facts['bytes']:,} bytes"
    plain |= {dtype: f"{one['parameters']:,} in {one['tensors']:,} tensors, {one['bytes']:,} bytes"
              for dtype, one in facts.get("dtypes", {}).items()}
    plain |= {key: ", ".join(map(str, facts[key])) for key in ("checkpoints", "runs") if key in facts}
    plain |= {"files": ", ".join(facts.get("files", {})), "ignored": _pairs(facts.get("ignored", {})),
              "policy": _pairs(facts.get("policy", {})), "checked": facts.get("checked", ""),
              "accepted": "yes, as far as was checked" if accepted else "no"}
    lines = [table({key: value for key, value in plain.items() if value})]
    for key in ("settings", "metadata"):
        if facts.get(key):
            lines += [f"\n{key}", *_some([f"  {name}: {value}" for name, value in facts[key].items()])]
    if facts.get("tensors"):
        lines += ["\ntensors", *_some(_alike(facts["tensors"]))]
    return "\n".join(lines)


def _alike(tensors: list) -> list[str]:
    """A line for the tensors of all layers that are alike."""
    groups: dict[str, int] = {}
    for name, dtype, shape in tensors:
        kind = f"  {re.sub(r'[0-9]+', '*', name)} {dtype} {shape}"
        groups[kind] = groups.get(kind, 0) + 1
    return [f"{kind} × {count}" if count > 1 else kind for kind, count in groups.items()]


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= LINES else [*lines[:LINES], f"  … {len(lines) - LINES:,} more"]


def _pairs(values: dict) -> str:
    return ", ".join(f"{key}: {value}" for key, value in values.items())


VERB = Verb(
    summary="look at a checkpoint without loading it or running anything from it",
    examples=("sentei inspect ./my-model", "sentei inspect model.gguf --json"),
    arguments=arguments,
    work=work,
)
