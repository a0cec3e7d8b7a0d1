"""A diagonal and a dense factor, inverted."""

import torch

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.kfac_diagonal import DiagonalInverse, KfacDiagonal
from kfdist.curvature.jobs import decode_result, encode_job, run_job
from kfdist.curvature.statistics import DiagonalFactors, KroneckerFactors
from tests.support.inversions import invert_with_ladder

V, P, DAMPING = 6, 4, 0.01


def factors() -> DiagonalFactors:
    g = torch.randn(3, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return DiagonalFactors(A_diagonal=torch.tensor([[0.5, 0.0, 2.0, 0.1, 0.0, 1.0]]).double(), G=(g.T @ g)[None])


def job(statistics: DiagonalFactors) -> bytes:
    return encode_job(
        inverter=KfacDiagonal(), statistics={"table": statistics}, damping=DAMPING, seeds={"table": 1}, previous={},
        threads=1,
    )  # fmt: skip


def test_is_kfac_of_the_same_factors_written_out():
    statistics = factors()
    made = decode_result(run_job(job(statistics))).outcomes["table"].preconditioner
    assert isinstance(made, DiagonalInverse)
    dense = KroneckerFactors(A=torch.diag_embed(statistics.A_diagonal), G=statistics.G)
    expected = invert_with_ladder(make_inverter("kfac"), dense, damping=DAMPING, previous={}, seed=1).preconditioner
    assert expected is not None
    gradient = torch.randn(1, P, V, dtype=torch.float64)
    torch.testing.assert_close(made.apply(gradient, DAMPING), expected.apply(gradient, DAMPING))
    torch.testing.assert_close(made.fallback(gradient, DAMPING), expected.fallback(gradient, DAMPING))
    assert made.shape == expected.shape == (1, P, V)


def test_refuses_frequencies_below_zero():
    statistics = factors()
    statistics.A_diagonal[0, 1] = -1.0
    outcome = decode_result(run_job(job(statistics))).outcomes["table"]
    assert outcome.preconditioner is None
    assert "frequencies can't be negative" in outcome.reason
