"""The gradient noise scale against per-example gradients in float64, whatever is done to `.grad` in between."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfdist
from kfdist.capture.gradient_norms import GradientNorms
from kfdist.comm.host_copy import HostCopy
from kfdist.errors import Interrupted
from kfdist.runtime.reduce.noise_scale import unbiased
from tests.support.preconditioning import preconditioner, rows, two_layers
from tests.support.small_models import images, small_cnn

SIZES = (6, 6, 12)
EXACT = 1e-11
"""float64; the estimates are differences of two squared norms, a hundredth of them."""


def of_examples(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One row per example: its gradient."""
    net = nn.Sequential(*net.children())  # without checkpoints
    losses = [nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    gradients = [torch.autograd.grad(loss, list(net.parameters())) for loss in losses]
    real = [[torch.view_as_real(each) if each.is_complex() else each for each in of_one] for of_one in gradients]
    return torch.stack([torch.cat([each.flatten() for each in of_one]) for of_one in real])


def estimated(gradients: Tensor, sizes: Sequence[int]) -> tuple[float, float]:
    """|G|^2 and tr(Sigma) from the means over parts of so many examples that weigh the same."""
    means, k = torch.stack([part.mean(0) for part in gradients.split(list(sizes))]), len(sizes)
    small, large = float(means.square().sum()) / k, float(means.mean(0).square().sum())
    inverse = sum(1 / size for size in sizes) / k
    noise = (small - large) / (inverse - inverse / k)
    return large - inverse / k * noise, noise


class Checkpointed(nn.Sequential):
    """Each layer in a checkpoint of its own, whose backward is nested in the loss's."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = checkpoint(layer, input.requires_grad_(), use_reentrant=True)  # type: ignore[assignment]
        return input


def leave(net: nn.Module) -> None:
    pass


def clip(net: nn.Module) -> None:
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


def clip_one(net: nn.Module) -> None:
    nn.utils.clip_grad_norm_(list(net.parameters())[:1], 1e-3)


def penalise(net: nn.Module) -> None:
    """A second backward that isn't the loss's."""
    (1e-2 * sum(each.square().sum() for each in net.parameters())).backward()  # type: ignore[union-attr]


def interrupted(*arguments: object) -> None:
    raise Interrupted("waited too long", reason="wait_limit")


def one_step(
    net: nn.Module,
    pre: kfdist.Preconditioner,
    *,
    sizes: Sequence[int] = SIZES,
    after: Callable[[nn.Module], None] = leave,
    scaler: torch.amp.GradScaler | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns what the step should have found."""
    x, y = rows(sum(sizes), seed=seed)
    truth = estimated(of_examples(net, x, y), sizes)
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for xs, ys in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
        loss = nn.functional.cross_entropy(net(xs), ys) / len(sizes)
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    after(net)
    pre.step()
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    return truth


@pytest.mark.parametrize("method", ["kfac", "none"])
@pytest.mark.parametrize("after", [leave, clip])
@pytest.mark.parametrize("kind", [nn.Sequential, Checkpointed])
def test_micro_batches_of_unequal_size_against_per_example_gradients(
    method: str, after: Callable[[nn.Module], None], kind: type[nn.Sequential]
):
    net = kind(*two_layers())
    with preconditioner(net, method) as pre:
        signal, noise = one_step(net, pre, after=after)
        assert pre.noise_scale() == pytest.approx(noise / signal, rel=EXACT)


def test_a_grad_scaler_changes_nothing_also_when_its_scale_changes():
    net, scaler = two_layers(), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    with preconditioner(net, grad_scaler=scaler) as pre:
        first, second = (one_step(net, pre, scaler=scaler, seed=seed) for seed in (0, 1))
        signal, noise = (0.95 * a + b for a, b in zip(first, second, strict=True))
        assert scaler.get_scale() == 2.0**12
        assert pre.noise_scale() == pytest.approx(noise / signal, rel=EXACT)


def test_averages_are_divided_and_survive_a_restart():
    """The average of the two steps' ratios is another number."""
    net = two_layers()
    with preconditioner(net, factor_period=2, inverse_period=2) as pre:
        first, _, third = (one_step(net, pre, seed=seed) for seed in (5, 6, 7))
        signal, noise = (0.95 * a + b for a, b in zip(first, third, strict=True))
        assert pre.noise_scale() == pytest.approx(noise / signal, rel=EXACT)
        assert abs(first[1] / first[0] - third[1] / third[0]) > 1
        state, before = pre.state_dict(), pre.noise_scale()
    with preconditioner(net, factor_period=2, inverse_period=2) as resumed:
        resumed.load_state_dict(state)
        assert resumed.noise_scale() == before


class Spectral(nn.Module):
    """A filter with complex weights, one of them a single number."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, features, dtype=torch.complex128))
        self.gain = nn.Parameter(torch.tensor(0.5 + 0.2j, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x) * self.weight.sum(0) * self.gain).real


def test_complex_parameters_count_with_both_parts():
    inner, outer = [each for each in two_layers() if isinstance(each, nn.Linear)]
    net = nn.Sequential(inner, Spectral(inner.out_features), outer)
    with preconditioner(net, "none") as pre:
        signal, noise = one_step(net, pre)
        assert pre.noise_scale() == pytest.approx(noise / signal, rel=EXACT)


@pytest.mark.filterwarnings("ignore:2 parameters have gradients and no block")
@pytest.mark.parametrize("period", [1, 2])
def test_parameters_that_thaw_are_looked_at_from_the_next_measurement_on(period: int):
    net = two_layers()
    net[0].requires_grad_(False)
    with preconditioner(net, "none", factor_period=period, inverse_period=period) as pre:
        x, y = rows(8)
        nn.functional.cross_entropy(net(x), y).backward()
        pre.step()
        net[0].requires_grad_(True)
        one_step(net, pre, seed=1)  # began without them
        assert not pre.state_dict()["gradient_noise"].any()
        signal, noise = one_step(net, pre, seed=2)
        assert pre.state_dict()["gradient_noise"].tolist() == pytest.approx([1.0, signal, noise], rel=EXACT)


@pytest.mark.parametrize("dropped", [False, True])
def test_what_was_dropped_counts_for_nothing(dropped: bool):
    net = two_layers()
    with preconditioner(net) as pre:
        x, y = rows(8, seed=7)
        nn.functional.cross_entropy(net(x), y).backward()
        if dropped:
            signal, noise = one_step(net, pre)  # begins with zero_grad()
            assert pre.noise_scale() == pytest.approx(noise / signal, rel=EXACT)
        else:
            with pre.paused():
                nn.functional.cross_entropy(net(x), y).backward()
            nn.functional.cross_entropy(net(x), y).backward()
            pre.step()
            assert pre.noise_scale() is None


def test_who_asks_right_after_each_step_of_a_device_that_is_late_hears_of_the_step_before(
    monkeypatch: pytest.MonkeyPatch,
):
    class Late(HostCopy):
        """Arrives when the host has gone on to the next step."""

        def __init__(self, tensors: Sequence[Tensor]) -> None:
            super().__init__(tensors)
            self.sent = now

        def ready(self) -> bool:
            return now > self.sent

    monkeypatch.setattr("kfdist.runtime.reduce.noise_scale.HostCopy", Late)
    net, found, truths, now = two_layers(), [], [], 0
    with preconditioner(net) as pre:
        for now in range(3):
            truths.append(one_step(net, pre, seed=now))
            found.append(pre.noise_scale())
        now = 3
        found.append(pre.noise_scale())
    signal, noise, expected = 0.0, 0.0, []
    for of_signal, of_noise in truths:
        signal, noise = 0.95 * signal + of_signal, 0.95 * noise + of_noise
        expected.append(pytest.approx(noise / signal, rel=EXACT))
    assert found == [None, *expected]


def test_a_step_that_was_interrupted_is_measured_once(monkeypatch: pytest.MonkeyPatch):
    net = two_layers()
    with preconditioner(net) as pre:
        with monkeypatch.context() as patched:
            patched.setattr(type(pre.pipeline.adopting), "bring", interrupted)
            with pytest.raises(Interrupted):
                one_step(net, pre)
        state, found = pre.state_dict(), pre.noise_scale()
        one_step(net, pre)
        assert pre.next_step == 1 and pre.noise_scale() == found
    with preconditioner(net) as resumed:
        resumed.load_state_dict(state)
        signal, noise = one_step(net, resumed)
        assert resumed.noise_scale() == found == pytest.approx(noise / signal, rel=EXACT)
        assert float(resumed.state_dict()["gradient_noise"][0]) == 1.0


def test_what_can_not_be_told_is_none():
    net = two_layers()
    with preconditioner(net) as pre:
        assert pre.noise_scale() is None
        x, y = rows(8)
        nn.functional.cross_entropy(net(x), y).backward()
        pre.step()
        for after in (clip_one, penalise):
            one_step(net, pre, after=after)
        net.zero_grad()
        output = net(x)
        for half in (slice(0, 4), slice(4, 8)):  # two losses of the same examples: no two samples of the gradient
            nn.functional.cross_entropy(output[half], y[half]).backward(retain_graph=True)
        pre.step()
        assert pre.noise_scale() is None
        assert not pre.state_dict()["gradient_noise"].any()


def test_training_keeps_its_bits(monkeypatch: pytest.MonkeyPatch):
    def trained() -> Tensor:
        net = small_cnn(dtype=torch.float32)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        with preconditioner(net, "kfac", lr=None).attach(optimizer) as pre:
            for step in range(3):
                optimizer.zero_grad()
                x, y = images(12, seed=step, dtype=torch.float32)
                for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
                    (nn.functional.cross_entropy(net(xs), ys) / 2).backward()
                optimizer.step()
            assert float(pre.state_dict()["gradient_noise"][0]) == pytest.approx(looked_at)
        return torch.cat([each.detach().flatten() for each in net.parameters()])

    looked_at = 1 + 0.95 + 0.95**2
    found = trained()
    monkeypatch.setattr(GradientNorms, "start", lambda norms: None)
    looked_at = 0.0
    assert torch.equal(found, trained())


def test_sparse_gradients_are_left_alone():
    net = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    with preconditioner(net, "kfac", skip=["0"]) as pre:
        for _ in range(2):
            (net(torch.tensor([[1, 2], [3, 4]])).square().mean() / 2).backward()
        pre.step()
        assert pre.noise_scale() is None


def test_unbiased_for_a_known_gradient_and_covariance():
    """A linear model whose mean output is the loss: an example's gradient is its input, drawn from N(G, Sigma)."""
    torch.manual_seed(0)
    mean, spread = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    net = nn.Linear(3, 1, bias=False).double()
    trace, norm, draws = float(spread.square().sum()), float(mean.square().sum()), 300
    sizes = (2, 5)
    found = []
    with preconditioner(net, "none") as pre:
        for _ in range(draws):
            x = mean + spread * torch.randn(sum(sizes), 3, dtype=torch.float64)
            before = pre.state_dict()["gradient_noise"]
            for part in x.split(list(sizes)):
                (net(part).mean() / len(sizes)).backward()
            pre.step()
            net.zero_grad()
            found.append(pre.state_dict()["gradient_noise"] - 0.95 * before)
    estimates = torch.stack(found)[:, 1:]
    standard_error = estimates.std(0) / draws**0.5
    assert (standard_error < torch.tensor([0.3, 0.5])).all()
    assert ((estimates.mean(0) - torch.tensor([norm, trace])).abs() < 4 * standard_error).all()


def test_equal_parts_are_the_papers_equations():
    small, large, b, B = (torch.tensor(value, dtype=torch.float64) for value in (3.0, 1.0, 4.0, 32.0))
    signal, noise = unbiased(small, large, 1 / b, 1 / B)
    assert float(signal) == pytest.approx(float((B * large - b * small) / (B - b)))
    assert float(noise) == pytest.approx(float((small - large) / (1 / b - 1 / B)))


def test_a_rank_alone_looks_at_norms_once_there_are_several_micro_batches():
    net = two_layers()
    with preconditioner(net) as pre:
        norms = pre.pipeline.capture.norms
        assert norms.watched
        x, y = rows(8)
        nn.functional.cross_entropy(net(x), y).backward()
        pre.step()
        assert not norms.watched
        one_step(net, pre)
        assert norms.watched and pre.noise_scale() is None
        signal, noise = one_step(net, pre, seed=1)
        assert pre.noise_scale() == pytest.approx(noise / signal, rel=EXACT)
