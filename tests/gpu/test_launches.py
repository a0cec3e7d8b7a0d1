"""What a block more launches in the application of a step: the operations that are dispatched, counted."""

from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.inverters import AbstractInverter
from kfdist.runtime.apply import directions, side_by_side
from kfdist.runtime.apply.applications import Applying
from tests.support.kernel_launches import Launches

WIDTH = 24
STEPS = 12


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host, where launches cost nothing, has another form of blocks with a bias."""
    for module in (directions, side_by_side):
        monkeypatch.setattr(module, "joined_on", lambda _device: True)


def launched(device: torch.device, layers: list[nn.Module], inverter: AbstractInverter) -> Counter[str]:
    """Returns what the application launches at a step at which nothing was taken into use."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).to(device)
    given = {"factor_period": 50, "inverse_period": 50, "adoption": kfdist.FixedLag(0), "lr": 0.1}
    x, apply = torch.randn(16, WIDTH, device=device), Applying.apply
    with kfdist.Preconditioner(model, inverter, **given) as pre:
        for _ in range(STEPS):
            model.zero_grad()
            model(x).square().sum().backward()
            found = Launches(numbers_of_the_host(pre))

            def counted(*arguments: object, found: Launches = found) -> None:
                with found:
                    apply(*arguments)

            with mock.patch.object(Applying, "apply", counted):
                report = pre.step()
            if report.step > 1 and not report.adopted:
                return found.by_name
    pytest.fail(f"something was adopted at each of {STEPS} steps")


def numbers_of_the_host(pre: kfdist.Preconditioner) -> list[Tensor]:
    """What methods keep there of each block, so that no operation on it is the device's."""
    kept = [
        memory.kept[name]
        for track in pre.pipeline.tracks
        for memory in track.memories.values()
        for name in memory.kept.keys() & track.group.inverter.produces.on_host
    ]
    assert all(each.device.type == "cpu" for each in kept)
    return kept


def assert_launches_at_most(
    most: int, device: torch.device, layer: Callable[[], nn.Module], inverter: AbstractInverter, *, others: int
) -> None:
    """Checks what a block more launches, and all blocks together."""
    few, many = (launched(device, [layer() for _ in range(count)], inverter) for count in (3, 5))
    more = {name: (many[name] - few[name]) / 2 for name in many if many[name] != few[name]}
    assert sum(more.values()) <= most, more
    assert few.total() - 3 * sum(more.values()) <= others, few


@pytest.mark.parametrize(
    ("layer", "rank", "most"),
    [
        (lambda: nn.Linear(WIDTH, WIDTH, bias=False), 4, 6),  # two products a side, <U, V>, and what is written
        (lambda: nn.Linear(WIDTH, WIDTH, bias=False), 16, 4),  # one product a side
        (lambda: nn.Linear(WIDTH, WIDTH), 4, 8),  # gradients of weight and bias are joined, and written apart
        (lambda: nn.LayerNorm(WIDTH), 4, 0),  # all norms of one width are one
    ],
    ids=["low rank", "matrices", "low rank with bias", "norm"],
)
def test_what_a_block_more_launches(device: torch.device, layer: Callable[[], nn.Module], rank: int, most: int):
    inverter = kfdist.RsKfac(rank=rank, oversampling=2, direction_error=0)
    assert_launches_at_most(most, device, layer, inverter, others=40)


@pytest.mark.parametrize(("rank", "most"), [(4, 18), (None, 14)], ids=["few eigenvectors", "all eigenvectors"])
def test_what_a_block_of_adams_moments_more_launches(device: torch.device, rank: int | None, most: int):
    """Products there and back; the moments 4, the quotient 3; join and write. Their bias is numbers of the host."""
    inverter = kfdist.EkfacAdam(rank=rank)
    assert_launches_at_most(most, device, lambda: nn.Linear(WIDTH, WIDTH), inverter, others=0)
