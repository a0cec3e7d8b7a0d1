"""Scales and shifts of units against dense truth: each example's own gradient, one example at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfdist.capture import collect
from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.blocks import UnitBlock
from tests.support.plans import planned

N, C, H = 6, 4, 3
EXACT = 1e-12
"""float64; both sides add up the same products in another order."""


def capture_of(model: nn.Module, *, sums: frozenset[str] = frozenset({"F"}), **arguments: Any) -> Capture:
    blocks = {block.name: block for block in planned(model, "kfac").blocks if isinstance(block, UnitBlock)}
    capture = Capture(model, blocks, sampling=arguments.pop("sampling", Sampling()), grad_scaler=None, **arguments)
    capture.arm(dict.fromkeys(blocks, Request(sums=sums)))
    return capture


def measured(model: nn.Module, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """F of each block of units, as captured from one batch whose loss is the mean of its examples' losses."""
    capture = capture_of(model, **arguments)
    loss_of(model, x).div(len(x)).backward()
    drained = capture.drain()
    assert not capture.unmeasured
    capture.close()
    model.zero_grad()
    return {name: each.sums["F"] / each.examples for name, each in drained.items()}


def truth(model: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """(1/N) sum of v v^T for each entry of parameters of equal size, v being the example's own gradient."""
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(loss_of(model, x[i : i + 1]), parameters)
        rows.append(torch.stack([each.reshape(-1) for each in gradients], dim=-1))
    v = torch.stack(rows)
    return torch.einsum("nci,ncj->cij", v, v) / len(x)


def check(model: nn.Module, x: Tensor, blocks: dict[str, list[str]]) -> None:
    """Asserts that the model has these blocks of units, of these parameters, and that their F is the truth."""
    model, x = model.double().train(), x.double()
    found = measured(model, x)
    parameters = dict(model.named_parameters())
    assert set(found) == set(blocks)
    for name, own in blocks.items():
        expected = truth(model, x, [parameters[each] for each in own])
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[name], expected, rtol=0, atol=EXACT * float(expected.abs().max()))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A sum over examples."""
    y = model(x)
    weight = torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).reshape(y[0].shape)
    return (y * weight).pow(2).sum() + y.sin().sum()


def images(n: int = N) -> Tensor:
    return torch.randn(n, C, H, H, generator=torch.Generator().manual_seed(1))


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(H),
    "LayerNorm of maps": lambda: nn.LayerNorm([C, H, H]),
    "GroupNorm": lambda: nn.GroupNorm(2, C),
    "InstanceNorm": lambda: nn.InstanceNorm2d(C, affine=True),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_norms_have_two_by_two_blocks(norm: Callable[[], nn.Module]):
    check(nn.Sequential(nn.Tanh(), randomised(norm())), images(), {"1": ["1.weight", "1.bias"]})


@pytest.mark.parametrize("norm", [nn.RMSNorm(H), nn.RMSNorm(H, eps=0.1), nn.LayerNorm(H, bias=False)], ids=repr)
def test_norms_without_a_shift(norm: nn.Module):
    check(nn.Sequential(randomised(norm)), images(), {"0": ["0.weight"]})


@pytest.mark.parametrize(("frozen", "trained"), [("weight", "bias"), ("bias", "weight")])
def test_norms_of_which_one_parameter_is_trained(frozen: str, trained: str):
    norm = randomised(nn.LayerNorm(H))
    getattr(norm, frozen).requires_grad_(False)
    check(nn.Sequential(norm), images(), {"0": [f"0.{trained}"]})


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("batch_statistics", [True, False], ids=["batch statistics", "running statistics"])
def test_batch_norm(kind: type[nn.Module], batch_statistics: bool):
    """Its examples aren't independent: the truth is made of x_hat and the gradient of the output of each."""
    dims = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]
    norm: Any = randomised(kind(C)).double()
    norm.running_mean.normal_()
    if not batch_statistics:
        norm.eval()
    model = nn.Sequential(nn.Tanh(), norm)
    model.training = True
    x = torch.randn(N, C, *(H,) * dims, dtype=torch.float64)
    outputs: list[Tensor] = []
    handle = norm.register_forward_hook(lambda *call: (call[-1].retain_grad(), outputs.append(call[-1]))[1])
    norm.training = True  # measured where the module trains; the statistics are what `eval` says
    forward = norm.forward
    if not batch_statistics:
        norm.forward = lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    before = norm.running_mean.clone()
    found = measured(model, x)["1"]
    handle.remove()
    norm.forward = forward
    updated = before if not batch_statistics else 0.9 * before + 0.1 * x.tanh().transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(norm.running_mean, updated)  # once, and not once more
    (y,) = outputs
    x_hat = (y.detach() - norm.bias.view(-1, *(1,) * dims)) / norm.weight.view(-1, *(1,) * dims)
    assert y.grad is not None
    g = y.grad * N
    v = torch.stack([(g * x_hat).reshape(N, C, -1).sum(-1), g.reshape(N, C, -1).sum(-1)], dim=-1)
    torch.testing.assert_close(found, torch.einsum("nci,ncj->cij", v, v).detach() / N, rtol=1e-10, atol=1e-12)


class Bare(nn.Module):
    """One bare parameter, used in some way."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x.tanh(), self.p)


BARE: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "layer scale": ((C, 1, 1), lambda x, p: x * p),
    "RMSNorm": ((H,), lambda x, p: p * (x * x.pow(2).mean(-1, keepdim=True).rsqrt())),
    "keyword": ((H,), lambda x, p: torch.mul(input=p, other=x)),
    "1 + p": ((H,), lambda x, p: x * (1.0 + p.clone())),
    "1 - p": ((H,), lambda x, p: x * (1.0 - p)),
    "one number": ((), lambda x, p: x * p),
    "positions": ((1, C, H, H), lambda x, p: x + p),
    "in place": ((H, H), lambda x, p: (2 * x).add_(p)),
    "iadd": ((H, H), lambda x, p: _iadd(2 * x, p)),
    "subtracted": ((C, H, H), lambda x, p: x - p),
    "a slice of a table": ((1, C + 3, H, H), lambda x, p: x + p[:, 2 : C + 2]),
    "a transposed table": ((H, C, H), lambda x, p: x + p.transpose(0, 1)),
    "expanded": ((1, C, H, H), lambda x, p: x + p.expand(len(x), -1, -1, -1)),
    "class token": ((1, 1, H, H), lambda x, p: torch.cat([p.expand(len(x), -1, -1, -1), x], dim=1)),
    "repeated token": ((1, 2, H, H), lambda x, p: torch.cat((x, p.repeat(len(x), 1, 1, 1)), 1).sin()),
    "scale of addcmul": ((H,), lambda x, p: torch.addcmul(x, p, x.sin())),
    "shift of addcmul": ((C, 1, 1), lambda x, p: torch.addcmul(p, x, x.cos())),
    "prelu": ((C,), lambda x, p: F.prelu(x, p)),
    "bias of a frozen product": ((5,), lambda x, p: F.linear(x, torch.ones(5, H, dtype=x.dtype), p)),
}


def _iadd(x: Tensor, p: Tensor) -> Tensor:
    x += p
    return x


@pytest.mark.parametrize(("shape", "use"), BARE.values(), ids=BARE.keys())
def test_bare_parameters_have_a_number_for_each_entry(shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]):
    torch.manual_seed(0)
    check(nn.Sequential(Bare(shape, use)), images(), {"0.p": ["0.p"]})


def test_windows_of_one_example_add_up_before_they_are_squared():
    """Swin's windows lie along dim 0, those of one example after another."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(H)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    check(randomised(Windows()), images(), {"norm": ["norm.weight", "norm.bias"]})


def put_into(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = p
    return x


UNSEEN: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], str]] = {
    "no examples": ((1, H), lambda x, p: x + (p * torch.ones(1, H, dtype=x.dtype)).exp(), "no dimension of examples"),
    "an entry an example": ((N, 1, 1, 1), lambda x, p: x + p, "used by add"),
    "multiplied in place": ((H,), lambda x, p: (2 * x).mul_(p), "used by mul_"),
    "subtracted from a tensor": ((H,), lambda x, p: x * (torch.ones(H, dtype=x.dtype) - p).exp(), "used by"),
    "1 - 2 p": ((H,), lambda x, p: x * torch.rsub(p, 1.0, alpha=2), "used by rsub"),
    "put into": ((H,), put_into, "used by __setitem__"),
    "gathered": ((9, C), lambda x, p: x + p[torch.arange(C), :].T.sum(0)[:, None, None], "used by __getitem__"),
}


@pytest.mark.parametrize(("shape", "use", "reason"), UNSEEN.values(), ids=UNSEEN.keys())
def test_what_cannot_be_told_apart_by_example_is_said(
    shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor], reason: str
):
    model = Bare(shape, use).double()
    capture = capture_of(model)
    loss_of(model, images().double()).div(N).backward()
    assert capture.drain() == {}
    assert reason in capture.unmeasured["p"]


def test_micro_batches_add_up_and_samples_are_unbiased():
    model, x = randomised(nn.Sequential(nn.LayerNorm(H))).double(), images().double()
    whole = measured(model, x)["0"]
    capture = capture_of(model)
    for piece in x.split(2):
        loss_of(model, piece).div(len(piece)).div(3).backward()
    drained = capture.drain()["0"]
    capture.close()
    torch.testing.assert_close(drained.sums["F"] / drained.examples, whole)
    assert drained.examples == N
    sampling = Sampling(examples_fraction=0.5)
    halves = [_sampled(model, x, sampling, seed) for seed in range(200)]
    assert (torch.stack(halves).mean(0) - whole).norm() < 0.1 * whole.norm()
    assert (halves[0] - whole).norm() > 0.01 * whole.norm()


class Scaled(nn.Module):
    """Multiplies maps with a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Settled(nn.BatchNorm2d):
    """Is trained with its running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, training=False)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "RMSNorm": lambda: nn.RMSNorm(H),
    "BatchNorm": lambda: nn.BatchNorm2d(C),
    "BatchNorm with running statistics": lambda: Settled(C),
    "BatchNorm under checkpointing": lambda: Checkpointed(nn.BatchNorm2d(C)),
    "PReLU": lambda: nn.PReLU(C),
    "a bare scale": Scaled,
}


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=False)


@pytest.mark.parametrize("unit", (NORMS | OTHERS).values(), ids=(NORMS | OTHERS).keys())
def test_drawn_halves_of_a_batch_make_up_all_of_it(unit: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch):
    """Where cost decides, units' gradients are made of some examples alone, normalised as in the whole batch."""
    model, x = nn.Sequential(randomised(unit())).double(), images().double()
    (whole,) = measured(model, x).values()
    halves = []
    monkeypatch.setattr(collect, "affordable_examples", lambda n, elements: n // 2)
    for first in (0, 1):
        monkeypatch.setattr(collect, "draw_rows", lambda n, count, seed, first=first: torch.arange(first, n, 2))
        halves += measured(model, x).values()
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, rtol=0, atol=EXACT * float(whole.abs().max()))
    assert (halves[0] - whole).norm() > 1e-3 * whole.norm()


def _sampled(model: nn.Module, x: Tensor, sampling: Sampling, seed: int) -> Tensor:
    capture = capture_of(model, sampling=sampling)
    capture.arm({"0": Request(sums=frozenset({"F"}), seed=seed)})
    loss_of(model, x).div(len(x)).backward()
    drained = capture.drain()["0"]
    capture.close()
    model.zero_grad()
    return drained.sums["F"] / drained.examples


def test_the_exact_fisher_of_a_norm():
    """E[v v^T] over the labels that the model itself would draw."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(randomised(nn.LayerNorm(H)), nn.Flatten(), nn.Linear(C * H * H, 3)).double()
    x = images().double()
    capture = capture_of(model, fisher="exact")
    output = model(x)
    capture.observe(output, "cross_entropy")
    output.sum().backward()
    drained = capture.drain()["0"]
    expected = torch.zeros(H, 2, 2, dtype=torch.float64)
    for i in range(N):
        logits = model(x[i : i + 1])
        for label, share in enumerate(logits.softmax(-1)[0].detach()):
            loss = F.cross_entropy(logits, torch.tensor([label]))
            found = torch.autograd.grad(loss, [model[0].weight, model[0].bias], retain_graph=True)
            v = torch.stack(found, dim=-1)
            expected += share * torch.einsum("ci,cj->cij", v, v) / N
    torch.testing.assert_close(drained.sums["F"] / drained.examples, expected)
