"""A pipeline's measurements as samples for the controller and as totals for the summary."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kfdist.links.link import LinkCounters
from kfdist.runtime.diagnostics import diagnostic_samples
from kfdist.runtime.pipeline import Pipeline
from kfdist.types import MetricSample


def pipeline_samples(pipeline: Pipeline, link: LinkCounters) -> list[MetricSample]:
    """Returns what this rank has to report; per-block gauges come from rank 0 alone, once a run.

    Observations of histograms are returned once and forgotten.

    Args:
        pipeline: This rank's.
        link: What its link has counted.
    """
    counters = pipeline.counters
    samples = [
        MetricSample(name="kfdist_inversion_seconds", value=seconds, labels={"method": method})
        for method, seconds in counters.inversion_seconds
    ]
    counters.inversion_seconds.clear()
    samples += _by_label("kfdist_bytes_total", "purpose", _bytes(pipeline, link))
    samples.append(MetricSample(name="kfdist_samples_lost_total", value=float(link.samples_dropped)))
    samples += _by_label("kfdist_failures_total", "reason", link.resubmissions)
    unanswered = sum(len(track.jobs.unanswered) for track in pipeline.tracks)
    samples.append(MetricSample(name="kfdist_queue_depth", value=float(unanswered)))
    if link.courier_restarts:
        samples += _by_label("kfdist_restarts_total", "process", {"courier": link.courier_restarts})
    drops = counters.drops.latest(each.dropped for each in pipeline.reducer.sums.values())
    samples.append(MetricSample(name="kfdist_nonfinite_drops_total", value=drops))
    if pipeline.training.rank == 0:
        samples += _common_samples(pipeline)
    return samples


def _common_samples(pipeline: Pipeline) -> list[MetricSample]:
    """What is equal on all ranks and reported once."""
    counters = pipeline.counters
    samples = [
        # Counters run from the sender's start, so a resumed run counts the steps of this process.
        MetricSample(name="kfdist_steps_total", value=float(counters.steps)),
        MetricSample(name="kfdist_damping", value=pipeline.agreement.damping(pipeline.last_step)),
        MetricSample(name="kfdist_adoptions_total", value=float(counters.adoptions)),
    ]
    for track in pipeline.tracks:
        labels, steps, seconds = {"block": track.group.name}, track.staleness(pipeline.last_step), track.age_seconds()
        samples.append(MetricSample(name="kfdist_staleness_steps", value=float(steps), labels=labels))
        if seconds is not None:
            samples.append(MetricSample(name="kfdist_staleness_seconds", value=seconds, labels=labels))
        for block, outcome in track.snapshot.outcomes.items():
            samples += diagnostic_samples(block, outcome.diagnostics)
    samples += _by_label("kfdist_fallbacks_total", "reason", counters.fallbacks)
    replaced = {reason: counters.replaced[reason].latest(counts) for reason, counts in _replaced(pipeline).items()}
    samples += _by_label("kfdist_fallbacks_total", "reason", {reason: n for reason, n in replaced.items() if n})
    samples += _by_label("kfdist_fallbacks_total", "reason", counters.degraded)
    # Reasons of failures have numbers in them: without bound as label values. The summary has them.
    failed, resent = sum(counters.failures.values()), counters.resent
    failures = {"inversion_failed": failed, "damaged_broadcast": resent}
    samples += _by_label("kfdist_failures_total", "reason", {reason: n for reason, n in failures.items() if n})
    samples += [
        MetricSample(name="kfdist_step_seconds", value=seconds, labels={"phase": phase})
        for phase, seconds in counters.step_seconds
    ]
    counters.step_seconds.clear()
    return samples


def pipeline_totals(pipeline: Pipeline, link: LinkCounters) -> dict[str, Any]:
    """Returns this rank's totals as plain values; reading the drop counts waits for the device.

    Args:
        pipeline: This rank's.
        link: What its link has counted.
    """
    counters, tracks = pipeline.counters, pipeline.tracks
    staleness = {"p50": counters.staleness.quantile(0.5), "max": counters.staleness.largest}
    return {
        "bytes": _bytes(pipeline, link),
        "inversions": {
            "completed": sum(counters.completed.values()),
            "failed": sum(counters.failures.values()),
            "by_method": dict(counters.completed),
        },
        "failures": dict(counters.failures),
        "staleness_steps": staleness if tracks else {},
        "adoptions": counters.adoptions,
        "fallbacks": dict(counters.fallbacks),
        "degraded": dict(counters.degraded),
        "replaced_jobs": sum(track.jobs.replaced for track in tracks),
        "merged_jobs": sum(track.jobs.merged for track in tracks),
        "replaced_directions": {
            reason: sum(int(count) for count in counts) for reason, counts in _replaced(pipeline).items()
        },
        "resent_broadcasts": counters.resent,
        "resubmissions": dict(link.resubmissions),
        "courier_restarts": link.courier_restarts,
        "samples_lost": link.samples_dropped,
        "nonfinite_drops": round(sum(float(sums.dropped) for sums in pipeline.reducer.sums.values())),
    }


def _by_label(name: str, label: str, totals: Mapping[str, float]) -> list[MetricSample]:
    return [MetricSample(name=name, value=float(total), labels={label: value}) for value, total in totals.items()]


def _bytes(pipeline: Pipeline, link: LinkCounters) -> dict[str, int]:
    """Returns this rank's bytes by purpose.

    "jobs" and "results" are what it asked for and got; "to_owners" and "from_owners" what went through its link for
    them, each retry again.
    """
    return {
        "table": pipeline.agreement.bytes_sent,
        "statistics": pipeline.reducer.bytes_sent + pipeline.calibration.bytes_sent,
        "jobs": pipeline.inverting.bytes_sent,
        "results": pipeline.inverting.bytes_received,
        "snapshots": pipeline.adopting.bytes_sent,
        "to_owners": link.bytes_sent,
        "from_owners": link.bytes_received,
    }


def _replaced(pipeline: Pipeline) -> dict[str, list[Tensor]]:
    """Returns the counts of directions that methods replaced, on the device, by reason."""
    counts: dict[str, list[Tensor]] = {}
    for track in pipeline.tracks:
        for memory in track.memories.values():
            for reason, count in memory.counts.items():
                counts.setdefault(reason, []).append(count)
    return counts
