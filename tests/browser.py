"""Debian's headless Chromium, driven over its DevTools protocol: a page as a reader gets it.

with Browser() as browser:
    page = browser.open(path, width=390, dark=True)
    assert page.problems == []
"""

import base64
import json
import os
import select
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PACKAGE = "chromium-headless-shell"
CHROMIUM = Path("/usr/bin") / PACKAGE
PHONE, DESK = 390, 1200  # CSS pixels of the window, as are all sizes here
MIN_PICTURE = 300  # a plot this wide can still be read
HEIGHT = 900
SECONDS = 120.0  # without a word, after which it hangs

# How wide the content is beyond the window, and what juts out of it. Tables scroll in a frame of
# their own.
OVERFLOW = """(() => {
  const root = document.documentElement;
  const out = [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".wide") && e.getBoundingClientRect().right > root.clientWidth + 0.5)
    .map(e => e.tagName.toLowerCase() + ": " + e.textContent.slice(0, 40));
  return [root.scrollWidth - root.clientWidth, out];
})()"""
IMAGES = """[...document.images].map(
  i => ({title: i.alt, loaded: i.complete && i.naturalWidth > 0,
         width: i.getBoundingClientRect().width}))"""


class Page:
    """An opened page; ``problems`` are console messages, exceptions and failed requests."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self.browser = browser
        self.session = session
        self.problems: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A method of the protocol in this page."""
        return self.browser.call(method, self, **params)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def images(self) -> list[dict[str, Any]]:
        """Each image's title, whether it was loaded, and its width on the page."""
        images: list[dict[str, Any]] = self.evaluate(IMAGES)
        return images

    def overflow(self) -> tuple[float, list[str]]:
        """CSS pixels of the content beyond the window's width, and the elements that jut out."""
        pixels, elements = self.evaluate(OVERFLOW)
        return pixels, elements

    def screenshot(self, path: Path, *, top: float = 0, height: float | None = None) -> Path:
        """Write the page, or ``height`` CSS pixels of it from ``top``, as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "scale": 1}
        clip["height"] = size["height"] - top if height is None else height
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def close(self) -> None:
        """Close the tab."""
        self.call("Page.close")


class Browser:
    """One Chromium process, which ends with the ``with`` block; nothing of it stays."""

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        their_input, our_output = os.pipe()
        our_input, their_output = os.pipe()
        # It reads commands from file descriptor 3 and writes answers to 4, each ended by a NUL.
        flags = ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--no-sandbox"]
        flags += ["--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        redirected = ["bash", "-c", f'exec "$0" "$@" 3<&{their_input} 4>&{their_output}']
        self._process = subprocess.Popen(
            [*redirected, str(CHROMIUM), *flags, "about:blank"],
            pass_fds=(their_input, their_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._send, self._receive = os.fdopen(our_output, "wb"), os.fdopen(our_input, "rb")
        self._unread = b""
        self._number = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._send.close()
        self._receive.close()
        self._process.kill()
        self._process.wait()
        self._profile.cleanup()

    def call(self, method: str, page: Page | None = None, **params: Any) -> dict[str, Any]:
        """A method of the protocol; events that come before its answer go to ``page``."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if page is not None:
            message["sessionId"] = page.session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            if page is not None:
                _take_event(page, answer)

    def wait(self, page: Page, event: str) -> None:
        """Until ``event`` has happened in ``page``."""
        while True:
            message = self._next()
            _take_event(page, message)
            if message.get("method") == event:
                return

    def open(self, path: Path, *, width: int, dark: bool = False) -> Page:
        """Open a file in a new tab, ``width`` CSS pixels wide, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=path.resolve().as_uri())
        self.wait(page, "Page.loadEventFired")
        page.evaluate("0")  # its answer comes after the events of the load
        return page

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._receive], [], [], SECONDS)
            assert ready, f"Chromium has said nothing for {SECONDS:.0f} s"
            read = os.read(self._receive.fileno(), 1 << 20)
            assert read, f"Chromium ended with status {self._process.wait()}"
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        content: dict[str, Any] = json.loads(message)
        return content


def problems_of(browser: Browser, path: Path) -> list[str]:
    """What is wrong with a page of this project, on a phone and on a desk, in light and in dark."""
    return [
        f"{width}, {'dark' if dark else 'light'}: {problem}"
        for width in (PHONE, DESK)
        for dark in (False, True)
        for problem in problems_at(browser, path, width=width, dark=dark)
    ]


def problems_at(browser: Browser, path: Path, *, width: int, dark: bool = False) -> list[str]:
    """What is wrong with it in one window."""
    page = browser.open(path, width=width, dark=dark)
    problems = [*page.problems]
    address = path.resolve().as_uri()
    outside = [url for url in page.requests if url != address and url[:5] != "data:"]
    problems += [f"it asks for {url}" for url in outside]
    for image in page.images():
        if not image["loaded"]:
            problems.append(f"the picture {image['title']!r} is not there")
        elif image["width"] < MIN_PICTURE:
            problems.append(f"the picture {image['title']!r} is small: {image['width']}")
    pixels, elements = page.overflow()
    if pixels or elements:
        problems.append(f"{pixels} pixels too wide: {elements}")
    page.close()
    return problems


def _take_event(page: Page, message: dict[str, Any]) -> None:
    """Note in ``page`` what an event says of it."""
    event, params = message.get("method"), message.get("params", {})
    if message.get("sessionId") != page.session:
        return
    if event == "Runtime.consoleAPICalled":
        page.problems.append(f"console: {[arg.get('value') for arg in params['args']]}")
    elif event == "Runtime.exceptionThrown":
        page.problems.append(f"exception: {params['exceptionDetails']['text']}")
    elif event == "Log.entryAdded":
        page.problems.append(f"log: {params['entry']['text']} {params['entry'].get('url', '')}")
    elif event == "Network.loadingFailed":
        page.problems.append(f"failed request: {params['errorText']}")
    elif event == "Network.requestWillBeSent":
        page.requests.append(params["request"]["url"])
