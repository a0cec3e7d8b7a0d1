"""Chromium without a window, over its DevTools protocol: how a page looks, what it asks for, what it complains of."""

import asyncio
import base64
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
"""Where it is; None where there is none (Debian's package is chromium-headless-shell)."""


@dataclass
class Seen:
    """What a page showed.

    Attributes:
        screenshot: PNG of the whole page.
        scroll_width: How wide its content is, in CSS pixels.
        height: How high it is.
        values: What the expressions gave, by name.
        complaints: What stood on the console, and exceptions.
        requests: Addresses that it asked for, the page's own among them.
    """

    screenshot: bytes = b""
    scroll_width: int = 0
    height: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def look_at(
    page: Path, *, width: int, dark: bool = False, expressions: Mapping[str, str] | None = None, opened: bool = False
) -> Seen:
    """Opens a page in a fresh browser and returns what it showed.

    Args:
        page: An HTML file.
        width: Of the viewport, in CSS pixels; below 500 it is a phone's.
        dark: Whether the user prefers dark pages.
        expressions: JavaScript whose values are returned, by name.
        opened: Whether everything that is folded is opened first.
    """
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory() as profile:
        options = ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-sandbox", "--disable-gpu"]
        browser = subprocess.Popen([PROGRAM, *options, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            assert browser.stderr is not None
            line = next(line for line in browser.stderr if "DevTools listening on" in line)
            address = line.split()[-1]
            return asyncio.run(_look(address, page, width, dark, expressions or {}, opened))
        finally:
            browser.kill()
            browser.wait()


async def _look(address: str, page: Path, width: int, dark: bool, expressions: Mapping[str, str], opened: bool) -> Seen:
    seen = Seen()
    host = address.removeprefix("ws://").partition("/")[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{host}/json") as answer:
            target = next(each for each in await answer.json() if each["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket, seen)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.call(f"{domain}.enable")
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            await tab.call("Emulation.setEmulatedMedia", features=scheme)
            metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            await tab.call("Emulation.setDeviceMetricsOverride", **metrics)
            await tab.call("Page.navigate", url=page.absolute().as_uri())
            await tab.loaded()
            if opened:
                await tab.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
            seen.scroll_width = await tab.value("document.documentElement.scrollWidth")
            seen.height = await tab.value("document.documentElement.scrollHeight")
            for name, expression in expressions.items():
                seen.values[name] = await tab.value(expression)
            clip = {"x": 0, "y": 0, "width": width, "height": seen.height, "scale": 1}
            shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
            seen.screenshot = base64.b64decode(shot["data"])
    return seen


class _Tab:
    """One page's connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, seen: Seen) -> None:
        self._socket, self._seen = socket, seen
        self._calls = 0
        self._loaded = False

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while (message := await self._next()).get("id") != self._calls:
            pass
        assert "error" not in message, message
        return message["result"]

    async def value(self, expression: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def loaded(self) -> None:
        while not self._loaded:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message = await self._socket.receive_json(timeout=60)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self._seen.complaints.append(str(parameters))
            case "Network.requestWillBeSent":
                with suppress(KeyError):
                    self._seen.requests.append(parameters["request"]["url"])
        return message
