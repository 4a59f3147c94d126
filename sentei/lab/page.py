"""The page of the lab: every claim measured in a folder, with its table, pictures and verdict, in one file.

It loads nothing and runs nothing; its policy allows its own style, by hash. All text is escaped.
"""

from html import escape
from pathlib import Path

from sentei.core.storage import write_text
from sentei.lab import records
from sentei.lab.finding import HOLDS, Finding, number
from sentei.measurement import pages
from sentei.measurement.charts import draw
from sentei.measurement.drawing import density_scale, heat_map, visible

TITLE = "The claims of “the geometry of dynamic pruning”, measured"


def path(out: Path) -> Path:
    """Where the page of a folder is."""
    return out / "lab.html"


def write(out: Path) -> None:
    """Writes the page of the claims kept in `out`, and their pictures as files beside it.

    Raises:
        FileError: a file there that is no record of a claim.
        ResourceError: it cannot be written.
    """
    found = records.kept(out)
    for name, (_, finding) in found.items():
        for place, picture in enumerate(pictures(finding)):
            write_text(out / f"{name}-{place + 1}.svg", alone(picture))
    write_text(path(out), render(found))


def pictures(finding: Finding) -> list[str]:
    """The SVGs of a finding: its charts, then its map."""
    return [*map(draw, finding.charts), *([heat_map(finding.heat)] if finding.heat else [])]


def alone(picture: str) -> str:
    """An SVG as a file of its own, with the page's style in it."""
    head, _, rest = picture.partition(">")
    return f'{head.replace("<svg", "<svg xmlns=" + chr(34) + "http://www.w3.org/2000/svg" + chr(34), 1)}>' \
           f"<style>{pages.style()}</style>{rest}\n"


def render(found: dict[str, tuple[dict, Finding]]) -> str:
    """The page as HTML text, of records and findings by the name of their claim."""
    held = sum(finding.verdict == HOLDS for _, finding in found.values())
    rows = [pages.row(f'<a href="#{escape(name)}">{pages.words(name)}</a>',
                      f"<strong>{pages.words(finding.verdict)}</strong>", pages.words(finding.sentence, None))
            for name, (_, finding) in found.items()]
    sections = [pages.section("Verdicts", "What decides is each claim's numbers and their 95 % intervals.",
                              pages.table(("claim", "verdict", "number"), rows, kind="verdicts"))]
    sections += [_section(name, record, finding) for name, (record, finding) in found.items()]
    told = [record for record, _ in found.values()]
    seconds = sum(float(record["seconds"]) for record in told)
    return pages.fill(
        title=escape(visible(TITLE)), state="met" if held == len(found) else "unmet",
        kicker=f"<b>sentei lab</b> · {', '.join(sorted({pages.words(record['date']) for record in told}))} · "
               f"{seconds:,.0f} s",
        sentence=pages.words(TITLE), verdict=f"<b>{held} of {len(found)}</b> claims measured here hold.",
        sections="\n".join(sections),
        footer=f"{records.SCHEMA}. This page loads nothing and runs no script. Its pictures also lie beside it as SVG, "
               "its numbers as JSON.")


def _section(name: str, record: dict, finding: Finding) -> str:
    """One claim: its sentence, pictures, notes, table and where it was measured."""
    told = finding.rows[0]
    rows = [pages.row(*(pages.words(number(cell), None) for cell in row.values())) for row in finding.rows]
    figures = "".join(f"<figure>{draw(chart)}<figcaption>{pages.words(chart.title, None)}</figcaption></figure>"
                      for chart in finding.charts)
    if finding.heat:
        figures += (f"<figure>{heat_map(finding.heat)}<figcaption>{density_scale()}By layer (down) and head (across)."
                    "</figcaption></figure>")
    body = pages.table([pages.words(key) for key in told], rows, kind="compact")
    where = pages.pairs((pages.words(key), pages.words(value)) for key, value in (
        *record["environment"].items(), ("date", record["date"]), ("seconds", f"{float(record['seconds']):,.1f}")))
    notes = "".join(f"<p>{pages.words(note, None)}</p>" for note in finding.notes)
    checks = pages.table(("check", "verdict"), [pages.row(pages.words(check.words(), None), pages.words(check.verdict))
                                                for check in finding.checks], kind="compact")
    return pages.section(
        f'<span id="{escape(name)}">{pages.words(name)}</span>', pages.words(finding.claim, None),
        f'<p class="verdict{" held" if finding.verdict == HOLDS else ""}">{pages.words(finding.sentence, None)}</p>',
        f'<div class="pair even">{figures}</div>', notes,
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{body}</div>',
        f"<details><summary>Checks, and where it was measured</summary>{checks}{where}</details>")
