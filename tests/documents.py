"""The code of the documentation as pieces that run: Python, files of settings, `sentei` lines; small where need be."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from docs.builder.markdown import Page, parse

ROOT = Path(__file__).parents[1]
# Translations have the code of their originals, as tests/docs/test_translations.py says.
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")
                              if not path.name.endswith(".ja.md"))]
COMMAND = re.compile(r"sentei [a-z]+ \S")
# What is made small, in every piece: a tiny model in place of a large one, a short text, a bound it can keep.
SMALL = [
    (r"^(sentei prune)(?!.*--workload)", r"\1 --workload prefill:4096"),
    (r"\bprefill:[\d,]+", "prefill:512"),
    (r"(my-encoder .*)prefill:512", r"\1prefill:128"),  # it needs more windows of a text
    (r"\bdecode:[\d,]+", "decode:24"),
    (r"sentei\.prune\(workload", 'sentei.prune("my-model", workload'),
    (r"quality=0\.99\b", "quality=0.5"),
    (r"--(quality|speed) [\d.]+", "--quality 0.5"),
    (r"--heal [\d.]+", "--heal 0.1"),
    (r"^sentei prune (?=-)", "sentei prune my-model "),
    (r"^sentei trace default", "sentei trace my-model"),
    (r"\bDIR\b", "faster"),
    (r"\bFILE\b", "my-model"),
    (r"^sentei lab .*$", "sentei lab one-structure"),
    (r"(?<=^sentei bench )(\w+)(.*)$", r"\1\2 --runs 1"),
]


@dataclass(frozen=True)
class Piece:
    """A piece of code of a page.

    Args:
        line: where it begins.
        kind: "python", "yaml", "command", or "text", which is read and not run.
        text: as it stands.
        changes: what is changed before it runs, as old and new.
    """

    line: int
    kind: str
    text: str
    changes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def how(self) -> str:
        """How it is run, in words."""
        if self.kind == "yaml":
            return "written to the file that it names"
        if self.kind == "text":
            return "not code of ours: formulas, trees, make"
        return "; ".join(f"{old.strip()} → {new.strip()}" for old, new in self.changes) or "as it stands"

    def small(self) -> str:
        """The text that is run."""
        return _small(self.text)[0]


def pieces(page: Page) -> list[Piece]:
    """All code of a page in its order, and the `sentei` lines among its words after it.

    Raises:
        AssertionError: a block of a kind that is not known, or Python in one that does not say so.
    """
    found = []
    for info, block, line in page.blocks():
        assert info in ("", "python", "yaml"), f"{page.path}:{line}: a block of {info}"
        if info:
            found.append(_piece(line, info, block))
            continue
        hidden = re.search(r"^\s*(import|from \S+ import)\b", block, re.MULTILINE)
        assert not hidden, f"{page.path}:{line}: is it python?"
        commands = [each for each in block.splitlines() if COMMAND.match(each)]
        found += [_piece(line, "command", each) for each in commands] or [_piece(line, "text", block)]
    said = {child.content: outer.map[0] + 1 for outer in reversed(page.tokens) for child in outer.children or []
            if child.type == "code_inline" and COMMAND.match(child.content)}
    found += [_piece(line, "command", words) for words, line in reversed(said.items())]
    return found


def read(path: str) -> list[Piece]:
    """The pieces of a page of this repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return pieces(parse(path, text))


def _piece(line: int, kind: str, text: str) -> Piece:
    return Piece(line, kind, text, _small(text)[1] if kind in ("python", "command") else [])


def _small(text: str) -> tuple[str, list[tuple[str, str]]]:
    changes = []
    for pattern, new in SMALL:
        for match in re.finditer(pattern, text, re.MULTILINE):
            changes.append((match[0], match.expand(new)))
        text = re.sub(pattern, new, text, flags=re.MULTILINE)
    return text, changes
