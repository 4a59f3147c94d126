"""The documentation's site: every link leads somewhere, every page stands alone, and what is wrong ends the build."""

import base64
import hashlib
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from docs.builder import build, markdown, pictures
from sentei.core.errors import FileError


class Found(HTMLParser):
    """What a page says of itself."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids, self.sources, self.tags, self.metas = [], [], [], Counter(), {}
        self.attributes = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags[tag] += 1
        self.attributes |= set(named)
        self.links += [named["href"]] if "href" in named else []
        self.ids += [named["id"]] if "id" in named else []
        self.sources += [named["src"]] if "src" in named else []
        if tag == "meta" and "http-equiv" in named:
            self.metas[named["http-equiv"]] = named["content"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Found]:
    """The pages of this repository's site, by their address."""
    out = tmp_path_factory.mktemp("site")
    return {path.relative_to(out).as_posix(): Found(path.read_text(encoding="utf-8")) for path in build.build(out)}


def test_every_link_leads_to_a_page_and_a_place_in_it(made):
    inside = 0
    for name, page in made.items():
        for link in page.links:
            if re.match("https?:", link):
                continue
            path, _, fragment = unquote(link).partition("#")
            target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            assert target in made, f"{name} links to {link}"
            assert not fragment or fragment in made[target].ids, f"{name} links to {link}"
            inside += 1
    assert inside > 500


def test_every_page_can_be_reached_from_the_first(made):
    seen, waiting = set(), ["index.html"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        links = [link.partition("#")[0] for link in made[name].links if not re.match("https?:", link)]
        targets = {os.path.normpath(os.path.join(os.path.dirname(name), link)) for link in links if link}
        waiting += targets - seen - set(waiting)
    assert seen == set(made)


def test_every_page_stands_alone(made):
    style = (build.HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    for name, page in made.items():
        policy = page.metas["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';") and f"style-src 'sha256-{digest}'" in policy, name
        assert "unsafe" not in policy and "http" not in policy
        assert all(source.startswith("data:image/") for source in page.sources), name
        assert not {"style", "onclick", "onload", "srcset"} & page.attributes, name
        assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0 and page.tags["h1"] == 1, name
        assert not [each for each, count in Counter(page.ids).items() if count > 1], name


def test_every_room_has_a_page_and_a_picture():
    from sentei.axes import AXES

    rooms = build.SECTIONS["The rooms"]
    assert sorted(AXES) == sorted(Path(path).stem for path in rooms)
    for path in rooms:
        text = (build.ROOT / path).read_text(encoding="utf-8")
        assert f"]({Path(path).stem}.svg)" in text
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
            "When it pays", "When it does not", "In training", "On a pretrained model", "Sources"], path


def test_pictures_are_those_that_the_code_draws():
    for picture in pictures.PICTURES:
        kept = build.ROOT / "docs" / "rooms" / f"{picture.__name__}.svg"
        assert kept.read_text(encoding="utf-8") == picture().source(), "run python -m docs.builder.pictures"


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A repository of two pages and a picture."""
    monkeypatch.setattr(build, "SECTIONS", {"": ("README.md", "*")})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "dot.svg").write_text("<svg/>")
    (tmp_path / "docs" / "a.md").write_text("# A\n\n## One thing\n\n[back](../README.md), ![a dot](dot.svg)\n")
    (tmp_path / "README.md").write_text("# Title\n\n[a](docs/a.md#one-thing) [b](https://example.org)\n")
    return tmp_path


def test_a_page_that_nobody_named_is_there(small):
    names = [path.relative_to(small / "out").as_posix() for path in build.build(small / "out", small)]
    assert set(names) == {"index.html", "docs/a.html", "benchmarks/results/index.html"}
    page = Found((small / "out" / "docs" / "a.html").read_text())
    assert page.sources == ["data:image/svg+xml;base64,PHN2Zy8+"] and "../index.html" in page.links


@pytest.mark.parametrize(("text", "got"), [
    ("# T\n[x](docs/b.md)", "a link to docs/b.md"), ("# T\n[x](docs/a.md#nowhere)", "a link to docs/a.md#nowhere"),
    ("# T\n![x](docs/b.svg)", "a link to docs/b.svg"), ("# T\n![x](docs/a.md)", "a link to docs/a.md"),
    ("# T\n[x](/etc/passwd)", "a link to /etc/passwd"),
    ("no heading", r"\[\], \[\]"), ("# T\n# U", "T.*U"), ("# T\n## A\n## A", "'a', 'a'")])
def test_what_is_wrong_ends_the_build(text, got, small):
    (small / "README.md").write_text(text)
    with pytest.raises(FileError, match=got):
        build.build(small / "out", small)
    assert not (small / "out").exists()


def test_a_named_page_that_is_missing_ends_the_build(small):
    (small / "README.md").unlink()
    with pytest.raises(FileError, match=r"README\.md"):
        build.build(small / "out", small)


def test_markup_in_text_is_text():
    code = "`<i>`\n\n```python\n'<u>' # <s>\n```\n\n    <q>\n"
    page = markdown.parse("a.md", f"# <b>T</b>\n\n<script>x</script>\n\n{code}")
    made = Found(page.html(str, str))
    assert set(made.tags) == {"h1", "p", "code", "pre", "span"} and made.tags["span"] == 2


def test_alignment_is_a_class_and_anchors_are_those_of_github():
    page = markdown.parse("a.md", "# T\n\n## What `it` is, 2!\n\n## 剪定とは\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n")
    assert page.headings == (("what-it-is-2", "What it is, 2!"), ("剪定とは", "剪定とは"))
    made = page.html(str, str)
    assert made.count('class="right"') == 2 and "style" not in made
