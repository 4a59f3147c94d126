"""The report of a pruning run: one HTML page that loads nothing, runs nothing and can be sent by mail.

Every string that came from a model, a file or a user passes through `_words`, which shows hidden characters and escapes
the rest; every number passes through a numeric format. The page's policy allows its own style, by hash, and nothing
else.
"""

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sentei.core.storage import write_text
from sentei.measurement import drawing
from sentei.measurement.drawing import counted, drawable, finite, percent, visible
from sentei.measurement.pages import fill
from sentei.measurement.pages import pairs as _pairs
from sentei.measurement.pages import row as _row
from sentei.measurement.pages import section as _section
from sentei.measurement.pages import table as _table
from sentei.measurement.pages import words as _words
from sentei.measurement.plots import write_plots


def write_report(out: Path, result: dict, details: dict) -> Path:
    """Writes `out/report.html` and the same plots as files under `out/plots/` (slack and frontier, SVG and PNG).

    Args:
        out: the run's folder; made if missing.
        result: the public object of the run, schema "sentei.prune/1".
        details: what stands behind it: goal, met, reason, intervals, text, slack, density, timings,
            environment, command, date, seconds and the meaning of quality, as the pipeline gathers them.

    Returns:
        The path of the page. Each file is written whole or not at all, the page last.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    page = render(result, details)
    write_plots(out / "plots", result, details)
    path = out / "report.html"
    write_text(path, page)
    return path


def render(result: dict, details: dict) -> str:
    """The report as HTML text; arguments as for `write_report`."""
    sections = (_comparison(result, details), _healing(result), _tried(result, details), _slack(details),
                _plan(result, details), _method(result, details), _repeat(details))
    return fill(
        title=escape(visible(f"{result['model']}, pruned by sentei")),
        state="met" if details["met"] else "unmet",
        kicker=f"<b>sentei prune</b> · {_words(details['date'])} · {_words(result['workload'])} · "
               f"{_words(result['dtype'])} · {counted(result['threads'], 'thread')}",
        sentence=_words(summary(result, details), limit=None),
        verdict=_verdict(result, details),
        sections="\n".join(filter(None, sections)),
        footer=f"{_words(result['schema'])}. This page loads nothing and runs no script. The plots also lie beside it, "
               "as files in <code>plots/</code>.",
    )


def summary(result: dict, details: dict) -> str:
    """The result in one sentence of plain text, for the head of the page and for a terminal."""
    kind, _, size = str(result["workload"]).partition(":")
    tasks = {"prefill": "prefills {:,} tokens", "decode": "writes the last tokens of {:,}"}
    task = tasks[kind].format(int(size)) if kind in tasks and size.isascii() and size.isdigit() else \
        f"runs {visible(result['workload'])}"
    if not result["plan"]:
        return f"{visible(result['model'])} {task} dense, as before: no plan that was tried meets the goal."
    goal = details["goal"]
    quality = percent(result["quality"], goal.get("quality"))
    speed = result["speedup"]
    pace = f"{speed:.2f}× faster" if speed >= 1 else f"at {speed:.2f}× the dense speed, which is slower,"
    sentence = f"{visible(result['model'])} {task} {pace} at {quality} of the dense quality"
    if details["met"]:
        return f"{sentence}."
    asked = f"{100 * goal['quality']:g} %" if "quality" in goal else f"{goal['speed']:g}×"
    return f"{sentence}, where {asked} was asked."


def _number(value: object, form: str) -> str:
    return format(value, form) if finite(value) else "not measured"


def _percents(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * low:.2f}–{100 * high:.2f}&nbsp;%" if finite(low) and finite(high) else "not measured"


def _times(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{low:.2f}–{high:.2f}×" if finite(low) and finite(high) else "not measured"


def _verdict(result: dict, details: dict) -> str:
    goal = details["goal"]
    asked = f"quality of at least {100 * goal['quality']:g} %" if "quality" in goal else \
        f"speed-up of at least {goal['speed']:g}×"
    reason = f" {_words(details['reason'], None)}" if details["reason"] else ""
    measured = (f" Quality {percent(result['quality'], goal.get('quality'))}, 95 % interval "
                f"{_percents(details['quality_interval'])}; density {_number(result['density'], '.2f')}."
                f"{_strict(result, details)}")
    word = "Bound met" if details["met"] else "Bound not met"
    return f"<b>{word}</b> ({asked}).{reason}{measured}".replace(" %", "&nbsp;%")


def _strict(result: dict, details: dict) -> str:
    """The other reading that is held to the bound, where one is."""
    strict = details.get("strict")
    if strict is None:
        return ""
    return (f" Read without lookahead: {percent(result['quality_without_lookahead'], details['goal'].get('quality'))}, "
            f"{_percents(strict['quality_interval'])}; density {_number(strict['density'], '.2f')}.")


def _comparison(result: dict, details: dict) -> str:
    decodes = _decodes(result)
    forms = {"perplexity": ",.4g", "seconds": ",.3f", "tokens_per_second": ",.1f" if decodes else ",.0f"}
    rows = [_row(name, *(_number(result[name][key], form) if result[name][key] is not None else ""
                         for key, form in forms.items())) for name in ("dense", "pruned")]
    quality = percent(result["quality"], details["goal"].get("quality")).replace(" %", "&nbsp;%")
    rows.append(_row("pruned against dense",
                     f"<strong>{quality}</strong><small>{_percents(details['quality_interval'])}</small>",
                     f"<strong>{result['speedup']:.2f}×</strong><small>{_times(details['speedup_interval'])}</small>",
                     "", kind="total"))
    table = _table(("model", _words(result.get("measure", "perplexity")), "seconds", "tokens/s"), rows)
    strip = drawing.timing_strip(details["timings"])
    counts = ", ".join(f"{len(values):,} {_words(name)}" for name, values in details["timings"].items())
    run = f" of {counted(details['timed_tokens'], 'token')}, one at a time" if decodes else ""
    caption = f"Every timed run{run}, taking turns ({counts}); upright strokes are medians."
    figure = f"<figure>{strip}<figcaption>{caption}</figcaption></figure>" if strip else ""
    return _section("Dense against pruned",
                    f"{'Healed' if _is_healed(result) else 'Same'} weights, same tokens, same threads. Dense is the "
                    "attention of transformers itself (scaled dot product)"
                    f"{' with its own cache' if decodes else ''}. Small print: intervals.",
                    f'<div class="pair even"><div>{table}</div>{figure}</div>')


def _healing(result: dict) -> str:
    """What each minute of healing bought, where the plan was to be healed."""
    healed = result.get("healed")
    if healed is None:
        return ""
    without = healed["unhealed"]
    outcome = ("Kept: the quality of this plan on the text for checking the bound was "
               f"{percent(healed['quality_unhealed'])} before. The best plan without healing: "
               f"{_number(without['speedup'], '.2f')} times as fast as dense at {percent(without['quality'])}."
               ) if healed["kept"] else \
        f"Not kept, all else is of the unhealed model: {_words(healed['reason'], None)}."
    outcome = f"{_relaxed(healed['relaxed'])}{outcome}"
    rows = [_row(_number(row["minutes"], ".2f"), f"{row['step']:,}", f"{row['tokens']:,}",
                 _number(row["perplexity"], ",.4g"), percent(row["quality"])) for row in healed["table"]]
    table = _table(("minutes", "steps", "tokens", "perplexity", "quality"), rows) if rows else ""
    return _section("What healing bought", f"{_number(healed['minutes'], 'g')} minutes by the clock to say what the "
                    "dense model says, on text that nothing is judged on; measured where plans were chosen. "
                    + outcome.replace(" %", "&nbsp;%"), table)


def _relaxed(relaxed: dict | None) -> str:
    """Under what bound the plan to be healed was chosen, and why."""
    if relaxed is None:
        return ""
    probe = relaxed["probe"]
    return (f"The plan was chosen under a bound of {percent(relaxed['quality'])} in place of "
            f"{percent(relaxed['asked'])}: {_number(probe['minutes'], '.2g')} of the minutes brought a plan from "
            f"{percent(probe['unhealed'])} to {percent(probe['healed'])} on the text for choosing, "
            f"{_number(100 * relaxed['share'], '.0f')} % of the nats it had lost. ")


def _tried(result: dict, details: dict) -> str:
    points = drawable(result["frontier"])
    if not points or not drawable([result]):
        return ""
    plots = "".join(f'<div class="{kind}">{drawing.frontier(points, result, details, width)}</div>'
                    for kind, width in (("wide", 1000), ("narrow", 350)))
    below = " Arrows on the lower edge: qualities below the picture." if 'class="below' in plots else ""
    caption = (f"{counted(len(points), 'point')}. Hollow: plans tried, as read on the text for choosing, their "
               "speed-up foreseen only. Filled: plans proved, both measured on "
               f"{_held_out(details, 'the plan')}; red the chosen one, with its intervals, and a ring where it was "
               f"foreseen. Dashed line: of the hollow points those that no other beats in both.{below}")
    rows = (_row(_words(point["name"]) + (" <strong>(chosen)</strong>" if point["chosen"] else ""),
                 f"{point['speedup']:.3f}×", _words(point["speed"]), percent(point["quality"]), _words(point["text"]),
                 f"{point['density']:.3f}")
            for point in sorted(points, key=lambda point: (point["speed"], point["speedup"])))
    head = ("plan", "speed-up", "which is", "quality", "on the text to", "density")
    table = _table(head, rows, kind="compact points")
    meaning = _words(details["meaning"], None)
    intro = f"Quality is {meaning}, on the same tokens; it is always measured. {_beside(points)}"
    return _section("Quality against speed", intro,
                    f"<figure>{plots}<figcaption>{caption}</figcaption></figure>",
                    f"<details><summary>The same as a table</summary>{table}</details>")


def _beside(points: list[dict]) -> str:
    """What was proved beside the chosen plan."""
    beside = [point for point in points if point["speed"] == "measured" and not point["chosen"]]
    told = [f"{_words(' and '.join(point['rooms']) or 'no room')} {point['speedup']:.2f}× at "
            f"{percent(point['quality'])}" for point in sorted(beside, key=lambda point: -point["speedup"])]
    return f"Proved beside the chosen plan, measured: {'; '.join(told)}." if told else ""


def _slack(details: dict) -> str:
    picture = drawing.heat_map(details["density"])
    panels = drawing.curve_panels(details["slack"], details["density"])
    if not picture and not panels:
        return ""
    unpruned = sum(row is None for row in details["density"])
    dashed = f" Dashed: {counted(unpruned, 'layer')} that cannot be pruned, left as they are." if unpruned else ""
    left = (f"<figure>{picture}<figcaption>{drawing.density_scale()}Density of the chosen plan: the share of permitted "
            f"candidates kept, layers from top to bottom, heads from left to right.{dashed}</figcaption></figure>"
            ) if picture else ""
    many = "panels many" if len(panels) > 40 else "panels"
    listed = "".join(f"<li>{panel}</li>" for panel in panels)
    caption = ("Slack, one panel a layer (its number at the right): the error if only a share of the candidates is "
               "kept. Thin: each head; strong: their mean; dots: what was chosen for each head. The first panel names "
               "the axes.")
    right = f'<figure><ul class="{many}">{listed}</ul><figcaption>{caption}</figcaption></figure>' if panels else ""
    return _section("Where the slack is", "Full colour is work still done; pale is work no longer done.",
                    f'<div class="pair map">{left}{right}</div>', _heads_table(details["density"]))


def _heads_table(density: Sequence[Sequence[float] | None]) -> str:
    heads = max((len(row) for row in density if row), default=0)
    if not heads:
        return ""
    rows = (_row(f"{layer}", *(f"{value:.2f}" for value in row)) if row else
            f'<tr><th scope="row">{layer}</th><td class="word" colspan="{heads}">not prunable</td></tr>'
            for layer, row in enumerate(density))
    table = _table(("layer", *(f"head {head}" for head in range(heads))), rows, kind="compact")
    return ("<details><summary>Density of every head as a table</summary>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="Density of heads">{table}</div></details>')


def rule_words(rule: object) -> str:
    """A rule as a few words of plain text: {"name": "mass", "mass": 0.9, "unit": 64} is "mass 0.9, unit 64".

    A list of rules or numbers, one a head, is told as the distinct ones with their counts, most frequent first.
    """
    if isinstance(rule, list | tuple):
        counts = Counter(rule_words(each) for each in rule)
        return "; ".join(words if len(counts) == 1 else f"{words} ({number})" for words, number in counts.most_common())
    if not isinstance(rule, dict):
        return f"{rule:g}" if isinstance(rule, float) else str(rule)
    name = str(rule.get("name", "rule"))
    first = f"{name} {rule_words(rule[name])}" if name in rule else name
    rest = (f"{key} {rule_words(value)}" for key, value in rule.items() if key not in ("name", name))
    return ", ".join([first, *rest])


def _option(entry: dict) -> str:
    """What is kept of a room: a rule may hold a number a head, and other rooms say it in words."""
    return rule_words(entry["rule"]) if entry["room"] == "connections" else entry["option"]


def _plan(result: dict, details: dict) -> str:
    rows = []
    for entry in result["plan"]:
        layer, share, density = entry["layer"], entry["density"], details["density"]
        heads = density[layer] if isinstance(layer, int) and 0 <= layer < len(density) else None
        spread = f"{min(heads):.2f}–{max(heads):.2f}" if heads else ""
        rows.append(f'<tr><th scope="row">{_words(layer)}</th><td class="word">{_words(entry["room"])}</td>'
                    f'<td class="word">{_words(_option(entry))}</td>'
                    f"<td>{_number(share, '.2f')}{drawing.density_bar(share)}</td><td>{spread}</td></tr>")
    if not rows:
        return _section("The plan", "Empty: every layer stays dense.")
    does = "; ".join(result["does"])
    intro = (f"{_words(does[:1].upper() + does[1:], None)}. Mean density of connections in the model: "
             f"{_number(result['density'], '.3f')}. A number in brackets counts heads. What is not listed stays dense.")
    head = ("layer", "room", "option", "density", "over heads")
    return _section("The plan", intro, _table(head, rows, kind="compact plan"))


def _held_out(details: dict, plan: str) -> str:
    """The text that quality was measured on; a text on which several plans were judged had a hand in the choice."""
    attempts = details.get("verify_attempts", 1)
    if attempts == 1:
        return f"text {plan} was not chosen on"
    return (f"held-out text ({attempts} plans were judged on this text: those that did not meet the goal there, or "
            "came out no better, made way)")


def _is_healed(result: dict) -> bool:
    return "healed" in result and result["healed"]["kept"]


def _decodes(result: dict) -> bool:
    return str(result["workload"]).startswith("decode:")


def _method(result: dict, details: dict) -> str:
    text = details["text"]
    uses = {"calibrate": "to measure slack", "choose": "to choose the plan", "verify": "to check the bound"}
    tokens = [f"{number:,} {uses.get(use) or _words(use)}" for use, number in text["tokens"].items()]
    quality = _pairs([
        ("measure", f"{_words(details['meaning'], None)}; 100&nbsp;% is no loss"),
        ("sight", "every token sees all others, so that choices may, too") if "measure" in result else
        ("decoding", "read is the end of each text, after a prompt that the pruned model has read itself, as the "
         "plan runs; a token's choice is its own, from no later token") if _decodes(result) else
        ("lookahead", "what a block of tokens keeps is chosen with the whole block in sight, as the plan runs"
         + ("" if details.get("strict") is None else "; the bound is also kept, and the plans tried were judged, "
            "without lookahead: what a token keeps is chosen from no later one")),
        ("comparison", "paired: the dense and the pruned model read the same tokens"),
        ("interval", f"{_percents(details['quality_interval'])}, 95&nbsp;% interval of the paired comparison"),
        ("tokens", "; ".join(tokens) + ". No token has two uses."),
        ("text", f"{_words(text['name'])}<br><code>sha256 {_words(text['sha256'])}</code>"),
        ("weights", _words(details["source"])),
    ])
    surroundings = _pairs((_words(name), _words(value)) for name, value in details["environment"].items())
    took = [(_words(name), f"{_number(seconds, ',.1f')} s") for name, seconds in details["seconds"].items()]
    total = sum(filter(finite, details["seconds"].values()))
    stages = f"<details><summary>By stage: {total:,.0f} s in all</summary>{_pairs(took)}</details>" if took else ""
    left = _section("How quality was measured", f"On {_held_out(details, 'the plan')}.", quality)
    right = _section("Environment", "Numbers of speed belong to this machine.", surroundings, stages)
    return f'<div class="pair even">{left}{right}</div>'


def _repeat(details: dict) -> str:
    return _section("To repeat it", "The run continues where it stopped if its folder is still there.",
                    f"<pre><code>{_words(details['command'], None)}</code></pre>")
