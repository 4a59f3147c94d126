"""The page of the lab in a real Chromium: nothing refused, nothing asked for, nothing wider than its window."""

import json

import pytest
from browser import CHROMIUM, Browser
from lab.test_page import NAMES, planted

from sentei.lab import page
from sentei.lab.records import keep, to_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
NOISE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Audits.issueAdded")


@pytest.fixture
def written(tmp_path):
    for name in NAMES[:3]:
        keep(to_record(name, planted("</script><script>alert(1)</script> plain"), 1.0), tmp_path / "out")
    page.write(tmp_path / "out")
    return page.path(tmp_path / "out")


@pytest.mark.parametrize("width", [390, 1280])
def test_silence(width, written, tmp_path):
    with Browser(tmp_path, (width, 900)) as browser:
        browser.open(written.as_uri())
        asked = {event["request"]["url"] for event in browser.told("Network.requestWillBeSent")}
        assert browser.told(*NOISE) == [] and asked == {written.as_uri()}
        assert browser.run("document.documentElement.scrollWidth") <= width
        curve = browser.run("getComputedStyle(document.querySelector('.mark.s0')).stroke")
        assert curve not in ("none", "rgb(0, 0, 0)")


def test_noise_would_be_heard(written, tmp_path):
    written.write_text(written.read_text(encoding="utf-8").replace("</style>", " </style>"), encoding="utf-8")
    with Browser(tmp_path, (1280, 900)) as browser:
        browser.open(written.as_uri())
        assert any("Content Security Policy" in json.dumps(event) for event in browser.told(*NOISE))
