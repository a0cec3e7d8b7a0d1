"""A preconditioner's steps on a device: the CPU's numbers, and no wait for the device."""

import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

import kfdist
from tests.support.on_devices import MODELS, Trained, over_methods
from tests.support.preconditioning import rows, two_layers

CLOSE = 1e-7
"""float64 on both devices; sums of a few hundred products, inverted at a condition of about a hundred."""


NoWait = Callable[[], AbstractContextManager[None]]


def losses_fall(trained: Trained, steps: int = 5) -> tuple[float, float]:
    """Trains on one batch; returns its loss before and after."""
    x, y = trained.resident(0)
    seen = [0.0, 0.0]
    for step in range(steps):
        trained.step(0)
        if step == 0:
            seen[0] = nn.functional.cross_entropy(trained.model(x), y).item()
    seen[1] = nn.functional.cross_entropy(trained.model(x), y).item()
    return seen[0], seen[1]


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "norms"), ("cpu", "lstm")] + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in MODELS],
    indirect=["device"],
)
def test_models_train_as_on_the_cpu(device: torch.device, name: str):
    trained = Trained(device, name)
    with trained.pre:
        before, after = losses_fall(trained)
        assert after < before
        expected = Trained(torch.device("cpu"), name)
        with expected.pre:
            losses_fall(expected)
    torch.testing.assert_close(trained.parameters(), expected.parameters(), rtol=CLOSE, atol=CLOSE)


@over_methods
def test_methods_train_as_on_the_cpu(device: torch.device, method: str):
    trained, expected = Trained(device, method=method), Trained(torch.device("cpu"), method=method)
    with trained.pre, expected.pre:
        for each in (trained, expected):
            for seed in range(4):
                each.step(seed)
        assert all(version >= 2 for version in trained.pre.versions().values())
    torch.testing.assert_close(trained.parameters(), expected.parameters(), rtol=CLOSE, atol=CLOSE)


@over_methods
def test_no_step_waits_for_the_device(device: torch.device, without_waiting: NoWait, method: str):
    trained = Trained(device, method=method, adoption="asap", inverse_period=4, factor_period=2, digest_period=3)
    batches = [trained.resident(seed) for seed in range(8)]
    with trained.pre:
        trained.step(0)  # waits for the first inverses, as documented
        first = trained.pre.versions()
        for x, y in itertools.islice(itertools.cycle(batches), 400):
            with without_waiting():
                trained.optimizer.zero_grad()
                for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):  # of which the noise scale is measured
                    (nn.functional.cross_entropy(trained.model(xs), ys) / 2).backward()
                trained.pre.step()
                trained.optimizer.step()
            versions = trained.pre.versions()
            if all(version > first[name] for name, version in versions.items()):
                break
            time.sleep(0.005)  # for the inversions of the background
        else:
            pytest.fail(f"nothing newer was adopted than {versions}")


def test_adoption_comes_by_an_event_while_the_device_is_busy(
    device: torch.device, keep_busy: Callable[[], Callable[[], bool]]
):
    """What was measured travels behind the device's work; steps go on meanwhile, and take nothing that isn't there."""
    trained = Trained(device, adoption="asap", inverse_period=5)
    batches = [trained.resident(seed) for seed in range(6)]
    with trained.pre:
        for seed in range(5):
            trained.step(seed)
        torch.zeros((), device=device).item()
        busy, before = keep_busy(), trained.pre.versions()
        for x, y in batches:  # an inversion of each group is due among them
            trained.optimizer.zero_grad()
            nn.functional.cross_entropy(trained.model(x), y).backward()
            trained.pre.step()
            trained.optimizer.step()
        if device.type == "cuda":
            assert busy(), "the steps waited for the device"
            assert all(version <= 5 for version in trained.pre.versions().values())
        for seed in range(400):
            trained.step(seed)
            if all(version > before[name] and version > 5 for name, version in trained.pre.versions().items()):
                break
            time.sleep(0.005)
        else:
            pytest.fail(f"nothing newer was adopted than {trained.pre.versions()}")


@pytest.mark.parametrize("attached", [False, True], ids=["by hand", "attached"])
def test_an_overflow_under_a_grad_scaler_leaves_no_trace(device: torch.device, attached: bool):
    """In half precision, under autocast, as users train; found_inf stays on the device."""
    model = two_layers().float().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    given = {"damping": 0.1, "factor_period": 1, "inverse_period": 1, "adoption": kfdist.FixedLag(0)}
    with kfdist.Preconditioner(model, "kfac-eigen", lr=0.1, grad_scaler=scaler, **given) as pre:
        if attached:
            pre.attach(optimizer)

        def train(seed: int, factor: float = 1.0) -> None:
            x, y = (each.to(device) for each in rows(seed=seed))
            with torch.autocast(device.type, torch.float16):
                output = model(x.float())
            scaler.scale(nn.functional.cross_entropy(output.float(), y) * factor).backward()
            if not attached:
                scaler.unscale_(optimizer)
                pre.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        for seed in range(3):
            train(seed)
        before, parameters = pre.state_dict()["sums"], [each.detach().clone() for each in model.parameters()]
        train(3, factor=1e6)
        assert scaler.get_scale() == 512.0, "it was to overflow"
        after = pre.state_dict()["sums"]
        for name, sums in before.items():
            assert all(torch.equal(after[name][key], sums[key]) for key in ("A", "G", "n_examples", "n_positions"))
        assert all(torch.equal(old, new) for old, new in zip(parameters, model.parameters(), strict=True))
        train(4)
        assert not torch.equal(parameters[0], next(model.parameters()))
        assert all(bool(each.isfinite().all()) for each in model.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_bfloat16_measures_what_float64_does(device: torch.device, layout: torch.memory_format):
    """Sums are kept in float32, whatever the layers compute in."""
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    exact = Trained(torch.device("cpu"))
    exact.pre.close()
    x, y = (each.to(device) for each in exact.batch(8, 0))
    model = model.to(device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    settings = {
        "damping": 0.1,
        "factor_period": 1,
        "inverse_period": 1,
        "adoption": kfdist.FixedLag(0),
        "kl_clip": None,
    }
    with kfdist.Preconditioner(model, "kfac-eigen", **settings) as pre:
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x.float().contiguous(memory_format=layout)), y)
        loss.backward()
        pre.step()
        directions = [parameter.grad.double().cpu() for parameter in model.parameters() if parameter.grad is not None]
    double = model.cpu().double()
    with kfdist.Preconditioner(double, "kfac-eigen", **settings) as pre:
        double.zero_grad()
        nn.functional.cross_entropy(double(x.cpu()), y.cpu()).backward()
        pre.step()
    assert len(directions) == 4
    for found, parameter in zip(directions, double.parameters(), strict=True):
        assert parameter.grad is not None
        assert float((found - parameter.grad).norm() / parameter.grad.norm()) < 0.1  # bfloat16 has 8 bits


def test_the_noise_scale_is_the_cpus(device: torch.device, without_waiting: NoWait):
    found = []
    for where in (device, torch.device("cpu")):
        trained = Trained(where, adoption="asap", inverse_period=4)
        with trained.pre:
            for seed in range(4):
                trained.step(seed, parts=4)
            torch.zeros((), device=where).item()  # now it has reached the host
            found.append(trained.pre.noise_scale())
    assert found[0] is not None
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_an_lstm_of_cudnn_is_measured_whole(device: torch.device):
    trained = Trained(device, "lstm")
    with trained.pre:
        trained.step(0)
        assert trained.pre.coverage().share > 0.99
