"""Statistics that become a job's records: what of them is there, and what isn't."""

from collections.abc import Mapping

import torch
from torch import nn

from kfdist.curvature.averages import BatchStatistics, WeightedSums
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.statistics import Increment
from kfdist.linalg.psd import unpack_triangle
from kfdist.runtime.invert.departures import Departure, job_record
from kfdist.runtime.reduce.contributions import Contribution, contribution_of_sums, with_increment
from kfdist.wire.records import RecordTree
from tests.support.matrices import gaussian
from tests.support.plans import planned

D_A, D_G = 5, 4


def test_an_increment_carries_dense_factors_only_where_they_are_due() -> None:
    method = make_inverter("b-r-kfac", rank=1, increment_rows=1)
    (group,) = planned(nn.Linear(D_A - 1, D_G).double(), method).groups
    ((name, needs),) = group.needs.items()
    rows = {"A": gaussian(1, 1, D_A, seed=0), "G": gaussian(1, 1, D_G, seed=1)}
    sums = WeightedSums({"A": (1, D_A, D_A), "G": (1, D_G, D_G)}, dtype=torch.float64, device="cpu")

    def records(*, dense: bool) -> Mapping[str, RecordTree]:
        empty = Contribution(block=name, statistic=Increment, summed={}, like=sums.like)
        given = contribution_of_sums(name, Increment, sums) if dense else empty
        found = with_increment(
            given,
            needs,
            {"A": (1, D_A), "G": (1, D_G)},
            BatchStatistics(sums={}, examples=1.0, positions=1.0, rows=rows),
            rho=0.0,
            step_is_finite=None,
            like=sums.like,
            rank=0,
            world_size=1,
            seed=0,
        )
        departure = Departure(0, [group], {name: found.summed | found.common}, damping=0.1, previous={})
        ((of_group, arrived),) = departure.arrived()
        return {block: job_record(of_group.inverter.statistic, tensors) for block, tensors in arrived.items()}

    assert records(dense=False)[name]["fields"]["A"].shape == (1, 0)
    assert records(dense=True) == {}, "where nothing was ever measured there is nothing to invert"
    found = {"A": 3.0 * torch.eye(D_A)[None], "G": torch.eye(D_G)[None]}
    sums.fold(BatchStatistics(found, examples=3.0, positions=6.0), 0.0)
    assert torch.equal(unpack_triangle(records(dense=True)[name]["fields"]["A"])[0], torch.eye(D_A).double())
