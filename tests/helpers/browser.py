"""Chromium without a window, told what to do through a pipe (the DevTools protocol).

Each message is a line of JSON that ends with a zero byte. `call` waits for the answer; what the
page itself reports meanwhile (a script that failed, a thing its policy refused) is in `complaints`.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHONE = (390, 844)
LAPTOP = (1280, 800)


class Browser:
    """One page of one browser. Errors: RuntimeError for a command that the browser refuses."""

    def __init__(self, requests: int, answers: int):
        self._requests, self._answers = requests, answers
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, *, size: tuple[int, int] = LAPTOP, scheme: str = "light") -> None:
        """Load a file. scheme: light or dark, as the user's system wants it."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        wish = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[wish])
        self.complaints.clear()
        self._loaded = False
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not self._loaded:
            self._take(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, once it is there if it is a promise."""
        done = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(_told(done["exceptionDetails"]))
        return done["result"].get("value")

    def press(self, key: str) -> None:
        """A key by its name, such as Tab or Enter."""
        code = {"Tab": 9, "Enter": 13, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        event = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **event)

    def picture(self, target: Path) -> None:
        """The whole page, below the fold too, as a PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        target.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        sent = json.dumps(message).encode() + b"\0"
        while sent:
            sent = sent[os.write(self._requests, sent) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._take(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._received += part
        line, _, self._received = self._received.partition(b"\0")
        return json.loads(line)

    def _take(self, event: Mapping[str, Any]) -> None:
        """Something that the browser says by itself."""
        method, told = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(_told(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("warning", "error"):
            self.complaints.append(told["entry"]["text"])


def _told(details: Mapping[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]


@contextmanager
def start_browser(profile: Path) -> Iterator[Browser]:
    """profile: a new folder for what the browser keeps."""
    program = shutil.which("chromium")
    assert program, (
        "chromium is not installed: `installation/laptop/install-tools tests long` does it"
    )
    from_us, requests = os.pipe()
    answers, to_us = os.pipe()
    # It reads 3 and writes 4. Without its sandbox, which root cannot have: it opens our own files.
    shell = f'exec {program} "$@" 3<&{from_us} 4>&{to_us}'
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
    ]
    with subprocess.Popen(
        ["bash", "-c", shell, "chromium", *options],
        pass_fds=(from_us, to_us), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(from_us)
        os.close(to_us)
        try:
            yield Browser(requests, answers)
        finally:
            os.close(requests)
            os.close(answers)
            process.terminate()
