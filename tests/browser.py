"""Headless Chromium, driven over the DevTools protocol through a pipe: pages as people see and use them."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Json = dict[str, Any]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --disable-extensions --mute-audio "
    "--hide-scrollbars --remote-debugging-pipe"
).split()
_PATIENCE = 60
# Named keys → their codes.
_CODES = {"Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find_chromium() -> str:
    """Path of a Chromium; where there is none, the test is skipped, or fails if CI_REQUIRE_CHROMIUM is set."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        say = pytest.fail if os.environ.get("CI_REQUIRE_CHROMIUM") else pytest.skip
        say(f"no browser: none of {', '.join(_NAMES)} is installed (Debian: apt-get install chromium)")
    return found


class Browser:
    """A running Chromium.

    Args:
        process: Its process.
        commands: Descriptor to write commands to.
        answers: Descriptor to read answers and events from.
    """

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self.process = process
        self._commands = commands
        self._answers = answers
        self._rest = b""
        self._sent = 0
        self._tabs: dict[str, Tab] = {}

    def call(self, method: str, session: str | None = None, **params: Any) -> Json:
        """Send a command and wait for its answer; events that come before it go to their tabs."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read(method)).get("id") != self._sent:
            if tab := self._tabs.get(answer.get("sessionId", "")):
                tab.hear(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: Json = answer["result"]
        return result

    def _read(self, method: str) -> Json:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            received = os.read(self._answers, 1 << 20) if ready else b""
            assert received, f"{method}: no answer from the browser (exit status {self.process.poll()})"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        answer: Json = json.loads(message)
        return answer

    def open(self, path: Path, width: int = 1280, height: int = 800, dark: bool = False) -> Tab:
        """Open a file and wait until it says `data-ready`."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        # Into every document before its own scripts: whatever is injected has something to set.
        tab.call("Page.addScriptToEvaluateOnNewDocument", source="window.ran = []; window.alert = (x) => ran.push(x);")
        opened = tab.call("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in opened, f"{path}: {opened['errorText']}"
        tab.wait("document.documentElement?.dataset.ready !== undefined")
        return tab

    def close(self, tab: Tab) -> None:
        """Close a tab."""
        self.call("Target.closeTarget", targetId=tab.target)
        del self._tabs[tab.session]


class Tab:
    """An open page.

    Attributes:
        errors: Texts of uncaught errors, and of errors and warnings in the console.
        requests: Addresses that were asked for.
    """

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser = browser
        self.session = session
        self.target = target
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> Json:
        """Send a command to this page."""
        return self.browser.call(method, self.session, **params)

    def hear(self, event: Json) -> None:
        """Note an event."""
        params = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.errors.append(params["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            self.errors.append(json.dumps(params["args"]))

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(condition):
            assert not self.errors, f"not: {condition}"
            assert time.monotonic() < end, f"still not: {condition}"
            time.sleep(0.01)

    def texts(self, selector: str) -> list[str]:
        """What the elements of a selector say."""
        found: list[str] = self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent)"
        )
        return found

    def text(self, selector: str) -> str:
        """What the one element of a selector says."""
        (found,) = self.texts(selector)
        return found

    def box(self, selector: str) -> Json:
        """Left, top, width and height of the first element of a selector, in the window."""
        found: Json = self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        return found

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Click at a place in the window."""
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        """Press keys one after another, each by its name or its character."""
        for key in keys:
            typed = "\r" if key == "Enter" else key if len(key) == 1 else ""
            for kind, text in (("keyDown", typed), ("keyUp", "")):
                self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=_CODES.get(key, 0)
                )

    def write(self, text: str) -> None:
        """Write a text where the focus is."""
        self.call("Input.insertText", text=text)

    def settle(self) -> None:
        """Wait until what happened is drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def seconds(self) -> float:
        """Processor time that the page's process has used since it began."""
        self.call("Performance.enable", timeDomain="threadTicks")
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(float(metric["value"]) for metric in metrics if metric["name"] == "ProcessTime")

    def screenshot(self) -> Image.Image:
        """What the window shows."""
        data = self.call("Page.captureScreenshot")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data)))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Run a headless Chromium within the context.

    Args:
        profile: Folder for its own files, which it makes.
    """
    # Chromium reads commands from descriptor 3 and writes to 4.
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    given = [fcntl.fcntl(theirs, fcntl.F_DUPFD, 10) for theirs in (theirs_in, theirs_out)]
    process = subprocess.Popen(
        [find_chromium(), *_FLAGS, f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=lambda: [os.dup2(one, number) for number, one in enumerate(given, start=3)],
        start_new_session=True,
    )
    for descriptor in (theirs_in, theirs_out, *given):
        os.close(descriptor)
    try:
        browser = Browser(process, ours_out, ours_in)
        yield browser
        browser.call("Browser.close")
    finally:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours_out)
        os.close(ours_in)
