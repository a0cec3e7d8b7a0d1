"""What a pipeline measured: as samples for the controller, totals for the summary, and notes for `coverage()`."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfdist.curvature.inverter import Inversion
from kfdist.curvature.inverters.unit_wise import UnitWise
from kfdist.links.link import LinkCounters
from kfdist.policies.staleness import FixedLag
from kfdist.runtime.pipeline import Pipeline
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.track import Track
from kfdist.telemetry.metrics import METRICS
from kfdist.types import BlockName, MetricSample

CLOSED_FORMS = "(closed forms)"
"""Label of all blocks that the ranks invert in closed form: norms, and bare scales and shifts (docs/decisions/0015)."""

_GAUGES = {
    "rank": "kfdist_inversion_rank",
    "residual": "kfdist_inversion_residual",
    "orthogonality": "kfdist_inversion_orthogonality_error",
    "approximation_error": "kfdist_inversion_approximation_error",
    "smallest_eigenvalue": "kfdist_inversion_smallest_eigenvalue",
}
"""Gauge of each diagnostic that a method gives for its factors, such as `residual_A`; in the order of the note."""


def pipeline_samples(pipeline: Pipeline, link: LinkCounters) -> list[MetricSample]:
    """Returns what this rank has to report; what is equal on all ranks comes from rank 0 alone.

    Observations of histograms are returned once and forgotten.

    Args:
        pipeline: This rank's.
        link: What its link has counted.
    """
    counters = pipeline.counters
    samples = [
        *_taken("kfdist_inversion_seconds", "method", counters.inversion_seconds),
        *_by_label("kfdist_bytes_total", "purpose", _bytes(pipeline, link)),
        *_by_label("kfdist_failures_total", "reason", link.resubmissions),
        *_by_label("kfdist_restarts_total", "process", _some({"courier": link.courier_restarts})),
        _sample("kfdist_samples_lost_total", link.samples_dropped),
        _sample("kfdist_queue_depth", sum(len(track.jobs.unanswered) for track in pipeline.tracks)),
        _sample("kfdist_jobs_replaced_total", sum(track.jobs.replaced for track in pipeline.tracks)),
        _sample(
            "kfdist_nonfinite_drops_total",
            counters.drops.latest(each.dropped for each in pipeline.reducer.every),
        ),
    ]
    return samples if pipeline.training.rank else [*samples, *_common_samples(pipeline)]


def _common_samples(pipeline: Pipeline) -> list[MetricSample]:
    counters, step, adoption = pipeline.counters, pipeline.last_step, pipeline.in_force.settings.adoption
    replaced = {reason: counters.replaced[reason].latest(counts) for reason, counts in _replaced(pipeline).items()}
    # Reasons of failures have numbers in them: without bound as label values. The summary has them.
    failures = {"inversion_failed": sum(counters.failures.values()), "damaged_broadcast": counters.resent}
    samples = [
        # Counters run from the sender's start, so a resumed run counts the steps of this process.
        _sample("kfdist_steps_total", counters.steps),
        _sample("kfdist_damping", counters.adaptive_damping or pipeline.in_force.damping(step)),
        _sample("kfdist_inverse_period_steps", pipeline.timetable.inverse_period(step)),
        _sample("kfdist_lag_steps", adoption.lag if isinstance(adoption, FixedLag) else 0),
        _sample("kfdist_adoptions_total", counters.adoptions),
        _sample("kfdist_refreshes_total", counters.outgrown),
        *(_sample("kfdist_adoption_wait_seconds", seconds) for seconds in counters.adoption_waits),
        *_by_label("kfdist_fallbacks_total", "reason", counters.fallbacks),
        *_by_label("kfdist_fallbacks_total", "reason", _some(replaced)),
        *_by_label("kfdist_fallbacks_total", "reason", counters.degraded),
        *_by_label("kfdist_failures_total", "reason", _some(failures)),
        *_taken("kfdist_step_seconds", "phase", counters.step_seconds),
    ]
    counters.adoption_waits.clear()
    if (factor := counters.late_kl_clip_factor()) is not None:
        samples.append(_sample("kfdist_kl_clip_factor", factor))
    if counters.trust_ratio is not None:
        samples.append(_sample("kfdist_trust_ratio", counters.trust_ratio))
    if (noise_scale := pipeline.noise_scale.latest()) is not None:
        samples.append(_sample("kfdist_gradient_noise_scale_examples", noise_scale))
    samples += _length_samples(pipeline)
    samples += _staleness_samples(pipeline.tracks, pipeline.timetable, step)
    samples += _method_samples(pipeline.tracks)
    for track in pipeline.tracks:
        for block, outcome in track.snapshot.outcomes.items():
            samples += diagnostic_samples(block, outcome.diagnostics)
    return samples


def _method_samples(tracks: Sequence[Track]) -> list[MetricSample]:
    """Names the method of each group under the label that its staleness has."""
    methods = {_label(track): track.group.inverter.name for track in tracks}
    return [_sample("kfdist_block_method_info", 1, block=label, method=method) for label, method in methods.items()]


def _label(track: Track) -> str:
    return CLOSED_FORMS if isinstance(track.group.inverter, UnitWise) else track.group.name


def _staleness_samples(tracks: Sequence[Track], timetable: Timetable, step: int) -> list[MetricSample]:
    """Returns how old each group's inverse is, and its period.

    Those with closed forms, of which there may be many, share the worst.
    """
    samples: dict[tuple[str, str], float] = {}
    for track in tracks:
        label = _label(track)
        ages = {
            "kfdist_staleness_steps": track.staleness(step),
            "kfdist_staleness_seconds": track.age_seconds(),
            "kfdist_delay_steps": track.delay,
            "kfdist_update_period_steps": timetable.update_period(track, step),
        }
        for name, age in ages.items():
            if age is not None:
                samples[name, label] = max(age, samples.get((name, label), 0.0))
    return [_sample(name, age, block=label) for (name, label), age in samples.items()]


def _length_samples(pipeline: Pipeline) -> list[MetricSample]:
    """Returns how far a step moved each group, and what its graft did; has the next step measured."""
    found = {"kfdist_step_length_ratio": pipeline.lengths.latest(), "kfdist_graft_ratio": pipeline.grafts.latest()}
    pipeline.lengths.ask()
    labels = {track.group.name: _label(track) for track in pipeline.tracks}
    worst: dict[tuple[str, str], float] = {}
    for name, values in found.items():
        for group, value in values.items():
            known = worst.get((name, labels[group]), 0.0)
            worst[name, labels[group]] = known if math.isnan(known) or known > value else value  # NaN is the worst
    samples = [_sample(name, value, block=label) for (name, label), value in worst.items()]
    replaced = pipeline.grafts.replaced()
    return samples if replaced is None else [*samples, _sample("kfdist_graft_replacements_total", replaced)]


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
        "refreshes": counters.outgrown,
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
        "nonfinite_drops": round(sum(float(each.dropped) for each in pipeline.reducer.every)),
    }


def diagnostic_samples(block: BlockName, diagnostics: Mapping[str, float]) -> list[MetricSample]:
    """Returns a block's diagnostics as gauges; those that have none are left out.

    Args:
        block: The block's name.
        diagnostics: Of the inversion in use, as in `Inversion`.
    """
    samples = [
        _sample(gauge, value, block=block, factor=factor)
        for quantity, gauge in _GAUGES.items()
        for factor, value in _by_factor(quantity, diagnostics).items()
    ]
    for name in ("rung", "direction_error", "limited_by_rank"):
        if name in diagnostics:
            samples.append(_sample(f"kfdist_inversion_{name}", diagnostics[name], block=block))
    return samples


def diagnostic_note(version: int, outcome: Inversion) -> str:
    """Says in one line how a block's inversion went: all ranks, and the worst of each other diagnostic.

    Args:
        version: Step whose statistics were inverted.
        outcome: How it went.
    """
    facts = []
    for quantity, metric in _GAUGES.items():
        values = list(_by_factor(quantity, outcome.diagnostics).values())
        if values:
            shown = values if quantity == "rank" else [METRICS[metric].across.worst(values)]
            words = metric.removeprefix("kfdist_inversion_").replace("_", " ")
            facts.append(f"{words} {'/'.join(f'{value:.3g}' for value in shown)}")
    if outcome.diagnostics.get("limited_by_rank"):
        worst, mean = (outcome.diagnostics[f"{which}direction_error"] for which in ("", "mean_"))
        facts.append(f"limited by rank: direction error up to {worst:.2g}, mean {mean:.2g}")
    return ": ".join(filter(None, (f"version {version} ({outcome.outcome})", ", ".join(facts))))


def _by_factor(quantity: str, diagnostics: Mapping[str, float]) -> dict[str, float]:
    """Returns the diagnostics `QUANTITY_FACTOR` of one quantity by factor."""
    parts = {name: name.rpartition("_") for name in diagnostics}
    return {factor: diagnostics[name] for name, (found, _, factor) in parts.items() if found == quantity}


def _sample(name: str, value: float, **labels: str) -> MetricSample:
    return MetricSample(name=name, value=float(value), labels=labels)


def _by_label(name: str, label: str, totals: Mapping[str, float]) -> list[MetricSample]:
    return [_sample(name, total, **{label: value}) for value, total in totals.items()]


def _taken(name: str, label: str, observations: deque[tuple[str, float]]) -> list[MetricSample]:
    samples = [_sample(name, value, **{label: of}) for of, value in observations]
    observations.clear()
    return samples


def _some(totals: Mapping[str, float]) -> dict[str, float]:
    return {value: total for value, total in totals.items() if total}


def _bytes(pipeline: Pipeline, link: LinkCounters) -> dict[str, int]:
    """Returns this rank's bytes by purpose.

    "jobs" and "results" are what it asked for and got; "to_owners" and "from_owners" what went through its link for
    them, each retry again.
    """
    return {
        "table": pipeline.agreement.bytes_sent,
        "statistics": pipeline.reducer.bytes_sent + pipeline.calibration.bytes_sent + pipeline.noise_scale.bytes_sent,
        "jobs": pipeline.inverting.book.bytes_sent,
        "results": pipeline.inverting.bytes_received,
        "snapshots": pipeline.adopting.exchange.bytes_sent,
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
