"""Claim 10: the same word gets another circuit in another context, and words before the difference do not.

Eight pairs of sentences that end in the same ambiguous word and differ in one noun before it, which changes what is
meant (cave, field), or hardly does (cave, cavern): the control. A circuit is what holds 90 % of the mass in the default
model; agreement is |both| ÷ |either| at the last word, the mean over layers. The interval is Student's t of the
difference over pairs. Then the same with the noun behind the word: what comes before it must be identical, to the bit.
Source: the lecture, "I saw a bat in the cave" and "on the field".
"""

from collections.abc import Callable

from sentei.circuit.agreement import ROOMS, agreement, prefix_differences, shared_prefix
from sentei.circuit.capture import capture
from sentei.circuit.run import Run
from sentei.circuit.tracing import spell
from sentei.geometry.intervals import mean_interval
from sentei.lab.finding import Finding, Row, counted, measured
from sentei.lab.subject import default_model
from sentei.measurement.charts import Chart, Series

CLAIM = ("The same word gets a different circuit in a different context, more so than in one of equal meaning; in a "
         "causal model the words before the difference have the same circuit.")
SENTENCES = (
    ("In the {} I saw a bat", "cave", "field", "cavern"), ("On the {} I saw a bat", "tree", "pitch", "branch"),
    ("By the {} I saw a bank", "river", "office", "stream"), ("At the {} I saw a seal", "beach", "office", "shore"),
    ("In the {} I saw a mouse", "barn", "office", "shed"), ("In the {} I saw a crane", "lake", "factory", "pond"),
    ("In the {} I saw a spring", "forest", "clock", "woods"), ("In the {} I saw a trunk", "forest", "car", "woods"),
)
Runs = Callable[[str, str], tuple[Run, Run]]


def runs_of_default(first: str, second: str) -> tuple[Run, Run]:
    """What two prompts use of the default model."""
    model, tokenizer, _ = default_model()
    return capture(model, [tokenizer(text)["input_ids"] for text in (first, second)], spell(tokenizer)).runs


def measure(sentences: tuple[tuple[str, ...], ...] = SENTENCES, runs: Runs = runs_of_default) -> Finding:
    """Traces every pair and judges the agreements.

    Args:
        sentences: a frame with a place for a noun, a noun, one that changes the meaning, and one that does not.
        runs: of two prompts.
    Cost: six short passes a sentence.
    """
    rows = []
    for frame, noun, other, alike in sentences:
        first, _, rest = frame.partition(" I saw")
        behind = f"I saw{rest} {first[0].lower()}{first[1:]}"
        later = runs(behind.format(noun), behind.format(other))
        rows.append({"word": frame.split()[-1], "contexts": f"{noun}, {other} (control {alike})",
                     **_agreements("", *runs(frame.format(noun), frame.format(other))),
                     **_agreements("control ", *runs(frame.format(noun), frame.format(alike))),
                     "same words": shared_prefix(*later), "differences there": prefix_differences(*later)})
    return judge(rows)


def judge(rows: list[Row]) -> Finding:
    """The finding of rows as `measure` makes them."""
    gaps = {room: mean_interval([row[f"control {room}"] - row[room] for row in rows]) for room in ROOMS}
    checks = (
        measured("control's agreement of edges at the word - that of another meaning is", gaps["connections"], least=0),
        measured("agreement of edges at the word in another context is",
                 mean_interval([row["connections"] for row in rows]), most=0.999),
        counted("choices that differ in words before the difference are", sum(row["differences there"] for row in rows),
                0),
        measured("the fewest words before the difference are", (min(row["same words"] for row in rows),) * 3, least=1))
    means = {kind: tuple(mean_interval([row[f"{kind}{room}"] for row in rows]) for room in ROOMS)
             for kind in ("", "control ")}
    series = tuple(Series(name=name, x=tuple(range(len(ROOMS))), y=tuple(mean for mean, _, _ in means[kind]),
                          low=tuple(low for _, low, _ in means[kind]), high=tuple(high for _, _, high in means[kind]))
                   for name, kind in (("another meaning", ""), ("equal meaning", "control ")))
    chart = Chart(title="Agreement of the word's circuits in two contexts, with 95 % intervals over words.", x="room",
                  y="agreement", labels=ROOMS, series=series)
    told = "; ".join(f"{room} {gap:.3f}, {low:.3f} to {high:.3f}" for room, (gap, low, high) in gaps.items())
    return Finding(claim=CLAIM, rows=tuple(rows), checks=checks, charts=(chart,), notes=(
        f"Control's agreement - that of another meaning, by room: {told}. An interval around 0 shows nothing.",))


def _agreements(kind: str, first: Run, second: Run) -> dict[str, float]:
    """By room, the mean agreement over layers at the last token."""
    values = agreement(first, second, [(len(first.tokens) - 1, len(second.tokens) - 1)])[:, :, 0]
    return {f"{kind}{room}": value for room, value in zip(ROOMS, values.mean(0).tolist(), strict=True)}
