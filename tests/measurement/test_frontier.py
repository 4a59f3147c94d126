"""The plot of quality against speed: measured and foreseen are told apart, in picture, text and table."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from report_examples import Outline, point, sample

from sentei.measurement import drawing, plots, report


def frontier_of(**changes) -> ElementTree.Element:
    result, details = sample(**changes)
    return ElementTree.fromstring(drawing.frontier(drawing.drawable(result["frontier"]), result, details, 860))


def test_frontier_marks_the_points_the_choice_and_the_bound():
    picture = frontier_of()
    assert len(picture.findall("circle[@class='tried hollow']")) == 4
    assert len(picture.findall("path[@class='below hollow']")) == 1
    measured, ring, bound = (picture.find(f"*[@class='{kind}']") for kind in ("chosen", "ring", "bound"))
    assert float(measured.get("cx")) > float(ring.get("cx")) > float(picture.find("circle[@class='dense']").get("cx"))
    assert bound.get("y1") == bound.get("y2") and float(measured.get("cy")) < float(bound.get("y1"))
    assert len(picture.findall("line[@class='interval']")) == 2


def test_what_is_foreseen_is_drawn_apart_from_what_is_measured_and_the_axis_says_so():
    picture = frontier_of()
    assert [each.find("title").text for each in picture.findall("circle[@class='tried']")] == [
        "beside: 1.05× as measured, quality 99.0 %, density 0.10"]
    assert all("as foreseen" in each.find("title").text for each in picture.findall("circle[@class='tried hollow']"))
    assert "speed-up: ● measured  ○ foreseen  →" in [each.text for each in picture.findall("text")]
    assert "of 2 the speed-up was measured" in picture.get("aria-label")
    front = picture.find("polyline").get("points").split()
    assert len(front) == 5, "of the hollow points alone"


def test_the_page_tells_what_was_proved_and_which_speeds_are_foreseen():
    page = "".join(Outline(report.render(*sample())).words)
    assert "Proved beside the chosen plan, measured: depth and weights 1.05× at 99.0 %." in page
    assert re.search(r"beside\s*1\.050×\s*measured\s*99\.0 %\s*verify", page)
    assert re.search(r"plan 3\s*1\.300×\s*foreseen\s*98\.8 %\s*choose", page)
    assert "Arrows on the lower edge" in page
    assert "Proved beside" not in report.render(*sample(frontier=[point("a", 1.0, 1.1)]))


def test_the_plot_s_legend_tells_them_apart(tmp_path):
    plots.write_plots(tmp_path, *sample())
    words = " ".join(ElementTree.parse(tmp_path / "frontier.svg").getroot().itertext())
    for told in ("tried, speed-up foreseen", "tried, speed-up measured", "below the picture, foreseen"):
        assert told in words
    assert "below the picture, measured" not in words


def test_frontier_keeps_wide_intervals_inside_the_picture():
    picture = frontier_of(quality_interval=[0.2, 3.0], speedup_interval=[0.1, 9.0])
    _, _, width, height = map(float, picture.get("viewBox").split())
    for line in picture.findall("line[@class='interval']"):
        assert all(0 <= float(line.get(end)) <= width for end in ("x1", "x2"))
        assert all(0 <= float(line.get(end)) <= height for end in ("y1", "y2"))


def test_frontier_draws_a_speed_bound_upright():
    bound = frontier_of(goal={"speed": 1.5}).find("line[@class='bound']")
    assert bound.get("x1") == bound.get("x2")


@pytest.mark.parametrize(("quality", "above"), [(0.9901, True), (0.9899, False)])
def test_frontier_measured_point_lies_on_its_side_of_the_bound(quality, above):
    picture = frontier_of(quality=quality)
    measured, bound = picture.find("circle[@class='chosen']"), picture.find("line[@class='bound']")
    assert (float(measured.get("cy")) < float(bound.get("y1"))) is above


def test_undominated_keeps_what_nothing_beats():
    spots = [(1.0, 1.0), (1.2, 0.98), (1.1, 0.97), (1.3, 0.99), (1.3, 0.90)]
    points = [{"speedup": speed, "quality": quality} for speed, quality in spots]
    assert [(point["speedup"], point["quality"]) for point in drawing.undominated(points)] == [(1.0, 1.0), (1.3, 0.99)]
