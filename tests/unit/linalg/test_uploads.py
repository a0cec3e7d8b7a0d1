"""What goes to a device by pinned memory; tests/gpu shows that nobody waits for it."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg import uploads
from kfdist.linalg.uploads import TAKEN_AT_ONCE, sent

GPU = torch.device("cuda", 1)
NUMBERS = TAKEN_AT_ONCE // 4


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Copies that were asked to be pinned, for which torch asks for a GPU."""
    made: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        made.append(tensor.clone())
        return made[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: any(tensor is each for each in made))
    return made


def test_large_pageable_memory_is_copied_by_pinned_memory(pinned: list[Tensor]) -> None:
    large = torch.arange(NUMBERS + 1, dtype=torch.float32)
    staged = uploads._staged(large, GPU)
    assert staged is pinned[0] and torch.equal(staged, large)
    assert uploads._staged(staged, GPU) is staged, "pinned it is already"
    assert len(pinned) == 1


@pytest.mark.parametrize(
    ("tensor", "device"),
    [
        (torch.zeros(NUMBERS), GPU),
        (torch.zeros(NUMBERS + 1), torch.device("cpu")),
        (torch.zeros(NUMBERS + 1, device="meta"), GPU),
    ],
    ids=["small", "to the host", "from elsewhere"],
)
def test_others_go_as_they_are(pinned: list[Tensor], tensor: Tensor, device: torch.device) -> None:
    assert uploads._staged(tensor, device) is tensor and not pinned


def test_what_is_there_is_returned_itself() -> None:
    tensor = torch.arange(3)
    assert sent(tensor, "cpu") is tensor
