"""A real Prometheus for tests, Debian's, and what the committed dashboards ask of it."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.waits import eventually

BOARDS = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
PROMETHEUS = shutil.which("prometheus")
SCRAPE_SECONDS = 0.2

needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="prometheus isn't installed (Debian: apt-get install prometheus)"
)


class Prometheus:
    """Scrapes one controller on loopback, five times a second."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder = folder
        scrape = {"job_name": "kfdist", "static_configs": [{"targets": [target]}]}
        times = {
            "scrape_interval": f"{SCRAPE_SECONDS * 1000:.0f}ms",
            "scrape_timeout": f"{SCRAPE_SECONDS * 1000:.0f}ms",
        }
        config = json.dumps({"global": times, "scrape_configs": [scrape]})  # JSON is YAML
        (folder / "prometheus.yml").write_text(config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"

    def __enter__(self) -> Self:
        assert PROMETHEUS is not None
        self._started = time.time()
        self._log = (self._folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'tsdb'}",
                f"--web.listen-address={self._address}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        eventually(lambda: self._ask("query", query="1") is not None, bool, seconds=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def query(self, expression: str) -> list[Any]:
        """Returns the series of an expression as it is now."""
        return self._ask("query", query=expression) or []

    def history(self, expression: str) -> list[Any]:
        """Returns the series of an expression since the start, in steps of a scrape."""
        span = {"start": self._started, "end": time.time(), "step": SCRAPE_SECONDS}
        return self._ask("query_range", query=expression, **span) or []

    def _ask(self, what: str, **words: str | float) -> list[Any] | None:
        url = f"http://{self._address}/api/v1/{what}?" + urllib.parse.urlencode(words)
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]["result"]
        except urllib.error.HTTPError as error:
            assert error.code == 503, f"{words}: {error.read().decode()}"  # it isn't ready yet
            return None
        except OSError:
            return None


@dataclass(frozen=True)
class BoardPanel:
    """A panel of a committed dashboard."""

    board: str
    title: str
    expressions: tuple[str, ...]


def panels() -> Iterator[BoardPanel]:
    """Yields the panels of all dashboards."""
    for path in sorted(BOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            yield BoardPanel(path.stem, panel["title"], tuple(target["expr"] for target in panel["targets"]))


def concrete(expression: str, *, run: str, interval: str) -> str:
    """Returns what Grafana makes of a panel's expression."""
    return expression.replace("$run", run).replace("$__rate_interval", interval)
