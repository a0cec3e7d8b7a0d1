"""Every metric, declared once as data. Ranks, couriers and owners send samples of them; the controller exports them.

Names are Prometheus names in base units. The exporter adds the label `run` to each metric with `by_run`, so no
declaration lists it. A label `block` stands only on gauges: one series a layer is affordable, twelve buckets aren't.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from functools import partial

from kfdist.types import MetricSample


class Kind(StrEnum):
    """What a metric's values mean."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


class Across(StrEnum):
    """How the values that several senders have for one series become one. Observations of histograms all count."""

    RANK_ZERO = "rank_zero"  # all ranks have the same, or only rank 0 has it
    SUM = "sum"
    MAX = "max"
    MIN = "min"

    @property
    def worst(self) -> Callable[[Iterable[float]], float]:
        """Picks the value that speaks for several blocks: the smallest under MIN, else the largest."""
        return min if self is Across.MIN else max


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: Its Prometheus name.
        help: What it measures, with the unit where the name has none.
        kind: What its values mean.
        labels: Label names, besides `run`.
        across: How several senders' values become one.
        buckets: Upper bounds of a histogram's buckets, rising, without infinity.
        known: Values of its only label that a counter shows at 0 from the start, as those without labels are shown:
            Prometheus sees no increase in a series that begins with 1.
        ages: Whether a gauge grows by one a second until its sender tells a new value.
        by_run: Whether the exporter adds the label `run`.
        sent: Whether members send it; the controller measures the others itself.
    """

    name: str
    help: str
    _: KW_ONLY
    kind: Kind
    labels: tuple[str, ...] = ()
    across: Across = Across.RANK_ZERO
    buckets: tuple[float, ...] = ()
    known: tuple[str, ...] = ()
    ages: bool = False
    by_run: bool = True
    sent: bool = True


STEP_PHASES: Mapping[str, str] = {
    "agree": "the last table is completed and obeyed; pauses",
    "capture": "this batch's statistics are taken over from what was watched",
    "fold": "they are folded into this rank's sums",
    "reduce": "the statistics that are due are summed over the ranks",
    "invert": "they are shipped, results taken in; what ranks invert themselves is inverted",
    "exchange": "results travel to all ranks, waited for where they are due",
    "adopt": "results that all ranks hold are taken into use",
    "calibrate": "what the snapshots in use leave to the ranks is measured",
    "precondition": "inverses are multiplied onto the gradients",
    "announce": "the next table is started",
    "input": "examples are waited for, and taken to the device",
    "total": "the whole training step, forward and backward included",
}
"""Label `phase` of `kfdist_step_seconds`, in the order of a step: what happens in each, on the host."""

_STEP_BUCKETS = (
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 30.0, 60.0),
)
"""Six a decade, for quantiles of a step that are within a fifth."""

_INVERSION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)

_gauge = partial(Metric, kind=Kind.GAUGE)
_counter = partial(Metric, kind=Kind.COUNTER)
_histogram = partial(Metric, kind=Kind.HISTOGRAM)
_of_block = partial(_gauge, labels=("block",), across=Across.MAX)
_of_factor = partial(_gauge, labels=("block", "factor"), across=Across.MAX)
_fact = partial(_gauge, sent=False)

_DECLARED = (
    # The run's progress.
    _counter("kfdist_steps_total", "Training steps made."),
    _counter("kfdist_examples_total", "Examples trained on, over all ranks."),
    _histogram(
        "kfdist_step_seconds",
        "Wall-clock seconds of a training step by phase, over all ranks.",
        labels=("phase",),
        buckets=_STEP_BUCKETS,
    ),
    _gauge("kfdist_loss", "Loss as last reported."),
    _gauge("kfdist_accuracy", "Accuracy as last reported, from 0 to 1."),
    _gauge(
        "kfdist_gradient_noise_scale_examples",
        "Gradient noise scale tr(Sigma) / |G|^2: the batch above which larger ones bring less and less.",
    ),
    # Staleness and adoption.
    _of_block("kfdist_staleness_steps", "Training steps between the statistics in a block's inverse and now."),
    _of_block("kfdist_staleness_seconds", "Seconds between the statistics in a block's inverse and now.", ages=True),
    _of_block(
        "kfdist_delay_steps", "Training steps between the statistics in a block's inverse and the step that adopted it."
    ),
    _of_block(
        "kfdist_update_period_steps", "Training steps between two inverses of this block, as its method has them."
    ),
    _gauge("kfdist_inverse_period_steps", "The run's inverse_period, for methods without a period of their own."),
    _gauge("kfdist_lag_steps", "Agreed training steps from statistics to adoption under a fixed lag; 0 without one."),
    _gauge(
        "kfdist_block_method_info",
        "Always 1; the label names the method of a block.",
        labels=("block", "method"),
        across=Across.MAX,
    ),
    _counter("kfdist_adoptions_total", "Versions that all ranks swapped in."),
    _counter(
        "kfdist_refreshes_total",
        "Inversions out of turn, because damping fell below what the inverse in use has eigenpairs enough for.",
    ),
    _histogram(
        "kfdist_adoption_wait_seconds",
        "Wall-clock seconds that all ranks waited in a step for results to adopt; steps that didn't wait aren't in it.",
        buckets=_STEP_BUCKETS,
    ),
    _counter(
        "kfdist_fallbacks_total",
        "Uses of something lesser than a fresh inverse, by reason.",
        labels=("reason",),
        known=("no_snapshot", "waited", "kept", "fallback", "damping_raised"),
    ),
    _gauge("kfdist_damping", "Damping lambda in force."),
    _gauge("kfdist_kl_clip_factor", "What the KL clip multiplied all directions by in a step: 1 where it didn't act."),
    _gauge(
        "kfdist_trust_ratio",
        "Change of the objective over the change that the quadratic model predicted, in AdaptiveStep's newest trial.",
    ),
    _of_block(
        "kfdist_step_length_ratio",
        "Norm of the change of a block's parameters in a step over their norm: lr |direction| / |theta|.",
    ),
    _of_block("kfdist_graft_ratio", "Length that the graft gave a block's direction over the length that it had."),
    _counter(
        "kfdist_graft_replacements_total",
        "Directions that were zero, not finite or uphill, and gave way to the graft's update; by parameter and step.",
    ),
    # Inversions and what they cost.
    _histogram(
        "kfdist_inversion_seconds",
        "Wall-clock seconds of an inversion by method.",
        labels=("method",),
        buckets=_INVERSION_BUCKETS,
    ),
    _gauge("kfdist_queue_depth", "Inversions submitted and not yet answered.", across=Across.SUM),
    _counter(
        "kfdist_jobs_replaced_total",
        "Inversions that never ran because newer statistics of their block took their place, over all ranks.",
        across=Across.SUM,
    ),
    _counter(
        "kfdist_bytes_total",
        "Bytes that kfdist moved, by purpose, over all ranks.",
        labels=("purpose",),
        across=Across.SUM,
    ),
    # Diagnostics of the inverse in use; a factor is "A", "G" or another matrix that the method decomposes.
    _of_factor(
        "kfdist_inversion_residual", "Relative error of a block's inverse: how far it is from what it claims to be."
    ),
    _of_factor(
        "kfdist_inversion_orthogonality_error",
        "Frobenius norm of U^T U - I for the eigenvectors U in a block's inverse.",
    ),
    _of_factor(
        "kfdist_inversion_approximation_error", "Relative distance of the kept part of a factor from the factor."
    ),
    _of_factor(
        "kfdist_inversion_smallest_eigenvalue",
        "Smallest eigenvalue found in a factor, before negative ones were clamped.",
        across=Across.MIN,
    ),
    _of_factor("kfdist_inversion_rank", "Rank that is kept of a factor."),
    _of_block(
        "kfdist_inversion_direction_error",
        "Bound on the relative change of a direction's components by the eigenpairs that a block's inverse lacks.",
    ),
    _of_block(
        "kfdist_inversion_limited_by_rank",
        "1 where `rank` leaves out eigenpairs that the direction error asked for would need, else 0.",
    ),
    _of_block(
        "kfdist_inversion_rung",
        "Retries that a block's inverse took: 0 as configured, then float64, then more and more damping.",
    ),
    # What went wrong.
    _counter(
        "kfdist_failures_total",
        "Failed inversions and re-submitted jobs, by reason.",
        labels=("reason",),
        across=Across.SUM,
        known=("inversion_failed", "damaged_broadcast", "owner_lost", "deadline", "crash", "corrupt", "courier_lost"),
    ),
    _counter(
        "kfdist_nonfinite_drops_total",
        "Batches whose statistics were dropped because they weren't finite, over all ranks.",
        across=Across.SUM,
    ),
    _counter(
        "kfdist_restarts_total",
        "Processes started again, by process.",
        labels=("process",),
        across=Across.SUM,
        known=("courier", "owner", "inverter"),
    ),
    _counter(
        "kfdist_samples_lost_total",
        "Samples that ranks dropped because the controller or the courier took none for too long, over all ranks.",
        across=Across.SUM,
    ),
    # Of all runs.
    _gauge(
        "kfdist_certificate_expiry_timestamp_seconds",
        "When the first certificate of a file that controller, owners or ranks read expires, in seconds since 1970.",
        labels=("process", "file"),
        across=Across.MIN,
        by_run=False,
    ),
    # What the controller sees by itself.
    _fact("kfdist_up", "1 while ranks of the run are heard of within the lease, else 0."),
    _fact("kfdist_run_state", "1 for the state that the run is in, 0 for the others.", labels=("state",)),
    _fact("kfdist_run_epoch", "The newest start of the run."),
    _fact("kfdist_run_step", "The training step that rank 0 last reported."),
    _fact("kfdist_run_planned_steps", "How many training steps the run is to make, 0 if not known."),
    _fact("kfdist_live_workers", "Ranks heard of within the lease."),
    _fact("kfdist_live_owners", "Owners heard of within the lease."),
    _fact(
        "kfdist_last_beat_timestamp_seconds",
        "When a rank of the run was last heard of, in seconds since 1970; time() minus it rises while all hang.",
    ),
    _counter(
        "kfdist_samples_dropped_total",
        "Samples that the controller refused, by reason.",
        labels=("reason",),
        by_run=False,
        sent=False,
    ),
    _gauge(
        "kfdist_retired_owners",
        "Owners that are gone and had been drained before, so that nobody misses them.",
        by_run=False,
        sent=False,
    ),
    _gauge(
        "kfdist_build_info",
        "Always 1; the labels name the controller's versions.",
        labels=("version", "python", "grpc"),
        by_run=False,
        sent=False,
    ),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _DECLARED}
"""All metrics by name."""

MAX_LABEL_CHARACTERS = 200
"""Longest value of a label."""


def fault_in(sample: MetricSample) -> str:
    """Returns why a sample can't be exported, in one word for a label, or an empty string if it can.

    A gauge may be NaN or infinite: a loss that is no number is news. A counter's total and an observation may not, as
    one such value would stay in every later sum.
    """
    metric = METRICS.get(sample.name)
    if metric is None or not metric.sent:
        return "unknown_metric"
    if set(sample.labels) != set(metric.labels):
        return "wrong_labels"
    if any(not value or len(value) > MAX_LABEL_CHARACTERS for value in sample.labels.values()):
        return "bad_label_value"
    if metric.kind is not Kind.GAUGE and not (math.isfinite(sample.value) and sample.value >= 0):
        return "bad_value"
    return ""
