"""The measurement behind docs/papers.md, claim b, on sizes that take no time."""

import pytest
import torch

from kfdist.bench.claim_b_cg import CG_SETTINGS, measure_cg
from kfdist.bench.measuring import AllocationCounter


def test_every_size_is_measured_or_said_not_to_be() -> None:
    rows = measure_cg((16, 8))
    assert [row["d"] for row in rows] == [8, 16]
    for row in rows:
        assert row["kfac"]["kept_bytes"] >= 4 * 4 * row["d"] ** 2
        assert all(row[name]["peak_bytes"] > 0 and row[name]["iterations"] <= 10 for name in CG_SETTINGS)
    unmeasured = measure_cg((8, 16, 32), limit_seconds=0.0)
    assert unmeasured[0]["kfac"] is not None
    assert unmeasured[1]["kfac"] is None and unmeasured[2]["cg-fac"] is None


def test_the_counter_sees_what_is_allocated_while_it_lives() -> None:
    given = torch.ones(1000)
    with AllocationCounter() as counter:
        kept = given + 1
        view = kept.view(10, 100).mT
        view.add_(1)
        assert counter.live_bytes == 4000
        del kept
        assert counter.live_bytes == 4000  # the view keeps it
        del view
        assert counter.live_bytes == 0
        result = (given + 1) * (given + 2)
    assert (counter.live_bytes, counter.peak_bytes) == (4000, 12000)
    assert counter.shapes == {(1000,)}
    assert float(result.sum()) == pytest.approx(6000)
