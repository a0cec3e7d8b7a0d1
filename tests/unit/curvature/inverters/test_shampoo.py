"""Shampoo with `FixedLag(0)` on tensors of one to five dimensions: the published formula, pytorch_optimizer's step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.inverters import make_inverter
from kfdist.errors import ConfigError
from tests.support.tensor_models import Tensors, backward, gradients

EPS, DECAY = 1e-3, 0.7
AS_PUBLISHED: dict[str, Any] = {
    "accumulate": "sum", "epsilon": EPS, "epsilon_rule": "absolute", "vectors": True
}  # fmt: skip


def preconditioner_of(model: nn.Module, settings: dict[str, Any], **options: Any) -> kfdist.Preconditioner:
    chosen = {"factor_period": 1, "inverse_period": 1, "adoption": kfdist.FixedLag(0), "kl_clip": None, **options}
    return kfdist.Preconditioner(model, make_inverter("shampoo", **settings), ema_decay=DECAY, **chosen)


def modes_of(tensor: Tensor) -> Tensor:
    """The tensor as one of at most four modes."""
    return tensor.flatten(3) if tensor.dim() > 4 else tensor


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


def reference(past: list[Tensor], weights: list[float], exponent: float | None, *, relative: bool) -> Tensor:
    """The direction by the formula, each mode by its own unfolding."""
    found = modes_of(past[-1])
    k = found.dim()
    for mode in range(k):
        unfolded = [modes_of(each).movedim(mode, 0).flatten(1) if k > 1 else each[:, None] for each in past]
        M = sum((w * X @ X.mT for w, X in zip(weights, unfolded, strict=True)), torch.zeros(()))
        eps = EPS * float(torch.linalg.eigvalsh(M).max()) if relative else EPS
        root = power(M + eps * torch.eye(len(M), dtype=M.dtype), -(1 / (2 * k) if exponent is None else exponent))
        found = (found.movedim(mode, -1) @ root.mT).movedim(-1, mode)
    return found.reshape(past[-1].shape)


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "published": ({}, 1e-10),
    "by Newton": ({"root": "newton"}, 1e-9),
    "averaged, relative": ({"accumulate": "average", "epsilon_rule": "relative"}, 1e-10),
    "averaged, by Newton": ({"accumulate": "average", "epsilon_rule": "absolute", "root": "newton"}, 1e-9),
    "exponent": ({"exponent": 0.5}, 1e-10),
    "exponent, by Newton": ({"exponent": 0.25, "root": "newton"}, 1e-9),
}


@pytest.mark.parametrize("case", CASES)
def test_directions_equal_the_formula(case: str) -> None:
    changes, tolerance = CASES[case]
    settings = {**AS_PUBLISHED, **changes}
    model, past = Tensors(), []
    with preconditioner_of(model, settings) as pre:
        for step in range(4):
            backward(model, step)
            past.append(list(gradients(model)))
            pre.step()
            t = len(past)
            raw = [(1 - DECAY) * DECAY ** (t - 1 - s) for s in range(t)]
            weights = [1.0] * t if settings["accumulate"] == "sum" else [w / sum(raw) for w in raw]
            for place, found in enumerate(gradients(model)):
                expected = reference(
                    [each[place] for each in past],
                    weights,
                    settings.get("exponent"),
                    relative=settings["epsilon_rule"] == "relative",
                )
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_cut_dimension_is_as_if_each_piece_were_a_parameter() -> None:
    """The pieces of a [5, 9] matrix with dimensions of at most 4: rows 0-2 and 3-4, columns 0-2, 3-5 and 6-8."""
    whole = Tensors(((5, 9),))
    rows, columns = (slice(0, 3), slice(3, 5)), (slice(0, 3), slice(3, 6), slice(6, 9))
    pieces = [(r, c) for r in rows for c in columns]
    apart = Tensors(tuple((r.stop - r.start, 3) for r, _ in pieces))
    with preconditioner_of(whole, {"block_size": 4}) as one, preconditioner_of(apart, {}) as other:
        for step in range(3):
            backward(whole, step)
            (gradient,) = gradients(whole)
            for parameter, piece in zip(apart.parameters(), pieces, strict=True):
                parameter.grad = gradient[piece].clone()
            one.step()
            other.step()
            (found,) = gradients(whole)
            for parameter, piece in zip(apart.parameters(), pieces, strict=True):
                torch.testing.assert_close(parameter.grad, found[piece], rtol=1e-9, atol=1e-9)


def test_its_step_is_pytorch_optimizers() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="a development dependency")
    model = Tensors(Tensors.SHAPES[:4])
    other = copy.deepcopy(model)
    theirs = pytorch_optimizer.Shampoo(other.parameters(), lr=0.1, matrix_eps=EPS)
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    with preconditioner_of(model, AS_PUBLISHED) as pre:
        for step in range(5):
            backward(model, step)
            backward(other, step)
            pre.step()
            ours.step()
            theirs.step()
            for a, b in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_parameter_without_any_gradient_yet_keeps_the_first_one() -> None:
    """As the second matrix of a LoRA pair has it: zeros have no scale that a root could be of."""
    model = Tensors(((4, 6),))
    with preconditioner_of(model, {}, inverse_period=10, factor_period=10) as pre:
        parameter = next(model.parameters())
        parameter.grad = torch.zeros_like(parameter)
        pre.step()
        backward(model, 0)
        before = list(gradients(model))
        pre.step()
        assert torch.equal(next(gradients(model)), before[0])


def test_the_fallback_scales_by_the_mean_eigenvalues() -> None:
    model = Tensors(((4, 6),))
    with preconditioner_of(model, {"epsilon": EPS, "epsilon_rule": "absolute"}) as pre:
        backward(model, 0)
        (V,) = gradients(model)
        pre.step()
        (inverse,) = pre.inverses().values()
    L, R = (V @ V.T).trace() / 4, (V.T @ V).trace() / 6
    torch.testing.assert_close(inverse.fallback(V[None], 1.0)[0], V * ((L + EPS) * (R + EPS)) ** -0.25)


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"exponent": 0.3, "root": "newton"}, "exponent"),
        ({"exponent": 0.0}, "exponent"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"root": "svd"}, "root"),
        ({"accumulate": "max"}, "accumulate"),
        ({"epsilon_rule": "trace"}, "epsilon_rule"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        make_inverter("shampoo", **settings)


def test_where_rounding_stops_newtons_iteration_eigenvalues_give_the_root() -> None:
    """float32 sums of rank 24 with 30 columns have eigenvalues below zero, and the epsilon is too small for them."""
    found = []
    for root in ("newton", "eigen"):
        model = Tensors(((24, 30),)).float()
        with preconditioner_of(model, {"root": root, "epsilon": 1e-12}) as pre:
            parameter = next(model.parameters())
            scales = torch.logspace(0, -6, 24)[:, None]
            parameter.grad = scales * torch.randn(24, 30, generator=torch.Generator().manual_seed(0))
            pre.step()
            found.append(next(gradients(model)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
