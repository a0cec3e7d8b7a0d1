"""What users set in torch for all of it, or around a step, changes no bit: devices, dtypes, modes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.auto import measure_costs
from kfdist.curvature.inverters import INVERTERS
from tests.support.factors import armed_capture
from tests.support.preconditioning import preconditioner

CASES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in INVERTERS if name != "kfac-tridiagonal"},
    "kfac-tridiagonal": {"method": {"0": "kfac", "*": "kfac-tridiagonal"}},
    "mc": {"method": "kfac", "fisher": "mc"},
    "exact": {"method": "kfac", "fisher": "exact"},
    "tables": {"method": "kfac"},
    "sampling": {"method": "rs-kfac", "sampling": kfdist.Sampling(examples_fraction=0.5, positions_fraction=0.5)},
}


class Tables(nn.Module):
    """Numbers one by one, in bags of several lengths, and of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 3, padding_idx=0), nn.Embedding(4, 3)
        self.bags = nn.EmbeddingBag(9, 3, padding_idx=1)

    def forward(self, x: Tensor) -> Tensor:
        numbers = (3 * x[:, 0, 0]).long().clamp(-4, 4) + 4
        offsets = torch.arange(len(x), device="cpu") * 4 - torch.arange(len(x), device="cpu") % 2
        rows = self.words(numbers) + self.places(torch.arange(4, device="cpu"))
        return rows.mean(1) + self.bags(numbers.flatten(), offsets)


def model_and_batches(*, tables: bool = False) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3)
    model = Tables() if tables else nn.Sequential(*layers)
    return model, [
        (torch.randn(8, 2, 4, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(3)
    ]


Around = Callable[[], AbstractContextManager[Any]]


def trained(arguments: dict[str, Any], around: Around, around_torch: Around = nullcontext) -> list[Tensor]:
    """The parameters after three steps: kfdist is called inside of `around`, the model inside of `around_torch`."""
    model, batches = model_and_batches(tables=arguments is CASES["tables"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with around():
        pre = preconditioner(model, **arguments)
    for x, y in batches:
        optimizer.zero_grad()
        with around_torch():
            output = model(x)
            loss = nn.functional.cross_entropy(output, y)
        with around():
            pre.observe(output)
        with around_torch():
            loss.backward()
        with around():
            pre.step()
        optimizer.step()
    pre.close()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[Tensor]]:
    arguments = CASES[request.param]
    return arguments, trained(arguments, nullcontext)


@contextmanager
def half_on_no_device() -> Iterator[None]:
    """Several at once, to take less time; each of them alone has to change nothing."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def inference_and_autocast() -> Iterator[None]:
    with torch.inference_mode(), autocast():
        yield


Case = tuple[dict[str, Any], list[Tensor]]


@pytest.mark.parametrize("around", [half_on_no_device, pytest.param(double, marks=pytest.mark.slow)])
def test_what_is_set_for_all_of_torch_changes_no_bit(case: Case, around: Around) -> None:
    arguments, expected = case
    for found, alone in zip(trained(arguments, around, around), expected, strict=True):
        assert torch.equal(found, alone)


def test_modes_around_our_calls_change_no_bit(case: Case) -> None:
    arguments, expected = case
    for found, alone in zip(trained(arguments, inference_and_autocast), expected, strict=True):
        assert torch.equal(found, alone)


def test_costs_are_measured_whatever_is_set() -> None:
    with half_on_no_device(), inference_and_autocast():
        assert all(rate.per_flop > 0 for rate in measure_costs().rates.values())


def test_a_backward_under_autocast_is_measured_in_full_precision() -> None:
    """The gradient of a sum of squares reaches the last layer without any product that autocast would touch."""
    (x, _), *_ = model_and_batches()[1]

    def measured(around: Around) -> Any:
        torch.manual_seed(0)
        model = nn.Linear(16, 5)
        capture = armed_capture(model, sums=frozenset({"A", "G", "a", "g"}), rows=frozenset({"A", "G"}), samples=4)
        loss = model(x.flatten(2)).square().mean()
        with around():
            loss.backward()
        return capture.drain()[""]

    alone, found = measured(nullcontext), measured(autocast)
    for name in alone.sums:
        assert torch.equal(alone.sums[name], found.sums[name])
    for name in alone.rows:
        assert torch.equal(alone.rows[name], found.rows[name])
