"""A headless Chromium, driven by its DevTools protocol over a pipe: no port, no extra package."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One browser with one page."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._writes = os.pipe()
        self._reads, from_browser = os.pipe()
        assert CHROMIUM is not None

        def as_3_and_4() -> None:  # where --remote-debugging-pipe looks for them
            for source, target in ((to_browser, 3), (from_browser, 4)):
                if source != target:
                    os.dup2(source, target)
                os.set_inheritable(target, True)

        # Out of the way of 3 and 4, which as_3_and_4 overwrites one after the other.
        moved = [os.dup(fd) for fd in (to_browser, from_browser)]
        os.close(to_browser)
        os.close(from_browser)
        while min(moved) < 10:
            moved = [os.dup(fd) for fd in moved]
        to_browser, from_browser = moved
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--force-color-profile=srgb",
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            preexec_fn=as_3_and_4,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._next = 0
        self.events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def _send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._reads, 1 << 20)
            assert chunk, "the browser ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return what a DevTools method gives."""
        return self._send(method, self._session, **params)

    def run(self, script: str) -> Any:
        """Return what JavaScript gives; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 20) -> None:
        """Wait until an expression is true."""
        look = f"if ({condition}) done(true); else if (performance.now() > until) done(false);"
        assert self.run(
            f"new Promise(done => {{ const until = performance.now() + {seconds * 1000};"
            f"(function look() {{ {look} else setTimeout(look, 30); }})(); }})"
        ), f"never: {condition}"

    def open(
        self, path: Path, width: int = 1200, *, dark: bool = False, script: bool = True
    ) -> None:
        """Open a file in a window of that width."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 700,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive())

    def press(self, key: str, text: str = "") -> None:
        """Press a key where the focus is."""
        codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes.get(key, 0),
                **more,
            )

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Save what is seen."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **(
            {"clip": self._whole()} if whole else {}))  # fmt: skip
        path.write_bytes(base64.b64decode(found["data"]))

    def _whole(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def close(self) -> None:
        """End the browser that was started."""
        self._process.kill()
        self._process.wait()
        os.close(self._reads)
        os.close(self._writes)


def complaints(browser: Browser) -> list[str]:
    """What the console and the log say, and every request for something else than the file."""
    browser.run("1")  # what is still on the way arrives before its answer
    found = []
    for event in browser.events:
        method, told = event.get("method"), event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            found.append(json.dumps(told))
        if method == "Network.requestWillBeSent":
            url = told["request"]["url"]
            if not url.startswith(("file:", "data:")):
                found.append(url)
    return found
