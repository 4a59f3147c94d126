"""Charts stand where their numbers say, in shapes that differ without colour."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from sentei.core.errors import SenteiError
from sentei.measurement.charts import Chart, Series, draw


def chart(**changes) -> Chart:
    x, y = (1.0, 10.0, 100.0), (1.0, 0.1, 0.01)
    series = (Series(name="theory", x=x, y=y, expected=True),
              Series(name="seen", x=x, y=y, low=(0.9, 0.09, 0.009), high=(1.1, 0.11, 0.011)))
    return Chart(**{"title": "It falls.", "x": "n", "y": "share", "series": series, "log_x": True, "log_y": True}
                 | changes)


def marks(picture: str, tag: str, kind: str) -> list[dict]:
    found = ElementTree.fromstring(picture).iter(tag)
    return [mark.attrib for mark in found if kind in mark.get("class", "").split()]


def test_a_power_law_is_a_straight_line_on_logarithmic_axes():
    _, *dots = marks(draw(chart()), "circle", "mark")  # the first is the legend's
    (x0, y0), (x1, y1), (x2, y2) = ((float(mark["cx"]), float(mark["cy"])) for mark in dots)
    assert abs((x1 - x0) - (x2 - x1)) < 0.2 and abs((y1 - y0) - (y2 - y1)) < 0.2 and y0 < y1 < y2


def test_intervals_stand_around_their_points():
    picture = draw(chart(log_x=False, log_y=False))
    whiskers, dots = marks(picture, "line", "whisker"), marks(picture, "circle", "mark")[1:]
    assert len(whiskers) == len(dots) == 3
    for whisker, point in zip(whiskers, dots, strict=True):
        assert whisker["x1"] == point["cx"] and float(whisker["y2"]) <= float(point["cy"]) <= float(whisker["y1"])


def test_names_instead_of_numbers():
    series = (Series(name="a", x=(0.0, 1.0), y=(1.0, 2.0)), Series(name="b", x=(0.0, 1.0), y=(2.0, 1.0)))
    picture = draw(chart(series=series, labels=("one", "two"), log_x=False, log_y=False))
    assert ">one<" in picture and ">two<" in picture and "polyline" not in picture
    assert len({mark["cx"] for mark in marks(picture, "circle", "mark")}) == 6  # neighbours do not cover each other


def test_theory_is_dashed_and_has_no_dots():
    picture = draw(chart())
    assert len(marks(picture, "polyline", "expected")) == 1 and len(marks(picture, "circle", "mark")) == 4
    assert "theory: from 1 at 1 to 0.01 at 100" in ElementTree.fromstring(picture).get("aria-label")


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-12, 1e12, 5.0])
def test_any_single_number_can_be_drawn(value):
    picture = draw(chart(series=(Series(name="s", x=(3.0,), y=(value,)),), log_x=False, log_y=False))
    assert not re.search(r"nan|inf", picture)


@pytest.mark.parametrize("make", [
    lambda: Series(name="s", x=(1.0,), y=(1.0, 2.0)), lambda: Series(name="s", x=(1.0,), y=(float("nan"),)),
    lambda: Series(name="s", x=(1.0,), y=(1.0,), low=(1.0,)), lambda: chart(series=()),
    lambda: chart(series=(Series(name="s", x=(0.0,), y=(1.0,)),)),
])
def test_what_cannot_be_drawn_is_refused(make):
    with pytest.raises(SenteiError):
        make()
