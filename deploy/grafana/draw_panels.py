"""Draws the dashboards' panels from a Prometheus, for those who have no Grafana at hand.

.venv/bin/python deploy/grafana/draw_panels.py http://127.0.0.1:9090 --run digits --minutes 5 --out pictures/
"""

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

BOARDS = Path(__file__).parent / "dashboards"
POINTS = 300

Series = tuple[str, np.ndarray, np.ndarray]
"""A curve's legend, its times in seconds from the left edge, and its values."""

Ask = Callable[[str, str], list[Series]]
"""Returns the series of an expression, given it and its legend."""

_TICKS: dict[str, Callable[[], Any]] = {
    "s": lambda: EngFormatter(unit="s"),
    "Bps": lambda: EngFormatter(unit="B/s"),
    "percentunit": lambda: PercentFormatter(xmax=1.0),
    "short": lambda: EngFormatter(sep=""),
    "none": lambda: FuncFormatter(lambda value, _: f"{value:g}"),
}
"""What Grafana's units write beside an axis."""


def asker(address: str, *, run: str, start: float, end: float, interval: str) -> Ask:
    """Returns a function that asks a Prometheus for an expression's series."""
    step = max((end - start) / POINTS, 0.2)

    def ask(expression: str, legend: str) -> list[Series]:
        concrete = expression.replace("$run", run).replace("$__rate_interval", interval)
        words = urllib.parse.urlencode({"query": concrete, "start": start, "end": end, "step": step})
        with urllib.request.urlopen(f"{address}/api/v1/query_range?{words}", timeout=60) as response:
            found = json.load(response)["data"]["result"]
        return [_series(each, legend, start) for each in found]

    return ask


def _series(found: dict[str, Any], legend: str, start: float) -> Series:
    labels = found["metric"]
    name = re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)
    times, values = zip(*found["values"], strict=True)
    return name, np.array(times) - start, np.array([float(value) for value in values])


def draw_curves(axes: Axes, panel: dict[str, Any], ask: Ask) -> None:
    """Draws a time series panel as Grafana does: its unit, its scale, stacked or not."""
    custom = panel["fieldConfig"]["defaults"]["custom"]
    series = [each for target in panel["targets"] for each in ask(target["expr"], target["legendFormat"])]
    if custom["stacking"]["mode"] == "normal":
        times = np.unique(np.concatenate([each[1] for each in series]))
        heights = [np.interp(times, t, np.nan_to_num(v), left=0.0, right=0.0) for _, t, v in series]
        axes.stackplot(times, *heights, labels=[name for name, *_ in series], alpha=0.6)
    else:
        for name, times, values in series:
            axes.plot(times, values, label=name, linewidth=1)
    if custom["scaleDistribution"]["type"] == "log":
        axes.set_yscale("log")
    else:
        lowest, highest = axes.get_ylim()
        axes.set_ylim(min(0.0, lowest), max(custom.get("axisSoftMax", highest), highest))
    axes.yaxis.set_major_formatter(_TICKS[panel["fieldConfig"]["defaults"]["unit"]]())
    if panel["fieldConfig"]["defaults"].get("decimals") == 0:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=6, ncols=3, loc="upper left", framealpha=0.5)


def draw_rows(axes: Axes, panel: dict[str, Any], ask: Ask) -> None:
    """Draws a heat map with a row for each series."""
    (target,) = panel["targets"]
    series = ask(target["expr"], target["legendFormat"])
    times = np.unique(np.concatenate([each[1] for each in series]))
    cells = np.full((len(series), len(times)), np.nan)
    for row, (_, at, values) in enumerate(series):
        cells[row, np.searchsorted(times, at)] = values
    drawn = axes.pcolormesh(times, np.arange(len(series)), cells, cmap="Oranges", shading="nearest")
    axes.set_yticks(np.arange(len(series)), [name for name, *_ in series], fontsize=7)
    axes.figure.colorbar(drawn, ax=axes, label=panel["options"]["rowsFrame"]["value"])


def draw(board: dict[str, Any], ask: Ask, target: Path) -> None:
    """Draws a dashboard into one picture, its panels where Grafana has them."""
    panels = board["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(16, rows * 0.45), layout="constrained")
    grid = figure.add_gridspec(rows // 8, 2)
    for panel in panels:
        place = panel["gridPos"]
        across = slice(0, 2) if place["w"] == 24 else place["x"] // 12
        axes = figure.add_subplot(grid[place["y"] // 8 : (place["y"] + place["h"]) // 8, across])
        axes.set_title(panel["title"], fontsize=9, loc="left")
        axes.set_xlabel("seconds", fontsize=7)
        axes.tick_params(labelsize=7)
        (draw_rows if panel["type"] == "heatmap" else draw_curves)(axes, panel, ask)
    figure.savefig(target, dpi=90)
    plt.close(figure)


def main() -> None:
    """Draws each dashboard into a picture named like it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="Prometheus, http://HOST:PORT")
    parser.add_argument("--run", default="digits")
    parser.add_argument("--minutes", type=float, default=15.0, help="how far back from --end")
    parser.add_argument("--end", type=float, default=None, help="seconds since 1970; now if not given")
    parser.add_argument("--interval", default="1m", help="in the place of Grafana's $__rate_interval")
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    end = given.end or time.time()
    ask = asker(
        given.address.rstrip("/"), run=given.run, start=end - 60 * given.minutes, end=end, interval=given.interval
    )
    given.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(BOARDS.glob("*.json")):
        draw(json.loads(path.read_text(encoding="utf-8")), ask, given.out / f"{path.stem}.png")


if __name__ == "__main__":
    main()
