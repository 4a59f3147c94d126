"""The Japanese pages say what their originals say: the same code, tables of the same numbers, the same links."""

import re
from collections import Counter

import pytest
from documents import ROOT

from docs.builder.markdown import Page, parse

PAIRS = [("README.md", "README.ja.md"), ("docs/idea.md", "docs/idea.ja.md")]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def page(path: str) -> Page:
    return parse(path, (ROOT / path).read_text(encoding="utf-8"))


def rows(found: Page) -> list[list[Counter]]:
    """The numbers in every cell of every row of every table, in order."""
    table, result = False, []
    for token in found.tokens:
        table = token.type == "tr_open" or (table and token.type != "tr_close")
        if token.type == "tr_open":
            result.append([])
        elif table and token.type == "inline":
            result[-1].append(Counter(NUMBER.findall(token.content)))
    return result


def long_numbers(found: Page) -> Counter:
    """The numbers of all prose that are no words in either language: of three digits or more, or with a point."""
    text = " ".join(token.content for token in found.tokens if token.type == "inline")
    return Counter(number for number in NUMBER.findall(text) if len(number) > 2)


def targets(found: Page) -> Counter:
    """Where the links and pictures lead, a translation counted as its original."""
    inside = [child for token in found.tokens for child in token.children or []]
    told = [child.attrGet("href") or child.attrGet("src") for child in inside if child.type in ("link_open", "image")]
    return Counter(str(target).replace(".ja.md", ".md") for target in told)


def compare(one: Page, other: Page) -> None:
    """Raises where two pages differ in what a translation leaves alone."""
    same = [block[:2] for block in one.blocks()] == [block[:2] for block in other.blocks()]
    assert same, f"copy the code blocks of {one.path} into {other.path}"
    assert [token.tag for token in one.tokens if token.type == "heading_open"] == [
        token.tag for token in other.tokens if token.type == "heading_open"]
    assert rows(one) == rows(other)
    assert long_numbers(one) == long_numbers(other)
    own = Counter([one.path.rpartition("/")[2]])  # each leads to the other
    assert targets(one) - own == targets(other) - own and (targets(one) & own) == (targets(other) & own) == own


@pytest.mark.parametrize(("original", "translation"), PAIRS)
def test_a_translation_has_the_code_numbers_and_links_of_its_original(original, translation):
    compare(page(original), page(translation))


@pytest.mark.parametrize(("old", "new"), [
    ("max_new_tokens=32", "max_new_tokens=33"), ("| 30.7 |", "| 30.8 |"), ("**8.52**", "**8.53**"), ("1.9 %", "1.8 %"),
    ("](LOG.md)", "](CHANGELOG.md)"), ("\n## ", "\n### "), ("(README.md)", "(LOG.md)")])
def test_drift_is_seen(old, new):
    text = (ROOT / "README.ja.md").read_text(encoding="utf-8").replace("0.9 %（", "1.9 %（")
    english = (ROOT / "README.md").read_text(encoding="utf-8").replace("read 0.9 %", "read 1.9 %")
    assert old in text and text.replace(old, new) != text
    compare(parse("README.md", english), parse("README.ja.md", text))
    with pytest.raises(AssertionError):
        compare(parse("README.md", english), parse("README.ja.md", text.replace(old, new, 1)))


def test_a_translation_is_japanese():
    for _, path in PAIRS:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert len(re.findall(r"[\u3040-\u30ff]", text)) > 1000, path
