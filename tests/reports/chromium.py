"""A headless Chromium that a test drives over its DevTools pipe: what a page logs, what it measures, how it looks.

The protocol is JSON with a zero byte after each message, on file descriptors 3 and 4 of the browser. No driver, no port
and no library is needed. Everything that the page complains about is collected: exceptions, ``console.error``, and what
the browser itself logs, such as a file that it was not allowed to fetch.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A fresh interpreter moves the pipes to where Chromium looks for them: done after a fork they could hit others' files.
_START = """
import fcntl, os, sys
down, up = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 20) for n in sys.argv[1:3])
os.dup2(down, 3)
os.dup2(up, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """A browser with one page; use it in a ``with``. ``errors`` grows with what the page complains about."""

    def __init__(self, program: str, profile: Path, timeout_s: float = 60.0):
        self.timeout_s, self.errors, self.events = timeout_s, [], []
        self._numbers, self._buffer, self._session = itertools.count(1), b"", None
        down_read, self._down = os.pipe()
        self._up, up_write = os.pipe()
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--hide-scrollbars", "--disable-background-networking", f"--user-data-dir={profile}",
            "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(down_read), str(up_write), program, *options],
            pass_fds=(down_read, up_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(down_read)
        os.close(up_write)

    def __enter__(self) -> Chromium:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        try:
            self.send("Browser.close")
        finally:
            os.close(self._down)
            os.close(self._up)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command; RuntimeError if the browser refuses it or says nothing in time."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout_s
        while (answer := self._receive(end)).get("id") != number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._up], [], [], max(0.0, end - time.monotonic()))[0]:
                raise RuntimeError(f"chromium said nothing for {self.timeout_s:g} s")
            part = os.read(self._up, 1 << 20)
            if not part:
                raise RuntimeError(f"chromium ended with exit code {self._process.wait(20)}")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load the file and wait until it is drawn. ``errors`` begins anew."""
        self.errors.clear()
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        if failed := self.send("Page.navigate", url=page.resolve().as_uri()).get("errorText"):
            raise RuntimeError(f"{page}: {failed}")
        end = time.monotonic() + self.timeout_s
        while "Page.loadEventFired" not in self.events:
            self._note(self._receive(end))
        self.run("document.fonts.ready.then(() => new Promise(done => requestAnimationFrame(() => done(true))))")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, promises awaited."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", "no description"))
        return found["result"].get("value")

    def boxes(self, selector: str) -> list[dict[str, float]]:
        """x, y, width and height of each match, in pixels of the whole page."""
        return self.run(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(e => {{ const b = e.getBoundingClientRect();"
            " return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; })"
        )

    def screenshot(self, box: dict[str, float] | None = None) -> Image.Image:
        """The whole page, or a box of it."""
        if box is None:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            box = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip={**box, "scale": 1})
        return Image.open(io.BytesIO(base64.b64decode(data["data"]))).convert("RGB")


def drawn_share(picture: Image.Image) -> float:
    """The share of pixels whose colour is not the most frequent one: 0 for an empty figure."""
    colours = np.asarray(picture).reshape(-1, 3).astype(np.uint32)
    _, counts = np.unique(colours[:, 0] << 16 | colours[:, 1] << 8 | colours[:, 2], return_counts=True)
    return 1.0 - counts.max() / counts.sum()
