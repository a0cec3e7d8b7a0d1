"""Adam in K-FAC's eigenbasis, against its formula with the first moment kept in the parameters' own coordinates."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverters import PRECONDITIONERS, make_inverter
from kfdist.curvature.inverters.ekfac_adam import AdamBasis
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.errors import ConfigError, KfdistWarning
from kfdist.types import BlockShape
from kfdist.wire.records import from_tree, move, to_tree
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import GOOD, C, P, Q, gaussian, make_factors, relative_error

DAMPING = 1e-2
BETA1, BETA2, EPS = 0.8, 0.9, 1e-3
SPECTRA = list(GOOD)
GRADIENTS = [gaussian(C, P, Q, seed=seed) for seed in range(6)]


def basis_of(spectrum: str = SPECTRA[0], *, dtype: torch.dtype = torch.float64, **settings: float | None) -> AdamBasis:
    inverter = make_inverter("ekfac-adam", **{"beta1": BETA1, "beta2": BETA2, "eps": EPS, **settings})
    factors = make_factors(spectrum, dtype)
    found = invert_with_ladder(inverter, factors, damping=DAMPING, previous={}, seed=0).preconditioner
    assert isinstance(found, AdamBasis)
    return found


def plain_steps(bases: Sequence[AdamBasis], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The directions of each step by the formula, the average as a sum over all gradients in their own coordinates."""
    directions, v = [], torch.zeros(())
    for t, (basis, gradient) in enumerate(zip(bases, gradients, strict=True), start=1):
        U_G, U_A = basis.G.matrix(), basis.A.matrix()
        past = sum((BETA1 ** (t - 1 - k) * (1 - BETA1) * gradients[k - 1] for k in range(1, t)), torch.zeros(()))
        if t > 1 and basis is not bases[t - 2]:
            mean = U_G.mT @ past @ U_A / (1 - BETA1 ** (t - 1))
            v = torch.maximum(v, mean**2 * (1 - BETA2 ** (t - 1)))
        average = BETA1 * past + (1 - BETA1) * gradient
        ahead = (BETA1 * average + (1 - BETA1) * gradient) / (1 - BETA1 ** (t + 1))
        v = BETA2 * v + (1 - BETA2) * (U_G.mT @ gradient @ U_A) ** 2
        root = (v / (1 - BETA2**t)) ** 0.5
        directions.append(U_G @ ((U_G.mT @ ahead @ U_A) / (root + EPS)) @ U_A.mT)
    return directions


@pytest.mark.parametrize("ranks", [(None, None), (1, 1), (None, 1), (1, None)], ids=str)
def test_steps_equal_the_formula_across_a_change_of_basis(ranks: tuple[int | None, int | None]) -> None:
    first, second = basis_of(SPECTRA[0], rank=ranks[0]), basis_of(SPECTRA[1], rank=ranks[1])
    assert (first.A.reflected, second.G.reflected) == (ranks[0] is not None, ranks[1] is not None)
    bases = [first] * 3 + [second] * 3
    memory, found = BlockMemory(learns=True), []
    for step, (basis, gradient) in enumerate(zip(bases, GRADIENTS, strict=True)):
        if step == 3:
            basis.take_over(first, memory)
        found.append(basis.apply(gradient, DAMPING, memory))
    for ours, expected in zip(found, plain_steps(bases, GRADIENTS), strict=True):
        assert relative_error(ours, expected) < 1e-12


def test_a_step_in_a_new_basis_stays_short_where_eigenvectors_changed_places() -> None:
    """A coordinate in which nothing was seen may take the place of one with a large average."""
    basis = basis_of(eps=1e-30)
    order = torch.arange(Q).roll(1)
    other = replace(basis, Q_A=basis.Q_A[..., order])
    V = torch.zeros(C, P, Q, dtype=torch.float64)
    V[..., 0] = 1.0  # all in the first coordinate, which is the second of the other basis
    memory = BlockMemory(learns=True)
    for size in (1.0, 2.0, 1.0):
        basis.apply(size * basis.matrix(V), DAMPING, memory)
    other.take_over(basis, memory)
    step = other.coordinates(other.apply(basis.matrix(1e-6 * V), DAMPING, memory))
    assert 0.1 < float(step.abs().max()) < 1.5


def test_a_first_step_that_is_skipped_leaves_directions_finite() -> None:
    basis, memory = basis_of(), BlockMemory(learns=torch.tensor(False))
    basis.apply(torch.full_like(GRADIENTS[0], torch.inf), DAMPING, memory)
    basis.take_over(basis, memory)
    memory.learns = True
    assert bool(basis.apply(GRADIENTS[0], DAMPING, memory).isfinite().all())


def test_first_step_is_the_sign_of_each_coordinate() -> None:
    basis = basis_of(eps=1e-30)
    U = basis.apply(GRADIENTS[0], DAMPING, BlockMemory(learns=True))
    sign = (basis.Q_G.mT @ GRADIENTS[0] @ basis.Q_A).sign()
    assert relative_error(basis.Q_G.mT @ U @ basis.Q_A, sign) < 1e-10


@pytest.mark.parametrize("learned", [1, 0], ids=["later", "first"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_skipped_step_changes_nothing(learned: int, dtype: torch.dtype) -> None:
    basis, memory, other = basis_of(dtype=dtype), BlockMemory(learns=True), BlockMemory(learns=True)
    for each in (memory, other):
        for gradient in GRADIENTS[:learned]:
            basis.apply(gradient.to(dtype), DAMPING, each)
    memory.learns = torch.tensor(False)
    basis.apply(torch.full_like(GRADIENTS[1], torch.nan), DAMPING, memory)
    assert memory.kept.keys() == other.kept.keys() or not learned
    assert all(torch.equal(kept, other.kept.get(name, torch.zeros_like(kept))) for name, kept in memory.kept.items())
    memory.learns = False
    V = GRADIENTS[1].to(dtype)
    outside = basis.apply(V, DAMPING, memory)
    assert bool(outside.isfinite().all())
    assert learned or relative_error(outside, V / EPS) < torch.finfo(dtype).eps ** 0.75, "v is 0"
    for each in (memory, other):
        each.learns = torch.tensor(True)
    assert torch.equal(*(basis.apply(GRADIENTS[2].to(dtype), DAMPING, each) for each in (memory, other)))


def test_a_step_that_might_have_been_skipped_is_like_any_other() -> None:
    basis, memory, other = basis_of(), BlockMemory(learns=True), BlockMemory(learns=torch.tensor(True))
    for gradient in GRADIENTS:
        found, expected = (basis.apply(gradient, DAMPING, each) for each in (memory, other))
        assert relative_error(found, expected) < 1e-12
    assert all(relative_error(memory.kept[name], other.kept[name]) < 1e-12 for name in memory.kept)


def test_a_direction_outside_a_step_is_linear_and_changes_nothing() -> None:
    basis, memory = basis_of(), BlockMemory(learns=True)
    basis.apply(GRADIENTS[0], DAMPING, memory)
    memory.learns = False
    before = {name: tensor.clone() for name, tensor in memory.kept.items()}
    one, other, both = (basis.apply(V, DAMPING, memory) for V in (*GRADIENTS[:2], GRADIENTS[0] + GRADIENTS[1]))
    assert relative_error(one + other, both) < 1e-12
    assert all(torch.equal(memory.kept[name], before[name]) for name in before)


def test_goes_on_from_a_checkpoint() -> None:
    basis, memory = basis_of(), BlockMemory(learns=True)
    for gradient in GRADIENTS[:3]:
        basis.apply(gradient, DAMPING, memory)
    resumed = BlockMemory.of_state(memory.state_dict(), torch.device("cpu"))
    resumed.learns = True
    for gradient in GRADIENTS[3:]:
        assert torch.equal(*(basis.apply(gradient, DAMPING, each) for each in (memory, resumed)))


def test_weights_of_moments_are_numbers_of_the_host() -> None:
    """So no device works them out, unless it alone knows which steps are skipped; meta has no numbers at all."""
    basis, memory = move(basis_of(), "meta"), BlockMemory(learns=True)
    gradient = GRADIENTS[0].to("meta")
    for _ in range(2):
        basis.direction(gradient, DAMPING, memory)
    assert float(memory.kept["first_weight"]) == pytest.approx(1 - BETA1**2)
    back = BlockMemory.of_state(memory.state_dict(), torch.device("meta"), on_host=basis.on_host)
    assert back.kept["first"].is_meta and float(back.kept["second_weight"]) == pytest.approx(1 - BETA2**2)
    back.learns = torch.ones((), dtype=torch.bool, device="meta")
    basis.direction(gradient, DAMPING, back)
    assert all(kept.is_meta for kept in back.kept.values())


def wide_factors(rows: int) -> KroneckerFactors:
    """Factors 100 and 20 wide, of some rows whose directions matter less and less."""
    a = gaussian(1, rows, 100, seed=7) * torch.logspace(0, -2, rows, dtype=torch.float64).unsqueeze(-1)
    return KroneckerFactors(A=a.mT @ a, G=make_identity(20))


def make_identity(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64).expand(1, d, d).clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wide_factor_has_its_leading_eigenvectors_first(dtype: torch.dtype) -> None:
    factors = move(wide_factors(rows=60), "cpu", dtype)
    inverter = make_inverter("ekfac-adam", rank=20)
    found = invert_with_ladder(inverter, factors, damping=DAMPING, previous={}, seed=0)
    basis = found.preconditioner
    assert isinstance(basis, AdamBasis)
    assert (basis.A.reflected, basis.G.reflected) == (True, False)
    assert found.diagnostics["rank_A"] == basis.Y_A.shape[-1] == 20
    vectors, Q = torch.linalg.eigh(factors.A.double())[1].flip(-1), basis.A.matrix().double()
    overlaps = (vectors[..., :4] * Q[..., :4]).sum(-2).abs()
    assert relative_error(overlaps, torch.ones_like(overlaps)) < 1e-3
    assert relative_error(Q.mT @ Q, make_identity(100)) < 10 * torch.finfo(dtype).eps


def test_payloads_of_before_there_were_reflections_are_read() -> None:
    basis = basis_of(rank=None)
    tree = to_tree(basis, PRECONDITIONERS)
    for name in ("Y_A", "Y_G"):
        del tree["fields"][name]
    found = from_tree(tree, PRECONDITIONERS)
    assert torch.equal(found.coordinates(GRADIENTS[0]), basis.coordinates(GRADIENTS[0]))


def test_few_eigenvectors_are_cheaper_and_smaller_in_the_estimate() -> None:
    shape = BlockShape(d_out=128, d_in=1025)
    few, all_of_them = (make_inverter("ekfac-adam", rank=rank) for rank in (128, None))
    assert few.cost(shape) < all_of_them.cost(shape) / 3
    assert few.estimate(shape).numbers == 128**2 + 2 * 1025 * 128
    assert all_of_them.estimate(shape).numbers == 128**2 + 1025**2
    assert few.estimate(shape).prepared == all_of_them.estimate(shape).prepared == 2 * 128 * 1025


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0.0}, {"basis_period": 0}],
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make_inverter("ekfac-adam", **settings)


@pytest.mark.parametrize(
    ("basis_period", "factor_period", "inverse_period", "expected"),
    [
        (None, 10, 100, 100),
        (20, 10, 100, 20),
        (20, 10, 10, 10),  # never less often than inversions
        (20, 10, 50, 10),  # 20 doesn't divide 50
        (20, 8, 32, 16),
        (5, 10, 100, 10),  # never more often than foldings
    ],
)
def test_a_basis_comes_as_often_as_asked_for_where_that_fits(
    basis_period: int | None, factor_period: int, inverse_period: int, expected: int
) -> None:
    inverter = make_inverter("ekfac-adam", basis_period=basis_period)
    assert inverter.update_period(factor_period, inverse_period) == expected


def test_an_optimizer_with_momentum_is_warned_of():
    model = nn.Linear(3, 2)
    with kfdist.Preconditioner(model, "ekfac-adam", kl_clip=None) as preconditioner:
        with pytest.warns(
            KfdistWarning, match="directions of ekfac-adam have Adam's size and momentum already, and SGD"
        ):
            preconditioner.attach(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    with kfdist.Preconditioner(model, "ekfac-adam", kl_clip=None) as preconditioner:
        preconditioner.attach(torch.optim.SGD(model.parameters(), lr=1e-3))
