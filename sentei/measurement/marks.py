"""The marks a picture is made of, as SVG: they carry classes and no colours, which are the page's."""

from html import escape


def svg(width: float, height: float, label: str, marks: list[str], kind: str) -> str:
    """A picture of a class `kind`, with its description for those who do not see it."""
    return (f'<svg class="{kind}" viewBox="0 0 {width:.6g} {height:.6g}" width="{width:.6g}" height="{height:.6g}" '
            f'role="img" aria-label="{escape(label)}">{"".join(marks)}</svg>')


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text, escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def dot(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    """A disc, with a title that is shown where one points at it."""
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inside}</circle>'
