"""The report: what it says, that nothing hostile gets through, that its pictures show the numbers they were given."""

import base64
import errno
import hashlib
import os
import re
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree

import pytest
from report_examples import Outline, sample

from sentei.core.errors import ResourceError
from sentei.core.rules import Threshold
from sentei.measurement import drawing, plots, report


def test_sentence_when_met():
    assert report.summary(*sample()) == \
        "SmolLM2-135M-Instruct prefills 4,096 tokens 1.21× faster at 99.1 % of the dense quality."


@pytest.mark.parametrize(("changes", "end"), [
    pytest.param({"quality": 0.9846}, "at 98.5 % of the dense quality, where 99 % was asked.", id="quality"),
    pytest.param({"quality": 0.98996}, "at 98.996 % of the dense quality, where 99 % was asked.", id="just below"),
    pytest.param({"goal": {"speed": 1.5}}, "at 99.1 % of the dense quality, where 1.5× was asked.", id="speed"),
    pytest.param({"speedup": 0.93}, "tokens at 0.93× the dense speed, which is slower, at 99.1 % of the dense quality, "
                 "where 99 % was asked.", id="slower"),
    pytest.param({"workload": "train:9"}, "Instruct runs train:9 1.21× faster at 99.1 % of the dense quality, "
                 "where 99 % was asked.", id="another workload"),
])
def test_sentence_when_not_met(changes, end):
    assert report.summary(*sample(met=False, **changes)).endswith(end)


def test_the_plan_is_told_in_words_and_each_room_s_option():
    gone = {"layer": 3, "room": "depth", "option": "no network", "rule": {"name": "fixed", "ids": []}, "density": 0.0}
    page = "".join(Outline(report.render(*sample(plan=[gone], does=["layers go", "<i>more</i>"]))).words)
    assert "Layers go; <i>more</i>. Mean density" in page and "no network" in page and "fixed" not in page
    assert "mass 0.9" in "".join(Outline(report.render(*sample())).words)


def test_page_says_whether_the_bound_was_met_and_why_not():
    met = report.render(*sample())
    unmet = report.render(*sample(met=False, reason="every plan loses more than 2 points"))
    assert "Bound met" in met and 'class="met"' in met
    assert "Bound not met" in unmet and 'class="unmet"' in unmet and "every plan loses more than 2 points" in unmet


def test_page_shows_every_part():
    page = report.render(*sample())
    words = "".join(Outline(page).words)
    for part in ("14.82", "14.95", "1,047", "98.97–99.25\u00a0%", "1.19–1.23×", "mass 0.9", "4,096 to measure slack",
                 "8,192 to check the bound", "paired", "ab" * 32, "a folder", "2.13.0", "2026-03-02",
                 "sentei prune --workload prefill:4096", "84 s in all", "connections", "plan 3", "(chosen)"):
        assert part in words, part


def test_what_healing_was_chosen_under_and_what_there_is_without_it_is_said():
    result, details = sample()
    healed = {"kept": True, "reason": "", "quality_unhealed": 0.9, "minutes": 10, "table": [],
              "unhealed": {"quality": 0.962, "speedup": 3.14}, "relaxed": {
                  "asked": 0.95, "quality": 0.9292, "share": 0.3,
                  "probe": {"bound": 0.9025, "unhealed": 0.9057, "healed": 0.933, "minutes": 2.41}}}
    page = report.render({**result, "healed": healed}, details).replace("&nbsp;", " ")
    told = "under a bound of 92.9 % in place of 95.0 %: 2.4 of the minutes brought a plan from 90.6 % to 93.3 %"
    assert told in page and "30 % of the nats" in page
    assert "checking the bound was 90.0 % before" in page and "healing: 3.14 times as fast as dense at 96.2 %" in page
    assert told not in report.render({**result, "healed": healed | {"relaxed": None}}, details).replace("&nbsp;", " ")


def test_page_is_well_formed_and_runs_and_loads_nothing():
    page = report.render(*sample())
    outline = Outline(page)
    assert outline.open == []
    tags = {tag for tag, _ in outline.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a", "use", "image"}
    names = {name for _, name, _ in outline.attributes}
    assert not names & {"style", "src", "href", "xlink:href", "srcset", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in page and "@import" not in page and "://" not in page
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label") or root.get("aria-hidden") == "true"


def test_policy_allows_the_style_of_the_page_and_nothing_else():
    page = report.render(*sample())
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert re.search(r'Content-Security-Policy" content="(.*?)"', page)[1] == \
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert page.index("Content-Security-Policy") < page.index("<style>") and page.count("<style>") == 1


HOSTILE = {
    "script": "</script><script>alert(1)</script>", "style": "</style><style>*{display:none}</style>",
    "comment": "<!--<script>", "quotes": "\"'`><b onmouseover=alert(1)>", "image": "<img src=http://127.0.0.1:9/x>",
    "template": "$title ${style} $$ %s {0}", "entity": "&lt;b&gt;&#x0;", "svg": "</title></svg><svg onload=alert(1)>",
    "bidi": "safe\u202egnp.exe\u2066\u200f", "nul": "a\x00b\x1b[31m\x7f\x85", "surrogate": "lone \ud800 half",
    "zero width": "in\u200bvis\u00adible\ufeff\U000e0041", "separators": "one\u2028two\u2029three\ntab\t",
    "long": "x" * 10_000, "right to left": "\u0646\u0645\u0648\u0630\u062c", "emoji": "\U0001f469\u200d\U0001f680",
    "maths": "$\\frac{",
}


def planted(text: str) -> tuple[dict, dict]:
    """A sample with `text` in every place that is a string."""
    result, details = sample(model=text, workload=text, dtype=text, schema=text, reason=text, source=text, command=text,
                             date=text, environment={text: text, "torch": text}, seconds={text: 1.0, "slack": 2.0})
    details["text"] |= {"name": text, "sha256": text, "tokens": {text: 1, "choose": 2, "verify": 3}}
    for each in result["frontier"]:
        each |= {"name": text, "rooms": [text]}
    for entry in result["plan"]:
        entry |= {"room": text, "rule": {"name": text, text: text}}
    result["plan"][0]["rule"] = [text, text, "other"]
    return result, details


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_stays_text(text):
    page = report.render(*planted(text))
    page.encode()
    assert Outline(page).tags == Outline(report.render(*planted("plain"))).tags
    assert not {character for character in page if unicodedata.category(character) in drawing.HIDDEN} - {"\n"}


def test_hidden_characters_are_shown_and_long_text_is_cut():
    assert drawing.visible("a\u202eb\x00c\U000e0041\ud800") == r"a\u202eb\x00c\U000e0041\ud800"
    assert drawing.visible("x" * 10_000) == "x" * 160 + "… (10,000 characters)"


def test_the_command_is_never_cut():
    command = "sentei prune " + "m" * 10_000
    assert f"<pre><code><bdi>{command}</bdi></code></pre>" in report.render(*sample(command=command))


def test_heat_map_shows_every_density():
    rows = [[0.25, 1.0], None, [0.0, 0.5]]
    picture = ElementTree.fromstring(drawing.heat_map(rows))
    cells = picture.findall("rect[@class='cell']")
    assert [float(cell.get("fill-opacity")) for cell in cells] == [0.25, 1.0, 0.0, 0.5]
    assert [cell.find("title").text for cell in cells][2] == "layer 2, head 0: density 0.000"
    (left, top), (right, _), (_, lower), _ = [(float(cell.get("x")), float(cell.get("y"))) for cell in cells]
    assert left < right and top < lower
    assert len(picture.findall("line[@class='unpruned']")) == 1
    assert "lowest 0.00 at layer 2, head 0; highest 1.00 at layer 0, head 1" in picture.get("aria-label")
    assert "1 layer not prunable" in picture.get("aria-label")


def test_curves_put_error_and_density_where_they_belong():
    slack = [{"layer": 0, "options": [{"rule": {}, "density": [1.0], "error": [0.0]},
                                      {"rule": {}, "density": [0.5], "error": [0.01]},
                                      {"rule": {}, "density": [0.0], "error": [1.0]}]}]
    key, panel = map(ElementTree.fromstring, drawing.curve_panels(slack, [[0.5]]))
    assert [text.text for text in key.findall("text")] == ["error 1", "0.01", "density 1"]
    assert panel.find("polyline").get("points") == "102.0,62.0 52.0,62.0 2.0,6.0"
    dot = panel.find("circle[@class='chosen']")
    assert (float(dot.get("cx")), float(dot.get("cy"))) == (52.0, 62.0)


def test_error_at_reads_between_the_points_of_a_curve():
    curve = [(1.0, 0.0), (0.5, 0.2), (0.25, 0.6)]
    assert [drawing.error_at(curve, share) for share in (1.0, 0.75, 0.5, 0.375, 0.1)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.4, 0.6])


def test_ticks_are_round_and_inside():
    assert drawing.ticks(0.97, 1.52, 5) == [1.0, 1.2, 1.4]
    assert drawing.ticks(0.9883, 1.0012, 5) == [0.99, 0.995, 1.0]


@pytest.mark.parametrize(("rule", "words"), [
    ({"name": "mass", "mass": 0.9, "unit": 64}, "mass 0.9, unit 64"), ({"name": "all"}, "all"), ("all", "all"),
    ({"name": "top_k", "k": 8}, "top_k, k 8"),
    ([{"name": "all"}, {"name": "mass", "mass": 0.9}, {"name": "mass", "mass": 0.9}], "mass 0.9 (2); all (1)"),
    ([{"name": "all"}] * 3, "all"),
    ({"name": "mass", "mass": (0.5, 0.25, 0.5)}, "mass 0.5 (2); 0.25 (1)"),
    (Threshold((0.01,) * 8 + (0.02,)).to_json(), "threshold, ratio 0.01 (8); 0.02 (1)"),
], ids=["own parameter", "no parameter", "string", "other parameter", "per head", "per head, equal", "a tuple",
        "a rule of the house"])
def test_rules_in_words(rule, words):
    assert report.rule_words(rule) == words


@pytest.mark.parametrize(("attempts", "words"), [
    (1, "On text the plan was not chosen on."),
    (2, "On held-out text (2 plans were judged on this text: those that did not meet the goal there, or came out no "
        "better, made way)."),
    (11, "(11 plans were judged on this text"),
])
def test_a_plan_that_was_not_the_first_one_tried_says_so(attempts, words):
    result, details = sample()
    assert "the plan was not chosen on." in report.render(result, details)  # a run that does not say is a first try
    page = report.render(result, {**details, "verify_attempts": attempts})
    assert words in page
    assert ("not chosen on" in page) == (attempts == 1)


@pytest.mark.parametrize("changes", [
    {"slack": []}, {"density": []}, {"density": [None] * 4}, {"frontier": []}, {"plan": []}, {"seconds": {}},
    {"environment": {}}, {"timings": {"dense": [], "pruned": []}},
    {"slack": [], "density": [], "frontier": [], "plan": []},
    {"quality_interval": [None, None], "speedup_interval": [None, None]}, {"quality": float("nan")},
], ids=["slack", "density", "no layer prunable", "points", "plan", "seconds", "environment", "timings", "everything",
        "intervals", "not a number"])
def test_missing_data_leaves_a_whole_page(changes):
    page = report.render(*sample(**changes))
    assert Outline(page).open == [] and not re.search(r"\bnan\b", page)


@pytest.mark.parametrize(("changes", "names"), [
    ({"frontier": [], "density": [None] * 4}, []), ({"density": []}, ["frontier"]),
    ({"quality": float("nan")}, ["slack"]),
    ({"slack": [], "quality_interval": [None, None], "speedup_interval": [None, None]}, ["frontier", "slack"]),
], ids=["no points, no layer prunable", "no density", "not a number", "no slack, no intervals"])
def test_plots_without_data_are_left_out(changes, names, tmp_path):
    written = plots.write_plots(tmp_path, *sample(**changes))
    assert sorted(path.name for path in written) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]


def test_hundred_layers_of_sixty_four_heads_stay_small():
    page = report.render(*sample(layers=100, heads=64, unpruned=(3, 97)))
    assert page.count('class="cell"') == 98 * 64 + 11
    assert len(page.encode()) < 3 << 20


def test_files_are_written_and_the_same_every_time(tmp_path):
    first, second = (report.write_report(tmp_path / name, *sample()) for name in "ab")
    folder = tmp_path / "a"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == ["plots/frontier.png", "plots/frontier.svg", "plots/slack.png", "plots/slack.svg", "report.html"]
    assert first == folder / "report.html" and second == tmp_path / "b" / "report.html"
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for name in ("frontier", "slack"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        words = " ".join(ElementTree.parse(folder / "plots" / f"{name}.svg").getroot().itertext())
        assert {"frontier": "bound 99 %", "slack": "density of the chosen plan"}[name] in words


@pytest.mark.parametrize("changes", [{}, {"frontier": [], "density": []}], ids=["in the plots", "in the page"])
def test_full_disk_leaves_nothing_half_written(changes, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResourceError, match="full disk"):
        report.write_report(tmp_path, *sample(**changes))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_importing_the_report_leaves_matplotlib_alone():
    code = "import sys, sentei.measurement.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          check=False).returncode == 0


def luminance(colour: str) -> float:
    channels = (int(colour[place:place + 2], 16) / 255 for place in (1, 3, 5))
    return sum(weight * (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
               for weight, value in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "muted", "indigo", "vermilion"])
def test_text_colours_have_contrast(scheme, name):
    blocks = re.findall(r":root \{(.*?)\}", report.render(*sample()), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme]))
    light, dark = sorted((luminance(colours[name]), luminance(colours["paper"])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, success criterion 1.4.3
