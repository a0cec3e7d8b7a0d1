"""What inversions say of their own results: as gauges for the controller and as a note for `coverage()`."""

from collections.abc import Mapping

from kfdist.curvature.ladder import BlockOutcome
from kfdist.telemetry.metrics import METRICS
from kfdist.types import BlockName, MetricSample

_GAUGES = {
    "rank": "kfdist_inversion_rank",
    "residual": "kfdist_inversion_residual",
    "orthogonality": "kfdist_inversion_orthogonality_error",
    "approximation_error": "kfdist_inversion_approximation_error",
    "smallest_eigenvalue": "kfdist_inversion_smallest_eigenvalue",
}
"""Gauge of each diagnostic that a method gives for its factors, such as `residual_A`; in the order of the note."""

_RUNG = "rung"


def diagnostic_samples(block: BlockName, diagnostics: Mapping[str, float]) -> list[MetricSample]:
    """Returns a block's diagnostics as gauges; those that have none are left out.

    Args:
        block: The block's name.
        diagnostics: Of the inversion in use, as in `BlockOutcome`.
    """
    samples = [
        MetricSample(name=_GAUGES[quantity], value=value, labels={"block": block, "factor": factor})
        for quantity in _GAUGES
        for factor, value in _by_factor(quantity, diagnostics).items()
    ]
    if _RUNG in diagnostics:
        samples.append(MetricSample(name="kfdist_inversion_rung", value=diagnostics[_RUNG], labels={"block": block}))
    return samples


def diagnostic_note(version: int, outcome: BlockOutcome) -> str:
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
    return ": ".join(filter(None, (f"version {version} ({outcome.outcome})", ", ".join(facts))))


def _by_factor(quantity: str, diagnostics: Mapping[str, float]) -> dict[str, float]:
    """Returns the diagnostics `QUANTITY_FACTOR` of one quantity by factor."""
    parts = {name: name.rpartition("_") for name in diagnostics}
    return {factor: diagnostics[name] for name, (found, _, factor) in parts.items() if found == quantity}
