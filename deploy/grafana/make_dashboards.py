"""Writes the dashboards "Run" and "Inversion": .venv/bin/python deploy/grafana/make_dashboards.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode

FOLDER = Path(__file__).parent / "dashboards"

_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_RUN = 'run="$run"'
_WIDTH, _HEIGHT = 12, 8


def _rate(metric: str, by: str = "", **labels: str) -> str:
    """Returns the rate of a counter, summed over everything but the labels `by`."""
    matched = ", ".join([_RUN, *(f'{name}="{value}"' for name, value in labels.items())])
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{matched}}}[$__rate_interval]))"


def _mean(histogram: str, by: str = "", **labels: str) -> str:
    return f"{_rate(histogram + '_sum', by, **labels)} / ({_rate(histogram + '_count', by, **labels)} > 0)"


def _quantile(q: float, histogram: str, by: str = "", **labels: str) -> str:
    return f"histogram_quantile({q}, {_rate(histogram + '_bucket', f'le, {by}' if by else 'le', **labels)})"


def _increase(metric: str) -> str:
    return f"increase({metric}{{{_RUN}}}[$__rate_interval])"


@dataclass(frozen=True)
class Graph:
    """Curves over time.

    Attributes:
        title: What it shows.
        unit: Of its axis, as Grafana names it.
        curves: (PromQL, legend) of each.
        about: Shown to those who ask what it means.
        log: Whether the axis is logarithmic.
        stacked: Whether the curves add up.
        counts: Whether its values are whole numbers, for which an axis up to 1 is fine enough.
    """

    title: str
    unit: str
    curves: Sequence[tuple[str, str]]
    about: str = ""
    log: bool = False
    stacked: bool = False
    counts: bool = False

    def build(self, number: int) -> timeseries.Panel:
        """Returns it as a panel with an id."""
        scale = common.ScaleDistributionConfig().type(
            shapes.ScaleDistribution.LOG if self.log else shapes.ScaleDistribution.LINEAR
        )
        panel = (
            timeseries.Panel()
            .id(number)
            .title(self.title)
            .description(self.about)
            .datasource(_SOURCE)
            .span(_WIDTH)
            .height(_HEIGHT)
            .unit(self.unit)
            .fill_opacity(30 if self.stacked else 5)
            .line_width(1)
            .show_points(shapes.VisibilityMode.NEVER)
            .stacking(
                common.StackingConfig().mode(shapes.StackingMode.NORMAL if self.stacked else shapes.StackingMode.NONE)
            )
            .scale_distribution(scale.log(10) if self.log else scale)
            .legend(
                common.VizLegendOptions()
                .display_mode(shapes.LegendDisplayMode.LIST)
                .placement(shapes.LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING))
        )
        if not self.log:
            panel.axis_soft_min(0)
        if self.counts:
            panel.axis_soft_max(1).decimals(0)
        for letter, (expression, legend) in zip("ABCDEFGH", self.curves, strict=False):
            panel.with_target(_query(letter, expression, legend))
        return panel


@dataclass(frozen=True)
class Rows:
    """A heat map with a row for each series, coloured by its value: what a block's staleness is, over time."""

    title: str
    unit: str
    expression: str
    legend: str
    about: str

    def build(self, number: int) -> heatmap.Panel:
        """Returns it as a panel with an id."""
        return (
            heatmap.Panel()
            .id(number)
            .title(self.title)
            .description(self.about)
            .datasource(_SOURCE)
            .span(2 * _WIDTH)
            .height(2 * _HEIGHT)
            .calculate(False)
            .cell_gap(0)
            .show_tooltip()
            .filter_values(heatmap.FilterValueRange().le(-1.0))  # blocks of staleness 0 are shown, too
            .cell_values(heatmap.CellValues().unit(self.unit).decimals(0))
            .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
            .rows_frame(heatmap.RowsHeatmapOptions().layout(shapes.HeatmapCellLayout.UNKNOWN).value("staleness"))
            .with_target(_query("A", self.expression, self.legend))
        )


@dataclass(frozen=True)
class Board:
    """A dashboard: its uid, which is its file's name, too, its title, and its panels, which fill rows of 24 columns."""

    uid: str
    title: str
    panels: Sequence[Graph | Rows]

    def text(self) -> str:
        """Returns it in Grafana's JSON."""
        board = (
            dashboard.Dashboard(self.title)
            .uid(self.uid)
            .tags(["kfdist"])
            .refresh("5s")
            .time("now-15m", "now")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
            .with_variable(
                dashboard.QueryVariable("run")
                .label("Run")
                .datasource(_SOURCE)
                .query("label_values(kfdist_up, run)")
                .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            )
        )
        for number, panel in enumerate(self.panels, start=1):
            board.with_panel(panel.build(number))
        return JSONEncoder(indent=2, sort_keys=True).encode(board.build()) + "\n"


_RUN_PANELS = (
    Graph("Loss", "none", [(f"kfdist_loss{{{_RUN}}}", "loss")], "Mean over the steps of a log period."),
    Graph(
        "Accuracy",
        "percentunit",
        [(f"kfdist_accuracy{{{_RUN}}}", "training accuracy")],
        "Of tasks that measure one; over the steps of a log period.",
    ),
    Graph("Examples a second", "short", [(_rate("kfdist_examples_total"), "over all ranks")]),
    Graph(
        "Progress",
        "short",
        [(f"kfdist_run_step{{{_RUN}}}", "step"), (f"kfdist_run_planned_steps{{{_RUN}}}", "planned")],
    ),
    Graph(
        "A training step",
        "s",
        [
            (_mean("kfdist_step_seconds", phase="total"), "mean"),
            (_quantile(0.5, "kfdist_step_seconds", phase="total"), "p50"),
            (_quantile(0.99, "kfdist_step_seconds", phase="total"), "p99"),
        ],
        "Forward, backward, preconditioner and optimizer; over all ranks. Quantiles are as fine as the buckets.",
    ),
    Graph(
        "A training step by phase: the preconditioner's, and the wait for examples",
        "s",
        [
            (
                f'sum by (phase) (rate(kfdist_step_seconds_sum{{{_RUN}, phase!="total"}}[$__rate_interval])) / '
                f'(sum by (phase) (rate(kfdist_step_seconds_count{{{_RUN}, phase!="total"}}[$__rate_interval])) > 0)',
                "{{phase}}",
            )
        ],
        "Mean host seconds. Forward and backward aren't among them.",
        stacked=True,
    ),
    Graph(
        "Share of the time that steps wait",
        "percentunit",
        [
            (
                " / ".join(_rate("kfdist_step_seconds_sum", phase=phase) for phase in ("input", "total")),
                "for examples",
            ),
            (_rate("kfdist_adoption_wait_seconds_sum"), "for results to adopt"),
        ],
    ),
    Graph(
        "Damping, and the factor of the KL clip",
        "none",
        [(f"kfdist_damping{{{_RUN}}}", "damping"), (f"kfdist_kl_clip_factor{{{_RUN}}}", "KL clip")],
        "The clip's factor is 1 where it doesn't act.",
        log=True,
    ),
    Graph(
        "Length of a step over that of the parameters, and the graft's factor",
        "none",
        [
            (f"quantile(0.5, kfdist_step_length_ratio{{{_RUN}}})", "step, median over blocks"),
            (f"max(kfdist_step_length_ratio{{{_RUN}}})", "step, longest"),
            (f"quantile(0.5, kfdist_graft_ratio{{{_RUN}}})", "graft, median over blocks"),
            (f"max(kfdist_graft_ratio{{{_RUN}}})", "graft, largest"),
        ],
        "Of one step in ten at most. kfdist.Optimizer grafts directions that have no length of their own.",
        log=True,
    ),
    Graph(
        "Gradient noise scale",
        "short",
        [(f"kfdist_gradient_noise_scale_examples{{{_RUN}}}", "examples")],
        "The batch above which larger ones bring less and less (docs/large-batch.md); of ranks or micro-batches.",
        log=True,
    ),
    Graph(
        "Ranks and owners",
        "none",
        [(f"kfdist_live_workers{{{_RUN}}}", "ranks"), (f"kfdist_live_owners{{{_RUN}}}", "owners")],
        counts=True,
    ),
)

_INVERSION_PANELS = (
    Rows(
        "Staleness by block, in steps",
        "none",
        f"kfdist_staleness_steps{{{_RUN}}}",
        "{{block}}",
        "Training steps between the statistics in a block's inverse and now; at best, up to a period and a delay.",
    ),
    Graph(
        "Staleness in steps",
        "short",
        [
            (f"max(kfdist_staleness_steps{{{_RUN}}})", "stalest block"),
            (f"quantile(0.5, kfdist_staleness_steps{{{_RUN}}})", "median over blocks"),
            (f"min(kfdist_update_period_steps{{{_RUN}}})", "shortest period of a block"),
            (f"max(kfdist_update_period_steps{{{_RUN}}})", "longest period of a block"),
        ],
    ),
    Graph(
        "Staleness in periods of the block",
        "short",
        [(f"topk(5, kfdist_staleness_steps{{{_RUN}}} / kfdist_update_period_steps{{{_RUN}}})", "{{block}}")],
        "Some blocks get new inverses more often than others. At best one and a delay; above three an alert fires.",
    ),
    Graph(
        "Age of the statistics in use",
        "s",
        [
            (f"max(kfdist_staleness_seconds{{{_RUN}}})", "stalest block"),
            (f"avg(kfdist_staleness_seconds{{{_RUN}}})", "mean over blocks"),
            (f"time() - kfdist_last_beat_timestamp_seconds{{{_RUN}}}", "since ranks were heard"),
        ],
        "Goes on rising while ranks hang.",
    ),
    Graph(
        "Delay: steps from statistics to adoption",
        "none",
        [
            (f"max(kfdist_delay_steps{{{_RUN}}})", "slowest block"),
            (f"avg(kfdist_delay_steps{{{_RUN}}})", "mean over blocks"),
        ],
    ),
    Graph(
        "Adoptions a second, and jobs that newer ones replaced",
        "none",
        [(_rate("kfdist_adoptions_total"), "adopted"), (_rate("kfdist_jobs_replaced_total"), "replaced")],
    ),
    Graph(
        "Seconds of an inversion by method",
        "s",
        [
            (_quantile(0.5, "kfdist_inversion_seconds", by="method"), "{{method}}, p50"),
            (_quantile(0.95, "kfdist_inversion_seconds", by="method"), "{{method}}, p95"),
        ],
    ),
    Graph("Queue", "short", [(f"kfdist_queue_depth{{{_RUN}}}", "submitted and not yet answered")], counts=True),
    Graph(
        "Failures, restarts and dropped batches",
        "none",
        [
            (_increase("kfdist_failures_total"), "failed: {{reason}}"),
            (_increase("kfdist_restarts_total"), "restarted: {{process}}"),
            (_increase("kfdist_nonfinite_drops_total"), "dropped: not finite"),
        ],
        "How many in the interval; docs/runbook.md has the reasons.",
        counts=True,
    ),
    Graph(
        "Uses of something lesser than a fresh inverse",
        "none",
        [(_increase("kfdist_fallbacks_total"), "{{reason}}")],
        "How many in the interval; docs/runbook.md has the reasons.",
        counts=True,
    ),
    Graph(
        "Bytes by purpose",
        "Bps",
        [(_rate("kfdist_bytes_total", by="purpose"), "{{purpose}}")],
        "Over all ranks. Jobs and results travel to owners and back once more where they are sent again.",
    ),
    Graph(
        "Approximation error: the five worst factors",
        "none",
        [(f"topk(5, kfdist_inversion_approximation_error{{{_RUN}}})", "{{block}}, {{factor}}")],
        "Relative distance of the kept part of a factor from the factor, of methods that keep a part.",
        log=True,
    ),
    Graph(
        "Smallest eigenvalue: the five smallest",
        "none",
        [(f"bottomk(5, kfdist_inversion_smallest_eigenvalue{{{_RUN}}})", "{{block}}, {{factor}}")],
        "Before negative ones were clamped; rounding makes some.",
    ),
    Graph(
        "Rank kept of the factors",
        "short",
        [
            (f"max by (factor) (kfdist_inversion_rank{{{_RUN}}})", "{{factor}}, largest"),
            (f"avg by (factor) (kfdist_inversion_rank{{{_RUN}}})", "{{factor}}, mean"),
        ],
    ),
)

BOARDS = (
    Board("kfdist-run", "kfdist: run", _RUN_PANELS),
    Board("kfdist-inversion", "kfdist: inversion", _INVERSION_PANELS),
)


def _query(letter: str, expression: str, legend: str) -> Dataquery:
    return Dataquery().ref_id(letter).datasource(_SOURCE).expr(expression).legend_format(legend).range()


def texts() -> dict[str, str]:
    """Returns the files' texts by name."""
    return {f"{board.uid}.json": board.text() for board in BOARDS}


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
