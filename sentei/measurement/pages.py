"""What every page is made of: its parts as HTML, its style, and a policy that allows that style and nothing else.

Strings that came from a model, a file or a user pass through `words`, which shows hidden characters and escapes the
rest; the other arguments are HTML already.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from sentei.measurement.drawing import LABEL_LIMIT, visible

STYLE = ("<style>", "</style>")


def words(value: object, limit: int | None = LABEL_LIMIT) -> str:
    """Any string, safe in HTML text, its direction kept to itself, its per cent signs kept with their numbers."""
    return f"<bdi>{escape(visible(value, limit)).replace(' %', '&nbsp;%')}</bdi>"


def section(title: str, text: str, *parts: str) -> str:
    """A part of the page under its title, a sentence before the rest."""
    return f"<section>\n<h2>{title}</h2>\n<p>{text}</p>\n{''.join(parts)}\n</section>"


def row(first: str, *cells: str, kind: str = "") -> str:
    """A row of a table, of a class `kind`."""
    return f'<tr class="{kind}"><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def table(head: Sequence[str], rows: Iterable[str], caption: str = "", kind: str = "") -> str:
    """A table whose first column is its row headers; cells and heads are HTML already."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    above = f"<caption>{caption}</caption>" if caption else ""
    return f'<table class="{kind}">{above}<thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for."""
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in items)}</dl>"


def style() -> str:
    """The style of every page, light, dark and in print."""
    return _template().split(STYLE[0])[1].split(STYLE[1])[0]


def fill(**parts: str) -> str:
    """The page: title, state (a class of the body), kicker, sentence, verdict, sections and footer, all HTML."""
    digest = base64.b64encode(hashlib.sha256(style().encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return Template(_template()).substitute(policy=policy, **parts)


def _template() -> str:
    return resources.files("sentei.measurement").joinpath("report.html").read_text(encoding="utf-8")
