"""The report in a real Chromium: nothing refused, nothing asked for, nothing wider than a phone.

Each test that expects silence has a twin that makes the noise on purpose, so that silence means something.
"""

import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from measurement.test_report import HOSTILE, planted, sample

from sentei.measurement import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-default-apps", "--hide-scrollbars",
         "--enable-logging=stderr")
BROWSER = "not an origin"  # what the network log calls a request of the browser itself

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


@pytest.fixture
def browse(tmp_path):
    """Opens a page and returns its document as HTML, the lines of its console, and the addresses it asked for."""

    def run(page: Path, *flags: str) -> tuple[str, list[str], set[str]]:
        log = tmp_path / "net.json"
        done = subprocess.run(
            [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}",
             "--virtual-time-budget=3000", *flags, "--dump-dom", page.as_uri()],
            capture_output=True, timeout=120, check=True)
        console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
        events = json.loads(log.read_text(encoding="utf-8"))["events"]
        wishes = [event["params"] for event in events if "url" in event.get("params", {})]
        asked = {wish["url"] for wish in wishes if wish.get("initiator", BROWSER) != BROWSER}
        return done.stdout.decode(errors="replace"), console, asked

    return run


@pytest.fixture
def write(tmp_path):
    """Writes the page of a result and its details, without the plots beside it."""

    def page(result: dict, details: dict) -> Path:
        path = tmp_path / "report.html"
        path.write_text(report.render(result, details), encoding="utf-8")
        return path

    return page


@pytest.fixture
def listener():
    """The address of a local server and the list of the paths it was asked for."""
    paths = []

    class Listen(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 (the name http.server looks for)
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            """Nothing on the terminal of the tests."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listen)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


def measured(page: Path, *widths: int) -> Path:
    """A page that shows `page` in frames of these widths in pixels and writes down what it measures in each."""
    frames = "".join(f'<iframe width="{width}" height="800" src="{page.as_uri()}"></iframe>' for width in widths)
    path = page.with_name("frames.html")
    path.write_text(f"""<!doctype html>{frames}<p id="found"></p><script>
window.onload = () => {{
  const seen = [...document.querySelectorAll("iframe")].map((frame) => {{
    const inside = frame.contentDocument;
    inside.querySelectorAll("details").forEach((one) => {{ one.open = true; }});
    const boxes = [...inside.querySelectorAll("svg")].map((one) => one.getBoundingClientRect());
    return {{
      wide: inside.documentElement.scrollWidth,
      pictures: boxes.filter((box) => box.width > 0 && box.height > 0).length,
      cells: inside.querySelectorAll(".heat:not(.scale) .cell").length,
      background: getComputedStyle(inside.documentElement).backgroundColor,
    }};
  }});
  document.getElementById("found").textContent = JSON.stringify(seen);
}};
</script>""", encoding="utf-8")
    return path


def found(document: str) -> list[dict]:
    return json.loads(re.search(r'<p id="found">(.*?)</p>', document)[1])


PAGES = {"plain": sample, "not met": lambda: sample(met=False, quality=0.95, reason="too slow"),
         "large": lambda: sample(layers=100, heads=64), "hostile": lambda: sample(environment=HOSTILE),
         "long names": lambda: planted("x" * 10_000)}


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES.keys())
def test_page_is_silent(make, write, browse):
    document, console, asked = browse(write(*make()))
    assert "</footer>" in document
    assert console == []
    assert asked == set()


def test_noise_would_be_heard(write, browse, listener):
    address, paths = listener
    page = write(*sample())
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<main>", f'<main><script>1</script><img src="{address}/refused">'), encoding="utf-8")
    _, console, _ = browse(page)
    assert len([line for line in console if "Content Security Policy" in line]) == 2 and paths == []
    page.write_text(re.sub(r"<meta http-equiv[^>]*>", f'<img src="{address}/asked">', text), encoding="utf-8")
    _, _, asked = browse(page)
    assert f"{address}/asked" in asked and "/asked" in paths


def test_style_of_another_page_is_refused(write, browse):
    page = write(*sample())
    page.write_text(page.read_text(encoding="utf-8").replace("</style>", " </style>"), encoding="utf-8")
    assert "Content Security Policy" in " ".join(browse(page)[1])


def test_hostile_names_ask_for_nothing(write, browse, listener):
    address, paths = listener
    image = f'"><img src="{address}/a"><style>@import url({address}/b);</style><link rel=stylesheet href={address}/c>'
    _, console, asked = browse(write(*planted(image)))
    assert paths == [] and asked == set() and console == []


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES.keys())
def test_page_fits_its_width(make, write, browse):
    widths = (360, 390, 768, 1200)
    document, console, _ = browse(measured(write(*make()), *widths), "--allow-file-access-from-files")
    assert console == []
    cells = sum(len(row or ()) for row in make()[1]["density"])
    for width, seen in zip(widths, found(document), strict=True):
        assert seen["wide"] <= width, width
        assert seen["cells"] == cells and seen["pictures"] >= 6


@pytest.mark.parametrize(("preferred", "background"), [(1, "rgb(253, 252, 250)"), (0, "rgb(22, 24, 27)")],
                         ids=["light", "dark"])
def test_page_follows_the_colour_scheme(preferred, background, write, browse):
    document, _, _ = browse(measured(write(*sample()), 800), "--allow-file-access-from-files",
                            f"--blink-settings=preferredColorScheme={preferred}")
    assert [seen["background"] for seen in found(document)] == [background]
