"""What the members of one run measured, as the series exported for it.

A sender reports a counter as its total since its start. Senders restart, yet a series must never go back: what a sender
counted in earlier lives is added to what it reports now. The controller restarts, too, and goes on from what it kept:
to Prometheus a total that fell has begun anew, and all of what it then is has been counted just now.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kfdist.control.control_records import RunRecord
from kfdist.telemetry.metrics import METRICS, Across, Kind, Metric, fault_in
from kfdist.types import MetricSample

MAX_BLOCKS = 512
"""Blocks with a separate series, the same ones in each metric; others share "other", which has their worst value."""

_STALENESS, _PERIOD = "kfdist_staleness_steps", "kfdist_update_period_steps"
_OF_ONE_BLOCK = (_STALENESS, "kfdist_staleness_seconds", "kfdist_delay_steps", _PERIOD)
"""What "other" has of a single one of its blocks, the stalest by its own period: these are compared with each other."""

MAX_LABEL_VALUES = 64
"""Values of any other label of a metric; samples with more are dropped and counted."""

OTHER = "other"

BLOCK = "block"

Key = tuple[str, tuple[str, ...]]
"""A series: the metric's name and its label values in declared order."""

KeptCounters = list[tuple[str, tuple[str, ...], list[tuple[str, str, str, float, float]]]]
"""A run's counters as they are kept: of each series the metric's name, its label values, and of each sender its kind
and name, its life, and what it counted in earlier lives and in this one."""


@dataclass(frozen=True, order=True)
class Sender:
    """Who sends samples.

    Attributes:
        kind: "worker" or "owner".
        name: A worker's rank or an owner's name.
    """

    kind: str
    name: str

    @property
    def is_rank_zero(self) -> bool:
        """Whether it is the run's rank 0."""
        return self.kind == "worker" and self.name == "0"


@dataclass
class Total:
    """One sender's counter over all its lives."""

    life: str = ""
    earlier: float = 0.0
    reported: float = 0.0

    def report(self, life: str, value: float) -> None:
        """Takes the sender's count since its start; a new life or a smaller total means that it restarted."""
        if life != self.life or value < self.reported:
            self.earlier += self.reported
        self.life, self.reported = life, value


@dataclass(frozen=True)
class Told:
    """A gauge's value, and when its sender told it."""

    value: float
    heard: float


@dataclass
class Histogram:
    """Observations by bucket; the last bucket has no upper bound."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        """Begins with no observation."""
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Counts one observation in the first bucket whose bound is at least as large."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Returns (upper bound, observations up to it) for each bucket, as Prometheus's text format has them."""
        running, buckets = 0, []
        for bound, count in zip([*self.bounds, float("inf")], self.counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(running)))
        return buckets


class RunSeries:
    """The series of one run. Not thread-safe: the exporter locks.

    Args:
        clock: Seconds that never go back; gauges that age do so by it.

    Attributes:
        record: What the controller knows of the run, set by others.
        heard: When a rank of it last sent a message, seconds since 1970, set by others; 0.0 if none did.
        counted: Whether a counter has changed since others last set it to False.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.record: RunRecord | None = None
        self.heard = 0.0
        self.counted = False
        self._clock = clock
        self._gauges: dict[Key, dict[Sender, Told]] = {}
        self._counters: dict[Key, dict[Sender, Total]] = {}
        self._histograms: dict[Key, Histogram] = {}
        self._values: dict[tuple[str, str], set[str]] = {}
        self._lives: dict[Sender, str] = {}

    def ingest(self, sender: Sender, life: str, samples: Iterable[MetricSample]) -> Counter[str]:
        """Takes what a sender measured since its last message.

        Args:
            sender: Who measured.
            life: Names the sender's present life; its counters began at zero with it, and gauges of an earlier one end.
            samples: What it measured, in any order.

        Returns:
            The number of dropped samples by reason.
        """
        if self._lives.get(sender) != life:
            self.forget_gauges(sender)  # such as those of blocks and methods that the new life doesn't have
            self._lives[sender] = life
        dropped: Counter[str] = Counter()
        gauges: dict[Key, float] = {}
        for sample in self._without_less_stale(samples):
            fault = fault_in(sample) or self._take(sender, life, sample, gauges)
            if fault:
                dropped[fault] += 1
        for key, value in gauges.items():
            self._gauges.setdefault(key, {})[sender] = Told(value, self._clock())
        return dropped

    def count(self, name: str, labels: Mapping[str, str], amount: float) -> None:
        """Adds to a counter that the controller itself keeps, beside what members send."""
        metric = METRICS[name]
        key = (name, tuple(labels[label] for label in metric.labels))
        total = self._counters.setdefault(key, {}).setdefault(Sender("controller", ""), Total())
        total.report("", total.reported + amount)
        self.counted = True

    def kept(self) -> KeptCounters:
        """Returns all counters, for a controller that goes on after this one."""
        return [
            (
                name,
                labels,
                [(by.kind, by.name, total.life, total.earlier, total.reported) for by, total in totals.items()],
            )
            for (name, labels), totals in self._counters.items()
        ]

    def go_on(self, kept: KeptCounters) -> None:
        """Takes over what an earlier controller kept; before anything else is counted."""
        for name, labels, totals in kept:
            metric = METRICS.get(name)
            if metric is not None and len(labels) == len(metric.labels):  # else it was another version's
                for label, value in zip(metric.labels, labels, strict=True):
                    self._values.setdefault((name, label), set()).add(value)
                self._counters[name, labels] = {
                    Sender(kind, by): Total(life, earlier, reported) for kind, by, life, earlier, reported in totals
                }

    def forget_gauges(self, sender: Sender) -> None:
        """Ends a silent sender's gauges, which describe the past; its counters stay counted."""
        self._lives.pop(sender, None)
        for key in list(self._gauges):
            self._gauges[key].pop(sender, None)
            if not self._gauges[key]:
                del self._gauges[key]

    def gauges_of(self, sender: Sender) -> dict[str, float]:
        """Returns a sender's gauges by metric name; of labelled ones, the worst value."""
        found: dict[str, float] = {}
        for (name, _), values in self._gauges.items():
            if sender in values:
                value = self._now(METRICS[name], values[sender])
                found[name] = METRICS[name].across.worst([found.get(name, value), value])
        return found

    def values(self) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
        """Yields every gauge and counter: metric, label values, value."""
        for (name, labels), by_sender in self._gauges.items():
            across = METRICS[name].across
            merge = sum if across is Across.SUM else across.worst
            yield METRICS[name], labels, merge(self._now(METRICS[name], told) for told in by_sender.values())
        for (name, labels), totals in self._counters.items():
            yield METRICS[name], labels, sum(total.earlier + total.reported for total in totals.values())

    def zeros(self) -> Iterator[tuple[Metric, tuple[str, ...]]]:
        """Yields the counters that are known beforehand and that nobody has counted yet.

        None while ranks of an earlier controller's start haven't said yet what they have counted.
        """
        if not self.heard and self.record is not None and self.record.epoch:
            return
        for metric in METRICS.values():
            if metric.kind is Kind.COUNTER and metric.sent:
                for labels in [(value,) for value in metric.known] if metric.labels else [()]:
                    if (metric.name, labels) not in self._counters:
                        yield metric, labels

    def histograms(self) -> Iterator[tuple[Metric, tuple[str, ...], Histogram]]:
        """Yields every histogram: metric, label values, observations."""
        for (name, labels), histogram in self._histograms.items():
            yield METRICS[name], labels, histogram

    def samples(self) -> Iterator[MetricSample]:
        """Yields every gauge and counter, and of every histogram its sum and count."""
        for metric, labels, value in self.values():
            yield _sample(metric, "", labels, value)
        for metric, labels, histogram in self.histograms():
            yield _sample(metric, "_sum", labels, histogram.total)
            yield _sample(metric, "_count", labels, sum(histogram.counts))

    def _now(self, metric: Metric, told: Told) -> float:
        """Returns a gauge's value now: one that ages does so even while its sender hangs."""
        return told.value + (self._clock() - told.heard if metric.ages else 0.0)

    def _without_less_stale(self, samples: Iterable[MetricSample]) -> list[MetricSample]:
        """Leaves out how old blocks are that share "other", but for the one that is the stalest by its own period."""
        samples = list(samples)
        ages: dict[str, dict[str, float]] = {}
        for sample in samples:
            known = sample.name in (_STALENESS, _PERIOD) and not fault_in(sample)
            if known and self._bounded(METRICS[sample.name], sample) == (OTHER,):
                ages.setdefault(sample.labels[BLOCK], {})[sample.name] = sample.value
        periods_old = {name: of.get(_STALENESS, 0.0) / (of.get(_PERIOD) or 1.0) for name, of in ages.items()}
        silent = ages.keys() - {max(periods_old, key=periods_old.__getitem__, default="")}
        return [each for each in samples if not (each.name in _OF_ONE_BLOCK and each.labels.get(BLOCK) in silent)]

    def _take(self, sender: Sender, life: str, sample: MetricSample, gauges: dict[Key, float]) -> str:
        metric = METRICS[sample.name]
        labels = self._bounded(metric, sample)
        if labels is None:
            return "too_many_label_values"
        key = (metric.name, labels)
        if metric.kind is Kind.HISTOGRAM:
            self._histograms.setdefault(key, Histogram(metric.buckets)).observe(sample.value)
        elif metric.across is Across.RANK_ZERO and not sender.is_rank_zero:
            pass  # all ranks have the same value, and rank 0's counts
        elif metric.kind is Kind.COUNTER:
            self._counters.setdefault(key, {}).setdefault(sender, Total()).report(life, sample.value)
            self.counted = True
        else:
            shared = OTHER in labels and key in gauges
            gauges[key] = metric.across.worst([gauges[key], sample.value]) if shared else sample.value
        return ""

    def _bounded(self, metric: Metric, sample: MetricSample) -> tuple[str, ...] | None:
        labels = []
        for label in metric.labels:
            value = sample.labels[label]
            # Blocks are the same of all metrics, so that "other" stands for the same blocks in all of them.
            known = self._values.setdefault((BLOCK if label == BLOCK else metric.name, label), set())
            if value not in known:
                if len(known) >= (MAX_BLOCKS if label == BLOCK else MAX_LABEL_VALUES):
                    if label != BLOCK:
                        return None
                    value = OTHER
                else:
                    known.add(value)
            labels.append(value)
        return tuple(labels)


def _sample(metric: Metric, suffix: str, labels: tuple[str, ...], value: float) -> MetricSample:
    return MetricSample(name=metric.name + suffix, value=value, labels=dict(zip(metric.labels, labels, strict=True)))
