"""SOAP on tensors of one to five dimensions: the published formula, and pytorch_optimizer's step and swap."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.adam_moments import SECOND
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.soap import ModeBasis
from kfdist.curvature.statistics import MODES, GradientMoments
from kfdist.errors import ConfigError
from tests.support.inversions import invert_with_ladder
from tests.support.tensor_models import Tensors, backward, gradients

BETA1, BETA2, EPS, DECAY = 0.8, 0.9, 1e-4, 0.7
SETTINGS: dict[str, Any] = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "vectors": True}


def preconditioner_of(model: nn.Module, **options: Any) -> kfdist.Preconditioner:
    chosen = {"factor_period": 1, "inverse_period": 1, "adoption": kfdist.FixedLag(0), "kl_clip": None, **options}
    settings = {**SETTINGS, **chosen.pop("settings", {})}
    return kfdist.Preconditioner(model, make_inverter("soap", **settings), ema_decay=DECAY, **chosen)


def along(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    for mode, matrix in enumerate(matrices):
        tensor = (tensor.movedim(mode, -1) @ matrix.mT).movedim(-1, mode)
    return tensor


def moments(past: Sequence[Tensor]) -> list[Tensor]:
    """The decayed mean of X X^T of each mode."""
    weights = [DECAY ** (len(past) - 1 - s) for s in range(len(past))]
    found = []
    for mode in range(past[0].dim()):
        unfolded = [each.movedim(mode, 0).reshape(each.shape[mode], -1) for each in past]
        total = sum((w * X @ X.T for w, X in zip(weights, unfolded, strict=True)), torch.zeros(()))
        found.append(total / sum(weights))
    return found


class Formula:
    """Algorithm 3 of the paper for one tensor, with the first moment in the parameter's coordinates."""

    def __init__(self, *, estimates: bool) -> None:
        self.past: list[Tensor] = []
        self.m, self.v = torch.zeros(()), torch.zeros(())
        self.Q: list[Tensor] = []
        self.estimates = estimates

    def direction(self, gradient: Tensor, Q: Sequence[Tensor]) -> Tensor:
        """One step in a new basis, whose vectors are checked."""
        self.past.append(gradient)
        for mode, (M, new) in enumerate(zip(moments(self.past), Q, strict=True)):
            diagonal = new.T @ M @ new
            torch.testing.assert_close(diagonal, diagonal.diagonal().diag(), rtol=0, atol=1e-10 * float(M.trace()))
            if self.Q and not self.estimates:
                order = (self.Q[mode].T @ M @ self.Q[mode]).diagonal().argsort(descending=True)
                self.v = self.v.index_select(mode, order)
        if self.Q and self.estimates:
            self.v = along(self.v, [(new.T @ old) ** 2 for new, old in zip(Q, self.Q, strict=True)])
        self.Q, t = list(Q), len(self.past)
        R = along(gradient, [each.T for each in Q])
        self.m = BETA1 * self.m + (1 - BETA1) * gradient
        self.v = BETA2 * self.v + (1 - BETA2) * R**2
        N = along(self.m / (1 - BETA1**t), [each.T for each in Q]) / ((self.v / (1 - BETA2**t)).sqrt() + EPS)
        return along(N, Q)


@pytest.mark.parametrize("second", ["permute", "estimate"])
def test_directions_equal_the_formula_over_changes_of_basis(second: str) -> None:
    model = Tensors()
    formulas = [Formula(estimates=second == "estimate") for _ in Tensors.SHAPES]
    with preconditioner_of(model, settings={"second_moments": second}) as pre:
        for step in range(5):
            backward(model, step)
            before = list(gradients(model))
            pre.step()
            bases = list(pre.inverses().values())
            for formula, basis, V, found in zip(formulas, bases, before, gradients(model), strict=True):
                assert isinstance(basis, ModeBasis)
                modes = V.flatten(3) if V.dim() > 4 else V
                expected = formula.direction(modes, [Q[0] for Q in basis.bases]).reshape(V.shape)
                torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_its_steps_in_a_basis_are_pytorch_optimizers() -> None:
    """Theirs makes the basis of the first gradient and skips that step, so it is given that gradient twice.

    It adds eps before the bias is taken out of v; here eps is large beside rounding, and else makes no difference.
    """
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="a development dependency")
    model = Tensors(((4, 4), (3, 2, 4), (4, 2, 3, 2)))  # whose first gradients have moments of full rank
    other = copy.deepcopy(model)
    theirs = pytorch_optimizer.SOAP(
        other.parameters(), lr=0.01, betas=(BETA1, BETA2), weight_decay=0.0, precondition_frequency=1000, eps=1e-7
    )
    ours = torch.optim.SGD(model.parameters(), lr=0.01)
    with preconditioner_of(model, inverse_period=1000, settings={"eps": 1e-7}) as pre:
        backward(other, 0)
        theirs.step()
        for step in range(6):
            for each in (model, other):
                backward(each, step)
            pre.step()
            ours.step()
            theirs.step()
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def basis_of(past: Sequence[Tensor]) -> ModeBasis:
    found = {name: M[None] for name, M in zip(MODES, moments(past), strict=False)}
    absent = {name: torch.zeros(1, 0, 0, dtype=torch.float64) for name in MODES if name not in found}
    record = GradientMoments(**found, **absent, weight=torch.ones(1, dtype=torch.float64))
    made = invert_with_ladder(make_inverter("soap", **SETTINGS), record, damping=1.0, previous={}, seed=0)
    assert isinstance(made.preconditioner, ModeBasis)
    return made.preconditioner


def test_second_moments_are_permuted_as_pytorch_optimizer_permutes_them() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="a development dependency")
    generator = torch.Generator().manual_seed(0)
    past = [torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(6)]
    old, new = basis_of(past[:2]), basis_of(past)
    v = torch.rand(4, 3, 5, generator=generator, dtype=torch.float64)
    memory = BlockMemory(kept={SECOND: v.reshape(1, 4, 15)})
    state = {"exp_avg_sq": v, "GG": moments(past), "Q": [Q[0] for Q in old.bases]}
    (parameter,) = [nn.Parameter(torch.zeros(4, 3, 5))]
    pytorch_optimizer.SOAP([parameter]).get_orthogonal_matrix_qr(state)
    found = new.second_moment(old, memory).reshape(4, 3, 5)
    assert torch.equal(found, state["exp_avg_sq"]) and not torch.equal(found, v)


def test_a_first_step_that_is_skipped_leaves_directions_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(1, 4, 15, generator=generator, dtype=torch.float64)
    basis, memory = basis_of([V.view(4, 3, 5)]), BlockMemory(learns=torch.tensor(False))
    basis.apply(torch.full_like(V, torch.nan), 1.0, memory)
    memory.learns = False
    torch.testing.assert_close(basis.apply(V, 1.0, memory), V / EPS)  # v is 0


def test_a_direction_before_any_step_has_the_size_of_adams() -> None:
    model = Tensors(((4, 6),))
    with preconditioner_of(model) as pre:
        backward(model, 0)
        (V,) = gradients(model)
        pre.step()
        (inverse,) = pre.inverses().values()
    found = inverse.apply(V[None], 1.0)[0]
    torch.testing.assert_close(found, V / (V.square().mean().sqrt() + EPS))
    assert math.isclose(float(found.square().mean()), 1.0, rel_tol=1e-2)


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"eps": 0.0}, "eps"),
        ({"second_moments": "keep"}, "second"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        make_inverter("soap", **settings)
