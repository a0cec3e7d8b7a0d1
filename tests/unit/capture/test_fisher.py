"""With `mc` and `exact` the factors are those of the Hessian of torch's own loss, in its generalised Gauss-Newton form.

For one example and one position per layer A (x) G is the block of J^T H J itself (K1); for a deep linear net it is for
any number of examples, since no layer's G differs between examples; otherwise G is J^T H J in each layer's output.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request
from kfdist.curvature.references import dense_kronecker
from tests.support.factors import armed_capture, assert_factors_equal, blocks_of, factors_of
from tests.support.small_models import images, small_cnn

EXACT = 1e-10
"""float64; as algorithms.md asks."""

DRAWS, EXAMPLES = 40, 32
MONTE_CARLO = 5.0
"""Standard errors by which a mean over `DRAWS` draws may miss; the seeds are fixed."""

Loss = Callable[..., Tensor]

LOSSES: dict[str, tuple[str, Loss, dict[str, Any]]] = {
    "ce": ("cross_entropy", F.cross_entropy, {}),
    "ce sum": ("cross_entropy", F.cross_entropy, {"reduction": "sum"}),
    "ce smoothed": ("cross_entropy", F.cross_entropy, {"label_smoothing": 0.1}),
    "mse": ("mse", F.mse_loss, {}),
    "mse sum": ("mse", F.mse_loss, {"reduction": "sum"}),
    "bce": ("binary_cross_entropy", F.binary_cross_entropy_with_logits, {}),
}


def target_of(name: str, output: Tensor) -> Tensor:
    if name == "cross_entropy":
        return output.detach().argsort(1)[:, 0]
    return (output.detach() > 0).to(output.dtype)


def tanh_net(*, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(4 if index else 3, 4), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gauss_newton_block(model: nn.Module, x: Tensor, name: str, h: Callable[[Tensor], Tensor]) -> Tensor:
    """J^T H J for the weight and bias of a linear layer, laid out as `[p, q]` with the bias last."""
    layer: Any = model.get_submodule(name)
    joint = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1)

    def output(parameters: Tensor) -> Tensor:
        values = {f"{name}.weight": parameters[:, :-1], f"{name}.bias": parameters[:, -1]}
        return torch.func.functional_call(model, values, (x,)).flatten()

    J = torch.autograd.functional.jacobian(output, joint)
    z = model(x).detach()
    H = torch.autograd.functional.hessian(lambda flat: h(flat.view(z.shape)), z.flatten())
    assert isinstance(J, Tensor) and isinstance(H, Tensor)
    J = J.flatten(1)
    return J.T @ H @ J


def observed(model: nn.Module, x: Tensor, name: str, fisher: str = "exact", **arguments: Any) -> Capture:
    capture = armed_capture(model, fisher=fisher, seed=arguments.pop("seed", 0))
    output = model(x)
    capture.observe(output, name, target=target_of(name, output), **arguments)
    return capture


@pytest.mark.parametrize("which", LOSSES)
def test_k1_one_example_gives_the_block_itself(which: str):
    name, loss, arguments = LOSSES[which]
    model, x = tanh_net(), normal(1, 3)
    target = target_of(name, model(x))
    for layer, (A, G) in factors_of(observed(model, x, name, **arguments).drain()).items():
        dense = gauss_newton_block(model, x, layer, lambda z: loss(z, target, **arguments))
        torch.testing.assert_close(dense_kronecker(A, G)[0], dense, rtol=0, atol=EXACT)
        assert dense.abs().max() > 1e-4


@pytest.mark.parametrize("which", ["mse", "mse sum"])
def test_a_deep_linear_net_is_exact_for_any_number_of_examples(which: str):
    name, loss, arguments = LOSSES[which]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 5)).double()
    x = normal(7, 3)
    target = target_of(name, model(x))
    for layer, (A, G) in factors_of(observed(model, x, name, **arguments).drain()).items():
        dense = gauss_newton_block(model, x, layer, lambda z: loss(z, target, **arguments))
        torch.testing.assert_close(dense_kronecker(A, G)[0], dense, rtol=0, atol=EXACT)


def remembered_outputs(model: nn.Module) -> dict[str, Tensor]:
    """Filled with each layer's output by the next forward."""
    outputs: dict[str, Tensor] = {}

    def remember(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs[name] = output

    for name in blocks_of(model).keys() & dict(model.named_modules()).keys():
        model.get_submodule(name).register_forward_hook(partial(remember, name))
    return outputs


def gammas_by_definition(model: nn.Module, x: Tensor, h: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """G = (1/T) sum over examples and positions of J^T H J, with J of the output in the layer's output and H of h.

    H of the mean loss has a 1/N, which the sum over examples turns into their mean.
    """
    outputs = remembered_outputs(model)
    z = model(x)
    H = torch.autograd.functional.hessian(lambda flat: h(flat.view(z.shape)), z.detach().flatten())
    assert isinstance(H, Tensor)
    found = {}
    for name, block in blocks_of(model).items():
        J = torch.stack([torch.autograd.grad(each, outputs[name], retain_graph=True)[0] for each in z.flatten()])
        J = J.reshape(z.numel(), len(x), block.shape.groups, block.shape.d_out, -1)
        found[name] = torch.einsum("inapt,ij,jnart->apr", J, H, J) / J.shape[-1]
    return found


@pytest.mark.parametrize("which", LOSSES)
def test_a_convolutional_net_has_its_gammas(which: str):
    name, loss, arguments = LOSSES[which]
    model, x = small_cnn(), images(5)[0]
    target = target_of(name, model(x))
    expected = gammas_by_definition(model, x, lambda z: loss(z, target, **arguments))
    plain = armed_capture(twin := small_cnn())
    F.cross_entropy(twin(x), torch.zeros(5, dtype=torch.int64)).backward()
    omegas = {layer: A for layer, (A, _) in factors_of(plain.drain()).items()}
    actual = factors_of(observed(model, x, name, **arguments).drain())
    assert_factors_equal(actual, {layer: (omegas[layer], G) for layer, G in expected.items()}, EXACT)


class Tokens(nn.Module):
    """Mixes positions between two layers, so that each position's terms reach all of them."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.mix = nn.Parameter(torch.randn(2, 2))
        self.flat = flat
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("ntd,ts->nsd", torch.tanh(self.first(x)), self.mix)
        logits = self.second(hidden)
        return logits.flatten(0, 1) if self.flat else logits.mT


@pytest.mark.parametrize("flat", [False, True], ids=["[N, C, T]", "[N T, C]"])
def test_terms_of_one_example_that_mix_are_kept_apart(flat: bool):
    """One backward for all positions would leave products between them in."""
    model, x = Tokens(flat=flat), normal(3, 2, 3)
    y = torch.tensor([[0, 1], [2, -100], [1, 1]])
    target = y.flatten() if flat else y
    outputs = remembered_outputs(model)
    capture = armed_capture(model, fisher="exact")
    z = model(x)
    capture.observe(z, "cross_entropy", target=target)
    H = torch.autograd.functional.hessian(lambda flat: F.cross_entropy(flat.view(z.shape), target), z.flatten())
    assert isinstance(H, Tensor)
    factors = factors_of(capture.drain())
    for name, output in outputs.items():
        J = torch.stack([torch.autograd.grad(element, output, retain_graph=True)[0] for element in z.flatten()])
        # The ignored position is padding to the last layer, and mixed with the other one by the first.
        expected = torch.einsum("intp,ij,jntr->pr", J, H, J) * len(x) / (5 if name == "second" else 6)
        torch.testing.assert_close(factors[name][1][0], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("which", ["ce", "mse", "bce"])
def test_the_mean_of_draws_is_exact(which: str):
    name, _, arguments = LOSSES[which]
    model, x = tanh_net(depth=2), normal(EXAMPLES, 3)
    exact = factors_of(observed(model, x, name, **arguments).drain())
    draws: dict[str, list[Tensor]] = {layer: [] for layer in exact}
    capture = armed_capture(model, fisher="mc")
    for seed in range(DRAWS):
        capture.arm(dict.fromkeys(exact, Request(seed=seed)))
        output = model(x)
        capture.observe(output, name, target=target_of(name, output), **arguments)
        for layer, (A, G) in factors_of(capture.drain()).items():
            torch.testing.assert_close(A, exact[layer][0])
            draws[layer].append(G)
    for layer, drawn in draws.items():
        stacked = torch.stack(drawn)
        error = stacked.std(0) / DRAWS**0.5
        missed = ((stacked.mean(0) - exact[layer][1]).abs() - MONTE_CARLO * error).max()
        assert missed <= 1e-12, f"{layer}: off by {missed} beyond {MONTE_CARLO} standard errors"


def test_the_same_seed_draws_the_same_targets_and_global_state_plays_no_part():
    model, x = small_cnn(), images(6)[0]
    first = factors_of(observed(model, x, "cross_entropy", "mc", seed=3).drain())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = factors_of(observed(model, x, "cross_entropy", "mc", seed=3).drain())
    assert torch.equal(before, torch.get_rng_state())
    assert_factors_equal(again, first, 0.0)
    other = factors_of(observed(model, x, "cross_entropy", "mc", seed=4).drain())
    assert not torch.equal(other["7"][1], first["7"][1])
