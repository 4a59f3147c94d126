"""The same word in two contexts: how far its circuit changes, against contexts of equal meaning.

    python -m benchmarks.bench_contexts

Eight pairs of sentences that end in the same ambiguous word and differ in one noun before it, which changes what is
meant (cave, field) or hardly does (cave, cavern); the model is the embedded one. Agreement is |both| ÷ |either| of what
holds 90 % of the mass, at the last word, the mean over layers. The interval is of the mean difference over pairs
(Student's t).
"""

import math
import statistics

from benchmarks.publish import table, write_result
from sentei.circuit.agreement import ROOMS, agreement
from sentei.circuit.capture import capture
from sentei.circuit.tracing import spell
from sentei.conversion.checkpoints import load_model, load_tokenizer, locate

SENTENCES = (
    ("In the {} I saw a bat", "cave", "field", "cavern"), ("On the {} I saw a bat", "tree", "pitch", "branch"),
    ("By the {} I saw a bank", "river", "office", "stream"), ("At the {} I saw a seal", "beach", "office", "shore"),
    ("In the {} I saw a mouse", "barn", "office", "shed"), ("In the {} I saw a crane", "lake", "factory", "pond"),
    ("In the {} I saw a spring", "forest", "clock", "woods"), ("In the {} I saw a trunk", "forest", "car", "woods"),
)
T_95 = 2.365  # Student's t, seven degrees of freedom


def main() -> None:
    """Measures, and writes two tables."""
    found = locate()
    model, tokenizer = load_model(found), load_tokenizer(found)

    def compare(first: str, second: str) -> tuple[list[float], list[str]]:
        """By room, the mean agreement at the last word, and the first layer in which it is below 1."""
        tokens = [tokenizer(text)["input_ids"] for text in (first, second)]
        runs = capture(model, tokens, spell(tokenizer)).runs
        values = agreement(*runs, [(len(tokens[0]) - 1, len(tokens[1]) - 1)])[:, :, 0]
        starts = [(column < 1).nonzero().flatten().tolist() for column in values.T]
        return values.mean(0).tolist(), [str(start[0]) if start else "none" for start in starts]

    rows: dict[str, list[list[float]]] = {"meaning": [], "words": []}
    pairs = []
    for frame, noun, other, alike in SENTENCES:
        for kind, second in (("meaning", other), ("words", alike)):
            means, starts = compare(frame.format(noun), frame.format(second))
            rows[kind].append(means)
            pairs.append([frame.format(noun), second, *(f"{value:.3f}" for value in means), ", ".join(starts)])
    verdict = []
    for index, room in enumerate(ROOMS):
        one, other = ([row[index] for row in rows[kind]] for kind in ("meaning", "words"))
        gaps = [after - before for before, after in zip(one, other, strict=True)]
        mean, half = statistics.mean(gaps), T_95 * statistics.stdev(gaps) / math.sqrt(len(gaps))
        verdict.append([room, f"{statistics.mean(one):.3f}", f"{statistics.mean(other):.3f}",
                        f"{mean:.3f}, {mean - half:.3f} to {mean + half:.3f}"])
    print(write_result("contexts", __doc__, [
        f"Model: {found.source}, float32.",
        table(["room", "another meaning", "equal meaning", "difference, 95 % interval"], verdict),
        table(["sentence", "other noun", *ROOMS, "first layers below 1"], pairs)]))


if __name__ == "__main__":
    main()
