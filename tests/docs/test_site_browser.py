"""The documentation's site in a real Chromium: silent, nothing wider than its window, light and dark."""

import json
import re

import pytest
from browser import CHROMIUM, Browser

from docs.builder import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

NOISE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Audits.issueAdded")
PAPER = {"light": "rgb(253, 252, 250)", "dark": "rgb(22, 24, 27)"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, as files."""
    out = tmp_path_factory.mktemp("site")
    return [path for path in build.build(out) if "results/" not in path.as_posix() or path.name == "index.html"]


@pytest.mark.parametrize("width", [1440, 1000, 390])
@pytest.mark.parametrize("scheme", PAPER)
def test_every_page_is_silent_and_fits(site, width, scheme, tmp_path):
    with Browser(tmp_path, (width, 900)) as browser:
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for path in site:
            browser.open(path.as_uri(), f"document.readyState === 'complete' && location.href.endsWith('{path.name}')")
            asked = {event["request"]["url"] for event in browser.told("Network.requestWillBeSent")}
            assert not [url for url in asked if not re.match(r"file:|data:", url)], path
            assert browser.told(*NOISE) == [], path
            assert browser.run("document.documentElement.scrollWidth") <= width, path
            assert browser.run("getComputedStyle(document.documentElement).backgroundColor") == PAPER[scheme]
            loaded = "[...document.images].every((one) => one.complete && one.naturalWidth > 0)"
            assert browser.run(loaded), path


def test_noise_and_width_would_be_seen(site, tmp_path):
    page = tmp_path / "page.html"
    text = site[0].read_text(encoding="utf-8")
    page.write_text(text.replace("</style>", " </style>").replace("<main>", '<main><pre style="width: 3000px">x</pre>'))
    with Browser(tmp_path, (390, 900)) as browser:
        browser.open(page.as_uri())
        assert any("Content Security Policy" in json.dumps(event) for event in browser.told(*NOISE))
        assert browser.run("getComputedStyle(document.documentElement).backgroundColor") != PAPER["light"]
