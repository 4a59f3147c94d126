"""A headless Chromium that a test can lead: the DevTools protocol over a pair of pipes, with nothing to install."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

from sentei.circuit.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-default-apps", "--hide-scrollbars",
         "--remote-debugging-pipe")
TIMEOUT = 60.0
DRAWN = "document.documentElement && document.documentElement.dataset.drawn"  # of the circuit page
LINE = "document.getElementById('line').textContent"
KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Home": 36,
             "End": 35, "PageUp": 33, "PageDown": 34, "Tab": 9}


class Browser:
    """One tab. `events` holds what the page has done since it was opened: console lines, errors, requests, violations.

    Args:
        folder: for the profile.
        size: of the window in CSS pixels.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1440, 900)):
        theirs_in, self.out = os.pipe()
        self.inside, theirs_out = os.pipe()
        # sh gives the browser its ends as 3 and 4, whatever numbers they have here.
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        flags = (*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}", "about:blank")
        self.process = subprocess.Popen(["bash", "-c", command, "sh", CHROMIUM, *flags], stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, pass_fds=(theirs_in, theirs_out))
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.waiting, self.events, self.session = 0, b"", [], None
        page = next(target for target in self.send("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                  mobile=False)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.out)
        os.close(self.inside)

    def send(self, method: str, **parameters) -> dict:
        """The result of one command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        number, until = self.number, time.monotonic() + TIMEOUT
        while True:
            answer = self.read(until)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def read(self, until: float) -> dict:
        """The next message; events are put by."""
        while b"\0" not in self.waiting:
            assert select.select([self.inside], [], [], max(0, until - time.monotonic()))[0], "the browser is silent"
            part = os.read(self.inside, 1 << 20)
            assert part, "the browser is gone"
            self.waiting += part
        raw, self.waiting = self.waiting.split(b"\0", 1)
        message = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, address: str, ready: str = "document.readyState === 'complete'") -> None:
        """Opens a page and waits until the expression `ready` is true."""
        self.events.clear()
        self.send("Page.navigate", url=address)
        self.until(f"location.href !== 'about:blank' && ({ready})")

    def until(self, expression: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def run(self, expression: str) -> object:
        """The value of an expression in the page; the page's policy does not bind the protocol."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        """Presses and lets go a key."""
        text = {"text": name} if len(name) == 1 else {}
        code = KEY_CODES.get(name, 0)
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code,
                      **(text if kind == "keyDown" else {}))

    def mouse(self, x: float, y: float, *, click: bool = False) -> None:
        """Moves the mouse to a point of the window, and clicks there."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def shot(self, path: Path, *, whole: bool = True) -> None:
        """Writes a picture of the page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}} if whole else {}
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def told(self, *methods: str) -> list[dict]:
        """The events of these methods, e.g. "Runtime.consoleAPICalled"."""
        return [event["params"] for event in self.events if event["method"] in methods]


def show(browser: Browser, folder: Path, circuit, fragment: str = "", *, change=lambda text: text) -> None:
    """Opens the page of a circuit."""
    path = folder / "circuit.html"
    path.write_text(change(render(circuit)), encoding="utf-8")
    browser.open(path.as_uri() + fragment, DRAWN)
