"""A headless Chromium spoken to over its debugging pipe: enough to fill in a page, read it and photograph it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.patience import patience

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900 --remote-debugging-pipe"
).split()


def find_chromium() -> str | None:
    """The browser's path, where there is one."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Browser:
    """One tab."""

    def __init__(self, read: int, write: int):
        self._read, self._write = os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb")
        self._number, self._held = 0, b""
        self._session: str | None = None
        self.console: list[str] = []

    def start(self) -> None:
        """Open the tab."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, headers: dict[str, str]) -> None:
        """Load a page, sending `headers` with everything it asks for."""
        self._call("Network.enable")
        self._call("Network.setExtraHTTPHeaders", headers=headers)
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Evaluate JavaScript."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 30.0) -> None:
        """Until `script` is true."""
        deadline = time.monotonic() + patience(seconds)
        while not self._holds(script):
            assert time.monotonic() < deadline, f"never became true: {script}"
            time.sleep(0.1)

    def _holds(self, script: str) -> bool:
        try:
            return bool(self.run(script))
        except AssertionError as error:
            if "navigated" not in str(error):  # the page is being loaded anew: not yet
                raise
            return False

    def screenshot(self, path: Path) -> None:
        """Write a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Close the pipe, which ends the browser."""
        self._write.close()
        self._read.close()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(answer["params"])[:500])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = self._read.read(1 << 16)
            assert part, "the browser went away"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running browser with an empty profile."""
    to_browser, from_browser = os.pipe(), os.pipe()
    command = [str(find_chromium()), *_FLAGS, f"--user-data-dir={profile}"]
    # The browser reads commands on descriptor 3 and answers on 4.
    moves = f"os.dup2({to_browser[0]}, 3); os.dup2({from_browser[1]}, 4)"
    move = f"import os, sys; {moves}; os.execv(sys.argv[1], sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", move, *command],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    tab = None
    try:
        tab = Browser(from_browser[0], to_browser[1])
        tab.start()
        yield tab
    finally:
        if tab is not None:
            tab.close()
        try:
            child.wait(patience(10))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
