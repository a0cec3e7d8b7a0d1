"""What two ranks say that they send is what the kernel counts."""

import pytest

from kfdist.bench.on_the_wire import TrafficSettings, measure_traffic


@pytest.mark.slow
def test_two_ranks_send_what_they_say():
    found = measure_traffic(TrafficSettings(model="mlp", methods=("rs-kfac",), inverse_period=10))
    counts = found["by_method"]["rs-kfac"]
    parameters = 785 * 1024 + 1025 * 1024 + 1025 * 10
    assert counts["gradient_bytes_a_step"] == pytest.approx(2 * 4 * parameters, rel=0.02)
    told = sum(counts["kfdist_bytes_a_step_by_purpose"].values())
    assert counts["kfdist_bytes_a_step"] == pytest.approx(told, rel=0.05)
