"""EKFAC against dense per-example gradients (algorithms.md 7.8 and 10.9)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kfdist.bench.measuring import AllocationCounter
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.ekfac import EkfacBasis
from kfdist.curvature.references import (
    dense_kronecker,
    example_gradients,
    factors_of_rows,
    solve_dense,
    weighted_fisher,
)
from kfdist.curvature.statistics import KroneckerFactors, Samples
from kfdist.errors import ConfigError
from kfdist.linalg import row_products
from kfdist.types import BlockShape
from kfdist.wire.records import tensor_fields
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, relative_error
from tests.support.samples import make_samples, select

C, P, Q = 2, 4, 5
DAMPING = 1e-2
V = gaussian(C, P, Q, seed=3)
WEIGHT = [2.0, 0.0, 1.0, 0.5, 3.0, 0.0, 1.0, 1.0]

over_positions = pytest.mark.parametrize("t", [1, 3])


def uneven(t: int, seed: int = 0) -> Samples:
    return make_samples(n=8, p=P, q=Q, t=t, weight=WEIGHT, seed=seed)


def basis_of(factors: KroneckerFactors) -> EkfacBasis:
    outcome = invert_with_ladder(make_inverter("ekfac"), factors, damping=DAMPING, previous={}, seed=0)
    assert isinstance(outcome.preconditioner, EkfacBasis), outcome.reason
    return outcome.preconditioner


def rotation(basis: EkfacBasis) -> Tensor:
    """Columns vec(Q_G[:, i] Q_A[:, j]^T) on row-major vectors, `[c, p q, p q]`."""
    return dense_kronecker(basis.Q_A, basis.Q_G)


def in_basis(basis: EkfacBasis, scales: Tensor) -> Tensor:
    """The dense matrix that has `scales` as its eigenvalues in the basis."""
    columns = rotation(basis)
    return columns @ torch.diag_embed(scales.flatten(1)) @ columns.mT


@over_positions
def test_scales_are_the_diagonal_of_the_fisher_in_the_basis(t: int) -> None:
    samples = uneven(t)
    basis = basis_of(factors_of_rows(samples))
    sums = basis.calibration_sums(samples)
    columns = rotation(basis)
    expected = (columns.mT @ weighted_fisher(samples) @ columns).diagonal(dim1=1, dim2=2)
    assert relative_error((sums["scales"] / sums["examples"]).flatten(1), expected) < 1e-12


@over_positions
def test_trap_e_orientation_eigenvectors_are_columns(t: int) -> None:
    """s = E[(Q_G^T S Q_A)^2] one example at a time; with Q for Q^T it comes out wrong."""
    samples = uneven(t)
    basis = basis_of(factors_of_rows(samples))
    sums = basis.calibration_sums(samples)
    right, wrong = torch.zeros(C, P, Q), torch.zeros(C, P, Q)
    for weight, S in zip(WEIGHT, example_gradients(samples), strict=True):
        right = right + weight * (basis.Q_G.mT @ S @ basis.Q_A).square()
        wrong = wrong + weight * (basis.Q_G @ S @ basis.Q_A.mT).square()
    assert relative_error(sums["scales"], right) < 1e-12
    assert float(sums["examples"]) == sum(WEIGHT)
    assert relative_error(sums["scales"], wrong) > 0.1


@over_positions
def test_direction_equals_the_dense_solution(t: int) -> None:
    samples = uneven(t)
    basis = basis_of(factors_of_rows(samples))
    sums = basis.calibration_sums(samples)
    matrix = in_basis(basis, sums["scales"] / sums["examples"])
    assert relative_error(basis.apply(V, DAMPING, BlockMemory(sums)), solve_dense(matrix, DAMPING, V)) < 1e-10


def test_its_spectrum_is_that_of_the_block_as_measured() -> None:
    samples = uneven(3)
    basis = basis_of(factors_of_rows(samples))
    memory = BlockMemory(basis.calibration_sums(samples))
    values, size = basis.spectra(memory)["scales"]
    expected = torch.linalg.eigvalsh(in_basis(basis, memory.kept["scales"] / sum(WEIGHT)))
    assert size == values.numel() == C * P * Q
    assert relative_error(values.flatten().sort().values, expected.flatten().sort().values) < 1e-10
    memory.kept["examples"].zero_()
    assert basis.spectra(memory) == basis.spectra(BlockMemory()) == {}


@over_positions
@pytest.mark.parametrize("seed", range(5))
def test_frobenius_error_is_never_above_that_of_kfac(t: int, seed: int) -> None:
    samples = make_samples(n=10, p=P, q=Q, t=t, seed=seed)
    factors, fisher = factors_of_rows(samples), weighted_fisher(samples)
    basis = basis_of(factors)
    sums = basis.calibration_sums(samples)
    ours = (in_basis(basis, sums["scales"] / sums["examples"]) - fisher).norm(dim=(1, 2))
    kfac = (dense_kronecker(factors.A, factors.G) - fisher).norm(dim=(1, 2))
    assert bool((ours <= kfac * (1 + 1e-12)).all())
    assert float((ours / kfac).min()) < 0.99  # and on random rows it is below


def test_equivalence_9_with_the_eigenvalues_products_it_is_kfac() -> None:
    factors = factors_of_rows(uneven(3))
    basis = basis_of(factors)
    eigen = invert_with_ladder(
        make_inverter("kfac-eigen"), factors, damping=DAMPING, previous={}, seed=0
    ).preconditioner
    assert isinstance(eigen, KroneckerSpectrum)
    kept = {"scales": 7 * eigen.w_G.unsqueeze(-1) * eigen.w_A.unsqueeze(-2), "examples": torch.tensor(7.0)}
    assert relative_error(basis.apply(V, DAMPING, BlockMemory(kept)), eigen.apply(V, DAMPING)) < 1e-10


@pytest.mark.parametrize(
    "kept",
    [{}, {"scales": torch.zeros(C, P, Q, dtype=torch.float64), "examples": torch.tensor(0.0, dtype=torch.float64)}],
    ids=["empty", "no-examples"],
)
def test_without_measurements_the_gradient_is_scaled(kept: dict[str, Tensor]) -> None:
    factors = factors_of_rows(uneven(3))
    tau = factors.A.diagonal(dim1=1, dim2=2).sum(1) * factors.G.diagonal(dim1=1, dim2=2).sum(1) / (P * Q)
    expected = V / (DAMPING + tau)[:, None, None]
    assert relative_error(basis_of(factors).apply(V, DAMPING, BlockMemory(kept)), expected) < 1e-12


def test_scales_of_zero_leave_the_damping() -> None:
    """Measured to be zero is not the same as not measured."""
    kept = {"scales": torch.zeros(C, P, Q, dtype=torch.float64), "examples": torch.tensor(3.0)}
    assert (
        relative_error(basis_of(factors_of_rows(uneven(1))).apply(V, DAMPING, BlockMemory(kept)), V / DAMPING) < 1e-12
    )


@over_positions
def test_rows_that_only_fill_up_do_not_matter(t: int) -> None:
    samples = uneven(t)
    basis = basis_of(factors_of_rows(samples))
    spoiled = replace(samples, a=samples.a.clone(), g=samples.g.clone())
    spoiled.a[:, 1], spoiled.g[:, 5] = float("nan"), float("inf")
    assert torch.equal(basis.calibration_sums(spoiled)["scales"], basis.calibration_sums(samples)["scales"])


def test_sums_add_up_over_ranks() -> None:
    samples = uneven(3)
    basis = basis_of(factors_of_rows(samples))
    whole = basis.calibration_sums(samples)
    parts = [basis.calibration_sums(select(samples, part)) for part in (slice(0, 3), slice(3, 8), slice(8, 8))]
    for name in ("scales", "examples"):
        assert relative_error(torch.stack([part[name] for part in parts]).sum(0), whole[name]) < 1e-12


def test_calibration_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With positions, at most one chunk of per-example gradients beside the rotated rows; without, none at all."""
    monkeypatch.setattr(row_products, "CHUNK_NUMBERS", 0)
    n, p, q = 50, 30, 40
    for t in (1, 4):
        samples = make_samples(c=1, n=n, p=p, q=q, t=t)
        basis = basis_of(KroneckerFactors(A=torch.eye(q).double()[None], G=torch.eye(p).double()[None]))
        with AllocationCounter() as counter:
            basis.calibration_sums(samples)
        assert counter.peak_bytes <= 8 * (3 * n * t * (p + q) + 4 * p * q)
        assert n * p * q > 3 * n * t * (p + q)


def test_applying_reads_no_value_back() -> None:
    """Fake tensors have no values: reading one raises."""
    mode, samples = FakeTensorMode(), uneven(3)
    basis = basis_of(factors_of_rows(samples))
    fake = replace(basis, **{name: mode.from_tensor(tensor) for name, tensor in tensor_fields(basis).items()})
    rows = replace(samples, **{name: mode.from_tensor(tensor) for name, tensor in tensor_fields(samples).items()})
    with mode:
        assert fake.apply(torch.zeros(C, P, Q), DAMPING, BlockMemory(fake.calibration_sums(rows))).shape == V.shape


def test_float32_is_near() -> None:
    samples = uneven(3)
    basis = basis_of(factors_of_rows(samples))
    expected = basis.apply(V, DAMPING, BlockMemory(basis.calibration_sums(samples)))
    single = basis.to("cpu", torch.float32)
    sums = single.calibration_sums(samples)
    assert sums["scales"].dtype == torch.float32
    assert relative_error(single.apply(V.float(), DAMPING, BlockMemory(sums)), expected) < 1e-4


def test_what_it_asks_of_the_runtime() -> None:
    needs = make_inverter("ekfac", examples=64).needs(BlockShape(d_out=P, d_in=Q))
    assert needs.sums == {"A", "G"} and needs.samples is None and needs.calibration is not None
    assert (needs.calibration.examples, needs.calibration.rows) == (64, 16384)
    assert EkfacBasis.calibrated and not EkfacBasis.keeps_memory
    for settings in ({"examples": 0}, {"rows": 0}):
        with pytest.raises(ConfigError, match="is not allowed"):
            make_inverter("ekfac", **settings)
