"""KL-Shampoo on tensors of one to five dimensions: the published formula, and what becomes of scales over time."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.kl_shampoo import VALUES, KlBasis
from kfdist.errors import ConfigError
from tests.support.tensor_models import Tensors, backward, gradients

BETA1, BETA2, EPS, KAPPA, DECAY = 0.8, 0.9, 1e-4, 1e-3, 0.7
SETTINGS: dict[str, Any] = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "kappa": KAPPA, "vectors": True}
BARE: dict[str, Any] = {"beta1": 0.0, "eps": 1e-30, "kappa": 0.0}
"""Of the formula without momentum, damping and epsilon."""


def preconditioner_of(model: nn.Module, **options: Any) -> kfdist.Preconditioner:
    chosen = {"factor_period": 1, "inverse_period": 1, "adoption": kfdist.FixedLag(0), "kl_clip": None, **options}
    settings = {**SETTINGS, **chosen.pop("settings", {})}
    return kfdist.Preconditioner(model, make_inverter("kl-shampoo", **settings), ema_decay=DECAY, **chosen)


def along(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    for mode, matrix in enumerate(matrices):
        tensor = (tensor.movedim(mode, -1) @ matrix.mT).movedim(-1, mode)
    return tensor


def moment(tensor: Tensor, mode: int, inverses: Sequence[Tensor]) -> Tensor:
    """X S^-1 X^T / (product of d) of one mode, S being the Kronecker product of the others' factors."""
    X = tensor.movedim(mode, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
    S = torch.ones(1, 1, dtype=tensor.dtype)
    for place, inverse in enumerate(inverses):
        S = S if place == mode else torch.kron(S, inverse)
    return X @ S @ X.T / X.shape[1]


def power(S: Tensor, exponent: float) -> Tensor:
    w, Q = torch.linalg.eigh(S)
    return Q @ torch.diag(w**exponent) @ Q.T


def at_first(gradient: Tensor) -> list[Tensor]:
    """The multiples of I that fit the first gradient, one a mode."""
    scale = float(gradient.square().mean()) ** (1 / gradient.dim())
    return [scale * torch.eye(d, dtype=gradient.dtype) for d in gradient.shape]


class Formula:
    """The paper's scheme for one tensor: dense factors, whose eigenvalues are averaged in the basis in use."""

    def __init__(self) -> None:
        self.S: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.m, self.t = torch.zeros(()), 0

    def direction(self, gradient: Tensor, Q: Sequence[Tensor]) -> Tensor:
        """One step in a new basis, whose vectors are checked."""
        self.t += 1
        self.S = self.S or at_first(gradient)
        inverses = [torch.linalg.inv(S) for S in self.S]
        found = [moment(gradient, mode, inverses) for mode in range(gradient.dim())]
        self.sums = [
            DECAY * S + (1 - DECAY) * M for S, M in zip(self.sums or [M * 0 for M in found], found, strict=True)
        ]
        for total, new in zip(self.sums, Q, strict=True):
            diagonal = new.T @ total @ new
            torch.testing.assert_close(diagonal, diagonal.diagonal().diag(), rtol=0, atol=1e-10 * float(total.trace()))
        values = [(new.T @ S @ new).diagonal() for new, S in zip(Q, self.S, strict=True)]
        inverses = [new @ torch.diag(1 / value) @ new.T for new, value in zip(Q, values, strict=True)]
        kappa = KAPPA * math.prod(float(value.mean()) for value in values)
        after = []
        for mode, (new, value) in enumerate(zip(Q, values, strict=True)):
            others = math.prod(float((1 / v).mean()) for place, v in enumerate(values) if place != mode)
            fresh = (new.T @ moment(gradient, mode, inverses) @ new).diagonal() + kappa * others
            after.append(BETA2 * value + (1 - BETA2) * fresh)
        self.S = [new @ torch.diag(value) @ new.T for new, value in zip(Q, after, strict=True)]
        self.m = BETA1 * self.m + (1 - BETA1) * gradient
        product = torch.ones((), dtype=gradient.dtype)
        for value in after:
            product = product[..., None] * value
        return along(along(self.m / (1 - BETA1**self.t), [each.T for each in Q]) / (product.sqrt() + EPS), Q)


def test_directions_equal_the_formula_over_changes_of_basis() -> None:
    model = Tensors()
    formulas = [Formula() for _ in Tensors.SHAPES]
    with preconditioner_of(model) as pre:
        for step in range(5):
            backward(model, step)
            before = list(gradients(model))
            pre.step()
            bases = list(pre.inverses().values())
            for formula, basis, V, found in zip(formulas, bases, before, gradients(model), strict=True):
                assert isinstance(basis, KlBasis)
                modes = V.flatten(3) if V.dim() > 4 else V
                expected = formula.direction(modes, [Q[0] for Q in basis.bases]).reshape(V.shape)
                torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dims", [(5,), (4, 4), (3, 3, 3), (2, 2, 2, 2)], ids=str)
def test_where_the_factors_have_fixed_eigenvectors_it_is_the_papers_recursion(dims: tuple[int, ...]) -> None:
    """S_i <- (1 - b) S_i + b X_i S^-1 X_i^T / (product of d), and U = V by S_i^(-1/2) along each mode."""
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0] for d in dims]
    parameter, S = nn.Parameter(torch.zeros(dims, dtype=torch.float64)), []
    with preconditioner_of(nn.ParameterList([parameter]), settings=BARE) as pre:
        for _ in range(6):
            sizes = 1 + torch.rand(min(dims), generator=generator, dtype=torch.float64)
            diagonal = torch.zeros(dims, dtype=torch.float64)
            diagonal[tuple([torch.arange(min(dims))] * len(dims))] = (
                sizes if len(dims) > 1 else sizes[0] * vectors[0][0]
            )
            V = along(diagonal, vectors)
            S = S or at_first(V)
            inverses = [torch.linalg.inv(each) for each in S]
            S = [BETA2 * each + (1 - BETA2) * moment(V, mode, inverses) for mode, each in enumerate(S)]
            parameter.grad = V.clone()
            pre.step()
            torch.testing.assert_close(
                parameter.grad, along(V, [power(each, -0.5) for each in S]), rtol=1e-9, atol=1e-9
            )


def test_directions_of_gaussian_gradients_have_size_one_in_every_period() -> None:
    """The first basis is of one gradient, and is kept for 200 steps (decision 30)."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (4, 6))
    parameter, found = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)), []
    options: dict[str, Any] = {"factor_period": 10, "inverse_period": 200, "settings": {"eps": 1e-9, "beta1": 0.0}}
    with preconditioner_of(nn.ParameterList([parameter]), **options) as pre:
        for _ in range(800):
            noise = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            parameter.grad = 1e-3 * left @ noise @ right.T
            pre.step()
            found.append(float(parameter.grad.square().mean()))
    sizes = torch.tensor(found).view(4, 200)
    assert sizes.mean(1).min() > 0.6 and sizes.mean(1).max() < 1.2 and sizes.max() < 10, sizes.mean(1)


def basis_of(
    generator: torch.Generator, dims: Sequence[int], dtype: torch.dtype = torch.float64, **given: Any
) -> KlBasis:
    made = [torch.linalg.qr(torch.randn(2, d, d, generator=generator, dtype=torch.float64))[0].to(dtype) for d in dims]
    absent = [torch.zeros(2, 0, 0, dtype=dtype)] * (4 - len(dims))
    Q = {f"Q_{mode}": each for mode, each in enumerate([*made, *absent], start=1)}
    settings = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "kappa": KAPPA, **given}
    return KlBasis(trace_A=torch.ones(2, dtype=dtype), trace_G=torch.ones(2, dtype=dtype), **Q, **settings)


def test_a_new_basis_keeps_the_diagonal_of_what_the_eigenvalues_stood_for() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (basis_of(generator, (4, 3, 5)) for _ in range(2))
    memory = BlockMemory(learns=True)
    old.apply(torch.randn(2, 4, 15, generator=generator, dtype=torch.float64), 1.0, memory)
    before = old.values(memory)
    expected = [
        (P.mT @ Q @ torch.diag_embed(value) @ Q.mT @ P).diagonal(dim1=1, dim2=2)
        for P, Q, value in zip(new.bases, old.bases, before, strict=True)
    ]
    momentum = old.matrix(memory.kept["first"])
    new.take_over(old, memory)
    torch.testing.assert_close(new.matrix(memory.kept["first"]), momentum)
    for name, value, had in zip(VALUES, expected, before, strict=False):
        torch.testing.assert_close(memory.kept[name], value)
        torch.testing.assert_close(memory.kept[name].sum(1), had.sum(1))


def test_it_begins_at_the_first_gradient_that_is_not_zero_and_no_scale_of_gradients_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = basis_of(generator, (4, 6), eps=1e-30)
    gradients = [torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
    found = []
    for scale, zeros in ((1.0, 0), (1e-9, 0), (1e6, 2)):
        memory = BlockMemory(learns=True)
        for _ in range(zeros):
            assert not basis.apply(torch.zeros(2, 4, 6, dtype=torch.float64), 1.0, memory).any()
            memory.kept["first_weight"].zero_()  # momentum counts steps without a gradient, as Adam's does
        found.append([basis.apply(scale * V, 1.0, memory) for V in gradients])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-9, atol=1e-9)
    assert 0.1 < float(found[0][-1].square().mean()) < 1.5


def test_rows_without_a_gradient_stay_harmless_and_come_back() -> None:
    """Half of a matrix's rows are zero for thousands of steps, as of dead units; float32 has no numbers below 1e-45."""
    generator = torch.Generator().manual_seed(0)
    basis, memory = basis_of(generator, (6, 5), torch.float32, kappa=1e-4), BlockMemory(learns=True)
    basis = KlBasis(**{**vars(basis), "Q_1": torch.eye(6).expand(2, 6, 6)})
    for step in range(4000):
        V = 1e-4 * torch.randn(2, 6, 5, generator=generator)
        V[:, 3:] *= step >= 3000
        U = basis.apply(V, 1.0, memory)
        if step % 1000 == 999:
            alive = U[:, :3] if step < 3000 else U
            assert U.isfinite().all() and 0.01 < float(alive.square().mean()) < 2.0, step
        assert step != 3000 or float(U.square().mean()) < 20.0  # as Adam's, of a coordinate that was zero


def test_a_first_step_that_is_skipped_leaves_directions_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, memory = basis_of(generator, (4, 6)), BlockMemory(learns=torch.tensor(False))
    V = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    basis.apply(torch.full_like(V, torch.nan), 1.0, memory)
    memory.learns = False
    torch.testing.assert_close(basis.apply(V, 1.0, memory), V / EPS)  # eigenvalues are 0


def test_a_step_that_is_learned_on_the_device_is_the_hosts() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = basis_of(generator, (4, 6))
    V = torch.randn(3, 2, 4, 6, generator=generator, dtype=torch.float64)
    host, device = BlockMemory(learns=True), BlockMemory(learns=torch.tensor(True))
    for gradient in V:
        torch.testing.assert_close(basis.apply(gradient, 1.0, host), basis.apply(gradient, 1.0, device))


def test_a_direction_before_any_step_has_the_size_of_adams() -> None:
    model = Tensors(((4, 6),))
    with preconditioner_of(model) as pre:
        backward(model, 0)
        (V,) = gradients(model)
        pre.step()
        (inverse,) = pre.inverses().values()
    found = inverse.apply(V[None], 1.0)[0]
    torch.testing.assert_close(found, V / (V.square().mean().sqrt() + EPS))


@pytest.mark.parametrize(
    ("settings", "path"),
    [({"beta1": 1.0}, "beta1"), ({"beta2": -0.1}, "beta2"), ({"eps": 0.0}, "eps"), ({"kappa": -1e-9}, "kappa")],
)
def test_settings_out_of_range(settings: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        make_inverter("kl-shampoo", **settings)
