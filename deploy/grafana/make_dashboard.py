"""Writes the dashboard of the inversions' staleness: .venv/bin/python deploy/grafana/make_dashboard.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "kfdist.json"

SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT = 12, 8
_RUN = 'run="$run"'


@dataclass(frozen=True)
class Panel:
    """A graph: what it is called, the unit of its axis as Grafana names it, and (PromQL, legend) for its curves."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]


PANELS = (
    Panel(
        "Staleness in steps: the five stalest blocks",
        "none",
        ((f"topk(5, kfdist_staleness_steps{{{_RUN}}})", "{{block}}"),),
    ),
    Panel(
        "Staleness in seconds",
        "s",
        (
            (f"max(kfdist_staleness_seconds{{{_RUN}}})", "stalest block"),
            (f"avg(kfdist_staleness_seconds{{{_RUN}}})", "mean over blocks"),
            (f"time() - kfdist_last_beat_timestamp_seconds{{{_RUN}}}", "since ranks were heard"),
        ),
    ),
    Panel(
        "Inversion, 95th percentile",
        "s",
        (
            (
                "histogram_quantile(0.95, sum by (le, method) "
                f"(rate(kfdist_inversion_seconds_bucket{{{_RUN}}}[$__rate_interval])))",
                "{{method}}",
            ),
        ),
    ),
    Panel(
        "Inversions under way, and adoptions",
        "none",
        (
            (f"kfdist_queue_depth{{{_RUN}}}", "under way"),
            (f"rate(kfdist_adoptions_total{{{_RUN}}}[$__rate_interval])", "adoptions a second"),
        ),
    ),
    Panel(
        "Failures, fallbacks and restarts",
        "none",
        (
            (f"increase(kfdist_failures_total{{{_RUN}}}[$__rate_interval])", "failed: {{reason}}"),
            (f"increase(kfdist_fallbacks_total{{{_RUN}}}[$__rate_interval])", "fell back: {{reason}}"),
            (f"increase(kfdist_restarts_total{{{_RUN}}}[$__rate_interval])", "restarted: {{process}}"),
        ),
    ),
    Panel(
        "Seconds of a step by phase",
        "s",
        (
            (
                f"rate(kfdist_step_seconds_sum{{{_RUN}}}[$__rate_interval]) / "
                f"rate(kfdist_step_seconds_count{{{_RUN}}}[$__rate_interval])",
                "{{phase}}",
            ),
        ),
    ),
    Panel(
        "Ranks and owners",
        "none",
        ((f"kfdist_live_workers{{{_RUN}}}", "ranks"), (f"kfdist_live_owners{{{_RUN}}}", "owners")),
    ),
    Panel("Loss", "none", ((f"kfdist_loss{{{_RUN}}}", "loss"),)),
)


def dashboard() -> dict[str, Any]:
    """Returns the dashboard in Grafana's JSON."""
    return {
        "uid": "kfdist-staleness",
        "title": "kfdist: staleness of the inverses",
        "tags": ["kfdist"],
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": "label_values(kfdist_up, run)",
                    "refresh": 2,
                },
            ]
        },
        "panels": [_graph(index, panel) for index, panel in enumerate(PANELS)],
    }


def text() -> str:
    """Returns the file's text."""
    return json.dumps(dashboard(), indent=2) + "\n"


def _graph(index: int, panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for number, (expression, legend) in enumerate(panel.curves)
    ]
    row, column = divmod(index, 2)
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
