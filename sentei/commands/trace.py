"""`sentei trace`: which parts of a model each token used, as a page and as a file."""

import argparse
import importlib
import itertools
import os
import sys
from pathlib import Path

from sentei.commands.verb import Progress, Say, Verb, draws, json_argument, number, table
from sentei.core.errors import SenteiError

MASS = 0.9
MAX_WRITTEN = 4096
MAX_SHOWN = 140  # characters of a name in the summary
PAGE = "circuit.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sentei trace`."""
    parser.add_argument("model", metavar="MODEL", help="a folder of a model, BERT-like encoders too, one written by "
                        "sentei prune or sentei train, a .gguf file, with --online a name on the hub, 'default' for "
                        "the embedded SmolLM2-135M-Instruct, or a trace that was saved")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text; a second one is compared with it")
    parser.add_argument("--control", metavar="PROMPT", help="a third text, which means what the first does: the page "
                        "tells how far it agrees with that, beside how far the second does")
    parser.add_argument("--out", metavar="FILE", help=f"the page (default: {PAGE})")
    parser.add_argument("--save", metavar="FILE", help="keep the trace too, to open it again")
    parser.add_argument("--mass", metavar="M", help="of a dense model: the share whose fewest parts are shown as "
                        f"needed, above 0 and at most 1 (default: {MASS})")
    parser.add_argument("--write", metavar="N", help="tokens that the model writes after each prompt (default: 0)")
    parser.add_argument("--online", action="store_true", help="allow a download from the hub (default: no network)")
    json_argument(parser)


def work(options: argparse.Namespace, say: Say) -> bool:
    """Traces a model, or opens a trace, and writes the page."""
    _require_files_apart(options)
    mass = number("--mass", options.mass, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
    write = number("--write", options.write, f"a whole number from 0 to {MAX_WRITTEN}",
                   lambda value: 0 <= value <= MAX_WRITTEN and value == int(value))
    file, page = importlib.import_module("sentei.circuit.file"), importlib.import_module("sentei.circuit.page")
    progress = Progress(sys.stderr, bars=draws(sys.stderr))
    path = importlib.import_module("sentei.conversion.embedded").path(options.model)
    if file.is_trace(path):
        if options.prompts or options.control is not None or options.save or options.mass or options.write:
            raise SenteiError("sentei trace", expected="a saved trace alone, with --out", got="more",
                              do="leave prompts, --control, --save, --mass and --write away")
        circuit = file.load(path)
    else:
        if not 1 <= len(options.prompts) <= 2:
            raise SenteiError("sentei trace", expected="a model and one or two prompts, or a saved trace",
                              got=f"{len(options.prompts)} prompts", do="put each prompt in quotes")
        if options.control is not None and len(options.prompts) < 2:
            raise SenteiError("--control", expected="two prompts, of which it is the control of the first",
                              got="one prompt", do="name the second prompt, or leave --control away")
        circuit = _capture(options, MASS if mass is None else mass, int(write or 0), progress)
        if options.save:
            file.save(circuit, Path(options.save))
    out = Path(PAGE if options.out is None else options.out)
    with progress.stage("draw", 1) as step:
        both = page.together(circuit)
        page.write(circuit, out, both)
        step()
    result = page.result(circuit, both) | {"page": str(out), "trace": options.save}
    say(result, table(summary(result)))
    return True


def _require_files_apart(options: argparse.Namespace) -> None:
    """Refuses names of which two lead to one file: what is written last would be left alone."""
    files = {"--out": PAGE if options.out is None else options.out}
    files |= {} if options.save is None else {"--save": options.save}
    files |= {"MODEL": options.model} if os.path.isfile(options.model) else {}
    for (flag, name), (other, its) in itertools.combinations(files.items(), 2):
        if _is_one_file(name, its):
            raise SenteiError(flag, expected=f"another file than that of {other}", got=name,
                              do="give each file a name of its own")


def _is_one_file(name: str, other: str) -> bool:
    """Whether two names lead to one file, through links too, whether it is there or not."""
    if os.path.exists(name) and os.path.exists(other):
        return os.path.samefile(name, other)
    return os.path.realpath(name) == os.path.realpath(other)


def _capture(options: argparse.Namespace, mass: float, write: int, progress: Progress):
    """The circuit of the model's prompts."""
    capture = importlib.import_module("sentei.circuit.capture").capture
    spell = importlib.import_module("sentei.circuit.tracing").spell
    with progress.stage("load", 1) as step:
        name, model, tokenizer, encode = _model(options)
        step()
    texts = [*options.prompts, *([] if options.control is None else [options.control])]
    prompts = [list(map(int, encode(text))) for text in texts]
    require_known = importlib.import_module("sentei.conversion.tokenizers").require_known
    vocabulary = getattr(model.config, "vocab_size", None) or model.config.vocabulary
    require_known(max(max(prompt, default=0) for prompt in prompts), vocabulary, name)
    longest = max(map(len, prompts)) + write
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise SenteiError("sentei trace", expected=f"at most {most:,} tokens, as {name} reads", got=f"{longest:,}",
                          do="shorten the prompt")
    with progress.stage("trace", 1) as step:
        circuit = capture(model, prompts, spell(tokenizer), write=write, share=mass, model_name=name)
        step()
    return circuit


def _model(options: argparse.Namespace):
    """The name, the model, its tokenizer, and what turns text into tokens."""
    folder = importlib.import_module("sentei.conversion.embedded").path(options.model)
    if (folder / "sentei-train.json").is_file():
        job, data = importlib.import_module("sentei.training.job"), importlib.import_module("sentei.training.data")
        model = job.load_model(folder)
        plain = model.config.vocabulary == data.Bytes.vocabulary and not (folder / "tokenizer.json").is_file()
        tokenizer = data.tokenizer_of("bytes" if plain else "tokenizer.json", folder)
        return folder.resolve().name, model, tokenizer, tokenizer.encode
    checkpoints = importlib.import_module("sentei.conversion.checkpoints")
    found = checkpoints.locate(options.model, online=options.online)
    if (folder / "sentei.json").is_file():
        model = importlib.import_module("sentei.conversion.export").load(folder)
    else:
        model = checkpoints.load_model(found)
    tokenizer = checkpoints.load_tokenizer(found)
    return found.name, model, tokenizer, lambda text: tokenizer(text)["input_ids"]


def summary(result: dict) -> dict[str, str]:
    """The result for people, a line for each of its parts; names that a terminal would obey are told as on the page."""
    label = importlib.import_module("sentei.circuit.page").label
    model, rule = (label(result[key], MAX_SHOWN) for key in ("model", "rule"))
    lines = {"model": f"{model}, {result['kind']}: {rule}",
             "tokens": " and ".join(map(str, result["tokens"])),
             "multiply-adds": " and ".join(f"{share:.1%}" for share in result["multiply_adds"]) + " of dense"}
    both = result["together"]
    if both is not None:
        state = "identical" if both["differences"] == 0 else f"{both['differences']} bytes differ"
        lines["shared"] = f"{both['shared']} tokens, {state}" if both["shared"] else "no first token"
        for name, shares in (("agreement", both["agreement"]), ("control", both["control"] or {})):
            told = ", ".join(f"{room} {share:.1%}" for room, share in shares.items() if share is not None)
            lines |= {name: f"{told} (mean of matched tokens)"} if told else {}
    return lines | {"page": result["page"]} | ({"trace": result["trace"]} if result["trace"] else {})


VERB = Verb(
    summary="show which parts of a model each token used, for one prompt or two side by side",
    examples=(
        'sentei trace default "I saw a bat in the cave" "I saw a bat on the field"',
        'sentei trace default "In the cave I saw a bat" "In the field I saw a bat" '
        '--control "In the cavern I saw a bat"',
        'sentei trace ./faster "Once upon a time" --write 32 --save once.trace',
        "sentei trace once.trace --out once.html",
    ),
    arguments=arguments,
    work=work,
)
