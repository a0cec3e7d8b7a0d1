"""Products with the exact Fisher against the dense one: the Jacobian row by row, the output Hessian by its formula."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kfdist.errors import KfdistError
from kfdist.optim.output_fisher import Differentiation, NoForwardDerivative, NotTogether, OutputFisher

EXACT = 1e-10
"""float64 sums of at most a few hundred terms."""

BOTH = pytest.mark.parametrize("how", list(Differentiation))

N, C = 6, 4


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, C)).double()


def some_direction(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    return {p: draw(*p.shape, seed=10 + i) for i, p in enumerate(model.parameters())}


def dense_jacobian(model: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """`[outputs, parameters]`, one backward per output."""
    output, _ = run()
    rows = []
    for each in output.reshape(-1):
        parts = torch.autograd.grad(each, list(model.parameters()), retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=p.dtype) if part is None else part.reshape(-1)
                    for p, part in zip(model.parameters(), parts, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def flat(model: nn.Module, direction: dict[nn.Parameter, Tensor]) -> Tensor:
    return torch.cat([direction[p].reshape(-1) for p in model.parameters()])


# Losses: the Hessian with respect to the output as a formula ----------------------------------------------------------


@dataclass(frozen=True)
class LossCase:
    """A loss of torch's, and its Hessian's blocks per row of the output, written out."""

    loss: Callable[[Tensor], Tensor]
    blocks: Callable[[Tensor], Tensor]


LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
IGNORED = torch.tensor([0, -100, 1, 1, -100, 0])
REALS = draw(N, C, seed=3)
BITS = (REALS > 0).double()


def softmax_blocks(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def sigmoid_blocks(z: Tensor) -> Tensor:
    p = z.sigmoid()
    return torch.diag_embed(p * (1 - p)) / C


LOSSES = {
    "mse": LossCase(
        lambda z: functional.mse_loss(z, REALS), lambda z: 2 / C * torch.eye(C, dtype=z.dtype).expand(N, C, C) / N
    ),
    "cross_entropy": LossCase(lambda z: functional.cross_entropy(z, LABELS), lambda z: softmax_blocks(z) / N),
    "label_smoothing": LossCase(
        lambda z: functional.cross_entropy(z, LABELS, label_smoothing=0.2), lambda z: softmax_blocks(z) / N
    ),
    "ignore_index": LossCase(
        lambda z: functional.cross_entropy(z, IGNORED),
        lambda z: softmax_blocks(z) * (IGNORED >= 0).double()[:, None, None] / 4,
    ),
    "binary_cross_entropy": LossCase(
        lambda z: functional.binary_cross_entropy_with_logits(z, BITS), lambda z: sigmoid_blocks(z) / N
    ),
}


@BOTH
@pytest.mark.parametrize("name", LOSSES)
def test_the_product_equals_the_dense_fishers(name: str, how: Differentiation):
    model, case, x = network(), LOSSES[name], draw(N, 5, seed=0)

    def run() -> tuple[Tensor, Tensor]:
        output = model(x)
        return output, case.loss(output)

    u = some_direction(model)
    product = OutputFisher(run, model).along(u, how)
    J = dense_jacobian(model, run)
    H = torch.block_diag(*case.blocks(model(x).detach()))
    Ju = J @ flat(model, u)
    torch.testing.assert_close(product.change.reshape(-1), Ju, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(product.curvature.reshape(-1), H @ Ju, rtol=EXACT, atol=EXACT)
    assert not product.change.requires_grad and not product.curvature.requires_grad


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "binary_cross_entropy"])
def test_the_blocks_above_are_torchs_hessian(name: str):
    z = draw(N, C, seed=5)
    H = torch.autograd.functional.hessian(LOSSES[name].loss, z).reshape(N * C, N * C)
    torch.testing.assert_close(H, torch.block_diag(*LOSSES[name].blocks(z)), rtol=EXACT, atol=EXACT)


# Layers: both ways give the same --------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (network, (5,)),
    "tied": (Tied, (5,)),
    "partly used": (PartlyUsed, (5,)),
    "in place": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), (5,)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 2)),
        (2, 4, 4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Softplus(), nn.Linear(4, 2)), (5,)),
    "group norm, pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
        (2, 5, 5),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(27, 2)),
        (2, 2, 2),
    ),
    "attention": (Attention, (3, 4)),
    "recurrent": (Recurrent, (3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_and_double_backward_agree(name: str):
    make, shape = MODELS[name]
    torch.manual_seed(2)
    model, x = make().double(), draw(N, *shape, seed=4)
    u = some_direction(model)

    def run() -> tuple[Tensor, Tensor]:
        output = model(x)
        return output, output.square().mean()

    backward = OutputFisher(run, model).along(u, Differentiation.DOUBLE_BACKWARD)
    names = {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)}
    try:
        forward = OutputFisher(run, model).along(u, Differentiation.FORWARD)
    except NoForwardDerivative:
        assert name == "recurrent"  # whether its kernel has one depends on the machine
        return
    finally:
        assert {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)} == names
    assert forward.change.abs().max() > 1e-3
    torch.testing.assert_close(forward.change, backward.change, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(forward.curvature, backward.curvature, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("many", [1, 4])
def test_directions_taken_together_are_those_taken_apart(name: str, many: int):
    make, shape = MODELS[name]
    torch.manual_seed(2)
    model, x = make().double(), draw(N, *shape, seed=4)
    directions = [{p: draw(*p.shape, seed=20 * j + i) for i, p in enumerate(model.parameters())} for j in range(many)]
    runs: list[torch.Size] = []

    def run() -> tuple[Tensor, Tensor]:
        output = model(x)
        runs.append(output.shape)
        return output, functional.softplus(output).square().mean()

    names = {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)}
    state = copy.deepcopy(model.state_dict())
    try:
        together = OutputFisher(run, model, together=directions)
    except NotTogether:
        assert name == "recurrent"  # which has an operator of its own
        return
    finally:
        assert {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)} == names
    assert len(runs) == 1
    assert model.state_dict().keys() == state.keys(), "buffers are what they were"
    assert all(torch.equal(value, state[key]) for key, value in copy.deepcopy(model.state_dict()).items())
    apart = OutputFisher(run, model)
    for u, product in zip(directions, together.products_together(), strict=True):
        expected = apart.along(u, Differentiation.DOUBLE_BACKWARD)
        assert expected.curvature.abs().max() > 1e-4
        assert not product.change.requires_grad and not product.curvature.requires_grad
        torch.testing.assert_close(product.change, expected.change, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(product.curvature, expected.curvature, rtol=EXACT, atol=EXACT)


def test_directions_taken_together_see_the_same_dropout_as_a_plain_run():
    torch.manual_seed(3)
    model, x = (
        nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, 2)).double(),
        draw(N, 5, seed=0),
    )

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        output = model(x)
        return output, output.square().mean()

    u = some_direction(model)
    apart = OutputFisher(run, model)
    together = OutputFisher(run, model, together=[u, {p: 2 * each for p, each in u.items()}])
    expected = apart.along(u, Differentiation.FORWARD).change
    once, twice = together.products_together()
    torch.testing.assert_close(once.change, expected, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(twice.change, 2 * expected, rtol=EXACT, atol=EXACT)


class _Cube(torch.autograd.Function):
    """An operator with a double backward and no forward derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def test_an_operator_without_a_forward_derivative_is_recognised():
    model, x = network(), draw(N, 5, seed=0)

    def run() -> tuple[Tensor, Tensor]:
        output = _Cube.apply(model(x))
        return output, output.square().mean()

    u = some_direction(model)
    with pytest.raises(NoForwardDerivative):
        OutputFisher(run, model).along(u, Differentiation.FORWARD)
    product = OutputFisher(run, model).along(u, Differentiation.DOUBLE_BACKWARD)
    expected = dense_jacobian(model, run) @ flat(model, u)
    torch.testing.assert_close(product.change.reshape(-1), expected, rtol=EXACT, atol=EXACT)


def test_other_errors_of_the_closure_pass_through():
    model = network()

    def run() -> tuple[Tensor, Tensor]:
        output = model(draw(N, 6, seed=0))  # one column too many
        return output, output.sum()

    with pytest.raises(RuntimeError, match="shapes"):
        OutputFisher(run, model).along(some_direction(model), Differentiation.FORWARD)


@BOTH
def test_a_loss_that_is_linear_in_the_output_has_no_curvature(how: Differentiation):
    model, x = network(), draw(N, 5, seed=0)

    def run() -> tuple[Tensor, Tensor]:
        output = model(x)
        return output, output.sum()

    assert OutputFisher(run, model).along(some_direction(model), how).curvature.abs().max() == 0


@BOTH
def test_a_loss_of_another_tensor_than_the_output_is_refused(how: Differentiation):
    model, x = network(), draw(N, 5, seed=0)

    def run() -> tuple[Tensor, Tensor]:
        output = model(x)
        return output * 1.0, output.square().mean()

    with pytest.raises(KfdistError, match="does not depend on the output"):
        OutputFisher(run, model).along(some_direction(model), how)
