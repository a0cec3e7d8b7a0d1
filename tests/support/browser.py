"""Chromium without a window, over its DevTools protocol: how a page looks, what it asks for, what it complains of."""

import asyncio
import base64
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
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


@dataclass(frozen=True)
class View:
    """How a page is looked at.

    Attributes:
        width: Of the viewport, in CSS pixels; below 500 it is a phone's.
        dark: Whether the user prefers dark pages.
        opened: Whether everything that is folded is opened first.
    """

    width: int
    dark: bool = False
    opened: bool = False


def look_at(page: Path, views: Sequence[View], expressions: Mapping[str, str] = MappingProxyType({})) -> list[Seen]:
    """Opens a page in a fresh browser, once for each view, and returns what it showed.

    Args:
        page: An HTML file.
        views: How it is looked at.
        expressions: JavaScript whose values are returned, by name.
    """
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "--no-sandbox",
            "--disable-gpu",
        ]
        line = [PROGRAM, *options, "about:blank"]
        browser = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert browser.stderr is not None
            told = next(line for line in browser.stderr if "DevTools listening on" in line)
            return asyncio.run(_look(told.split()[-1], page, views, expressions))
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            wait_until_gone(browser.pid)


def wait_until_gone(group: int) -> None:
    """Waits until no process of a group is left; whoever started this one reaps those that have lost their parent."""
    with suppress(ProcessLookupError):
        for _ in range(200):
            os.killpg(group, 0)
            time.sleep(0.05)


async def _look(address: str, page: Path, views: Sequence[View], expressions: Mapping[str, str]) -> list[Seen]:
    host = address.removeprefix("ws://").partition("/")[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{host}/json") as answer:
            target = next(each for each in await answer.json() if each["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.call(f"{domain}.enable")
            return [await tab.look(page, view, expressions) for view in views]


class _Tab:
    """One page's connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._seen = Seen()
        self._calls = 0
        self._loaded = False

    async def look(self, page: Path, view: View, expressions: Mapping[str, str]) -> Seen:
        seen = self._seen = Seen()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if view.dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        metrics = {"width": view.width, "height": 844, "deviceScaleFactor": 1, "mobile": view.width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self._loaded = False
        await self.call("Page.navigate", url=page.absolute().as_uri())
        while not self._loaded:
            await self._next()
        if view.opened:
            await self.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
        seen.scroll_width = await self.value("document.documentElement.scrollWidth")
        seen.height = await self.value("document.documentElement.scrollHeight")
        for name, expression in expressions.items():
            seen.values[name] = await self.value(expression)
        clip = {"x": 0, "y": 0, "width": view.width, "height": seen.height, "scale": 1}
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        seen.screenshot = base64.b64decode(shot["data"])
        return seen

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
