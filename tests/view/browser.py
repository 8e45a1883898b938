"""A headless Chromium, driven through chromedriver with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs chromium and chromedriver: apt-get install chromium chromium-driver"

# Every chart that is in view has been drawn.
DRAWN = """[...cards.values()].every((card) =>
  card.element.hidden || !card.visible || (!card.stale && card.chart.querySelector('.main-svg')))"""


class Browser:
    """One browser window. Pages are local files; the network is cut off, so a page that needs it shows its errors."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._driver = subprocess.Popen([DRIVER, f"--port={port}", "--log-level=SEVERE"], stdout=subprocess.DEVNULL)
        self._url = f"http://127.0.0.1:{port}"
        try:
            self._wait_for_driver()
            arguments = [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--disable-dev-shm-usage",
            ]
            arguments += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
            options = {"binary": CHROMIUM, "args": arguments}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._url += f"/session/{session['sessionId']}"
        except BaseException:
            self._driver.kill()
            raise

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + 20
        while not self._answers():
            assert time.monotonic() < deadline, "chromedriver didn't start"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return bool(self._call("GET", "/status")["ready"])
        except OSError:
            return False

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def resize(self, width: int, height: int) -> None:
        """Give the page's viewport a size in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, value: str) -> None:
        """Ask for a "dark" or "light" page, as a system's setting does."""
        self._devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": value}]})

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path | str) -> None:
        """Open a report, or a URL, and wait until the charts that are in view are drawn."""
        self._call("POST", "/url", {"url": page if isinstance(page, str) else page.absolute().as_uri()})
        self.wait("document.body.dataset.drawn === 'yes'")
        self.wait(DRAWN)

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression holds."""
        deadline = time.monotonic() + 120
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < deadline, f"never came true: {condition}; the console: {self.console()}"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """Run JavaScript and give back what it returns; promises are awaited."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        """Click the first element that the selector finds."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def console(self) -> list[str]:
        """Give the warnings and errors that the page has written since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def screenshot(self, path: Path, *, top: float = 0, height: float = 8000) -> None:
        """Take a picture of the page, from ``top`` on and at most so high."""
        size = self._devtools("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": min(size["height"] - top, height), "scale": 1}
        picture = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        """Close the window and the driver."""
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(20)
