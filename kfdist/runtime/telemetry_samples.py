"""A pipeline's measurements as samples for the controller and as totals for the summary."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kfdist.curvature.inverters.seng_directions import NON_DESCENT
from kfdist.runtime.diagnostics import diagnostic_samples
from kfdist.runtime.pipeline import Pipeline
from kfdist.types import Sample


def pipeline_samples(pipeline: Pipeline, worker_rank: int) -> list[Sample]:
    """Returns what this rank has to report; per-block gauges come from rank 0 alone, once a run.

    Observations of histograms are returned once and forgotten.
    """
    counters, parts = pipeline.counters, pipeline.parts
    samples = [
        Sample(name="kfdist_inversion_seconds", value=seconds, labels={"method": method})
        for method, seconds in counters.inversion_seconds
    ]
    counters.inversion_seconds.clear()
    samples += [
        Sample(name="kfdist_bytes_total", value=float(total), labels={"purpose": purpose})
        for purpose, total in _bytes(pipeline).items()
    ]
    link = parts.link.counters()
    samples.append(Sample(name="kfdist_samples_lost_total", value=float(link.samples_dropped)))
    samples += [
        Sample(name="kfdist_failures_total", value=float(total), labels={"reason": reason})
        for reason, total in link.resubmissions.items()
    ]
    samples.append(Sample(name="kfdist_queue_depth", value=float(len(parts.book.inputs))))
    if link.courier_restarts:
        samples.append(
            Sample(name="kfdist_restarts_total", value=float(link.courier_restarts), labels={"process": "courier"})
        )
    samples.append(
        Sample(
            name="kfdist_nonfinite_drops_total",
            value=pipeline.drops.latest(each.dropped for each in pipeline.sums.values()),
        )
    )
    if worker_rank == 0:
        samples += _common_samples(pipeline)
    return samples


def _common_samples(pipeline: Pipeline) -> list[Sample]:
    """What is equal on all ranks and reported once."""
    counters, parts = pipeline.counters, pipeline.parts
    last = max(pipeline.next_step - 1, 0)
    steps = pipeline.staleness(last)
    samples = [
        # Counters run from the sender's start, so a resumed run counts the steps of this process.
        Sample(name="kfdist_steps_total", value=float(len(counters.staleness))),
        Sample(name="kfdist_damping", value=pipeline.damping(last)),
        Sample(name="kfdist_adoptions_total", value=float(counters.adoptions)),
    ]
    for group in parts.groups:
        labels = {"block": group.name}
        samples.append(Sample(name="kfdist_staleness_steps", value=float(steps[group.name]), labels=labels))
        age = parts.snapshots.age_seconds(group.index)
        if age is not None:
            samples.append(Sample(name="kfdist_staleness_seconds", value=age, labels=labels))
        for block, outcome in parts.snapshots[group.index].outcomes.items():
            samples += diagnostic_samples(block, outcome.diagnostics)
    samples += [
        Sample(name="kfdist_fallbacks_total", value=float(total), labels={"reason": reason})
        for reason, total in counters.fallbacks.items()
    ]
    uphill = pipeline.uphill.latest(_uphill(pipeline))
    if uphill:
        samples.append(Sample(name="kfdist_fallbacks_total", value=uphill, labels={"reason": NON_DESCENT}))
    # The reasons are sentences with numbers in them: without bound as label values. The summary has them.
    failed = sum(parts.snapshots.failures.values())
    if failed:
        samples.append(Sample(name="kfdist_failures_total", value=float(failed), labels={"reason": "inversion_failed"}))
    if parts.exchange.resent:
        samples.append(
            Sample(
                name="kfdist_failures_total",
                value=float(parts.exchange.resent),
                labels={"reason": "damaged_broadcast"},
            )
        )
    samples += [
        Sample(name="kfdist_fallbacks_total", value=float(total), labels={"reason": outcome})
        for outcome, total in parts.snapshots.degraded.items()
    ]
    samples += [
        Sample(name="kfdist_step_seconds", value=seconds, labels={"phase": phase})
        for phase, seconds in counters.step_seconds
    ]
    counters.step_seconds.clear()
    return samples


def pipeline_totals(pipeline: Pipeline) -> dict[str, Any]:
    """Returns this rank's totals as plain values; reading the drop counts waits for the device."""
    counters, parts = pipeline.counters, pipeline.parts
    link = parts.link.counters()
    return {
        "bytes": _bytes(pipeline),
        "inversions": {
            "completed": sum(counters.completed.values()),
            "failed": sum(parts.snapshots.failures.values()),
            "by_method": dict(counters.completed),
        },
        "failures": dict(parts.snapshots.failures),
        "staleness_steps": {"p50": _quantile(counters.staleness, 0.5), "max": max(counters.staleness, default=0)},
        "adoptions": counters.adoptions,
        "fallbacks": dict(counters.fallbacks),
        "degraded": dict(parts.snapshots.degraded),
        "replaced_jobs": parts.book.replaced,
        "merged_jobs": parts.book.merged,
        "non_descent": round(sum(float(count) for count in _uphill(pipeline))),
        "resent_broadcasts": parts.exchange.resent,
        "resubmissions": dict(link.resubmissions),
        "courier_restarts": link.courier_restarts,
        "samples_lost": link.samples_dropped,
        "nonfinite_drops": round(sum(float(sums.dropped) for sums in pipeline.sums.values())),
    }


def _bytes(pipeline: Pipeline) -> dict[str, int]:
    """Returns this rank's bytes by purpose.

    "jobs" and "results" are what it asked for and got; "to_owners" and "from_owners" what went through its link for
    them, each retry again.
    """
    link = pipeline.parts.link.counters()
    return {**pipeline.counters.bytes, "to_owners": link.bytes_sent, "from_owners": link.bytes_received}


def _uphill(pipeline: Pipeline) -> list[Tensor]:
    """Counts of directions that were no descent directions, on the device, of the blocks whose method keeps one."""
    memories = pipeline.parts.snapshots.memories.values()
    return [memory[NON_DESCENT] for memory in memories if NON_DESCENT in memory]


def _quantile(values: Sequence[int], q: float) -> int:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else 0
