"""The page of the lab: all on it is text, its policy allows its own style alone, its pictures are well formed."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from circuits import HOSTILE
from lab.test_finding import finding
from terminal import four_parts, last_error

from sentei.lab import page
from sentei.lab.finding import counted, measured
from sentei.lab.records import keep, kept, to_record
from sentei.lab.table import CLAIMS
from sentei.measurement.charts import Chart, Series

NAMES = list(CLAIMS)


class Tags(HTMLParser):
    """The tags of a page with their attributes' names, and its text."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text.append(data)


def read(text: str) -> Tags:
    parser = Tags()
    parser.feed(text)
    return parser


def planted(word: str):
    """A finding with `word` wherever a string may stand."""
    chart = Chart(title=word, x=word, y=word, labels=(word, "b"), series=(
        Series(name=word, x=(0.0, 1.0), y=(1.0, 2.0), low=(0.5, 1.5), high=(1.5, 2.5)),))
    return finding(counted(word, 1.0, 1.0), claim=word, rows=({word: word},), charts=(chart,), within=word,
                   notes=(word,))


@pytest.mark.parametrize("word", [word for word in HOSTILE if word != "\ud800"], ids=ascii)
def test_strangers_are_text(word, tmp_path):
    for text, folder in (("plain", tmp_path / "a"), (word, tmp_path / "b")):
        keep(to_record(NAMES[0], planted(text), 1.0), folder)
        page.write(folder)
    plain, hostile = (read(page.path(tmp_path / name).read_text(encoding="utf-8")) for name in "ab")
    assert hostile.tags == plain.tags
    assert len([tag for tag, _ in hostile.tags if tag == "script"]) == 0


def test_the_policy_allows_the_style_and_nothing_else(tmp_path):
    keep(to_record(NAMES[0], finding(), 1.0), tmp_path)
    page.write(tmp_path)
    text = page.path(tmp_path).read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "style" not in {name for _, names in read(text).tags for name in names}
    assert not re.search(r"https?://|\burl\(|@import", text)


def test_pictures_are_files_of_their_own(tmp_path):
    keep(to_record(NAMES[1], finding(), 1.0), tmp_path)
    page.write(tmp_path)
    found = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert found == [f"{NAMES[1]}-1.svg", f"{NAMES[1]}-2.svg"]
    for name in found:
        root = ElementTree.parse(tmp_path / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "--indigo" in root[0].text


def test_the_page_keeps_what_was_measured_before(tmp_path):
    good, bad = finding(), finding(measured("it is", (1.0, 1.0, 1.0), least=2))
    for name, found in ((NAMES[3], bad), (NAMES[0], good)):
        keep(to_record(name, found, 2.0), tmp_path)
        page.write(tmp_path)
    assert list(kept(tmp_path)) == [NAMES[0], NAMES[3]]
    text = "".join(read(page.path(tmp_path).read_text(encoding="utf-8")).text)
    assert "1 of 2 claims" in text and "does not hold" in text and "4 s" in text


def test_the_command_prints_a_table_a_verdict_and_a_page(sentei, tmp_path):
    done = sentei("lab", "one-structure", "--out", tmp_path)
    assert done.returncode == 0 and done.stdout.rstrip().splitlines()[-1].startswith("The claim holds: ")
    assert done.stdout.startswith("one-structure: Attention and a mixture") and page.path(tmp_path).is_file()
    again = sentei("lab", "one-structure", "--out", tmp_path, "--json").stdout
    lines = list(map(json.loads, again.splitlines()))
    assert {line["claim"] for line in lines} == {"one-structure"} and lines[-1]["verdict"] == "holds"
    assert len(lines) == 7 and all(line["largest difference"] < 1e-12 for line in lines[:-1])
    assert lines[-1]["page"] == str(page.path(tmp_path))


def test_an_unknown_claim_is_told_the_known_ones(sentei, tmp_path):
    done = sentei("lab", "snr", "flatness", "--out", tmp_path)
    parts = last_error(done.stderr)
    assert done.returncode == 2 and parts["got"] == "flatness" and "orthogonality" in parts["expected"]
    assert not list(tmp_path.iterdir())


def changed(change) -> str:
    """A record of "snr" after a change, as text."""
    record = to_record("snr", finding(), 1.0)
    change(record)
    return json.dumps(record)


BROKEN = {
    "nothing": "{}", "a part": changed(lambda record: None)[:-9], "a list": "[]", "no text": "\0",
    "another schema": changed(lambda record: record.update(schema="sentei.lab/0")),
    "another claim": changed(lambda record: record.update(name="savings")),
    "no finding": changed(lambda record: record.pop("finding")),
    "half a finding": changed(lambda record: record["finding"].pop("rows")),
    "no seconds": changed(lambda record: record.pop("seconds")),
    "no number": changed(lambda record: record.update(seconds="long")),
    "no date": changed(lambda record: record.pop("date")),
    "no machine": changed(lambda record: record.update(environment=[])),
    "a label less": changed(lambda record: record["finding"]["charts"][0].update(labels=["one"])),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("asked", ["one-structure", "snr"])
def test_a_broken_record_is_refused_before_anything_is_measured(text, asked, sentei, tmp_path):
    (tmp_path / "snr.json").write_text(text)
    done = sentei("lab", asked, "--out", tmp_path)
    parts = four_parts(done.stderr)  # no stage has begun
    assert (done.returncode, done.stdout, parts["error"]) == (3, "", str(tmp_path / "snr.json"))
    assert parts["do this"] == "remove it, or name another folder with --out"
    assert [path.name for path in tmp_path.iterdir()] == ["snr.json"] and (tmp_path / "snr.json").read_text() == text


def test_whole_records_are_no_hindrance(sentei, tmp_path):
    for name in NAMES:
        keep(to_record(name, finding(), 1.0), tmp_path)
    done = sentei("lab", "one-structure", "--out", tmp_path)
    assert done.returncode == 0 and kept(tmp_path)["one-structure"][1].rows != finding().rows


@pytest.mark.parametrize("way", ["page is a folder", "record is a folder", "out is a file", "out is below one"])
def test_what_cannot_be_written_is_found_out_before_anything_is_measured(way, sentei, tmp_path):
    out, at = tmp_path / "out", {"page is a folder": "out/lab.html", "record is a folder": "out/snr.json",
                                 "out is a file": "out", "out is below one": "out/below"}[way]
    if way.startswith("out"):
        out.write_text("a file")
        out = tmp_path / at
    else:
        (tmp_path / at).mkdir(parents=True)
    done = sentei("lab", "snr", "one-structure", "--out", out)
    assert (done.returncode, done.stdout) == (4, "") and four_parts(done.stderr)["error"] == str(tmp_path / at)
