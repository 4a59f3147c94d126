"""The model card of a written folder, README.md: what was measured, how, on what, and what it does not promise.

Names and texts come from strangers: each is shown as the letters it has, never as markup.
"""

import re
from pathlib import Path

from sentei.core.storage import write_text

CARD = "README.md"
MAX_FRONT_BYTES = 1 << 14  # of the base model's own card, where its licence may stand
LONGEST = 200
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", flags=re.ASCII)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.-]{1,64})[\"']?[ \t]*$", flags=re.ASCII | re.MULTILINE)
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+.!|~:@$&<>-])")
LIMITS = (
    "Quality is told on one text; it is no score on your task. The bound is met when the measured value is; the "
    "interval may reach below it.",
    "Seconds belong to one machine, its threads and its day. On another one run `sentei prune` again.",
    "The plan is for one workload. Other lengths, and reading where it was made for writing, may gain nothing.",
)
# What the folder is without sentei, by its rung (see `rungs`).
WITHOUT = {
    "A": "Without sentei this is an ordinary, smaller model: the same answers, but for what is chosen for each input.",
    "B": "Without sentei this folder does not load: its layers differ in shape, and transformers does not know its "
         "`model_type`. With a class of the base model that is named outright, parts of it would be random.",
    "C": "Without sentei these are the plain weights: the dense model, no faster and no smaller. Memory does not "
         "shrink.",
}
WITHOUT_EMPTY = "Nothing is pruned: with sentei and without, this is the dense model."
WITHOUT_HEALED = "Without sentei these are the healed weights, without the choices that are made for each input."
USE = """import sentei
from transformers import AutoTokenizer

folder = "path/of/this/folder"
tokenizer, model = AutoTokenizer.from_pretrained(folder), sentei.load(folder)
inputs = tokenizer("A text.", return_tensors="pt")
"""
# The last line of USE, by what the model does.
CALLS = {"perplexity": "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
         "cosine": "print(model(**inputs).last_hidden_state.mean(1))"}
NATIVE, UNFORESEEN = "native", "unforeseen"  # of `rooms` in a result, what is no room
SAVINGS = {NATIVE: "kernels of sentei's own, and exact attention", UNFORESEEN: "more than was foreseen, or less"}
# What the weights are: as they were, made from them, or healed.
SAME = "The weights are those of the base model, with its knowledge, its biases and its licence."
MADE = ("The weights are what is left of the base model's, parts of them refitted on one text: memory is that of the "
        "files in this folder, and of the key/value heads that are left. Its knowledge, its biases and its licence "
        "stay.")
HEALED = ("The weights are those of the base model, changed by healing on one text; what that does elsewhere was not "
          "measured. Its knowledge, its biases and its licence stay.")


def licence_in(card: Path) -> str | None:
    """The licence that the front matter of a model card names, where it is one plain word; else None.

    Args:
        card: a regular file.
    """
    with open(card, "rb") as file:
        start = file.read(MAX_FRONT_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    front = start.split("\n---", 1)[0] if start.startswith("---\n") and "\n---" in start else ""
    found = _LICENCE.search(front)
    return found[1] if found else None


def write(folder: Path, result: dict, details: dict, receipt: dict) -> Path:
    """Writes the card of a folder, whole or not at all, and returns its path.

    Args:
        result: the public object of the run, schema "sentei.prune/1".
        details: what stands behind it, as for `measurement.report`, with "licence", a word or None, and "rung".
        receipt: of `export.check`.
    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    write_text(folder / CARD, render(result, details, receipt))
    return folder / CARD


def render(result: dict, details: dict, receipt: dict) -> str:
    """The card as Markdown; arguments as for `write`."""
    verdict = "The bound is met." if details["met"] else f"The bound is **not** met: {words(details['reason'])}."
    parts = [
        _front(details["licence"], details["rung"]),
        f"# {words(result['model'])}, pruned by sentei",
        f"{_sentence(result)} {verdict}",
        "## Measured", _table(result, details), _method(result, details),
        *_savings(result),
        *_healing(result),
        "## Made with", fenced(details["command"]),
        f"A fresh process has loaded this folder and compared outputs: the largest difference is "
        f"{receipt['difference']:.2g}, of {receipt['tolerance']:.2g} allowed. `sentei verify` does it again.",
        "## Use", fenced(USE + CALLS[result.get("measure", "perplexity")], lines=True, language="python"),
        "## Base model",
        f"{words(details['source'])}. Licence: {words(details['licence'] or 'not known to sentei; see its source')}.",
        "## Limits", "\n".join(f"- {limit}" for limit in _limits(result, details["rung"])),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _sentence(result: dict) -> str:
    """What the plan does, and what that is worth, in one sentence."""
    does = "; ".join(result["does"])
    return (f"{does[:1].upper() + does[1:]}: {result['speedup']:.2f} times as fast as dense at quality "
            f"{result['quality']:.4f}, {words(result['workload'])}, {words(result['dtype'])}.")


def _front(licence: str | None, rung: str) -> str:
    """What the hub reads: plain words alone. It is told of transformers where that loads the folder."""
    lines = [f"library_name: {'sentei' if rung == 'B' else 'transformers'}", "tags:", "- sentei", "- pruning"]
    lines += [f"license: {licence}"] if licence and _PLAIN.fullmatch(licence) else []
    return "\n".join(["---", *lines, "---"])


def _table(result: dict, details: dict) -> str:
    dense, pruned = result["dense"], result["pruned"]
    (low, high), (slow, fast) = details["quality_interval"], details["speedup_interval"]
    strict = result.get("quality_without_lookahead")
    rows = [("", "dense", "pruned"),
            ("---", "---", "---"),
            ("seconds", f"{dense['seconds']:.3g}", f"{pruned['seconds']:.3g}"),
            ("tokens a second", *(f"{float(format(side['tokens_per_second'], '.3g')):,g}" for side in (dense, pruned))),
            *([("perplexity", f"{dense['perplexity']:.4g}", f"{pruned['perplexity']:.4g}")]
              if dense["perplexity"] is not None else []),
            ("speed-up, range of pairs", "1", f"{result['speedup']:.2f}, {slow:.2f} to {fast:.2f}"),
            ("quality, 95 % interval", "1", f"{result['quality']:.4f}, {low:.4f} to {high:.4f}"),
            *([("quality without lookahead", "1", f"{strict:.4f}")] if strict is not None else []),
            ("connections computed", "1", f"{result['density']:.3f}")]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _savings(result: dict) -> list[str]:
    """Where the time went, by room, where any was saved."""
    if not result["rooms"]:
        return []
    rows = [("saved by", "layers", "seconds", "share"), ("---",) * 4] + [
        (SAVINGS.get(room, words(room)), f"{part['layers'] or ''}", f"{part['seconds']:.3g}", f"{part['share']:.2f}")
        for room, part in sorted(result["rooms"].items(), key=lambda item: (item[0] == UNFORESEEN, -item[1]["share"]))]
    return ["Where the seconds went, each as foreseen before the proof; their sum is what was measured.",
            "\n".join(f"| {' | '.join(row)} |" for row in rows)]


def _healing(result: dict) -> list[str]:
    """What each minute of healing bought, where the plan was to be healed."""
    healed = result.get("healed")
    if healed is None:
        return []
    without, relaxed = healed["unhealed"], healed["relaxed"]
    outcome = (f"Quality of this plan before, as measured above: {healed['quality_unhealed']:.4f}. The best plan "
               f"without healing: {without['speedup']:.2f} times as fast at {without['quality']:.4f}."
               ) if healed["kept"] else \
        f"The healed weights are **not** these: {words(healed['reason'])}."
    chosen = [] if relaxed is None else [
        f"The plan was chosen under a bound of {relaxed['quality']:.4f} in place of {relaxed['asked']:g}: "
        f"{relaxed['probe']['minutes']:.2g} of the minutes brought a plan from {relaxed['probe']['unhealed']:.4f} to "
        f"{relaxed['probe']['healed']:.4f} on the text for choosing, {relaxed['share']:.0%} of the nats it had lost."]
    rows = [("minutes", "steps", "tokens", "perplexity", "quality"), ("---",) * 5] + [
        (f"{row['minutes']:.2f}", f"{row['step']:,}", f"{row['tokens']:,}", f"{row['perplexity']:.4g}",
         f"{row['quality']:.4f}") for row in healed["table"]]
    return ["## Healed", "Trained by sentei to say what the dense model says (KL of the next token, low-rank changes, "
            f"merged), {healed['minutes']:g} minutes by the clock, on text that nothing is judged on. {outcome}",
            *chosen, *(["\n".join(f"| {' | '.join(row)} |" for row in rows)] if healed["table"] else [])]


def _limits(result: dict, rung: str) -> tuple[str, ...]:
    """What is not promised; the weights of rungs A and B, and healed ones, are no longer those of the base model."""
    healed = result.get("healed", {}).get("kept")
    if not result["plan"] and not healed:
        return (*LIMITS, WITHOUT_EMPTY, SAME)
    without = WITHOUT_HEALED if healed and rung == "C" else WITHOUT[rung]
    return (*LIMITS, without, HEALED if healed else SAME if rung == "C" else MADE)


def _method(result: dict, details: dict) -> str:
    """Where the numbers come from."""
    text, machine = details["text"], ", ".join(f"{words(key)} {words(value)}" for key, value in
                                               details["environment"].items())
    uses = ", ".join(f"{words(use)} {count:,}" for use, count in text["tokens"].items())
    return (f"Quality is {words(details['meaning'])}; 1 is no loss. "
            f"Dense is transformers' own sdpa at the same dtype and threads, timed in turn with the pruned model. "
            f"Text: {words(text['name'])} (SHA-256 {words(text['sha256'][:16])}); tokens by use, none shared: {uses}. "
            f"{details['verify_attempts']} plan{'s were' if details['verify_attempts'] != 1 else ' was'} judged on the "
            f"text for verifying. {words(details['date'])}; {machine}.")


def words(value: object) -> str:
    """Text as its letters: what is Markdown, HTML or a command to a terminal is escaped; one line, shortened."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value)[:LONGEST])
    return _MARKUP.sub(r"\\\1", text)


def fenced(text: str, *, lines: bool = False, language: str = "") -> str:
    """Text as a block of code that nothing in it can end; control characters escaped, newlines too unless `lines`."""
    kept = "\n" if lines else ""
    safe = "".join(letter if letter.isprintable() or letter in kept else ascii(letter)[1:-1] for letter in text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", safe)), default=0))
    return f"{fence}{language}\n{safe}\n{fence}"
