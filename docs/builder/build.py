"""The documentation as a site: Markdown to HTML pages that stand alone, made without a network.

    python -m docs.builder.build --out build/docs          # what `make docs` does

A page is one file. Its style, and its pictures as data, are in it, and its policy allows that style by hash and nothing
else: no script, and nothing that is asked for. The site keeps the tree of the repository, so that a link in the
Markdown leads to the same place here and there; README is the index. A link to nothing ends the build.
"""

import argparse
import base64
import hashlib
import html
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from docs.builder.markdown import Page, parse
from sentei.core.errors import FileError
from sentei.core.storage import write_text

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RESULTS = "benchmarks/results/"
# The order of the navigation. A page of docs/ that is not named comes at the end of the section that says "*".
SECTIONS: dict[str, tuple[str, ...]] = {
    "": ("README.md", "docs/idea.md"),
    "The rooms": tuple(f"docs/rooms/{name}.md" for name in (
        "connections", "experts", "heads", "rank", "channels", "depth", "weights")),
    "How it works": ("docs/kernels.md", "docs/budget.md", "docs/trace.md", "*"),
    "The record": (RESULTS, "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    "日本語": ("README.ja.md", "docs/idea.ja.md"),
}
NAMES = {"README.md": "sentei", "README.ja.md": "sentei（剪定）", RESULTS: "Measurements"}
WORDS = {"en": ("On this page", "All pages"), "ja": ("このページの内容", "全ページ")}
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Site:
    """The pages, by their path in the repository, and the navigation: headings and the paths below each."""

    root: Path
    pages: dict[str, Page]
    sections: dict[str, list[str]]

    def title(self, path: str) -> str:
        """What the navigation calls a page: its heading, up to a colon."""
        return NAMES.get(path) or self.pages[path].title.partition(": ")[0]


def read(root: Path = ROOT) -> Site:
    """All pages of the site, in memory.

    Raises:
        FileError: a page of SECTIONS that is missing, or one without a heading.
    """
    found = {path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md")}
    named = {path for paths in SECTIONS.values() for path in paths}
    sections = {name: [each for path in paths for each in (sorted(found - named) if path == "*" else [path])]
                for name, paths in SECTIONS.items()}
    listed = [path for paths in sections.values() for path in paths if path != RESULTS]
    results = sorted(path.relative_to(root).as_posix() for path in (root / RESULTS).glob("*.md"))
    pages = {path: parse(path, _text(root, path)) for path in [*listed, *results]}
    lines = [f"- [{pages[path].title}]({Path(path).name})\n\n  `{Path(path).stem}`" for path in results]
    pages[RESULTS] = parse(RESULTS, "# Measurements\n\nEvery page says its machine, date, commit and command.\n\n"
                           + "\n".join(lines))
    return Site(root=root, pages=pages, sections=sections)


def _text(root: Path, path: str) -> str:
    try:
        return (root / path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(path, expected="a page of the site", got=str(error),
                        do="write it, or change SECTIONS") from error


def address(path: str) -> str:
    """Where a page of the repository stands in the site: docs/idea.md → docs/idea.html, README.md → index.html."""
    if path.endswith("/"):
        return f"{path}index.html"
    return re.sub(r"^README\b", "index", path).removesuffix(".md") + ".html"


def build(out: Path, root: Path = ROOT) -> list[Path]:
    """Writes the whole site and returns its files.

    Raises:
        FileError: a link or a picture that leads nowhere, or a page that is missing; nothing is written then.
    """
    site = read(root)
    made = {address(path): render(site, page) for path, page in site.pages.items()}
    for name, text in made.items():
        write_text(out / name, text)
    return [out / name for name in made]


def render(site: Site, page: Page) -> str:
    """A page as HTML."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'sha256-{digest}'"
    inside, every = WORDS[page.language]
    body = page.html(link=lambda target: _link(site, page, target), picture=lambda name: _picture(site, page, name))
    headings = "".join(f'<li><a href="#{slug}">{html.escape(text)}</a></li>' for slug, text in page.headings)
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        language=page.language, policy=html.escape(policy), style=style, title=html.escape(_full_title(site, page)),
        body=body, pages=_navigation(site, page), every=every, around=_around(site, page),
        inside=f'<p>{inside}</p><ul>{headings}</ul>' if len(page.headings) > 1 else "")


def _full_title(site: Site, page: Page) -> str:
    return page.title if page.path.startswith("README") else f"{page.title} · sentei"


def _between(page: Page, path: str) -> str:
    """The address of `path` as seen from `page`."""
    return os.path.relpath(address(path), os.path.dirname(address(page.path)) or ".")


def _navigation(site: Site, page: Page) -> str:
    parts = []
    for name, paths in site.sections.items():
        items = "".join(f'<li><a href="{_between(page, path)}"{_current(page, path)}>{html.escape(site.title(path))}'
                        "</a></li>" for path in paths)
        parts.append((f"<h2>{name}</h2>" if name else "") + f"<ul>{items}</ul>")
    return "".join(parts)


def _current(page: Page, path: str) -> str:
    language = f' lang="{"ja" if path.endswith(".ja.md") else "en"}"'
    return language + (' aria-current="page"' if page.path == path else "")


def _around(site: Site, page: Page) -> str:
    """Links to the page before and the page after."""
    order = [path for paths in site.sections.values() for path in paths]
    if page.path not in order:
        return ""
    place, parts = order.index(page.path), []
    for step, arrow, kind in ((-1, "← {}", "prev"), (1, "{} →", "next")):
        if 0 <= place + step < len(order):
            path = order[place + step]
            words = html.escape(arrow.format(site.title(path)))
            parts.append(f'<a rel="{kind}" class="{kind}" href="{_between(page, path)}">{words}</a>')
    return "".join(parts)


def _link(site: Site, page: Page, target: str) -> str:
    """The address in the site of what a page of the repository links to."""
    if re.match(r"https?:", target):
        return target
    path, _, fragment = target.partition("#")
    full = _resolved(page, path) if path else page.path
    if full not in site.pages or (fragment and fragment not in dict(site.pages[full].headings)):
        raise _nowhere(page, target, "a page of the site, or a heading in it")
    return (_between(page, full) if path else "") + (f"#{fragment}" if fragment else "")


def _picture(site: Site, page: Page, name: str) -> str:
    """A picture as a data address."""
    path = site.root / _resolved(page, name)
    if path.suffix not in TYPES or not path.is_file():
        raise _nowhere(page, name, f"a picture ({', '.join(TYPES)}) in the repository")
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _resolved(page: Page, target: str) -> str:
    folder = page.path if page.path.endswith("/") else os.path.dirname(page.path)
    return os.path.normpath(os.path.join(folder, target)) + ("/" if target.endswith("/") else "")


def _nowhere(page: Page, target: str, expected: str) -> FileError:
    return FileError(page.path, expected=expected, got=f"a link to {target}", do="correct the link")


def main(arguments: Iterable[str] | None = None) -> None:
    """Builds the site."""
    parser = argparse.ArgumentParser(description="build the documentation as a site")
    parser.add_argument("--out", type=Path, default=Path("build/docs"), metavar="DIR")
    options = parser.parse_args(arguments)
    files = build(options.out)
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} pages, {size / 1e6:.1f} MB: {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
