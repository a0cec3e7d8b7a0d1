"""The controller's /metrics: one scrape target for all that a run's processes measure."""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

from kfdist.control.control_records import RunRecord, RunState
from kfdist.control.series import Histogram, KeptCounters, RunSeries, Sender
from kfdist.errors import EnvironmentFault
from kfdist.system.provenance import versions
from kfdist.telemetry.metrics import METRICS, Kind, Metric
from kfdist.types import MetricSample

_LOG = logging.getLogger(__name__)

MAX_RUNS = 64
"""Runs that are exported; beyond that, the longest silent one is dropped."""

LAST_GAUGES_SECONDS = 60.0
"""How long the gauges of a run that has ended are exported, for a scrape to see the last of them."""

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_FAMILIES = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}


class Exporter(Collector):
    """Holds what members measured and what the controller knows of runs; scrapes read it from other threads.

    Args:
        measure: Returns what the controller itself measures, of metrics that belong to no run; asked at each scrape.
    """

    def __init__(self, measure: Callable[[], Sequence[MetricSample]] = list) -> None:
        self._measure = measure
        self._keep: Callable[[Mapping[str, KeptCounters]], None] = lambda counters: None
        self._scraping = threading.Lock()
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, RunSeries] = OrderedDict()
        self._common = RunSeries()  # of metrics that belong to no run
        self._dropped: Counter[str] = Counter()
        self._retired_owners = 0

    def go_on(self, kept: Mapping[str, KeptCounters], keep: Callable[[Mapping[str, KeptCounters]], None]) -> None:
        """Goes on with the counters of an earlier controller, and keeps its own for a later one.

        Args:
            kept: Counters by run, the newest run last.
            keep: Makes counters by run durable, called from the threads of scrapes; may raise EnvironmentFault.
        """
        with self._lock:
            for run, counters in kept.items():
                self._series(run).go_on(counters)
            self._keep = keep

    def ingest(self, run: str, sender: Sender, life: str, samples: Sequence[MetricSample]) -> None:
        """Takes a member's samples.

        Args:
            run: The run they belong to; "" for those of metrics that belong to none.
            sender: The member.
            life: Names the member's present life; its counters began at zero with it.
            samples: What it measured.
        """
        with self._lock:
            common = [sample for sample in samples if _is_common(sample)]
            self._dropped.update(self._common.ingest(_in_common(run, sender), life, common))
            of_run = [sample for sample in samples if not _is_common(sample)]
            if run:
                self._dropped.update(self._series(run).ingest(sender, life, of_run))
            elif of_run:
                self._dropped["wrong_labels"] += len(of_run)

    def drop(self, reason: str, count: int) -> None:
        """Counts samples that were refused before `ingest`."""
        with self._lock:
            self._dropped[reason] += count

    def count(self, run: str, name: str, labels: Mapping[str, str], amount: float = 1.0) -> None:
        """Adds to a counter that the controller itself keeps for a run."""
        with self._lock:
            self._series(run).count(name, labels, amount)

    def heard(self, run: str) -> None:
        """Notes that a rank of the run sent a message just now."""
        with self._lock:
            self._series(run).heard = time.time()

    def retired(self, owners: int) -> None:
        """Takes how many owners are gone that had been drained before."""
        with self._lock:
            self._retired_owners = owners

    def show(self, record: RunRecord) -> None:
        """Takes a run's new record."""
        with self._lock:
            self._series(record.name).record = record

    def forget_gauges(self, run: str, sender: Sender) -> None:
        """Ends the gauges of a rank that went silent."""
        with self._lock:
            self._common.forget_gauges(_in_common(run, sender))
            if run in self._runs:
                self._runs[run].forget_gauges(sender)

    def release(self, run: str, sender: Sender) -> None:
        """Ends what a rank that has ended told beside its run's gauges, of which the last are still to be seen."""
        with self._lock:
            self._common.forget_gauges(_in_common(run, sender))

    def forget_owner(self, owner_id: str) -> None:
        """Ends the gauges of an owner that went silent."""
        sender = Sender("owner", owner_id)
        with self._lock:
            self._common.forget_gauges(_in_common("", sender))
            for series in self._runs.values():
                series.forget_gauges(sender)

    def gauges_of(self, run: str, sender: Sender) -> dict[str, float]:
        """Returns a member's gauges by metric name; of labelled ones, the worst value."""
        with self._lock:
            return self._runs[run].gauges_of(sender) if run in self._runs else {}

    def samples(self, run: str) -> list[MetricSample]:
        """Returns what a run's members measured, as `RunSeries.samples` has it; empty for an unknown run."""
        with self._lock:
            return list(self._runs[run].samples()) if run in self._runs else []

    @override
    def collect(self) -> Iterator[Family]:
        measured = self._measure()  # reads files, for which beats must not wait
        with self._scraping:  # what a scrape shows is kept before a later one keeps more
            with self._lock:
                self._common.ingest(Sender("controller", ""), "", measured)
                families = self._families()
                counters = {run: series.kept() for run, series in self._runs.items() if series.counted}
                for run in counters:
                    self._runs[run].counted = False
            self._make_durable(counters)
        yield from families.values()

    def _families(self) -> dict[str, Family]:
        families: dict[str, Family] = {}
        for run, series in self._runs.items():
            shown = [each for each in series.values() if not (each[0].kind is Kind.GAUGE and _is_over(series))]
            for metric, labels, value in [*shown, *_facts(series)]:
                _add(_family(families, metric), [run, *labels], value)
            for metric, labels in series.zeros():
                _add(_family(families, metric), [run, *labels], 0.0)
            for metric, labels, histogram in series.histograms():
                _add_histogram(_family(families, metric), [run, *labels], histogram)
        for reason, count in self._dropped.items():
            _add(_family(families, METRICS["kfdist_samples_dropped_total"]), [reason], count)
        _add(_family(families, METRICS["kfdist_retired_owners"]), [], self._retired_owners)
        for metric, labels, value in self._common.values():
            _add(_family(families, metric), list(labels), value)
        here = versions()
        build = [here[name] for name in ("kfdist", "python", "grpcio")]
        _add(_family(families, METRICS["kfdist_build_info"]), build, 1)
        return families

    def _make_durable(self, counters: Mapping[str, KeptCounters]) -> None:
        """Keeps counters before they are shown: what Prometheus has seen, no later controller may go back behind."""
        if counters:
            try:
                self._keep(counters)
            except EnvironmentFault as fault:
                _LOG.error("a controller that starts again will count anew: %s", fault)
                with self._lock:
                    for run in counters.keys() & self._runs.keys():
                        self._runs[run].counted = True

    def _series(self, run: str) -> RunSeries:
        if run not in self._runs:
            self._runs[run] = RunSeries()
            while len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)
        self._runs.move_to_end(run)
        return self._runs[run]


def _is_common(sample: MetricSample) -> bool:
    """Whether a sample's metric belongs to no run."""
    metric = METRICS.get(sample.name)
    return metric is not None and not metric.by_run


def _in_common(run: str, sender: Sender) -> Sender:
    """Names a sender among those of all runs."""
    return replace(sender, name=f"{run}/{sender.name}")


def _is_over(series: RunSeries) -> bool:
    """Whether the run has ended, so that what its gauges say is of the past."""
    ended = series.record is not None and series.record.state.ended
    return ended and time.time() - series.heard > LAST_GAUGES_SECONDS


def _facts(series: RunSeries) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
    """Yields what the controller itself knows of a run."""
    record = series.record
    if record is not None:
        yield METRICS["kfdist_up"], (), float(record.live_workers > 0)
        yield METRICS["kfdist_run_epoch"], (), record.epoch
        yield METRICS["kfdist_run_step"], (), record.step
        yield METRICS["kfdist_run_planned_steps"], (), record.total_steps
        yield METRICS["kfdist_live_workers"], (), record.live_workers
        yield METRICS["kfdist_live_owners"], (), record.live_owners
        for state in RunState:
            yield METRICS["kfdist_run_state"], (state.value,), float(record.state is state)
    if series.heard:
        yield METRICS["kfdist_last_beat_timestamp_seconds"], (), series.heard


def _family(families: dict[str, Family], metric: Metric) -> Family:
    if metric.name not in families:
        labels = ["run", *metric.labels] if metric.by_run else list(metric.labels)
        families[metric.name] = _FAMILIES[metric.kind](metric.name, metric.help, labels=labels)
    return families[metric.name]


def _add(family: Family, labels: list[str], value: float) -> None:
    assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
    family.add_metric(labels, value)


def _add_histogram(family: Family, labels: list[str], histogram: Histogram) -> None:
    assert isinstance(family, HistogramMetricFamily)
    family.add_metric(labels, buckets=histogram.cumulative(), sum_value=histogram.total)
