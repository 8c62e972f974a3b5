"""Controls a headless Chromium over a pair of pipes, by its DevTools protocol, without a driver or package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# these functions see elements in shadow trees too
EVERYWHERE = """
function* everywhere(root = document) {
  for (const element of root.querySelectorAll("*")) {
    yield element;
    if (element.shadowRoot) yield* everywhere(element.shadowRoot);
  }
}
const visible = element => element.getClientRects().length > 0;
const found = selector => [...everywhere()].filter(element => element.matches(selector) && visible(element));
const text = () => [...everywhere()].filter(visible).flatMap(element => [...element.childNodes])
  .filter(node => node.nodeType === Node.TEXT_NODE).map(node => node.textContent.trim()).filter(Boolean).join(" ");
"""


class Browser:
    """One page of a Chromium.

    requests:  the addresses that the page requested
    errors:    errors on its console and uncaught exceptions
    """

    def __init__(self, folder: Path, width: int = 1400, height: int = 900):
        assert CHROMIUM is not None
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.number = 0
        self.session: str | None = None
        self.received = b""
        its_read, self.write_end = os.pipe()
        self.read_end, its_write = os.pipe()
        # the protocol uses the descriptors 3 and 4
        command = f'exec "$0" "$@" 3<&{its_read} 4>&{its_write}'
        arguments = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *arguments, "about:blank"],
            pass_fds=(its_read, its_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def call(self, method: str, seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        """Sends a command of the protocol and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while True:
            answer = self._next(until)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.read_end], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self.read_end, 1 << 16)
            assert part, "the browser has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str | None, content: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(content["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and content["type"] == "error":
            self.errors.append(json.dumps(content["args"]))
        elif event == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.errors.append(f"{content['entry']['text']} {content['entry'].get('url', '')}")

    def open(self, address: str) -> None:
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url="about:blank")  # otherwise a new fragment of the same address loads nothing
        self.call("Page.navigate", url=address)

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page, which may call `found(selector)` and `text()`."""
        code = f"(() => {{ {EVERYWHERE} return {expression}; }})()"
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """Waits until an expression is true and returns its value."""
        until = time.monotonic() + seconds
        while not (value := self.ask(expression)):
            assert time.monotonic() < until, f"waited in vain for {expression}; the page says: {self.ask('text()')}"
            time.sleep(0.2)
        return value

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)
