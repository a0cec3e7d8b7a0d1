"""What a rank counts: phases of a step, and quantiles in bounded memory."""

import pytest
from hypothesis import given, strategies

from kfdist.runtime.counters import Histogram, PipelineCounters
from kfdist.telemetry.metrics import STEP_PHASES
from tests.support.preconditioning import backward, preconditioner, two_layers


@given(strategies.lists(strategies.integers(0, 10**7), min_size=1), strategies.floats(0.0, 1.0))
def test_quantiles_are_exact_below_1024_and_to_0_2_percent_above(values: list[int], q: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[min(int(q * len(values)), len(values) - 1)]
    found = histogram.quantile(q)
    assert found == exact if exact < 1024 else 0.998 * exact <= found <= exact
    assert (histogram.count, histogram.largest) == (len(values), max(values))


def test_nothing_counted_is_zero() -> None:
    assert (Histogram().quantile(0.5), Histogram().largest) == (0, 0)


def test_a_histogram_does_not_grow_with_the_steps() -> None:
    histogram = Histogram()
    for value in range(100_000):
        histogram.add(value)
    assert len(histogram._counts) < 5_000


def test_a_phase_that_raises_is_timed_too() -> None:
    counters = PipelineCounters()
    with pytest.raises(ValueError, match="inside"), counters.phase("reduce"):
        raise ValueError("inside")
    assert set(counters.phase_seconds) == {"reduce"}
    counters.begin_step()
    assert counters.phase_seconds == {}


def test_a_step_has_the_phases_that_the_metric_lists_in_this_order() -> None:
    model = two_layers()
    with preconditioner(model, "kfac") as pre:
        backward(model)
        report = pre.step()
    assert [*report.phase_seconds, "input", "total"] == list(STEP_PHASES)
