"""One page: its Markdown as tokens, what it is called, and its HTML once links and pictures have an address."""

import html
import io
import re
import tokenize
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

from sentei.core.errors import FileError

READER = MarkdownIt("commonmark", {"html": False}).enable("table")


@dataclass(frozen=True)
class Page:
    """A page of the repository.

    Args:
        path: from the repository's root.
        title: its first heading.
        headings: those of the second level, as an anchor and a text.
        tokens: of markdown-it.
    """

    path: str
    title: str
    headings: tuple[tuple[str, str], ...]
    tokens: list[Token]

    @property
    def language(self) -> str:
        """ "ja" for NAME.ja.md, else "en"."""
        return "ja" if self.path.endswith(".ja.md") else "en"

    def blocks(self) -> list[tuple[str, str, int]]:
        """Its code: the language of a fence ("" if it names none), the text, and the line it begins in."""
        return [(token.info, token.content, token.map[0] + 1) for token in self.tokens
                if token.type in ("fence", "code_block")]

    def html(self, link: Callable[[str], str], picture: Callable[[str], str]) -> str:
        """Its body, with the addresses that `link` and `picture` give for those of the Markdown."""
        for token in _all(self.tokens):
            if token.type == "link_open":
                target = str(token.attrGet("href"))
                token.attrSet("href", link(target))
                if target.endswith(".ja.md"):
                    token.attrSet("hreflang", "ja")
            elif token.type == "image":
                token.attrSet("src", picture(str(token.attrGet("src"))))
        body = READER.renderer.render(self.tokens, READER.options, {})
        return body.replace("<table>", '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
                            ).replace("</table>", "</table></div>")


def parse(path: str, text: str) -> Page:
    """A page of a text.

    Raises:
        FileError: no heading, more than one of the first level, or two with one anchor.
    """
    tokens = READER.parse(text)
    titles, headings = [], []
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            words = _plain(tokens[place + 1])
            token.attrSet("id", slug(words))
            if token.tag == "h1":
                titles.append(words)
            else:
                headings.append((token.tag, slug(words), words))
        # A policy that allows one style by its hash allows no style attributes.
        if token.attrs.get("style"):
            token.attrs["class"] = str(token.attrs.pop("style")).rpartition(":")[2]
    anchors = [anchor for _, anchor, _ in headings]
    if len(titles) != 1 or len(set(anchors)) < len(anchors):
        raise FileError(path, expected="one heading of the first level, and no two alike", got=f"{titles}, {anchors}",
                        do="correct the headings")
    return Page(path=path, title=titles[0], tokens=tokens,
                headings=tuple((anchor, words) for tag, anchor, words in headings if tag == "h2"))


def slug(words: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    kept = [character for character in words.lower() if character in " -_"
            or unicodedata.category(character)[0] in "LNM"]
    return "".join(kept).replace(" ", "-")


def _all(tokens: list[Token]) -> list[Token]:
    return [each for token in tokens for each in (token, *_all(token.children or []))]


def _plain(inline: Token) -> str:
    return "".join(token.content for token in inline.children or [] if token.type in ("text", "code_inline"))


def _coloured(code: str) -> str:
    """Python as HTML, with its comments and strings marked; other text, or Python that cannot be read, as it is."""
    marks, lines = [], code.splitlines(keepends=True)
    starts = [sum(map(len, lines[:row])) for row in range(len(lines) + 1)]
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            kind = {tokenize.COMMENT: "comment", tokenize.STRING: "string"}.get(token.type)
            if kind:
                (row, column), (last, end) = token.start, token.end
                marks.append((starts[row - 1] + column, starts[last - 1] + end, kind))
    except (tokenize.TokenError, SyntaxError):
        return html.escape(code)
    parts, done = [], 0
    for start, stop, kind in marks:
        parts += [html.escape(code[done:start]), f'<span class="{kind}">{html.escape(code[start:stop])}</span>']
        done = stop
    return "".join(parts) + html.escape(code[done:])


def _fence(tokens: list[Token], index: int, *_: object) -> str:
    token = tokens[index]
    if token.info == "python":
        return f"<pre><code>{_coloured(token.content)}</code></pre>\n"
    shell = re.sub(r"(?m)(?<=\S)( +#.*)$", r'<span class="comment">\1</span>', html.escape(token.content, quote=False))
    return f"<pre><code>{shell}</code></pre>\n"


READER.renderer.rules["fence"] = READER.renderer.rules["code_block"] = _fence
