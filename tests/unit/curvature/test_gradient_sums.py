"""Sums of a gradient's moments: decayed or plain, without what isn't finite, and over a checkpoint."""

import pytest
import torch
from torch import Tensor

from kfdist.curvature.gradient_sums import GradientSums
from kfdist.curvature.statistics import MODES
from kfdist.linalg.psd import unpack_triangle


def moments(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return {"mode_1": X @ X.mT, "mode_2": X.mT @ X}


def empty() -> GradientSums:
    return GradientSums({"mode_1": (2, 3, 3), "mode_2": (2, 4, 4)}, 2, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize("rho", [0.8, 1.0])
def test_the_sums_are_the_formulas(rho: float) -> None:
    sums, gain = empty(), 1.0 if rho == 1.0 else 1.0 - rho
    for seed in range(4):
        sums.fold(moments(seed), rho)
    packed = sums.packed()
    assert list(packed) == [*MODES, "weight"]
    weights = [gain * rho ** (3 - seed) for seed in range(4)]
    torch.testing.assert_close(packed["weight"], torch.tensor([sum(weights)], dtype=torch.float64))
    for name in ("mode_1", "mode_2"):
        expected = sum((w * moments(seed)[name] for seed, w in enumerate(weights)), torch.zeros(()))
        torch.testing.assert_close(unpack_triangle(packed[name]), expected)
    assert packed["mode_3"].shape == packed["mode_4"].shape == (2, 0)


def test_what_is_not_finite_adds_nothing_and_is_counted_and_a_skipped_step_changes_nothing() -> None:
    sums, other = empty(), empty()
    for each in (sums, other):
        each.fold(moments(0), 0.5)
    bad = moments(1)
    bad["mode_2"][0, 1, 2] = torch.nan
    sums.fold(bad, 0.5)
    other.fold(None, 0.5)
    for skipped in (moments(2), bad):
        before = sums.packed()
        sums.fold(skipped, 0.5, torch.tensor(False))
        assert all(torch.equal(before[name], tensor) for name, tensor in sums.packed().items())
    assert all(torch.equal(other.packed()[name], tensor) for name, tensor in sums.packed().items())
    assert float(sums.dropped) == 2.0  # counted as batches are, whether the step was skipped or not


def test_goes_on_from_its_state_to_the_bit() -> None:
    whole, parts = empty(), empty()
    whole.fold(moments(0), 0.9)
    parts.load_state_dict(whole.state_dict())
    for each in (whole, parts):
        each.fold(moments(1), 0.9)
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in parts.state_dict().items())
